"""Edge maps, read from the shard or computed from the image, as a condition concatenated to the latents."""

from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from ldm_train.conditioning.spatial import SpatialConditioner
from ldm_train.data.batch import Field, Sample
from ldm_train.data.transforms import decode_image, read_image
from ldm_train.devices import to_device
from ldm_train.models.first_stage import FirstStage

# Sobel's horizontal derivative; its transpose is the vertical one.
SOBEL = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]]) / 4


def edges_of(image: torch.Tensor) -> torch.Tensor:
    """image (C, H, W) in [-1, 1] -> (1, H, W) in [0, 1]: the magnitude of the brightness gradient (Sobel), 1 for a step
    from black to white."""
    grey = F.pad(image.mean(dim=0)[None, None], (1, 1, 1, 1), mode="replicate")
    across, down = (F.conv2d(grey, kernel[None, None].to(grey)) for kernel in (SOBEL, SOBEL.T))
    return ((across.square() + down.square()).sqrt()[0] / 2).clamp(0, 1)


class Edges(Field):
    """edges: float32 (1, H, W) in [0, 1]."""

    name, extensions, needs_pixels = "edges", ("edges.png",), True
    input = "picture"

    def from_image(self, image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        return edges_of(image)

    def decode(self, sample: Sample) -> torch.Tensor:
        if (stored := sample.raw.get(self.extensions[0])) is None:
            return sample.derived(self)
        edges = decode_image(stored, "png", 1)
        return sample.transform.apply(edges, sample.plan(edges.shape[1:], self.name)).float() / 255

    def from_words(self, given: str, conditioner: Any, size: tuple[int, int], channels: int) -> torch.Tensor:
        """Returns the edges of the image file `given`."""
        return edges_of(read_image(given, size, channels, f"fields.{self.name}"))


class EdgeMap(SpatialConditioner):
    """Edges at latent size: the f x f pixels of each latent cell become channels. The null condition is all -1.

    factor: the first stage's f. dropout: probability of the null condition in training.
    """

    field, declares = Edges.name, Edges()

    def __init__(self, factor: int, dropout: float = 0.1):
        super().__init__(dropout)
        self.factor, self.widths = factor, {"concat": factor**2}

    def attach(self, first_stage: FirstStage) -> None:
        super().attach(first_stage)
        if self.factor != (f := first_stage.downsample_factor):
            raise ValueError(
                f"the edges have factor {self.factor}, the autoencoder {f}; set diffusion.conditioning.conditioners.edges.factor="
                f"{f} diffusion.conditioning.concat_channels={f * f}"
            )

    def forward(self, values: torch.Tensor, drop: torch.Tensor) -> dict[str, torch.Tensor]:
        """(B, 1, H, W) in [0, 1] -> concat (B, f^2, h, w)."""
        edges = to_device(torch.as_tensor(values), self.device).float()
        cells = F.pixel_unshuffle(edges, self.factor)
        return {"concat": torch.where(to_device(drop, self.device).view(-1, 1, 1, 1), -1.0, cells)}
