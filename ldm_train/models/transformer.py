"""Attention: the SpatialTransformer of latent diffusion (self-, cross-attention, GEGLU) and plain self-attention blocks."""

import weakref
from typing import Any

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F

from ldm_train.models.layers import as_tokens, group_norm, pointwise, zero_init


class CrossAttention(nn.Module):
    """Multi-head attention of x to `context`, or to itself where there is none. No biases on q, k, v, as published."""

    def __init__(self, dim: int, context_dim: int | None, heads: int, head_dim: int, dropout: float = 0.0):
        super().__init__()
        self.heads, inner = heads, heads * head_dim
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_k = nn.Linear(context_dim or dim, inner, bias=False)
        self.to_v = nn.Linear(context_dim or dim, inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, dim), nn.Dropout(dropout))
        self._kept: tuple[Any, tuple, tuple[torch.Tensor, torch.Tensor]] | None = None

    def _split(self, a: torch.Tensor) -> torch.Tensor:
        return rearrange(a, "b n (h d) -> b h n d", h=self.heads)

    def keys_values(self, context: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, heads, L, head_dim) each. Without gradients those of the last context are kept: a sampler asks with the
        same tensor in every step."""
        weights = (self.to_k.weight, self.to_v.weight)
        untracked = context.is_inference() or weights[0].is_inference()  # inference mode counts no changes
        if torch.is_grad_enabled() or self.training or torch.compiler.is_compiling() or untracked:
            return self._split(self.to_k(context)), self._split(self.to_v(context))
        state = (context._version, *(w._version for w in weights), *(w.data_ptr() for w in weights))
        if torch.amp.is_autocast_available(kind := context.device.type):
            state += (torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        kept = self._kept
        if kept is None or kept[0]() is not context or kept[1] != state:
            made = self._split(self.to_k(context)), self._split(self.to_v(context))
            # They are freed with their context, not only at the next one.
            kept = self._kept = (weakref.ref(context, self._forget), state, made)
        return kept[2]

    def _forget(self, gone: weakref.ref) -> None:
        if self._kept is not None and self._kept[0] is gone:
            self._kept = None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_kept": None}  # weak references cannot be copied

    def forward(
        self, x: torch.Tensor, context: torch.Tensor | None = None, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x (B, N, dim), context (B, L, context_dim), mask (B, L) bool with True where a token counts -> (B, N, dim)"""
        if context is None:  # one product in the place of three, each way
            weight = torch.cat([self.to_q.weight, self.to_k.weight, self.to_v.weight])
            q, k, v = (self._split(part) for part in F.linear(x, weight).chunk(3, dim=-1))
        else:
            q, (k, v) = self._split(self.to_q(x)), self.keys_values(context)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask[:, None, None, :])
        return self.to_out(rearrange(out, "b h n d -> b n (h d)"))


class GEGLU(nn.Module):
    """A linear layer gated by the GELU of its second half (Shazeer 2020)."""

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
    """Pre-norm: self-attention, attention to the context (to itself where the model has none), GEGLU feed-forward.

    cross_only: the first attention goes to the context too (SD's x4 upscaler at its large resolutions).
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

    def forward(self, x: torch.Tensor, context: torch.Tensor | None, mask: torch.Tensor | None) -> torch.Tensor:
        x = x + (self.attn1(self.norm1(x), context, mask) if self.cross_only else self.attn1(self.norm1(x)))
        x = x + self.attn2(self.norm2(x), context, mask)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """A transformer over the positions of a feature map (LDM, appendix E.2.1), added to its input.

    linear_projection: in and out projections as linear layers (SD 2) instead of 1x1 convolutions.
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

    def forward(
        self, x: torch.Tensor, context: torch.Tensor | None = None, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x (B, C, h, w), context (B, L, D), mask (B, L) -> (B, C, h, w)"""
        h, w = x.shape[-2:]
        into, out_of = self.proj_in, self.proj_out
        tokens = as_tokens(self.norm(x))
        tokens = into(tokens) if self.linear_projection else pointwise(into, tokens)  # (B, h*w, inner)
        for block in self.transformer_blocks:
            tokens = block(tokens, context, mask)
        tokens = out_of(tokens) if self.linear_projection else pointwise(out_of, tokens)
        return x + rearrange(tokens, "b (h w) c -> b c h w", h=h, w=w)


class AttentionBlock(nn.Module):
    """Self-attention over positions with one fused qkv projection, for models without a context (ADM).

    The projection holds q, k, v in thirds, each split into heads. Published checkpoints that interleave heads
    are re-ordered when they are converted.
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
        qkv = pointwise(self.qkv, as_tokens(self.norm(x)))
        q, k, v = rearrange(qkv, "b n (three heads d) -> three b heads n d", three=3, heads=self.heads)
        out = rearrange(F.scaled_dot_product_attention(q, k, v), "b heads n d -> b n (heads d)")
        return x + rearrange(pointwise(self.proj_out, out), "b (h w) c -> b c h w", h=h, w=w)
