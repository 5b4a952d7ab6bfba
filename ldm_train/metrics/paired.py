"""Metrics of an image against its reconstruction, one value per image. Images (B, C, H, W) in [-1, 1] -> (B,)."""

import torch
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure


def psnr(reconstructions: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB, infinite for equal images."""
    return peak_signal_noise_ratio(
        reconstructions.float(), images.float(), data_range=(-1.0, 1.0), reduction="none", dim=(1, 2, 3)
    )


def ssim(reconstructions: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Structural similarity (Wang et al. 2004), Gaussian window of 11 pixels."""
    value = structural_similarity_index_measure(
        reconstructions.float(), images.float(), data_range=(-1.0, 1.0), reduction="none"
    )
    return value.reshape(-1)
