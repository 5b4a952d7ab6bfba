"""The evaluation stage: measures reconstructions, latents, samples and, on shapes, adherence, and writes one
metrics.json."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ldm_train import images as pictures
from ldm_train.devices import to_device
from ldm_train.distributed import gathered, rank
from ldm_train.evaluation.adherence import format_table, measure_adherence
from ldm_train.evaluation.evaluator import PAIRED, Evaluator
from ldm_train.evaluation.measurement import Draw, Reference, indices_of, measure_samples
from ldm_train.evaluation.restoration import format_restoration, measure_restoration
from ldm_train.images import groups_in_words, has_colours
from ldm_train.latent_diffusion import LatentDiffusion
from ldm_train.losses.perceptual import LPIPS, TinyPerceptual
from ldm_train.metrics.distribution import frechet_estimate, mean_estimate
from ldm_train.metrics.kinds import FrechetDistance
from ldm_train.metrics.latent import decoder_sensitivity, equivariance_error, nearest_neighbours, spectrum_slope
from ldm_train.metrics.measures import Collected, measure
from ldm_train.metrics.metric import REFERENCE, Metric
from ldm_train.metrics.sets import FeatureSet
from ldm_train.models.first_stage import FirstStage
from ldm_train.rng import NoiseSource
from ldm_train.storage import write_json


def of_reconstructions(evaluator: Evaluator) -> list[Metric]:
    """Returns the metrics that apply to reconstructions: those that compare with the reference alone."""
    return [m for m in evaluator.metrics if m.compared_with == (REFERENCE,)]


def measure_reconstructions(
    first_stage: FirstStage,
    images: torch.Tensor,
    indices: torch.Tensor,
    evaluator: Evaluator,
    values: dict[str, list[torch.Tensor]],
    rebuilt: Collected,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adds a batch of images (B, C, H, W) on the host to the paired metrics' `values` and to the set of
    reconstructions, `rebuilt`. Returns its latents (B, C, h, w) and reconstructions, on the device, which is
    synchronised once."""
    x = to_device(images, evaluator.device)
    latents = first_stage.scaled(first_stage.posterior(first_stage.encode_moments(x)).mean)
    rec = first_stage.decode(latents)
    measured = {name: (PAIRED.get(name) or evaluator.networks[name])(rec, x) for name in values}
    rebuilt.add(rec, indices)
    for name, value in measured.items():
        values[name].append(value.cpu().double())
    return latents, rec


@torch.no_grad()
def evaluate_first_stage(
    first_stage: FirstStage,
    batches: Iterable[dict[str, Any]],
    evaluator: Evaluator,
    reference: Reference,
    predictors: int,
    progress: bool = True,
) -> tuple[dict[str, Any], torch.Tensor]:
    """Evaluates an autoencoder alone, on this rank's share of the images. Returns (metrics, the first images followed
    by their reconstructions).

    "reconstruction": paired metrics per image (psnr in dB, ssim, ms_ssim, and networks: images, images -> distances).
    "reconstructions": distances of the set of reconstructions to the reference (e.g. rFID). "latents": measures that
    predict the quality of a diffusion model on these latents, on the first `predictors` images (0: not measured).
    """
    paired = {name: PAIRED.get(name) or evaluator.networks[name] for name in evaluator.paired}
    used = of_reconstructions(evaluator)
    rebuilt, values, kept, position = Collected(used, evaluator.extractors), {n: [] for n in paired}, {}, 0
    shown = torch.empty(0)
    for batch in tqdm(batches, desc="reconstructions", unit="batch", disable=not progress):
        indices = indices_of(position, len(batch["image"]))
        position += len(indices)
        latents, rec = measure_reconstructions(first_stage, batch["image"], indices, evaluator, values, rebuilt)
        kept |= {i: z for i, z in zip(indices.tolist(), latents.cpu()) if i < predictors}
        if not len(shown):
            shown = torch.cat([batch["image"][:8], rec[:8].cpu()])
    metrics: dict[str, Any] = {"reconstruction": {}}
    channels = first_stage.autoencoder.in_channels
    for name, own in values.items():
        joint = torch.cat([part for parts in gathered(own) for part in parts])
        metrics["reconstruction"][name] = mean_estimate(joint).as_dict()
        if isinstance(paired[name], LPIPS | TinyPerceptual) and not has_colours(channels):
            metrics["reconstruction"][name]["channels"] = groups_in_words(channels)
    metrics["reconstructions"] = reference.table(used, measure(used, reference.sets, rebuilt.gathered()))
    kept = {i: z for part in gathered(kept) for i, z in part.items()}
    if len(kept) > 1:
        latents = torch.stack([kept[i] for i in sorted(kept)]).to(evaluator.device)
        metrics["latents"] = predict(first_stage, latents, reference, evaluator)
    return metrics, shown


@torch.no_grad()
def predict(
    first_stage: FirstStage, latents: torch.Tensor, reference: Reference, evaluator: Evaluator
) -> dict[str, Any]:
    """Returns measures of scaled latents (N, C, h, w) that predict the quality of a diffusion model: spectrum slope,
    equivariance error, decoder sensitivity, and the Frechet distance of decoded midpoints between nearest neighbours
    (ifid, arXiv:2603.05630)."""
    noise = NoiseSource(range(len(latents))).normal(latents.shape[1:], "predictor", latents.device)
    parts = latents.split(32)
    values = {"spectrum_slope": [spectrum_slope(latents)]} if min(latents.shape[2:]) >= 8 else {}
    values["equivariance_error"] = [equivariance_error(first_stage, z) for z in parts]
    values["decoder_sensitivity"] = [decoder_sensitivity(first_stage, z, e) for z, e in zip(parts, noise.split(32))]
    estimates = {name: mean_estimate(torch.cat(v).cpu()).as_dict() for name, v in values.items()}
    neighbours = latents[nearest_neighbours(latents)]
    middles = [first_stage.decode((a + b) / 2) for a, b in zip(parts, neighbours.split(32))]
    for metric in of_reconstructions(evaluator):
        if type(metric).measure is FrechetDistance.measure:
            extractor = evaluator.extractors[metric.extractor]
            features = FeatureSet.of(torch.cat([extractor(m).cpu() for m in middles]))
            estimate = frechet_estimate(reference.sets[REFERENCE][metric.extractor].moments, features)
            estimates[f"i{metric.name}"] = estimate.as_dict() | reference.details(metric)
    return estimates


def save_pairs(rows: torch.Tensor, path: Path) -> None:
    """Saves a batch (2 N, C, H, W) as a picture with two rows."""
    pictures.save_png(pictures.grid(rows, columns=len(rows) // 2), path)


@torch.no_grad()
def evaluate(
    model: LatentDiffusion,
    evaluator: Evaluator,
    images: Iterable[dict[str, Any]],
    conditions: Iterable[dict[str, Any]],
    draw: Draw,
    reference: Reference,
    folder: Path,
    settings: dict[str, Any],
    *,
    batch_size: int = 128,
    predictors: int = 128,
    adherence: dict[str, Any] | None = None,
    restoration: dict[str, Any] | None = None,
    precision: str = "32",
    progress: bool = True,
) -> dict[str, Any]:
    """Writes metrics.json, samples.png, reconstructions.png (and restorations.png) into `folder` and returns the
    metrics.

    images: batches to reconstruct; conditions: batches with one sample drawn per entry; both are this rank's share,
    without randomness. precision: the one that `draw` works in. settings: sampler, steps and guidance, recorded beside
    each number. adherence: arguments of `measure_adherence`, on shapes. restoration: arguments of
    `measure_restoration`, its loader included, for super-resolution and inpainting. Both are measured by rank 0 alone,
    which also writes the files.
    """
    metrics, shown = evaluate_first_stage(model.first_stage, images, evaluator, reference, predictors, progress)
    partial, used, extractors = folder / f".samples-{precision}.partial", evaluator.metrics, evaluator.extractors
    sampled = measure_samples(
        model, conditions, draw, reference, used, extractors, batch_size, progress=progress, partial=partial, pairs=True
    )
    table = reference.table(used, sampled.estimates)
    metrics["samples"] = {name: estimate | settings | {"seed": 0} for name, estimate in table.items()}
    if rank() > 0:
        return metrics
    for name, rows in sampled.pairs.items():
        save_pairs(rows, folder / f"{name}.png")
    save_pairs(shown, folder / "reconstructions.png")
    drawn, texts = sampled.images, sampled.captions
    if adherence:
        table, made, conditions = measure_adherence(
            lambda fields, seeds: draw(model, fields, seeds=seeds).cpu(),
            reconstruct=lambda images: model.decode(model.encode(images)).cpu(),
            **adherence,
        )
        metrics["adherence"] = table | settings
        drawn = pictures.beside(model.picture(conditions, made.shape[2:]), made)[:36]
        texts = model.describe(conditions, len(made))[:36]
        print(format_table(table))
    if restoration:
        perceptual = evaluator.networks.get("perceptual")
        table, rows = measure_restoration(model, draw=draw, perceptual=perceptual, batch_size=batch_size, **restoration)
        metrics["restoration"] = table | settings
        pictures.save_png(pictures.grid(rows.flatten(0, 1), columns=rows.shape[1]), folder / "restorations.png")
        print(format_restoration(table))
    pictures.save_png(pictures.grid(drawn, columns=6, captions=texts if any(texts) else None), folder / "samples.png")
    write_json(folder / "metrics.json", _finite(metrics))
    return metrics


def _finite(tree: Any) -> Any:
    """Returns nested values with null in place of numbers that JSON does not know, such as the diversity of pictures
    that cannot be read."""
    if isinstance(tree, Mapping):
        return {name: _finite(value) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
