"""Guidance wraps a denoiser and returns a denoiser."""

from collections.abc import Callable

import torch

from ldm_train.diffusion.denoiser import Denoiser

Denoise = Callable[[torch.Tensor, float | torch.Tensor], torch.Tensor]


def classifier_free(denoise: Denoise, uncond: Denoise, guidance_scale: float) -> Denoise:
    """x0 = x0_uncond + guidance_scale (x0_cond - x0_uncond)   (Ho and Salimans 2022; w = guidance_scale - 1).

    Guidance is affine, so mixing x0 equals mixing eps. A scale of 1 returns `denoise` itself: no second evaluation.
    """
    if guidance_scale == 1:
        return denoise
    batched = isinstance(denoise, Denoiser) and denoise.shares_model(uncond)

    def guided(x_t: torch.Tensor, t: float | torch.Tensor) -> torch.Tensor:
        if batched:
            with_condition, without = Denoiser.together([denoise, uncond], x_t, t)
        else:
            with_condition, without = denoise(x_t, t), uncond(x_t, t)
        return without + guidance_scale * (with_condition - without)

    return guided
