"""The blocks of the autoencoders' encoder and decoder, with the published state dict keys."""

from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F

from ldm_train.models.layers import (
    PaddedDownsample,
    Upsample,
    as_map,
    as_tokens,
    attend,
    group_norm,
    pointwise,
    recomputed,
)
from ldm_train.models.tiling import Step


class ResnetBlock(nn.Module):
    recomputes = False

    def __init__(self, channels: int, out_channels: int, dropout: float = 0.0):
        super().__init__()
        self.norm1 = group_norm(channels, 1e-6)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels, 1e-6)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(channels, out_channels, 1) if channels != out_channels else nn.Identity()

    def _first(self, normed: torch.Tensor) -> torch.Tensor:
        return self.conv1(F.silu(normed))

    def _second(self, x: torch.Tensor, normed: torch.Tensor) -> torch.Tensor:
        return self.nin_shortcut(x) + self.conv2(self.dropout(F.silu(normed)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._second(x, self.norm2(self._first(self.norm1(x))))

    def steps(self) -> list[Step]:
        return [
            Step(self.norm1, lambda state, normed: (*state, self._first(normed))),
            Step(self.norm2, lambda state, normed: (self._second(state[0], normed),)),
        ]


class AttnBlock(nn.Module):
    """Single-head self-attention over positions, with 1x1 convolutions as projections."""

    recomputes = False

    def __init__(self, channels: int):
        super().__init__()
        self.norm = group_norm(channels, 1e-6)
        self.q, self.k, self.v = (nn.Conv2d(channels, channels, 1) for _ in range(3))
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._attended(x, self.norm(x))

    def steps(self) -> list[Step]:
        return [Step(self.norm, lambda state, normed: (self._attended(state[0], normed),))]

    def _attended(self, x: torch.Tensor, normed: torch.Tensor) -> torch.Tensor:
        weight, bias = (torch.cat([getattr(p, name) for p in (self.q, self.k, self.v)]) for name in ("weight", "bias"))
        q, k, v = F.linear(as_tokens(normed)[:, None], weight.flatten(1), bias).chunk(3, dim=-1)  # (B, 1, h*w, C) each
        out = pointwise(self.proj_out, attend(q, k, v)[:, 0])
        return x + as_map(out, x.shape[2], x.shape[3])


class Level(nn.Module):
    """One resolution of the encoder or decoder: residual blocks, optionally attention after each, optionally a
    resampler at the end."""

    def __init__(self, widths: list[int], attention: bool, dropout: float, down: bool = False, up: bool = False):
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(a, b, dropout) for a, b in pairwise(widths))
        self.attn = nn.ModuleList(AttnBlock(w) for w in widths[1:] if attention)
        self.downsample = PaddedDownsample(widths[-1]) if down else nn.Identity()
        self.upsample = Upsample(widths[-1]) if up else nn.Identity()
        self.resamples = down or up

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i, block in enumerate(self.block):
            x = recomputed(block, x)
            if self.attn:
                x = recomputed(self.attn[i], x)
        return self.upsample(self.downsample(x))

    def steps(self) -> list[Step]:
        """Returns the same computation as steps for `Tiles`."""
        steps = []
        for i, block in enumerate(self.block):
            steps += block.steps() + (self.attn[i].steps() if self.attn else [])
        if self.resamples:
            steps.append(Step(None, lambda state, _: (self.upsample(self.downsample(state[0])),)))
        return steps


class Middle(nn.Module):
    def __init__(self, width: int, attention: bool, dropout: float):
        super().__init__()
        self.block_1 = ResnetBlock(width, width, dropout)
        self.attn_1 = AttnBlock(width) if attention else nn.Identity()
        self.block_2 = ResnetBlock(width, width, dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in (self.block_1, self.attn_1, self.block_2):
            x = recomputed(block, x)
        return x
