"""Normalisation groups: the published 32 for wide layers, and never so few channels per group that a colour is lost.
Also: what a CPU computes in float32 under autocast."""

import pytest
import torch
from torch.nn import functional as F

from ldm_train.models.layers import attend, group_norm
from ldm_train.models.unet import UNet


@pytest.mark.parametrize("width", [128, 192, 224, 320, 448, 896, 1280, 2560])
def test_published_widths_have_the_published_groups(width: int) -> None:
    assert group_norm(width, 1e-5).num_groups == 32


@pytest.mark.parametrize("width", [4, 16, 18, 20, 24, 30, 48, 90, 96, 144, 200, 240])
def test_any_width_splits_into_groups_of_at_least_four(width: int) -> None:
    assert width / group_norm(width, 1e-5).num_groups >= 4


@torch.no_grad()
def test_a_unet_may_have_any_even_width() -> None:
    """With 80 channels, joined skips have 240, which 32 does not divide."""
    unet = UNet(4, 80, (1, 2), num_res_blocks=1, num_heads=1)
    assert unet(torch.randn(1, 4, 4, 4), torch.tensor([1])).shape == (1, 4, 4, 4)


def test_the_colour_of_a_flat_image_survives() -> None:
    norm, colours = group_norm(16, 1e-6), torch.randn(2, 16, 1, 1).expand(2, 16, 8, 8)
    one, other = norm(colours)
    assert (one - other).abs().max() > 0.1


def test_under_autocast_a_cpu_normalises_in_float32_as_a_gpu_does() -> None:
    norm, x = group_norm(32, 1e-5), torch.randn(2, 32, 4, 4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        normed = norm(x)
    assert normed.dtype == torch.float32
    torch.testing.assert_close(normed, F.group_norm(x.float(), norm.num_groups, eps=1e-5))  # at float32's tolerance


@pytest.mark.parametrize("masked", [False, True])
def test_attention_of_a_cpu_in_bfloat16_is_that_of_float32(masked: bool) -> None:
    """Holds for outputs and gradients, with autocast on, and with it off because the tensors are bfloat16 already."""
    q, k, v = (torch.randn(2, 3, n, 8).bfloat16().requires_grad_() for n in (5, 7, 7))
    mask = torch.rand(2, 1, 1, 7) > 0.3 if masked else None
    wide = [t.detach().float().requires_grad_() for t in (q, k, v)]
    F.scaled_dot_product_attention(*wide, attn_mask=mask).sum().backward()
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = attend(q, k, v, mask)
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out, F.scaled_dot_product_attention(*wide, attn_mask=mask).bfloat16())
        gradients = torch.autograd.grad(out.sum(), (q, k, v))
        for gradient, reference in zip(gradients, wide, strict=True):
            torch.testing.assert_close(gradient, reference.grad.bfloat16())


def test_attention_keeps_double_precision() -> None:
    q, k, v = (torch.randn(1, 1, 4, 8, dtype=torch.float64) for _ in range(3))
    expected = (q @ k.transpose(2, 3) / 8**0.5).softmax(dim=3) @ v
    torch.testing.assert_close(attend(q, k, v), expected, rtol=0, atol=1e-12)
