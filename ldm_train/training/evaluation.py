"""The evaluation stage: reconstructions, samples and, on shapes, obedience, as one metrics.json."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ldm_train import images as pictures
from ldm_train.data.shards import write_json
from ldm_train.latent_diffusion import LatentDiffusion
from ldm_train.metrics.distribution import Moments, frechet_estimate, kernel_estimate, mean_estimate
from ldm_train.metrics.paired import psnr, ssim
from ldm_train.rng import derive_seed
from ldm_train.training.obedience import format_table, measure_obedience
from ldm_train.training.restoration import format_restoration, measure_restoration

# (model, fields, seeds) -> images
Draw = Callable[..., torch.Tensor]


@dataclass
class Sampled:
    """Samples under the conditions of a reference split, as features of both, and the first ones as pictures, beside what
    can be seen of their conditions."""

    reference: torch.Tensor
    features: torch.Tensor
    images: torch.Tensor
    captions: list[str]


@torch.no_grad()
def sample_like(
    model: LatentDiffusion,
    batches: Iterable[dict[str, Any]],
    draw: Draw,
    extractor: torch.nn.Module,
    batch_size: int,
    shown: int = 36,
    progress: bool = True,
    reference: torch.Tensor | None = None,
) -> Sampled:
    """One sample under the conditions of each image in `batches`, with a seed that is a function of its key: the same
    samples for any batch size and number of ranks.

    extractor: images -> features. reference: features of the images themselves, where they are known already.
    """
    fields = set(model.fields)
    real, made, pictures_shown, captions = [], [], [], []
    total = None if reference is None else len(reference)
    bar = tqdm(total=total, desc="samples", unit="img", disable=not progress)
    for batch in batches:
        if reference is None:
            real.append(extractor(batch["image"].to(model.device)).cpu())
        for k in range(0, len(batch["key"]), batch_size):
            keys = batch["key"][k : k + batch_size]
            condition = {f: batch[f][k : k + batch_size] for f in fields if f in batch}
            images = draw(model, condition, seeds=[derive_seed("evaluation", key) for key in keys]).to(model.device)
            made.append(extractor(images).cpu())
            if len(captions) < shown:
                pictures_shown.append(
                    pictures.beside(model.picture(condition, images.shape[2:]), images.cpu())[: shown - len(captions)]
                )
                captions += model.describe(condition, len(images))[: shown - len(captions)]
            bar.update(len(images))
    bar.close()
    return Sampled(
        torch.cat(real) if reference is None else reference, torch.cat(made), torch.cat(pictures_shown), captions
    )


@torch.no_grad()
def evaluate(
    model: LatentDiffusion,
    loader: Any,
    draw: Draw,
    extractor: torch.nn.Module,
    perceptual: torch.nn.Module | None,
    folder: Path,
    settings: dict[str, Any],
    batch_size: int = 128,
    obedience: dict[str, Any] | None = None,
    restoration: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes metrics.json, samples.png, reconstructions.png (and restorations.png) into `folder` and returns the metrics.

    loader: batches of the reference split (images and condition fields), without randomness; each image is
    reconstructed, and sampled once under its conditions. extractor: features for distances, with a `name`. perceptual:
    for the reconstructions. settings: sampler, steps and guidance, recorded beside each number. obedience: arguments of
    `measure_obedience`, on shapes. restoration: of `measure_restoration`, for super-resolution and inpainting.
    """
    rebuilt, real, found = [], [], {}
    shown: dict[str, torch.Tensor] = {}
    for batch in tqdm(loader, desc="reconstructions", unit="batch"):
        x = batch["image"].to(model.device)
        rec = model.decode(model.encode(x))
        values = {"psnr": psnr(rec, x), "ssim": ssim(rec, x)}
        if perceptual is not None:
            values["perceptual"] = perceptual(rec, x)
        for name, value in values.items():
            found.setdefault(name, []).append(value.double().cpu())
        real.append(extractor(x).cpu())
        rebuilt.append(extractor(rec).cpu())
        shown.setdefault("reconstructions", torch.cat([x[:8], rec[:8]]).cpu())
    metrics: dict[str, Any] = {
        "reconstruction": {name: mean_estimate(torch.cat(values)).as_dict() for name, values in found.items()}
    }
    reference = torch.cat(real)
    sampled = sample_like(model, loader, draw, extractor, batch_size, reference=reference)
    shown["samples"], texts = sampled.images, sampled.captions
    for name, features in (("reconstructions", torch.cat(rebuilt)), ("samples", sampled.features)):
        context = {"n_reference": len(reference)} | (settings if name == "samples" else {})
        distances = {
            "fid": frechet_estimate(Moments.of([reference]), features),
            "kid": kernel_estimate(reference, features),
        }
        for kind, estimate in distances.items():
            metrics.setdefault(name, {})[f"{kind}_{extractor.name}"] = estimate.as_dict() | context
    if obedience:
        table, drawn, conditions = measure_obedience(
            lambda fields, seeds: draw(model, fields, seeds=seeds).cpu(), **obedience
        )
        metrics["obedience"] = table | settings
        shown["samples"] = pictures.beside(model.picture(conditions, drawn.shape[2:]), drawn)[:36]
        texts = model.describe(conditions, len(drawn))[:36]
        print(format_table(table))
    if restoration:
        table, rows = measure_restoration(model, loader, draw, perceptual, batch_size=batch_size, **restoration)
        metrics["restoration"] = table | settings
        pictures.save_png(pictures.grid(rows.flatten(0, 1), columns=rows.shape[1]), folder / "restorations.png")
        print(format_restoration(table))
    pictures.save_png(pictures.grid(shown["reconstructions"], columns=8), folder / "reconstructions.png")
    pictures.save_png(
        pictures.grid(shown["samples"], columns=6, captions=texts if any(texts) else None), folder / "samples.png"
    )
    write_json(folder / "metrics.json", metrics)
    return metrics
