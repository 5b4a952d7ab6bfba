"""Augmentations of the latents between encoder and decoder, which make the latents easier to model by diffusion."""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from ldm_train.models.autoencoder import Change


@dataclass(frozen=True)
class LatentAugmentation:
    """Noise (l-DeTok) and rotation with downscaling (EQ-VAE), applied to the latents while the autoencoder trains.

    noise: standard deviation g of the noise that the decoder must remove (Yang et al. 2025, arXiv:2507.15856, eq. 3):
        z (1 - t) + g t e, t uniform in [0, most) per image, e standard normal; 0: none
    most: upper bound of t, the share of noise, at most 1
    equivariance: the probability that a batch's latents are rotated by multiples of 90 degrees and downscaled, and
        decoded against images transformed in the same way (EQ-VAE, Kouzelis et al. 2025, arXiv:2502.09509, eq. 4);
        0: none
    Random numbers come from the global generators of the host and the device; nothing waits for the device.
    Raises ValueError for a negative `noise` and for `most` or `equivariance` outside [0, 1].
    """

    noise: float = 0.0
    most: float = 1.0
    equivariance: float = 0.0

    def __post_init__(self) -> None:
        if self.noise < 0:
            raise ValueError(
                f"autoencoder.task.augmentation.noise={self.noise} is a standard deviation; it must be at least 0"
            )
        for name in ("most", "equivariance"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"autoencoder.task.augmentation.{name}={getattr(self, name)} is a share from 0 to 1")

    def draw(self, images: torch.Tensor, factor: int) -> tuple[Change | None, torch.Tensor]:
        """Returns (the function that changes the latents, or None; the images that the decoder should reconstruct from
        them). images (B, C, H, W); factor: the autoencoder's downsampling factor f."""
        changes: list[Change] = []
        if self.equivariance and float(torch.rand(())) < self.equivariance:
            move, images = self._moved(images, factor)
            changes.append(move)
        if self.noise:
            changes.append(self._noised)
        if not changes:
            return None, images

        def change(latents: torch.Tensor) -> torch.Tensor:
            for step in changes:
                latents = step(latents)
            return latents

        return change, images

    def smallest(self, size: tuple[int, int], factor: int) -> tuple[int, int]:
        """Returns the smallest pictures that the decoder reconstructs, of images of `size` (H, W)."""
        if not self.equivariance:
            return size
        rows, columns = size[0] // factor, size[1] // factor
        return _scaled(rows, columns, (rows + 1) // 2, factor)

    def _noised(self, latents: torch.Tensor) -> torch.Tensor:
        share = self.most * torch.rand_like(latents[:, :1, :1, :1])
        return latents * (1 - share) + self.noise * share * torch.randn_like(latents)

    def _moved(self, images: torch.Tensor, factor: int) -> tuple[Change, torch.Tensor]:
        """Returns (a function that rotates latents by a random multiple of 90 degrees and scales them to between half
        and full size; the images transformed in the same way)."""
        height, width = (n // factor for n in images.shape[2:])
        turns, rows = int(torch.randint(4, ())), int(torch.randint((height + 1) // 2, height + 1, ()))
        size = _scaled(height, width, rows)

        def resized(x: torch.Tensor, to: tuple[int, int]) -> torch.Tensor:
            smaller = F.interpolate(x, to, mode="bilinear", antialias=True) if tuple(x.shape[2:]) != to else x
            return smaller.rot90(turns, (2, 3)).contiguous(memory_format=torch.channels_last)

        return lambda z: resized(z, size), resized(images, _scaled(height, width, rows, factor))


def _scaled(height: int, width: int, rows: int, factor: int = 1) -> tuple[int, int]:
    """Returns the size of latents (height, width) scaled to `rows` rows, times `factor`."""
    return rows * factor, max(1, round(width * rows / height)) * factor
