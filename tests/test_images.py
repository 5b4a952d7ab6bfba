"""Pictures: uint8 values survive the round trip to floats, grids show their pictures, PNGs contain their recipe."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_train.images import (
    channel_groups,
    false_colours,
    from_uint8,
    grid,
    in_threes,
    mean_over_groups,
    read_recipe,
    save_png,
    to_pil,
    to_uint8,
)


def test_every_byte_survives_the_round_trip() -> None:
    bytes_ = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    images = from_uint8(bytes_)
    assert (images.min().item(), images.max().item()) == (-1.0, 1.0)
    assert torch.equal(to_uint8(images), bytes_)
    assert torch.equal(to_uint8(images.double()), bytes_)


def test_values_outside_the_range_are_clamped_and_others_rounded() -> None:
    step = 2 / 255
    values = torch.tensor([-5.0, 5.0, -1 + 0.4 * step, -1 + 0.6 * step]).view(1, 1, 4)
    assert to_uint8(values).flatten().tolist() == [0, 255, 0, 1]


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (2, "RGB"), (3, "RGB"), (4, "RGB"), (5, "RGB"), (13, "RGB")])
def test_any_number_of_channels_can_be_shown(channels: int, mode: str) -> None:
    image = torch.rand(channels, 6, 9) * 2 - 1
    shown = to_pil(image)
    assert (shown.mode, shown.size) == (mode, (9, 6))
    if channels in (1, 3):
        assert (np.atleast_3d(np.asarray(shown)) == to_uint8(image).permute(1, 2, 0).numpy()).all()


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 8, 31])
def test_false_colours_show_every_channel_at_its_place(channels: int) -> None:
    grey = false_colours(torch.full((channels, 2, 2), 0.5))
    torch.testing.assert_close(grey, torch.full((3, 2, 2), 0.5))
    dark = false_colours(torch.full((channels, 1, 1), -1.0)).flatten()
    weight = torch.stack(  # (C, 3): what each channel alone adds to red, green and blue
        [
            false_colours(torch.where(torch.arange(channels)[:, None, None] == k, 1.0, -1.0)).flatten() - dark
            for k in range(channels)
        ]
    )
    assert (weight.sum(dim=1) > 0.01).all()
    assert (weight >= 0).all()
    if channels > 1:
        assert weight[0].argmax() == 0
        assert weight[-1].argmax() == 2
        assert (weight - weight.flip(0, 1)).abs().max() < 1e-5  # the same read from either end
    rgb = torch.rand(3, 4, 5) * 2 - 1
    torch.testing.assert_close(false_colours(rgb), rgb)


@pytest.mark.parametrize("channels", range(1, 14))
def test_groups_of_three_hold_every_channel_in_order(channels: int) -> None:
    groups = channel_groups(channels)
    assert len(groups) == -(-channels // 3)
    assert sorted({c for group in groups for c in group}) == list(range(channels))
    assert all(group == sorted(group) and len(group) == 3 for group in groups)
    images = torch.arange(channels).float().view(1, -1, 1, 1) + 100 * torch.arange(2).view(-1, 1, 1, 1)
    seen = in_threes(images)
    assert seen.flatten(1).tolist() == [[c + 100.0 * i for c in group] for i in range(2) for group in groups]
    expected = torch.tensor(groups).float().mean() + torch.tensor([0.0, 100.0])
    torch.testing.assert_close(mean_over_groups(seen.mean(dim=(1, 2, 3)), channels), expected)


def test_a_grid_shows_each_image_at_its_place_enlarged_by_whole_pixels() -> None:
    images = torch.rand(5, 3, 16, 16) * 2 - 1
    picture = np.asarray(grid(images, columns=3, tile=32))
    assert picture.shape == (2 * 36 + 4, 3 * 36 + 4, 3)
    for i in range(5):
        y, x = 4 + i // 3 * 36, 4 + i % 3 * 36
        tile = picture[y : y + 32 : 2, x : x + 32 : 2]
        assert (tile == to_uint8(images[i]).permute(1, 2, 0).numpy()).all()
    assert (picture[40:, 76:] == 255).all()  # the empty place


@pytest.mark.parametrize("count", [1, 2, 7, 16])
def test_a_grid_without_columns_is_about_square(count: int) -> None:
    width, height = grid(torch.zeros(count, 1, 8, 8), tile=8).size
    assert 0.4 < width / height < 2.5


def test_captions_are_written_below_their_tiles_and_wrap() -> None:
    images = torch.ones(2, 3, 64, 64)
    plain = grid(images, columns=2, tile=64)
    captioned = grid(images, columns=2, captions=["", "a long caption that needs several lines to fit"], tile=64)
    assert captioned.width == plain.width
    band = np.asarray(captioned)[68:]
    assert band.shape[0] > 30
    assert (band[:, :68] == 255).all()
    assert (band[:, 70:] < 128).any()


def test_a_png_carries_its_recipe(tmp_path: Path) -> None:
    recipe = {"seed": 7, "prompt": "ein roter Kreis - é", "steps": [1, 2]}
    image = torch.rand(3, 8, 8) * 2 - 1
    path = save_png(image, tmp_path / "deep" / "a.png", recipe)
    assert read_recipe(path) == recipe
    with Image.open(path) as stored:
        assert (np.asarray(stored) == to_uint8(image).permute(1, 2, 0).numpy()).all()
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]


def test_a_png_without_a_recipe_says_so(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        read_recipe(save_png(torch.zeros(1, 4, 4), tmp_path / "a.png"))


def test_a_failed_save_leaves_the_old_picture_and_no_half_one(tmp_path: Path) -> None:
    path = save_png(torch.zeros(3, 4, 4), tmp_path / "a.png", {"version": 1})
    with pytest.raises(OSError):
        save_png(Image.new("CMYK", (4, 4)), path, {"version": 2})
    assert read_recipe(path) == {"version": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
