"""Metrics of an image against its reconstruction, one value per image. Images (B, C, H, W) in [-1, 1] -> (B,)."""

from typing import Any

import torch
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

PER_IMAGE: dict[str, Any] = {"data_range": 1.0, "reduction": "none"}
MS_SSIM_SIDE = 161  # five scales, each halving, of windows of 11 pixels


def _unit(images: torch.Tensor) -> torch.Tensor:
    """[-1, 1] -> [0, 1], clamped: the luminance term of SSIM is defined for intensities from 0 up."""
    return (images.float().clamp(-1, 1) + 1) / 2


def psnr(reconstructions: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB, infinite for equal images."""
    return peak_signal_noise_ratio(_unit(reconstructions), _unit(images), dim=(1, 2, 3), **PER_IMAGE)


def ssim(reconstructions: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Structural similarity (Wang et al. 2004), Gaussian window of 11 pixels."""
    return structural_similarity_index_measure(_unit(reconstructions), _unit(images), **PER_IMAGE).reshape(-1)


def ms_ssim(reconstructions: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Structural similarity over five scales (Wang et al. 2003). Raises ValueError for sides below 161 pixels."""
    if min(images.shape[2:]) < MS_SSIM_SIDE:
        raise ValueError(f"ms_ssim needs sides of at least {MS_SSIM_SIDE} pixels, not {tuple(images.shape[2:])}")
    pairs = _unit(reconstructions), _unit(images)
    return multiscale_structural_similarity_index_measure(*pairs, normalize="relu", **PER_IMAGE).reshape(-1)
