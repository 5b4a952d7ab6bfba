"""Changes of the latents between encoder and decoder that make latents easier to diffuse."""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from ldm_train.models.autoencoder import Change


@dataclass(frozen=True)
class LatentAugmentation:
    """noise: the deviation g of noise that the decoder must see through (l-DeTok, Yang et al. 2025, arXiv:2507.15856, eq. 3):
        z (1 - t) + g t e, with t uniform up to `most` for each picture and e standard normal; 0: none
    most: the largest share of noise, at most 1
    equivariance: the probability that a batch's latents are turned by quarters and made smaller, and decoded against pictures
        that were changed alike (EQ-VAE, Kouzelis et al. 2025, arXiv:2502.09509, eq. 4); 0: none
    Everything is drawn on the host from the global generator, or on the device; nothing waits for the device.
    Raises ValueError for shares outside 0 to 1.
    """

    noise: float = 0.0
    most: float = 1.0
    equivariance: float = 0.0

    def __post_init__(self) -> None:
        if self.noise < 0:
            raise ValueError(f"autoencoder.task.augmentation.noise={self.noise} is a deviation; it must be at least 0")
        for name in ("most", "equivariance"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"autoencoder.task.augmentation.{name}={getattr(self, name)} is a share from 0 to 1")

    def draw(self, images: torch.Tensor, factor: int) -> tuple[Change | None, torch.Tensor]:
        """(the change of latents, or None; the pictures that the decoder shall make of them). images (B, C, H, W); factor: the
        autoencoder's f."""
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

    def _noised(self, latents: torch.Tensor) -> torch.Tensor:
        share = self.most * torch.rand_like(latents[:, :1, :1, :1])
        return latents * (1 - share) + self.noise * share * torch.randn_like(latents)

    def _moved(self, images: torch.Tensor, factor: int) -> tuple[Change, torch.Tensor]:
        """A quarter turn and a size between half and whole, of latents and of pictures."""
        height, width = (n // factor for n in images.shape[2:])
        turns, rows = int(torch.randint(4, ())), int(torch.randint((height + 1) // 2, height + 1, ()))
        size = (rows, max(1, round(width * rows / height)))

        def resized(x: torch.Tensor, to: tuple[int, int]) -> torch.Tensor:
            smaller = F.interpolate(x, to, mode="bilinear", antialias=True) if tuple(x.shape[2:]) != to else x
            return smaller.rot90(turns, (2, 3)).contiguous(memory_format=torch.channels_last)

        return lambda z: resized(z, size), resized(images, (size[0] * factor, size[1] * factor))
