"""PLMS: pseudo linear multistep (Liu et al. 2022, arXiv:2202.09778), as in CompVis' sampler."""

import torch

from ldm_train.diffusion.guidance import Denoise
from ldm_train.diffusion.process import NoiseProcess
from ldm_train.rng import NoiseSource
from ldm_train.samplers import Callback
from ldm_train.samplers.heun import LONG

# Coefficients of Adams-Bashforth, the newest first.
ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def plms(
    denoise: Denoise,
    x_t: torch.Tensor,
    timesteps: torch.Tensor,
    schedule: NoiseProcess,
    noise: NoiseSource,
    *,
    callback: Callback | None = None,
) -> torch.Tensor:
    """DDIM's step with a noise estimate extrapolated from the last four, which assumes even steps in t; the first step
    averages the estimates at its two ends, which takes one more evaluation, unless it is longer than Heun's `LONG`.
    No noise is drawn.
    The other arguments: see `ldm_train.samplers`.
    """
    (alphas, levels), times = schedule.levels(timesteps), timesteps.tolist()
    sigmas = [alpha * level for alpha, level in zip(alphas, levels)]

    def move(x: torch.Tensor, eps: torch.Tensor, step: int) -> torch.Tensor:
        """DDIM's step with a given noise estimate."""
        pred_x0 = (x - sigmas[step] * eps) / alphas[step]
        return alphas[step + 1] * pred_x0 + sigmas[step + 1] * eps

    history: list[torch.Tensor] = []
    for step in range(len(times) - 1):
        pred_x0 = denoise(x_t, times[step])
        eps = (x_t - alphas[step] * pred_x0) / sigmas[step]
        history = [eps, *history[:3]]
        if step == 0 and levels[1] > levels[0] / LONG:
            ahead = move(x_t, eps, 0)
            eps = (eps + (ahead - alphas[1] * denoise(ahead, times[1])) / sigmas[1]) / 2
        else:
            coefficients = ADAMS_BASHFORTH[len(history) - 1]
            eps = sum((c * e for c, e in zip(coefficients, history)), start=torch.zeros(()))
        x_t = move(x_t, eps, step)
        if callback:
            callback(step, pred_x0)
    return x_t
