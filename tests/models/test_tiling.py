"""Overlapping windows: their average gives the whole, and a tiled autoencoder equals the untiled one."""

from itertools import pairwise

import pytest
import torch
from tiers import tiered

from ldm_train.models.autoencoder import AutoencoderKL, AutoencoderVQ
from ldm_train.models.first_stage import FirstStage
from ldm_train.models.tiling import Tiles, Windows, window_starts


@pytest.mark.parametrize(
    ("length", "window", "overlap"), [(10, 4, 2), (11, 4, 1), (9, 4, 3), (4, 4, 0), (3, 4, 2), (64, 16, 5)]
)
def test_windows_cover_everything_and_share_at_least_the_overlap(length: int, window: int, overlap: int) -> None:
    starts = window_starts(length, window, overlap)
    assert starts[0] == 0
    assert starts[-1] + window >= length
    assert all(b <= a + window - overlap for a, b in pairwise(starts))


@pytest.mark.parametrize("scale", [1, 4])
@pytest.mark.parametrize(
    ("size", "window", "overlap"), [((12, 9), (4, 5), 2), ((10, 10), (4, 4), 0), ((7, 30), (8, 8), 7)]
)
def test_the_average_of_equal_windows_is_the_picture(size: tuple, window: tuple, overlap: int, scale: int) -> None:
    picture = torch.randn(2, 3, size[0] * scale, size[1] * scale)

    windows = Windows(size, window, overlap)
    parts = (picture[..., rows, columns] for rows, columns in windows.slices(scale))
    torch.testing.assert_close(windows.average(parts, scale), picture)


def test_between_windows_that_differ_the_average_rises_without_a_jump() -> None:
    """For two windows of values 0 and 1, no step between neighbouring cells is larger than 1 / (half the overlap)."""
    made = Windows((1, 24), (1, 16), 8).average(torch.full((1, 1, 1, 16), float(k)) for k in range(2))[0, 0, 0]
    assert made[0] == 0
    assert made[-1] == 1
    assert (made[1:] - made[:-1]).min() >= 0
    assert (made[1:] - made[:-1]).max() <= 1 / 4 + 1e-6


def autoencoder(kind: str, levels: int, patch_size: int = 1) -> AutoencoderKL | AutoencoderVQ:
    torch.manual_seed(0)
    options = {"z_channels": 3, "channels": 16, "channel_mult": (1, 2, 2)[:levels], "num_res_blocks": 1}
    options["patch_size"] = patch_size
    return AutoencoderKL(**options) if kind == "kl" else AutoencoderVQ(**options, num_codes=64)


@pytest.fixture(params=["kl", "vq"])
def first_stage(request: pytest.FixtureRequest) -> FirstStage:
    return FirstStage(autoencoder(request.param, 2), 0.7, 0.1)


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(10 * torch.log10(4 / (a - b).square().mean()))


def pictures(f: int) -> torch.Tensor:
    """Returns an image, half flat and half noisy, whose statistics differ from those of its tiles."""
    x = torch.randn(1, 3, 96 * f, 64 * f, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)
    x[:, :, : 48 * f] = 0.6
    return x


@pytest.mark.parametrize(("levels", "patch_size"), [(2, 1), (2, 2), pytest.param(3, 1, marks=pytest.mark.slow)])
@tiered("kind", ["kl", "vq"], fast=1)
def test_a_tiled_autoencoder_equals_the_untiled_one(kind: str, levels: int, patch_size: int) -> None:
    """Equal up to rounding (above 85 dB) if the overlap covers the receptive field, with no jump between tiles."""
    net = autoencoder(kind, levels, patch_size)
    f = net.downsample_factor
    images = pictures(f)
    tiles = Tiles(cells=48, overlap=40)
    with torch.no_grad():
        moments = net.encode_moments(images)
        again = net.encode_moments(images, tiles)
        assert float((again - moments).abs().max() / moments.std()) < 1e-4
        latents = net.posterior(moments).mean
        whole = net.decode(latents)
        error = (net.decode(latents, tiles) - whole).abs()
    assert float(10 * torch.log10(4 / error.square().mean())) > 85
    assert error.max() < 1e-3


@pytest.mark.parametrize("length", [103, 176])
def test_tiles_at_odd_distances_count_every_row_once(length: int) -> None:
    """Default overlap, windows an odd number of cells apart; bright rows counted twice would shift the statistics."""
    net = autoencoder("kl", 2)
    latents = torch.randn(1, 3, length, 8, generator=torch.Generator().manual_seed(2))
    latents[:, :, [length // 2, 50]] += 20
    images = torch.nn.functional.interpolate(latents, scale_factor=2.0).clamp(-5, 5)
    tiles = Tiles()
    with torch.no_grad():
        assert (net.decode(latents, tiles) - net.decode(latents)).abs().max() < 1e-4
        moments = net.encode_moments(images)
        assert (net.encode_moments(images, tiles) - moments).abs().max() < 1e-4 * moments.std()


def test_too_small_an_overlap_stays_a_good_picture() -> None:
    """Tiles with their own statistics, as in most tiled decoders, are about 20 dB worse than joint ones."""
    net = autoencoder("kl", 2)
    with torch.no_grad():
        latents = net.posterior(net.encode_moments(pictures(2))).mean
        whole = net.decode(latents)
        windows = Windows(latents.shape[-2:], (32, 32), 8)
        alone = windows.average((net.decode(latents[..., r, c]) for r, c in windows.slices()), 2)
        joined = net.decode(latents, Tiles(32, 8))
    assert psnr(joined, whole) > 45
    assert psnr(joined, whole) > psnr(alone, whole) + 15


def test_attention_in_tiles_sees_its_own_tile() -> None:
    net = AutoencoderKL(z_channels=3, channels=16, channel_mult=(1, 2), num_res_blocks=1, attention_levels=(1,))
    latents = torch.randn(1, 3, 24, 24)
    with torch.no_grad():
        assert psnr(net.decode(latents, Tiles(16, 8)), net.decode(latents)) > 25


def test_pictures_that_fit_into_a_tile_are_not_taken_apart(first_stage: FirstStage) -> None:
    latents = torch.randn(1, 3, 16, 16)
    assert torch.equal(first_stage.decode(latents, tiles=Tiles(16, 4)), first_stage.decode(latents))


def test_decoding_is_differentiable_also_through_a_codebook(first_stage: FirstStage) -> None:
    latents = torch.randn(1, 3, 8, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(first_stage.decoded(latents).square().sum(), latents)
    assert gradient.abs().max() > 0
    assert not first_stage.decode(latents).requires_grad


@pytest.mark.parametrize("options", [{"cells": 8, "overlap": 8}, {"cells": 8, "overlap": -1}])
def test_tiles_that_make_no_sense_are_named(options: dict) -> None:
    with pytest.raises(ValueError, match="cannot share"):
        Tiles(**options)
    with pytest.raises(ValueError, match="cannot overlap by 4"):
        window_starts(10, 4, 4)
