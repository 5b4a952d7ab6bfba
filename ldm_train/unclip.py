"""unCLIP (Ramesh et al. 2022, arXiv:2204.06125): image embeddings as latents, decoded by a model conditioned on
them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ldm_train.conditioning.image_embedding import ImageEmbedding
from ldm_train.latent_diffusion import LatentDiffusion, Sampling
from ldm_train.models.posterior import Point
from ldm_train.models.tiling import Tiles
from ldm_train.rng import derive_seed


class ImageEmbeddings(nn.Module):
    """A first stage whose latents are image embeddings (B, dim, 1, 1). A model trained on these latents is unCLIP's
    prior; whatever generates such latents generates images.

    model: decodes an embedding by sampling an image conditioned on it. sampling: its options, see `Sampling`
    Raises ValueError if the model does not have exactly one image-embedding conditioner or its images are not square.
    """

    moments_per_latent = 1
    draws = True  # `decode` samples, and takes seeds

    def __init__(self, model: LatentDiffusion, sampling: dict[str, Any] | None = None):
        super().__init__()
        self.model, self.sampling = model, Sampling(**(sampling or {}))
        readers = [c for c in model.conditioners.values() if isinstance(c, ImageEmbedding)]
        if len(readers) != 1:
            raise ValueError(
                f"this model has {len(readers)} conditioners of image embeddings; take one with diffusion/conditioning=image_embedding "
                "or clip_image"
            )
        self._reader = (readers[0],)  # in a tuple, so as not to be registered twice: it is part of `model`
        self.latent_channels, self.in_channels = self.reader.encoder_dim, self.reader.channels
        sides = {side * model.first_stage.downsample_factor for side in model.latent_size}
        if len(sides) > 1:
            raise ValueError(f"this model draws pictures of {sorted(sides)} pixels; its embeddings are of square ones")
        self.downsample_factor = sides.pop()

    def require(self) -> None:
        """Obtains the pretrained networks of the decoding model's conditioners. Raises FileNotFoundError if one is
        missing."""
        for conditioner in self.model.conditioners.values():
            conditioner.require()

    @property
    def reader(self) -> ImageEmbedding:
        return self._reader[0]

    def encode_moments(self, images: torch.Tensor, tiles: Tiles | None = None) -> torch.Tensor:
        """Images (B, C, H, W) in [-1, 1] -> (B, dim, 1, 1). Raises ValueError if the encoder gives several embeddings
        per image."""
        embeddings = self.reader.embed(images)
        if embeddings.shape[1] != 1:
            raise ValueError(f"this image encoder gives {embeddings.shape[1]} embeddings per image, not one")
        return embeddings[:, 0, :, None, None]

    def posterior(self, moments: torch.Tensor) -> Point:
        return Point(moments)

    def encode(self, images: torch.Tensor) -> Point:
        return Point(self.encode_moments(images).float())

    @torch.no_grad()
    def decode(
        self, latents: torch.Tensor, tiles: Tiles | None = None, seeds: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Embeddings (B, dim, 1, 1) -> images (B, C, H, W) in [-1, 1], each sampled with its own seed; without seeds
        all use the same one. Raises ValueError for a grid of embeddings, i.e. a spatial size other than 1 x 1."""
        if latents.shape[2:] != (1, 1):
            raise ValueError(
                f"a prior draws pictures of {self.downsample_factor} pixels alone; leave size= and panorama= out"
            )
        embeddings = latents.flatten(1)[:, None].float()
        if self.reader.per_image:  # as in the training of the model
            embeddings = F.layer_norm(embeddings, embeddings.shape[-1:])
        own = [derive_seed("unclip", seed) for seed in (seeds or [0] * len(latents))]
        return self.model.sample({self.reader.field: embeddings}, own, self.sampling)
