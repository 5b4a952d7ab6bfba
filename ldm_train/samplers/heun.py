"""Heun's method in the noise level (Karras et al. 2022, arXiv:2206.00364, algorithm 1)."""

import torch

from ldm_train.diffusion.guidance import Denoise
from ldm_train.diffusion.process import NoiseProcess
from ldm_train.rng import NoiseSource
from ldm_train.samplers import Callback


def heun(
    denoise: Denoise,
    x_t: torch.Tensor,
    timesteps: torch.Tensor,
    schedule: NoiseProcess,
    noise: NoiseSource,
    *,
    callback: Callback | None = None,
) -> torch.Tensor:
    """Averages the slopes at the two ends of each step: two evaluations per step, one in the last step to the clean
    image.
    No noise is drawn.
    The other arguments: see `ldm_train.samplers`.
    """
    (alphas, levels), times = schedule.levels(timesteps), timesteps.tolist()
    y = x_t / alphas[0]
    for step in range(len(times) - 1):
        level, following = levels[step], levels[step + 1]
        pred_x0 = denoise(y * alphas[step], times[step])
        slope = (y - pred_x0) / level
        ahead = y + (following - level) * slope
        if following > 0:
            pred_x0 = denoise(ahead * alphas[step + 1], times[step + 1])
            ahead = y + (following - level) * (slope + (ahead - pred_x0) / following) / 2
        y = ahead
        if callback:
            callback(step, pred_x0)
    return y * alphas[-1]
