"""Normalisation groups: the published 32 where layers are wide, never so few channels that a colour is lost."""

import pytest
import torch

from ldm_train.models.layers import group_norm
from ldm_train.models.unet import UNet


@pytest.mark.parametrize("width", [128, 192, 224, 320, 448, 896, 1280, 2560])
def test_published_widths_have_the_published_groups(width: int) -> None:
    assert group_norm(width, 1e-5).num_groups == 32


@pytest.mark.parametrize("width", [4, 16, 18, 20, 24, 30, 48, 90, 96, 144, 200, 240])
def test_any_width_splits_into_groups_of_at_least_four(width: int) -> None:
    assert width / group_norm(width, 1e-5).num_groups >= 4


@torch.no_grad()
def test_a_unet_may_have_any_even_width() -> None:
    """80 channels meet skips of 240, which 32 does not divide."""
    unet = UNet(4, 80, (1, 2), num_res_blocks=1, num_heads=1)
    assert unet(torch.randn(1, 4, 4, 4), torch.tensor([1])).shape == (1, 4, 4, 4)


def test_the_colour_of_a_flat_image_survives() -> None:
    norm, colours = group_norm(16, 1e-6), torch.randn(2, 16, 1, 1).expand(2, 16, 8, 8)
    one, other = norm(colours)
    assert (one - other).abs().max() > 0.1
