"""How well super-resolution and inpainting models restore pictures whose originals are known."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from ldm_train.data.masks import known_colour
from ldm_train.latent_diffusion import LatentDiffusion
from ldm_train.metrics.paired import psnr, ssim
from ldm_train.rng import derive_seed

Autoencode = Callable[[Tensor], Tensor]  # images -> their reconstructions
Distance = Callable[[Tensor, Tensor], Tensor]  # pairs of images -> distances (B,)
FIELDS = ("lowres", "masked_image")
PEAK = 2.0  # images span [-1, 1]


def _resized(images: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(images, tuple(size), mode="bicubic", antialias=True, align_corners=False).clamp(-1, 1)


def decibel(squared_error: Tensor, count: Tensor) -> float:
    """Returns the PSNR in dB of squared errors summed over `count` values in [-1, 1]: pooled, not a mean of
    logarithms."""
    return float(10 * torch.log10(PEAK**2 * count / squared_error.clamp(min=1e-12)))


def superresolution_values(
    images: Tensor, lowres: Tensor, samples: Tensor, autoencode: Autoencode, perceptual: Distance | None
) -> dict[str, Tensor]:
    """Returns measures with one value per image (B,): images (B, C, H, W), lowres (B, C, h, w), samples (n, B, C, H,
    W), all in [-1, 1].

    psnr and ssim (and `perceptual`, a distance, if given) against the images: of the mean of the samples; of one
    sample; of bicubic enlargement through the autoencoder, which the mean should beat; and of the images through the
    autoencoder, which is the ceiling. "consistency": the PSNR of the samples, reduced again, against `lowres`.
    """
    mean = samples.mean(dim=0)
    enlarged = _resized(lowres, images.shape[2:])
    made = {"mean": mean, "sample": samples[0], "bicubic": autoencode(enlarged), "ceiling": autoencode(images)}
    measures = {"psnr": psnr, "ssim": ssim} | ({} if perceptual is None else {"perceptual": perceptual})
    values = {f"{kind}_{name}": m(picture, images) for kind, m in measures.items() for name, picture in made.items()}
    values["psnr_gain"] = values["psnr_mean"] - values["psnr_bicubic"]
    size = lowres.shape[2:]
    values["consistency"] = torch.stack([psnr(_resized(sample, size), lowres) for sample in samples]).mean(0)
    values["consistency_ceiling"] = psnr(_resized(made["ceiling"], size), lowres)
    return values


def inpainting_errors(images: Tensor, masks: Tensor, samples: Tensor, autoencode: Autoencode) -> dict[str, Tensor]:
    """Returns squared errors (B,) per image, summed over pixels: images (B, C, H, W), masks (B, 1, H, W) with 1 in the
    hole, samples (n, B, C, H, W), before known pixels are pasted back.

    In the hole: of the mean of the samples, of one sample, of a fill with the known pixels' mean colour ("mean_fill"),
    of the autoencoder ("ceiling"). On the known pixels: of the samples and of the autoencoder. "hole" and "known" are
    numbers of values.
    """
    known = 1 - masks
    rebuilt = autoencode(images)

    def error(picture: Tensor, where: Tensor) -> Tensor:
        return ((picture - images).double().square() * where).sum(dim=(1, 2, 3))

    channels = images.shape[1]
    return {
        "mean": error(samples.mean(dim=0), masks),
        "sample": error(samples[0], masks),
        "mean_fill": error(known_colour(images, masks), masks),
        "ceiling": error(rebuilt, masks),
        "known_sample": torch.stack([error(s, known) for s in samples]).mean(dim=0),
        "known_ceiling": error(rebuilt, known),
        "hole": masks.double().sum(dim=(1, 2, 3)) * channels,
        "known": known.double().sum(dim=(1, 2, 3)) * channels,
    }


def pooled_psnr(errors: dict[str, Tensor]) -> dict[str, float]:
    """Returns the PSNR in dB of `inpainting_errors`, pooled over the pixels of all images."""
    sums = {name: error.sum() for name, error in errors.items()}
    table = {f"psnr_hole_{n}": decibel(sums[n], sums["hole"]) for n in ("mean", "sample", "mean_fill", "ceiling")}
    table["psnr_gain"] = table["psnr_hole_mean"] - table["psnr_hole_mean_fill"]
    return table | {f"psnr_known_{n}": decibel(sums[f"known_{n}"], sums["known"]) for n in ("sample", "ceiling")}


def _restored(
    model: LatentDiffusion, draw: Callable[..., Tensor], conditions: dict[str, Any], keys: list[str], samples: int
) -> Tensor:
    """Draws `samples` pictures under each of B conditions, (samples, B, C, H, W), with seeds derived from the keys."""
    repeated = {
        name: torch.cat([values] * samples) if isinstance(values, Tensor) else list(values) * samples
        for name, values in conditions.items()
    }
    seeds = [derive_seed("restoration", key, i) for i in range(samples) for key in keys]
    return draw(model, repeated, seeds=seeds).cpu().unflatten(0, (samples, -1))


@torch.no_grad()
def measure_restoration(
    model: LatentDiffusion,
    loader: Iterable[dict[str, Any]],
    draw: Callable[..., Tensor],
    perceptual: nn.Module | None,
    images: int = 64,
    samples: int = 8,
    batch_size: int = 64,
    shown: int = 8,
) -> tuple[dict[str, float], Tensor]:
    """Draws `samples` pictures for each of the first `images` of `loader` under its own conditions.

    Returns (table, pictures): means over images for super-resolution; PSNR in dB pooled over pixels for inpainting.
    The pictures (rows, columns, C, H, W): condition, up to three samples, the mean of all, and the original.
    """
    field = next(f for f in FIELDS if f in model.fields)
    restored, originals, conditions = [], [], []
    size, left = max(1, batch_size // samples), images
    with tqdm(total=images, desc="restorations", unit="img") as bar:
        for batch in loader:
            for k in range(0, min(len(batch["key"]), left), size):
                part = slice(k, min(k + size, left))
                given, keys = {f: batch[f][part] for f in model.fields if f in batch}, batch["key"][part]
                restored.append(_restored(model, draw, given, keys, samples))
                originals.append(batch["image"][part])
                conditions.append(batch[field][part])
                bar.update(len(keys))
            left -= len(batch["key"])
            if left <= 0:
                break
    drawn, real, given = torch.cat(restored, dim=1), torch.cat(originals), torch.cat(conditions)

    def autoencode(pictures: Tensor) -> Tensor:
        return torch.cat([model.decode(model.encode(part)).cpu() for part in pictures.split(batch_size)])

    def distance(ours: Tensor, originals: Tensor) -> Tensor:
        pairs = zip(ours.split(batch_size), originals.split(batch_size))
        return torch.cat([perceptual(a.to(model.device), b.to(model.device)).cpu() for a, b in pairs])

    table: dict[str, float] = {"n": len(real), "samples": samples}
    if field == "lowres":
        values = superresolution_values(real, given, drawn, autoencode, distance if perceptual is not None else None)
        table |= {name: float(v.double().mean()) for name, v in values.items()}
    else:
        table |= pooled_psnr(inpainting_errors(real, given[:, -1:], drawn, autoencode))
    condition = model.picture({field: given[:shown]}, tuple(real.shape[2:]))
    return table, torch.stack([condition, *drawn[:3, :shown], drawn[:, :shown].mean(dim=0), real[:shown]], dim=1)


def format_restoration(table: dict[str, float]) -> str:
    values = [f"{name} {value:.2f}" for name, value in table.items() if name not in ("n", "samples")]
    return (
        f"restoration of {table['n']} images, {table['samples']} samples each (dB; ssim; distance):\n  "
        + "\n  ".join(", ".join(values[k : k + 4]) for k in range(0, len(values), 4))
    )
