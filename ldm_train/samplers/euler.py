"""Euler's method in the noise level, with and without fresh noise (Karras et al. 2022, arXiv:2206.00364)."""

import torch

from ldm_train.diffusion.guidance import Denoise
from ldm_train.diffusion.process import NoiseProcess
from ldm_train.rng import NoiseSource
from ldm_train.samplers import Callback


def euler(
    denoise: Denoise,
    x_t: torch.Tensor,
    timesteps: torch.Tensor,
    schedule: NoiseProcess,
    noise: NoiseSource,
    *,
    ancestral: float = 0.0,
    churn: float = 0.0,
    churn_between: tuple[float, float] = (0.0, float("inf")),
    callback: Callback | None = None,
) -> torch.Tensor:
    """dy/dsigma = (y - x_0) / sigma for y = x / alpha, where sigma is the noise divided by the signal.

    ancestral: the standard deviation of fresh noise, relative to that of the ancestral step (0: none, 1: Euler
        ancestral).
    churn: S_churn of Karras' stochastic sampler (algorithm 2): before a step with sigma in `churn_between`, noise is
        added to raise it to sigma (1 + min(churn / S, sqrt(2) - 1)).
    The other arguments: see `ldm_train.samplers`.
    """
    if not 0 <= ancestral <= 1:
        raise ValueError(f"ancestral={ancestral} is a share of the ancestral step's noise, from 0 to 1")
    (alphas, levels), times = schedule.levels(timesteps), timesteps.tolist()
    steps = len(times) - 1
    y = x_t / alphas[0]
    for step in range(steps):
        level, following, t = levels[step], levels[step + 1], times[step]
        if churn and churn_between[0] <= level <= churn_between[1]:
            raised = level * (1 + min(churn / steps, 2**0.5 - 1))
            # The noise cannot exceed that of the schedule's last timestep.
            raised = max(level, min(raised, schedule.max_level))
            y = y + (raised**2 - level**2) ** 0.5 * noise.normal(y.shape[1:], f"churn {step}", y.device)
            level, t = raised, schedule.time_of(raised)
        pred_x0 = denoise(y * (1 + level**2) ** -0.5, t)
        fresh = ancestral * min(following, (following**2 * (level**2 - following**2) / level**2) ** 0.5)
        down = (following**2 - fresh**2) ** 0.5
        y = y + (down - level) * (y - pred_x0) / level
        if fresh > 0:
            y = y + fresh * noise.normal(y.shape[1:], step, y.device)
        if callback:
            callback(step, pred_x0)
    return y * alphas[-1]
