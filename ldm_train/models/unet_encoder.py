"""The downsampling half of the U-Net, with its middle block."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ldm_train.models.layers import ResBlock, timestep_embedding
from ldm_train.models.transformer import SpatialTransformer


class Downsample(nn.Module):
    """A 3x3 convolution of stride 2."""

    def __init__(self, channels: int):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.op(x)


class Layers(nn.ModuleList):
    """The layers of one U-Net step, in order, e.g. a residual block, perhaps attention, perhaps a resampler."""

    def projected(self, context: torch.Tensor) -> tuple | None:
        """Returns the `projected` context of its SpatialTransformer, or None if it has none."""
        return next((layer.projected(context) for layer in self if isinstance(layer, SpatialTransformer)), None)

    def forward(
        self, x: torch.Tensor, emb: torch.Tensor, context: torch.Tensor | tuple | None, mask: torch.Tensor | None
    ) -> torch.Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context, mask)
            else:
                x = layer(x)
        return x


class Encoder(nn.Module):
    """The timestep embedding, the downsampling steps and the middle; subclasses create these modules.

    channels: width of the timestep's sinusoidal encoding. skip_widths: channels of each downsampling step's output
    vector_classes, vector_dim: as in `UNet`
    """

    channels: int
    skip_widths: tuple[int, ...]
    vector_classes: int | None
    vector_dim: int | None
    activation_checkpointing: bool
    time_embed: nn.Module
    input_blocks: nn.ModuleList
    middle_block: Layers

    def embed(self, timesteps: torch.Tensor, vector: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        """timesteps (B,) in [0, T), vector (B, vector_dim) -> (B, 4 channels)."""
        emb = self.time_embed(timestep_embedding(timesteps, self.channels).to(dtype))
        if self.vector_classes:
            return emb + self.label_emb(vector[:, 0].round().long()).to(emb.dtype)
        return emb + self.label_emb(vector.to(emb.dtype)) if self.vector_dim else emb

    def run_layers(self, layers: Layers, *args: torch.Tensor | tuple | None) -> torch.Tensor:
        if self.activation_checkpointing and self.training:
            return checkpoint(layers, *args, use_reentrant=False)
        return layers(*args)

    def encode(
        self,
        x: torch.Tensor,
        emb: torch.Tensor,
        context: Sequence[torch.Tensor | tuple | None],
        mask: torch.Tensor | None,
        added: torch.Tensor | None = None,
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Returns the output of each downsampling step, and of the middle. context: one for each of these; added: is
        added to the output of the first step."""
        skips: list[torch.Tensor] = []
        for layers, given in zip(self.input_blocks, context):
            if not skips:
                x = layers[0](x)
                x = x if added is None else x + added.to(x.dtype)
            else:
                x = self.run_layers(layers, x, emb, given, mask)
            skips.append(x)
        return skips, self.run_layers(self.middle_block, x, emb, context[len(skips)], mask)
