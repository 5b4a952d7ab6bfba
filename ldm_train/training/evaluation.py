"""The evaluation stage: reconstructions, samples and, on shapes, obedience, as one metrics.json."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ldm_train import images as pictures
from ldm_train.data.shards import write_json
from ldm_train.latent_diffusion import LatentDiffusion
from ldm_train.metrics.distribution import Moments, frechet_distance, kernel_distance
from ldm_train.metrics.paired import psnr, ssim
from ldm_train.training.obedience import format_table, measure_obedience

# (model, fields, seeds) -> images
Draw = Callable[..., torch.Tensor]


@torch.no_grad()
def evaluate(
    model: LatentDiffusion,
    loader: Any,
    draw: Draw,
    extractor: torch.nn.Module,
    perceptual: torch.nn.Module | None,
    folder: Path,
    settings: dict[str, Any],
    images: int = 512,
    batch_size: int = 128,
    obedience: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes metrics.json, samples.png and reconstructions.png into `folder` and returns the metrics.

    loader: batches of the reference split (images and condition fields), without randomness. images: how many to
    reconstruct and to sample, each under the conditions of one reference sample. extractor: features for distances,
    with a `name`. perceptual: for the reconstructions. settings: sampler, steps and guidance, recorded beside each
    number. obedience: arguments of `measure_obedience`, on shapes.
    """
    device, fields = model.device, set(model.fields)
    real, rebuilt, sampled, sums, count = [], [], [], {}, 0
    shown: dict[str, torch.Tensor] = {}
    conditions: list[dict[str, Any]] = []
    for batch in tqdm(loader, desc="reconstructions", unit="batch"):
        x = batch["image"].to(device)
        moments = model.first_stage.encode_moments(x)
        mean = (moments.chunk(2, dim=1)[0] - model.first_stage.shift) * model.first_stage.scale
        rec = model.decode(mean)
        values = {"psnr": psnr(rec, x), "ssim": ssim(rec, x)}
        if perceptual is not None:
            values["perceptual"] = perceptual(rec, x)
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + float(value.double().sum())
        real.append(extractor(x).cpu())
        rebuilt.append(extractor(rec).cpu())
        shown.setdefault("reconstructions", torch.cat([x[:8], rec[:8]]).cpu())
        conditions.append({f: batch[f] for f in fields if f in batch})
        count += len(x)
    metrics: dict[str, Any] = {
        "reconstruction": {name: {"value": total / count, "n": count} for name, total in sums.items()}
    }
    texts: list[str] = []
    first = 0
    progress = tqdm(total=min(images, count), desc="samples", unit="img")
    for number, condition in enumerate(conditions):
        size = len(real[number])
        for k in range(0, size, batch_size):
            part = {f: v[k : k + batch_size] for f, v in condition.items()}
            n = min(batch_size, size - k, images - first)
            if n <= 0:
                break
            drawn = draw(model, {f: v[:n] for f, v in part.items()}, seeds=list(range(first, first + n))).to(device)
            sampled.append(extractor(drawn).cpu())
            shown.setdefault("samples", drawn[:36].cpu())
            if not texts and model.conditioners:
                conditioner = list(model.conditioners.values())[-1]
                if conditioner.field in part:
                    texts = conditioner.describe(part[conditioner.field][: len(shown["samples"])])
            first += n
            progress.update(n)
    progress.close()
    sets = {"reconstructions": torch.cat(rebuilt), "samples": torch.cat(sampled)}
    reference = torch.cat(real)
    for name, features in sets.items():
        context = {"n": len(features), "n_reference": len(reference)} | (settings if name == "samples" else {})
        distance = frechet_distance(Moments.of([reference]), Moments.of([features]))
        metrics.setdefault(name, {})[f"fid_{extractor.name}"] = {"value": distance} | context
        metrics[name][f"kid_{extractor.name}"] = {"value": kernel_distance(reference, features)} | context
    if obedience:
        table, drawn, captions = measure_obedience(
            lambda fields, seeds: draw(model, fields, seeds=seeds).cpu(), **obedience
        )
        metrics["obedience"] = table | settings
        shown["samples"], texts = drawn[:36], captions[:36]
        print(format_table(table))
    pictures.save_png(pictures.grid(shown["reconstructions"], columns=8), folder / "reconstructions.png")
    pictures.save_png(pictures.grid(shown["samples"], columns=6, captions=texts or None), folder / "samples.png")
    write_json(folder / "metrics.json", metrics)
    return metrics
