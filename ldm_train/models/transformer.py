"""Attention: the SpatialTransformer of latent diffusion (self-, cross-attention, GEGLU) and plain self-attention blocks.

Tensors are reshaped with torch's own methods, since torch.compile spends most of its tracing time on einops' patterns.
"""

import torch
from torch import nn
from torch.nn import functional as F

from ldm_train.models.layers import as_map, as_tokens, attend, group_norm, pointwise, zero_init

KeysValues = tuple[torch.Tensor, torch.Tensor]  # (B, heads, L, head_dim) each


class CrossAttention(nn.Module):
    """Multi-head attention of x to `context`, or to x itself if there is none. No biases on q, k, v, as published."""

    def __init__(self, dim: int, context_dim: int | None, heads: int, head_dim: int, dropout: float = 0.0):
        super().__init__()
        self.heads, inner = heads, heads * head_dim
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_k = nn.Linear(context_dim or dim, inner, bias=False)
        self.to_v = nn.Linear(context_dim or dim, inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, dim), nn.Dropout(dropout))

    def _split(self, a: torch.Tensor) -> torch.Tensor:
        return a.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def projected(self, context: torch.Tensor) -> KeysValues:
        """Returns the keys and values of a context (B, L, context_dim). `forward` takes them instead of the context."""
        return self._split(self.to_k(context)), self._split(self.to_v(context))

    def forward(
        self, x: torch.Tensor, context: torch.Tensor | KeysValues | None = None, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x (B, N, dim), context (B, L, context_dim) or its `projected`, mask (B, L) bool, True for tokens to attend to
        -> (B, N, dim)"""
        if context is None:  # one matrix product instead of three, in both passes
            weight = torch.cat([self.to_q.weight, self.to_k.weight, self.to_v.weight])
            q, k, v = (self._split(part) for part in F.linear(x, weight).chunk(3, dim=-1))
        else:
            q = self._split(self.to_q(x))
            k, v = context if isinstance(context, tuple) else self.projected(context)
        out = attend(q, k, v, None if mask is None else mask[:, None, None, :])
        return self.to_out(out.transpose(1, 2).flatten(2))


class GEGLU(nn.Module):
    """A linear layer whose first half is gated by the GELU of its second half (Shazeer 2020)."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * out_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, dim: int, mult: int = 4, dropout: float = 0.0):
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, dim * mult), nn.Dropout(dropout), nn.Linear(dim * mult, dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Pre-norm: self-attention, attention to the context (to x itself if the model has none), GEGLU feed-forward.

    cross_only: the first attention attends to the context too (SD's x4 upscaler at its large resolutions).
    """

    def __init__(
        self,
        dim: int,
        context_dim: int | None,
        heads: int,
        head_dim: int,
        dropout: float = 0.0,
        cross_only: bool = False,
    ):
        super().__init__()
        self.cross_only = cross_only
        self.attn1 = CrossAttention(dim, context_dim if cross_only else None, heads, head_dim, dropout)
        self.attn2 = CrossAttention(dim, context_dim, heads, head_dim, dropout)
        self.ff = FeedForward(dim, dropout=dropout)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)

    def projected(self, context: torch.Tensor) -> tuple[KeysValues | None, KeysValues]:
        """Returns the keys and values of the context for both attentions; None for the first if it is
        self-attention."""
        return self.attn1.projected(context) if self.cross_only else None, self.attn2.projected(context)

    def forward(self, x: torch.Tensor, context: torch.Tensor | tuple | None, mask: torch.Tensor | None) -> torch.Tensor:
        first, second = context if isinstance(context, tuple) else (context if self.cross_only else None, context)
        x = x + (self.attn1(self.norm1(x), first, mask) if self.cross_only else self.attn1(self.norm1(x)))
        x = x + self.attn2(self.norm2(x), second, mask)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """A transformer over the positions of a feature map (LDM, appendix E.2.1), added to its input.

    linear_projection: use linear layers for the in and out projections (SD 2) instead of 1x1 convolutions.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        head_dim: int,
        context_dim: int | None,
        depth: int = 1,
        dropout: float = 0.0,
        linear_projection: bool = False,
        cross_only: bool = False,
    ):
        super().__init__()
        inner = heads * head_dim
        self.linear_projection = linear_projection
        self.norm = group_norm(channels, 1e-6)
        self.proj_in = nn.Linear(channels, inner) if linear_projection else nn.Conv2d(channels, inner, 1)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(inner, context_dim, heads, head_dim, dropout, cross_only) for _ in range(depth)
        )
        self.proj_out = zero_init(nn.Linear(inner, channels) if linear_projection else nn.Conv2d(inner, channels, 1))

    def projected(self, context: torch.Tensor) -> tuple:
        """Returns the `projected` context of each block."""
        return tuple(block.projected(context) for block in self.transformer_blocks)

    def forward(
        self, x: torch.Tensor, context: torch.Tensor | tuple | None = None, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x (B, C, h, w), context (B, L, D) or its `projected`, mask (B, L) -> (B, C, h, w)"""
        h, w = x.shape[-2:]
        into, out_of = self.proj_in, self.proj_out
        tokens = as_tokens(self.norm(x))
        tokens = into(tokens) if self.linear_projection else pointwise(into, tokens)  # (B, h*w, inner)
        own = context if isinstance(context, tuple) else (context,) * len(self.transformer_blocks)
        for block, given in zip(self.transformer_blocks, own):
            tokens = block(tokens, given, mask)
        tokens = out_of(tokens) if self.linear_projection else pointwise(out_of, tokens)
        return x + as_map(tokens, h, w)


class AttentionBlock(nn.Module):
    """Self-attention over positions with one fused qkv projection, for models without a context (ADM).

    The projection's output is q, k and v, in thirds, each split into heads. Published checkpoints that interleave heads
    are reordered on conversion.
    """

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm = group_norm(channels, 1e-5)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zero_init(nn.Conv1d(channels, channels, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) -> (B, C, h, w)"""
        h, w = x.shape[-2:]
        qkv = pointwise(self.qkv, as_tokens(self.norm(x))).unflatten(2, (3, self.heads, -1))  # (B, h*w, 3, heads, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        out = attend(q, k, v).transpose(1, 2).flatten(2)
        return x + as_map(pointwise(self.proj_out, out), h, w)
