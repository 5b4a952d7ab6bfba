"""Guidance: functions that wrap a denoiser and return a denoiser. They compose; the innermost acts first."""

from collections.abc import Callable

import torch

from ldm_train.diffusion.denoiser import Denoiser
from ldm_train.diffusion.process import NoiseProcess, expand_to

Denoise = Callable[[torch.Tensor, float | torch.Tensor], torch.Tensor]
HIGHEST = 1e6  # an interval of noise levels up to this one includes steps from pure noise


def classifier_free(
    denoise: Denoise,
    uncond: Denoise,
    guidance_scale: float,
    *,
    interval: tuple[float, float] | None = None,
    rescale: float = 0.0,
    threshold: float | None = None,
) -> Denoise:
    """x0 = x0_uncond + guidance_scale (x0_cond - x0_uncond)   (Ho and Salimans 2022; w = guidance_scale - 1).

    uncond: the same model under its null condition, under a negative prompt, or a weaker model under the same condition
        (autoguidance, Karras et al. 2024). Denoisers of one model are evaluated in one call.
    interval: guide only between these noise levels sigma / alpha, with one evaluation elsewhere (Kynkaanniemi et al.
        2024); up to HIGHEST means without an upper end
    rescale: fraction by which the standard deviation of the network's output is brought back to that without guidance,
        per sample (Lin et al. 2023, eq. 15 and 16)
    threshold: percentile (0 to 100) of |x0| at which values are clipped; they are then scaled so that it is no larger
        than without guidance (Imagen's dynamic thresholding, with the unguided range instead of [-1, 1], because
        latents have no fixed range)
    Guidance is affine, so mixing x0 equals mixing eps. A scale of 1 returns `denoise` itself: no second evaluation.
    Raises ValueError for invalid options, and for rescale or interval if `denoise` is not a `Denoiser`.
    """
    if not 0 <= rescale <= 1:
        raise ValueError(f"guidance.rescale is a share between 0 and 1, not {rescale}")
    if threshold is not None and not 0 < threshold <= 100:
        raise ValueError(f"guidance.threshold is a percentile above 0 and up to 100, not {threshold}")
    if interval is not None and not 0 <= interval[0] < interval[1]:
        raise ValueError(f"guidance.interval is [low, high] in noise levels, not {list(interval)}")
    if (rescale or interval is not None) and not isinstance(denoise, Denoiser):
        raise ValueError(
            "guidance.rescale and guidance.interval need the model itself inside classifier_free; put other guidance "
            "around it, not inside"
        )
    if guidance_scale == 1:
        return denoise
    model = denoise if isinstance(denoise, Denoiser) else None
    together = [model, uncond] if model and isinstance(uncond, Denoiser) and model.shares_model(uncond) else None

    def guided(x_t: torch.Tensor, t: float | torch.Tensor) -> torch.Tensor:
        if interval is not None and model is not None:
            alpha, sigma = (torch.as_tensor(v) for v in model.schedule.pair(t, x_t))
            if not interval[0] <= min(float((sigma / alpha).max()), HIGHEST) <= interval[1]:
                return denoise(x_t, t)
        if together:
            with_condition, without = Denoiser.together(together, x_t, t)
        else:
            with_condition, without = denoise(x_t, t), uncond(x_t, t)
        mixed = without + guidance_scale * (with_condition - without)
        if rescale and model is not None:
            mixed = _rescaled(model, with_condition, mixed, x_t, t, rescale)
        return mixed if threshold is None else _thresholded(with_condition, mixed, threshold)

    return guided


def _rescaled(
    denoise: Denoiser,
    plain: torch.Tensor,
    mixed: torch.Tensor,
    x_t: torch.Tensor,
    t: float | torch.Tensor,
    share: float,
) -> torch.Tensor:
    x_t, alpha, sigma = denoise.schedule.network_view(x_t.float(), t)
    kind = denoise.parameterisation
    wanted, output = (kind.from_pred_x0(x0, x_t, alpha, sigma) for x0 in (plain, mixed))
    axes = tuple(range(1, output.ndim))
    factor = wanted.std(dim=axes, keepdim=True) / output.std(dim=axes, keepdim=True).clamp(min=1e-8)
    return kind.to_pred_x0(output * (1 + share * (factor - 1)), x_t, alpha, sigma)


def _thresholded(plain: torch.Tensor, mixed: torch.Tensor, percentile: float) -> torch.Tensor:
    limits = [torch.quantile(x.abs().flatten(1), percentile / 100, dim=1) for x in (plain, mixed)]
    plain_limit, mixed_limit = (expand_to(v, mixed) for v in limits)
    clipped = torch.maximum(torch.minimum(mixed, mixed_limit), -mixed_limit)
    return torch.where(mixed_limit > plain_limit, clipped * plain_limit / mixed_limit.clamp(min=1e-8), mixed)


def classifier_guidance(
    denoise: Denoise,
    log_probability: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    schedule: NoiseProcess,
    guidance_scale: float,
) -> Denoise:
    """x0 + s (1 - abar) / sqrt(abar) grad log p(y | x_t)   (Dhariwal and Nichol 2021, algorithm 2, in terms of x0).

    log_probability: (x_t (B, C, h, w), timesteps (B,)) -> (B,), of a classifier trained on noisy latents.
        guidance_scale: s, 0 turns it off. Wrap it around other guidance, not inside classifier_free. Raises ValueError
        for a schedule that ends without signal, where the factor is infinite.
    """
    if guidance_scale == 0:
        return denoise
    if schedule.numbers(schedule.last_time)[0] < 1e-6:
        raise ValueError(
            "classifier guidance divides by the signal, and this model's schedule ends without any (zero_terminal_snr); use "
            "guidance_scale"
        )

    def guided(x_t: torch.Tensor, t: float | torch.Tensor) -> torch.Tensor:
        pred_x0 = denoise(x_t, t)
        alpha, sigma = schedule.pair(t, pred_x0)
        if isinstance(t, torch.Tensor):
            times = t.to(x_t.device, torch.float32).clamp(min=0).expand(len(x_t))
        else:
            times = torch.full((len(x_t),), max(0.0, float(t)), device=x_t.device)
        gradient = _gradient(lambda x: log_probability(x, times), x_t)
        return pred_x0 + guidance_scale * sigma**2 / alpha * gradient

    return guided


def score_guidance(
    denoise: Denoise, score: Callable[[torch.Tensor], torch.Tensor], schedule: NoiseProcess, guidance_scale: float
) -> Denoise:
    """x0 + s (1 - abar) grad_x0 score(x0): guidance by a score of clean latents, e.g. CLIP after decoding.

    This is classifier guidance with p(y | x_t) taken at the estimate x0, whose derivative with respect to x_t is taken
    to be alpha, as for latents of unit variance; nothing is differentiated through the model itself. score:
    (B, C, h, w) -> (B,), a log-probability up to a constant. guidance_scale: s, 0 turns it off. Wrap it around other
    guidance.
    """
    if guidance_scale == 0:
        return denoise

    def guided(x_t: torch.Tensor, t: float | torch.Tensor) -> torch.Tensor:
        pred_x0 = denoise(x_t, t)
        _, sigma = schedule.pair(t, pred_x0)
        return pred_x0 + guidance_scale * sigma**2 * _gradient(score, pred_x0)

    return guided


def _gradient(function: Callable[[torch.Tensor], torch.Tensor], at: torch.Tensor) -> torch.Tensor:
    """Returns d sum(function) / d at, also inside no_grad and inference mode."""
    with torch.inference_mode(False), torch.enable_grad():
        x = at.detach().clone().float().requires_grad_()
        return torch.autograd.grad(function(x).sum(), x)[0]


def keep_known(denoise: Denoise, known: torch.Tensor, mask: torch.Tensor) -> Denoise:
    """Inpainting with a model that was not trained for it: replaces the estimate of x_0 by `known` outside the hole
    (similar to RePaint, Lugmayr et al. 2022, which replaces the noisy latents instead).

    known: latents (B, C, h, w); mask: (B, 1, h, w), 1 in the hole. The sampled latents equal `known` outside the hole,
        exactly if the sampler's last step returns the estimate (true of all ours that end at the clean image).
    """

    def kept(x_t: torch.Tensor, t: float | torch.Tensor) -> torch.Tensor:
        pred_x0 = denoise(x_t, t)
        return torch.where(mask.to(pred_x0.device) > 0.5, pred_x0, known.to(pred_x0))

    return kept
