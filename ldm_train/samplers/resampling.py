"""Resampling jumps (RePaint, Lugmayr et al. 2022, arXiv:2201.09865, section 4.2), with any sampler."""

from collections.abc import Callable

import torch

from ldm_train.diffusion.guidance import Denoise
from ldm_train.diffusion.process import NoiseProcess
from ldm_train.rng import NoiseSource
from ldm_train.samplers import Callback


def resampled(
    denoise: Denoise,
    x_t: torch.Tensor,
    timesteps: torch.Tensor,
    schedule: NoiseProcess,
    noise: NoiseSource,
    *,
    sampler: Callable[..., torch.Tensor],
    jump_length: int = 10,
    repeats: int = 10,
    callback: Callback | None = None,
) -> torch.Tensor:
    """Takes `jump_length` steps with `sampler`, adds the noise of those steps again and repeats, `repeats` times in
    total, before it goes on: the generated part then agrees better with the known part.

    Needs as many evaluations as `repeats` runs of the sampler. Multistep samplers restart in each stretch.
    The callback's step number counts repeated steps. Raises ValueError if jump_length or repeats is below 1.
    """
    if jump_length < 1 or repeats < 1:
        raise ValueError(f"resampling needs a jump_length and repeats of at least 1, not {jump_length} and {repeats}")
    alphas, sigmas = schedule.coefficients(timesteps)
    steps, taken = len(timesteps) - 1, 0

    def count(_: int, pred_x0: torch.Tensor) -> None:
        nonlocal taken
        if callback:
            callback(taken, pred_x0)
        taken += 1

    for first in range(0, steps, jump_length):
        last = min(first + jump_length, steps)
        for repeat in range(repeats):
            own = noise.scoped(f"{first}/{repeat}")
            if repeat:  # q(x_t | x_s), from the end of the stretch back to its beginning
                ratio = alphas[first] / alphas[last]
                spread = max(0.0, sigmas[first] ** 2 - (ratio * sigmas[last]) ** 2) ** 0.5
                x_t = ratio * x_t + spread * own.normal(x_t.shape[1:], "jump", x_t.device)
            x_t = sampler(denoise, x_t, timesteps[first : last + 1], schedule, own, callback=count)
    return x_t
