"""DDIM (Song et al. 2021, arXiv:2010.02502), and its inversion, which finds the noise that leads to a given image."""

import torch

from ldm_train.diffusion.guidance import Denoise
from ldm_train.diffusion.process import NoiseProcess
from ldm_train.rng import NoiseSource
from ldm_train.samplers import Callback


def ddim(
    denoise: Denoise,
    x_t: torch.Tensor,
    timesteps: torch.Tensor,
    schedule: NoiseProcess,
    noise: NoiseSource,
    *,
    eta: float = 0.0,
    callback: Callback | None = None,
) -> torch.Tensor:
    """x_s = alpha_s x_0 + sqrt(sigma_s^2 - v) eps + sqrt(v) z   (eq. 12), v = eta^2 times the posterior's variance.

    eta: 0 deterministic, 1 ancestral.
    The other arguments: see `ldm_train.samplers`.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta={eta} is a share of the ancestral step's noise, from 0 to 1")
    (alphas, sigmas), times = schedule.coefficients(timesteps), timesteps.tolist()
    for step in range(len(times) - 1):
        alpha_t, sigma_t, alpha_s, sigma_s = alphas[step], sigmas[step], alphas[step + 1], sigmas[step + 1]
        pred_x0 = denoise(x_t, times[step])
        eps = (x_t - alpha_t * pred_x0) / sigma_t
        variance = (eta * sigma_s / sigma_t) ** 2 * max(0.0, 1 - (alpha_t / alpha_s) ** 2)
        x_t = alpha_s * pred_x0 + max(0.0, sigma_s**2 - variance) ** 0.5 * eps
        if variance > 0:
            x_t = x_t + variance**0.5 * noise.normal(x_t.shape[1:], step, x_t.device)
        if callback:
            callback(step, pred_x0)
    return x_t


def ddim_inversion(
    denoise: Denoise,
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    schedule: NoiseProcess,
    *,
    iterations: int = 5,
    callback: Callback | None = None,
) -> torch.Tensor:
    """Returns the x_T from which `ddim` with eta 0 samples `latents` (B, C, h, w) at the same decreasing `timesteps`
    (S + 1,).

    Each step towards noise solves  x_t = alpha_t (x_s - sigma_s eps) / alpha_s + sigma_t eps  with eps = eps(x_t, t) by
    fixed-point iteration, i.e. it inverts DDIM's own step. One iteration corresponds to the usual approximation
    (Dhariwal and Nichol 2021, appendix F), here with eps taken at a first guess of x_t; more iterations converge faster
    for smaller steps.
    Raises ValueError for fewer than one iteration.
    """
    if iterations < 1:
        raise ValueError(f"inversion needs at least one iteration, not {iterations}")
    (alphas, sigmas), times = schedule.coefficients(timesteps), timesteps.tolist()
    x, eps = latents, torch.zeros_like(latents)
    for step in reversed(range(len(times) - 1)):

        def up(eps: torch.Tensor, at: torch.Tensor = x, now: int = step) -> torch.Tensor:
            return alphas[now] / alphas[now + 1] * (at - sigmas[now + 1] * eps) + sigmas[now] * eps

        for _ in range(iterations):
            guess = up(eps)
            pred_x0 = denoise(guess, times[step])
            eps = (guess - alphas[step] * pred_x0) / sigmas[step]
        x = up(eps)
        if callback:
            callback(len(times) - 2 - step, pred_x0)
    return x
