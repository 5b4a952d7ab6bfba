"""Mean and standard deviation of the latents in a cache, by which they are scaled for stage 2."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from ldm_train.data.files import DataError
from ldm_train.data.latents import REMEDY, CachedLatents
from ldm_train.data.shards import spread

STATISTICS = "statistics.json"


def latent_statistics(latents: CachedLatents, limit: int = 50_000) -> dict[str, Any]:
    """Mean and standard deviation of the latents (sampled, unscaled) over all or `limit` images, in float64.

    Returns "mean" and "std" per channel, the scalar "scale_factor" = 1 / (standard deviation over all axes) (Rombach et
    al. 2022, appendix G) and "count". Raises DataError if that standard deviation is 0 or not finite.
    """
    picks = spread(len(latents), limit)
    channels = len(latents.mean_and_std(0)[0])
    total, square, elements = np.zeros(channels), np.zeros(channels), 0
    for i in picks.tolist():
        mean, std = latents.mean_and_std(i)
        elements += mean[0].size
        total += mean.sum(axis=(1, 2))
        square += (mean**2 + std**2).sum(axis=(1, 2))
    mean = total / elements
    std = np.sqrt(np.maximum(square / elements - mean**2, 0))  # rounding can make it negative
    overall = float(np.sqrt(square.sum() / elements / channels - (total.sum() / elements / channels) ** 2))
    if not 0 < overall < math.inf:  # also false for NaN
        raise DataError(
            f"the latents in {latents.shards.root} have the standard deviation {overall}; look at the autoencoder, then: {REMEDY}"
        )
    return {"count": len(picks), "mean": mean.tolist(), "std": std.tolist(), "scale_factor": 1 / overall}


def read_statistics(folder: str | Path) -> dict[str, Any]:
    """The result of `latent_statistics`, from the file beside a cache. Raises DataError if it is missing or invalid."""
    path = Path(folder) / STATISTICS
    try:
        statistics = json.loads(path.read_bytes())
        numbers = [statistics["scale_factor"], *statistics["std"], *statistics["mean"]]
        ours = all(type(n) in (int, float) and math.isfinite(n) for n in numbers) and statistics["scale_factor"] > 0
        ours = ours and len(statistics["std"]) == len(statistics["mean"]) > 0
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise DataError(f"{path} holds no statistics of latents ({error}); rebuild it with: {REMEDY}") from error
    if not ours:
        raise DataError(f"{path} holds no statistics of latents; rebuild it with: {REMEDY}")
    return statistics
