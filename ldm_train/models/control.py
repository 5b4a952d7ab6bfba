"""Spatial control of a trained U-Net (ControlNet, Zhang et al. 2023, arXiv:2302.05543)."""

from copy import deepcopy

import torch
from torch import nn

from ldm_train.models.layers import zero_init
from ldm_train.models.unet_encoder import Encoder


class Control(Encoder):
    """A copy of a U-Net's encoder that also takes a picture's features. Its outputs are added to the U-Net's skips and
    middle through 1x1 convolutions initialised to zero, so that a new control changes nothing.

    unet: the U-Net to copy, with its weights. `strength`: factor on what is added, 1 as trained
    """

    def __init__(self, unet: Encoder):
        super().__init__()
        self.channels, self.vector_classes, self.vector_dim = unet.channels, unet.vector_classes, unet.vector_dim
        self.activation_checkpointing, self.strength = unet.activation_checkpointing, 1.0
        self.time_embed, self.input_blocks = deepcopy(unet.time_embed), deepcopy(unet.input_blocks)
        self.middle_block = deepcopy(unet.middle_block)
        if self.vector_dim:
            self.label_emb = deepcopy(unet.label_emb)
        self.skip_widths = unet.skip_widths
        self.zero_convs = nn.ModuleList(zero_init(nn.Conv2d(width, width, 1)) for width in self.skip_widths)
        self.middle_zero_conv = zero_init(nn.Conv2d(self.skip_widths[-1], self.skip_widths[-1], 1))
        like = next(unet.parameters())
        self.zero_convs.to(like), self.middle_zero_conv.to(like)

    def projected(self, context: torch.Tensor) -> tuple:
        """See `UNet.projected`."""
        return tuple(layers.projected(context) for layers in (*self.input_blocks, self.middle_block))

    def forward(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        context: tuple,
        mask: torch.Tensor | None,
        vector: torch.Tensor | None,
        features: torch.Tensor,
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """x (B, C, h, w): the input of the U-Net's first layer; features (B, width, h, w): of the picture. Returns what
        to add to each skip and to the middle."""
        skips, middle = self.encode(x, self.embed(timesteps, vector, x.dtype), context, mask, features)
        added = [conv(skip) * self.strength for conv, skip in zip(self.zero_convs, skips)]
        return added, self.middle_zero_conv(middle) * self.strength
