"""Projections computed as one matrix product equal the published layers: same outputs, same trained weights."""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from einops import rearrange
from tiers import tiered
from torch import nn
from torch.nn import functional as F

from ldm_train.models.autoencoder import AutoencoderKL
from ldm_train.models.autoencoder_blocks import AttnBlock
from ldm_train.models.layers import as_tokens, pointwise
from ldm_train.models.transformer import AttentionBlock, CrossAttention, SpatialTransformer
from ldm_train.models.unet import UNet

# The layers as published, each projection a layer of its own.


def cross_attention(self: CrossAttention, x, context=None, mask=None) -> torch.Tensor:
    context = x if context is None else context
    q, k, v = (self._split(layer(a)) for layer, a in ((self.to_q, x), (self.to_k, context), (self.to_v, context)))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask[:, None, None, :])
    return self.to_out(rearrange(out, "b h n d -> b n (h d)"))


def spatial_transformer(self: SpatialTransformer, x, context=None, mask=None) -> torch.Tensor:
    tokens = as_tokens(self.proj_in(self.norm(x)))
    for block in self.transformer_blocks:
        tokens = block(tokens, context, mask)
    return x + self.proj_out(rearrange(tokens, "b (h w) c -> b c h w", h=x.shape[2]))


def attention_block(self: AttentionBlock, x: torch.Tensor) -> torch.Tensor:
    qkv = self.qkv(rearrange(self.norm(x), "b c h w -> b c (h w)"))
    q, k, v = rearrange(qkv, "b (three heads d) n -> three b heads n d", three=3, heads=self.heads)
    out = rearrange(F.scaled_dot_product_attention(q, k, v), "b heads n d -> b (heads d) n")
    return x + rearrange(self.proj_out(out), "b c (h w) -> b c h w", h=x.shape[2])


def attn_block(self: AttnBlock, x: torch.Tensor, normed: torch.Tensor) -> torch.Tensor:
    h, w = x.shape[-2:]
    q, k, v = (rearrange(layer(normed), "b c h w -> b 1 (h w) c") for layer in (self.q, self.k, self.v))
    out = rearrange(F.scaled_dot_product_attention(q, k, v), "b 1 (h w) c -> b c h w", h=h, w=w)
    return x + self.proj_out(out)


def as_published(module: nn.Module) -> nn.Module:
    module = copy.deepcopy(module)
    forwards = {
        CrossAttention: cross_attention,
        SpatialTransformer: spatial_transformer,
        AttentionBlock: attention_block,
    }
    for part in module.modules():
        if type(part) in forwards:
            part.forward = partial(forwards[type(part)], part)
        elif type(part) is AttnBlock:
            part._attended = partial(attn_block, part)
    return module


def conditional() -> nn.Module:
    return UNet(4, 16, (1, 2), 1, (0, 1), num_heads=2, context_dim=8)


def unconditional() -> nn.Module:
    return UNet(4, 16, (1, 2), 1, (0, 1), num_heads=2)


def autoencoder() -> nn.Module:
    return AutoencoderKL(2, 16, (1, 2), 1, attention_levels=[1])


def stirred(make: Callable[[], nn.Module], layout: torch.memory_format) -> nn.Module:
    """Returns make()'s module with random weights instead of zeros, so that every projection counts."""
    torch.manual_seed(0)
    module = make()
    for parameter in module.parameters():
        if parameter.ndim > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return module.to(memory_format=layout)


def error(module: nn.Module, step: int) -> torch.Tensor:
    noise = torch.Generator().manual_seed(step)
    x = torch.randn(2, 4, 8, 8, generator=noise)
    if isinstance(module, AutoencoderKL):
        images = x[:, :3]
        return F.mse_loss(module(images, sample=False)[0], images)
    context = torch.randn(2, 3, 8, generator=noise) if module.condition_widths["context"] else None
    return F.mse_loss(module(x, torch.tensor([1.0, 500.0]), context), x)


def test_a_pointwise_convolution_is_a_product_of_tokens() -> None:
    layer, x = nn.Conv2d(6, 5, 1), torch.randn(2, 6, 3, 4)
    torch.testing.assert_close(pointwise(layer, as_tokens(x)), as_tokens(layer(x)))


@tiered("layout", [torch.channels_last, torch.contiguous_format], fast=1, ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("make", [conditional, unconditional, autoencoder])
@pytest.mark.parametrize("steps", [15, pytest.param(50, marks=pytest.mark.slow)])
def test_training_with_products_ends_with_the_published_weights(make, layout: torch.memory_format, steps: int) -> None:
    """Uses SGD, which does not amplify rounding errors of gradients near zero."""
    ours = stirred(make, layout)
    theirs = as_published(ours)
    begin = copy.deepcopy(ours.state_dict())
    for module in (ours, theirs):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
        for step in range(steps):
            optimizer.zero_grad()
            error(module, step).backward()
            optimizer.step()
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    assert not all(torch.equal(begin[k], v) for k, v in expected.items())
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4)
