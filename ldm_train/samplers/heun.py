"""Heun's method in the noise level (Karras et al. 2022, arXiv:2206.00364, algorithm 1)."""

import torch

from ldm_train.diffusion.guidance import Denoise
from ldm_train.diffusion.process import NoiseProcess
from ldm_train.rng import NoiseSource
from ldm_train.samplers import Callback

# A step that divides the noise level by more than this is Euler's, as the slope at its end says nothing of its beginning:
# the first one of the cosine schedule and of flows, which begin at levels of hundreds and more.
LONG = 20


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
    image, and in steps that divide the noise level by more than `LONG`.
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
        if following > level / LONG:
            pred_x0 = denoise(ahead * alphas[step + 1], times[step + 1])
            ahead = y + (following - level) * (slope + (ahead - pred_x0) / following) / 2
        y = ahead
        if callback:
            callback(step, pred_x0)
    return y * alphas[-1]
