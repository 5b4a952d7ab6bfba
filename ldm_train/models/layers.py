"""Layers shared by the U-Net and the autoencoder, and full precision under autocast.

Module names follow CompVis/latent-diffusion, so its keys load.
"""

import math
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """A context without autocast. For a device type that has no autocast (meta, in a memory rehearsal), the CPU's
    autocast is switched off."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type if known else "cpu", enabled=False)


class GroupNorm(nn.GroupNorm):
    """GroupNorm in float32 under autocast on CPUs too, as torch does it on GPUs: the CPU's bfloat16 kernel takes four
    times as long."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.float() if torch.is_autocast_enabled("cpu") else x)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Scaled dot-product attention over q, k, v, each (B, heads, N, d). mask: bool, True for keys that are attended to.

    On a CPU it is computed in float32 at any precision, as the backward pass in bfloat16 takes nine times as long
    (torch 2.15).
    """
    if q.device.type != "cpu" or q.dtype not in (torch.bfloat16, torch.float16):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    with torch.autocast("cpu", enabled=False):
        wide = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask)
    return wide.to(q.dtype)


def group_norm(channels: int, eps: float) -> nn.GroupNorm:
    """GroupNorm with the published 32 groups; layers under 128 channels have groups of at least 4 channels.

    Smaller groups approach an instance norm, which erases the colour of a flat image (measured: a 16-channel
    autoencoder with 16 groups cannot tell a black background from a white one for hundreds of steps).
    """
    most = max(1, min(32, channels // 4))
    groups = next(g for g in range(most, 0, -1) if channels % g == 0)  # 32 may not divide the width of joined skips
    return GroupNorm(groups, channels, eps=eps)


def zero_init(module: nn.Module) -> nn.Module:
    """Zeroes a layer's parameters and returns it, so that a residual block ending in it starts as the identity."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


def timestep_embedding(timesteps: torch.Tensor, dim: int) -> torch.Tensor:
    """Sinusoidal embedding, (B,) -> (B, dim) float32: cosines, then sines (DDPM; order as in LDM). dim is even."""
    half = dim // 2
    frequencies = torch.exp(-math.log(10_000.0) * torch.arange(half, device=timesteps.device).float() / half)
    angles = timesteps.float()[:, None] * frequencies[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def recomputed(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Returns block(x). If the block `recomputes`, training stores only its input and recomputes the rest in the
    backward pass."""
    if getattr(block, "recomputes", False) and block.training:
        return checkpoint(block, x, use_reentrant=False)
    return block(x)


def embedding_mlp(in_dim: int, dim: int) -> nn.Sequential:
    """An MLP from an embedding or a vector to the width of the network's time embedding."""
    return nn.Sequential(nn.Linear(in_dim, dim), nn.SiLU(), nn.Linear(dim, dim))


class PaddedDownsample(nn.Module):
    """A 3x3 convolution of stride 2, padded on the right and bottom only, as published."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


def as_tokens(x: torch.Tensor) -> torch.Tensor:
    """(B, C, h, w) -> (B, h*w, C), a view if x is channels_last."""
    return x.flatten(2).transpose(1, 2)


def as_map(tokens: torch.Tensor, h: int, w: int) -> torch.Tensor:
    """(B, h*w, C) -> (B, C, h, w), channels_last."""
    return tokens.transpose(1, 2).unflatten(2, (h, w))


def pointwise(layer: nn.Conv1d | nn.Conv2d, tokens: torch.Tensor) -> torch.Tensor:
    """Applies a convolution of kernel size 1 as a matrix product, (B, N, C) -> (B, N, C'). Published checkpoints hold
    convolutions, but the product costs less than half as much on a CPU and needs no change of layout on any device."""
    return F.linear(tokens, layer.weight.flatten(1), layer.bias)


class Upsample(nn.Module):
    """Nearest-neighbour x2, then a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) -> (B, C, 2h, 2w)"""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class ResBlock(nn.Module):
    """The U-Net's residual block (ADM): norm, SiLU, conv; + timestep embedding; norm, SiLU, dropout, zeroed conv.

    scale_shift: the embedding modulates the second norm (h * (1 + scale) + shift) instead of being added.
    resample: "up" or "down" changes the resolution inside the block, by nearest neighbour or 2x2 averaging.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        emb_dim: int,
        dropout: float = 0.0,
        scale_shift: bool = False,
        resample: str | None = None,
    ):
        super().__init__()
        self.scale_shift, self.resample = scale_shift, resample
        self.in_layers = nn.Sequential(
            group_norm(channels, 1e-5), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_dim, out_channels * (2 if scale_shift else 1)))
        self.out_layers = nn.Sequential(
            group_norm(out_channels, 1e-5),
            nn.SiLU(),
            nn.Dropout(dropout),
            zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        self.skip_connection = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def _resampled(self, x: torch.Tensor) -> torch.Tensor:
        if self.resample == "up":
            return F.interpolate(x, scale_factor=2.0, mode="nearest")
        return F.avg_pool2d(x, 2) if self.resample == "down" else x

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        """x (B, C, h, w), emb (B, emb_dim) -> (B, out_channels, h', w')"""
        h = self.in_layers[2](self._resampled(self.in_layers[1](self.in_layers[0](x))))
        emb = self.emb_layers(emb).to(h.dtype)[:, :, None, None]
        if self.scale_shift:
            scale, shift = emb.chunk(2, dim=1)
            h = self.out_layers[0](h) * (1 + scale) + shift
            h = self.out_layers[3](self.out_layers[2](self.out_layers[1](h)))
        else:
            h = self.out_layers(h + emb)
        return self.skip_connection(self._resampled(x)) + h
