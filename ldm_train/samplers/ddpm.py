"""Ancestral sampling (DDPM, Ho et al. 2020, arXiv:2006.11239)."""

import torch

from ldm_train.diffusion.guidance import Denoise
from ldm_train.diffusion.process import NoiseProcess
from ldm_train.rng import NoiseSource
from ldm_train.samplers import Callback


def ddpm(
    denoise: Denoise,
    x_t: torch.Tensor,
    timesteps: torch.Tensor,
    schedule: NoiseProcess,
    noise: NoiseSource,
    *,
    variance: str = "small",
    callback: Callback | None = None,
) -> torch.Tensor:
    """x_s ~ q(x_s | x_t, x_0 = pred_x0)   (eq. 6 and 7), for any decreasing timesteps.

    variance: "small" is the posterior's, exact for a Dirac data distribution; "large" is beta, exact for a unit
        Gaussian one.
    Raises ValueError for another variance.
    The other arguments: see `ldm_train.samplers`.
    """
    if variance not in ("small", "large"):
        raise ValueError(f"variance is 'small' or 'large', not {variance!r}")
    (alphas, sigmas), times = schedule.coefficients(timesteps), timesteps.tolist()
    for step in range(len(times) - 1):
        alpha_t, sigma_t, alpha_s, sigma_s = alphas[step], sigmas[step], alphas[step + 1], sigmas[step + 1]
        pred_x0 = denoise(x_t, times[step])
        ratio = alpha_t / alpha_s  # sqrt(1 - beta) of the step s -> t
        beta = 1 - ratio**2
        x_t = (alpha_s * beta * pred_x0 + ratio * sigma_s**2 * x_t) / sigma_t**2
        spread = beta if variance == "large" else beta * sigma_s**2 / sigma_t**2
        if sigma_s > 0:  # no noise on the clean image
            x_t = x_t + spread**0.5 * noise.normal(x_t.shape[1:], step, x_t.device)
        if callback:
            callback(step, pred_x0)
    return x_t
