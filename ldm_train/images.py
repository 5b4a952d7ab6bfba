"""Images: conversion between uint8 and [-1, 1], any number of channels for viewing and for 3-channel networks,
captioned grids, and PNG files with metadata."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import MAX_TEXT_CHUNK, PngInfo

from ldm_train.storage import write_atomically

COMPRESSED = 4096  # characters of metadata beyond which they are compressed


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """(..., C, H, W) in [-1, 1] -> uint8 of the same shape, rounded and clamped."""
    return ((images.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def from_uint8(images: torch.Tensor) -> torch.Tensor:
    """uint8 (..., C, H, W) -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def has_colours(channels: int) -> bool:
    """Returns True if images with this many channels are grey or RGB, which viewers and RGB networks accept
    unchanged."""
    return channels in (1, 3)


def channel_groups(channels: int) -> list[list[int]]:
    """Triples of neighbouring channels that together cover all channels, for networks that take three. If the last
    triple would not be full, it starts earlier (5 channels: 0 1 2, 2 3 4). A single channel is repeated three times; of
    two channels the second is repeated."""
    if channels < 3:
        return [[0, channels - 1, channels - 1]]
    return [[k, k + 1, k + 2] for k in (*range(0, channels - 3, 3), channels - 3)]


def in_threes(images: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) -> (B * groups, 3, H, W), with the groups of an image one after the other; RGB is returned
    unchanged."""
    groups = channel_groups(images.shape[1])
    if images.shape[1] == 1:
        return images.expand(-1, 3, -1, -1)
    return images if images.shape[1] == 3 else images[:, groups].flatten(0, 1)


def mean_over_groups(values: torch.Tensor, channels: int) -> torch.Tensor:
    """Averages a network's output for `in_threes` over the groups: (B * groups, ...) -> (B, ...)."""
    groups = len(channel_groups(channels))
    return values if groups == 1 else values.unflatten(0, (-1, groups)).mean(dim=1)


def groups_in_words(channels: int) -> str:
    """Describes how 3-channel networks see images with this many channels; channels are counted from 1."""
    return "mean over channels " + ", ".join(f"{a + 1}-{b + 1}" for a, _, b in channel_groups(channels))


def false_colours(image: torch.Tensor) -> torch.Tensor:
    """(C, H, W) -> (3, H, W) by fixed weights: the channels are placed evenly along red, green, blue, and each
    contributes to the two colours it lies between. The first is red and the last blue; equal channels give grey; RGB
    would be unchanged."""
    place = torch.linspace(0, 2, len(image))
    weights = (1 - (place - torch.arange(3.0)[:, None]).abs()).clamp(min=0)  # (3, C)
    weights = torch.where(weights.sum(dim=1, keepdim=True) > 0, weights, 1.0)  # with two channels, none lies at green
    weights = weights / weights.sum(dim=1, keepdim=True)
    return torch.einsum("kc,chw->khw", weights, image.detach().float().cpu().clamp(-1, 1))


def to_pil(image: torch.Tensor) -> Image.Image:
    """(C, H, W) in [-1, 1] -> PIL image; grey for C = 1, RGB for C = 3, otherwise in `false_colours`."""
    array = to_uint8(image if has_colours(len(image)) else false_colours(image))
    return Image.fromarray(array.permute(1, 2, 0).squeeze(-1).numpy())


def _wrap(text: str, width: int, font: "ImageFont.ImageFont | ImageFont.FreeTypeFont") -> list[str]:
    lines, line = [], ""
    for word in text.split():
        trial = f"{line} {word}".strip()
        if line and font.getlength(trial) > width:
            lines.append(line)
            line = word
        else:
            line = trial
    return [*lines, line]


LONGEST, LINES = 1000, 12  # the characters and lines of a caption that a grid shows


def grid(
    images: torch.Tensor, columns: int | None = None, captions: Sequence[str] | None = None, tile: int = 128
) -> Image.Image:
    """Arranges images (B, C, H, W) in [-1, 1] in one picture, `columns` wide (default: about square).

    Images smaller than `tile` pixels are enlarged by an integer factor without interpolation, so that pixels stay
    visible.
    Captions are written below their tiles.
    """
    count, _, height, width = images.shape
    columns = columns or max(1, round(count**0.5))
    factor = max(1, tile // min(height, width))
    height, width = height * factor, width * factor
    font = ImageFont.load_default(size=11)
    texts = [_wrap(c[:LONGEST], width - 4, font)[:LINES] for c in captions] if captions else [[] for _ in range(count)]
    band = 13 * max(len(t) for t in texts) + 4 if captions else 0
    rows = -(-count // columns)
    canvas = Image.new("RGB", (columns * (width + 4) + 4, rows * (height + band + 4) + 4), "white")
    draw = ImageDraw.Draw(canvas)
    for i in range(count):
        x, y = 4 + i % columns * (width + 4), 4 + i // columns * (height + band + 4)
        canvas.paste(to_pil(images[i]).convert("RGB").resize((width, height), Image.Resampling.NEAREST), (x, y))
        for k, line in enumerate(texts[i]):
            draw.text((x + 2, y + height + 1 + 13 * k), line, fill="black", font=font)
    return canvas


def beside(left: torch.Tensor | None, right: torch.Tensor) -> torch.Tensor:
    """Places two batches (B, C, H, W) side by side, with the channels of `right`. Returns `right` alone if `left` is
    None."""
    if left is None:
        return right
    count, channels, height, width = right.shape
    if left.shape[1] != channels:
        left = left.mean(dim=1, keepdim=True).expand(-1, channels, -1, -1)
    return torch.cat([left.to(right), right.new_ones(count, channels, height, max(1, width // 32)), right], dim=3)


def save_png(image: Image.Image | torch.Tensor, path: str | Path, metadata: dict[str, Any] | None = None) -> Path:
    """Writes a PNG that appears under its final name only when it is complete.

    metadata: JSON-serialisable, stored in the PNG's text chunk "recipe" (see `read_recipe`), compressed if it is long.
    """
    path = Path(path)
    if isinstance(image, torch.Tensor):
        image = to_pil(image)
    info = PngInfo()
    if metadata is not None:
        text = json.dumps(metadata, sort_keys=True)
        # Pillow reads compressed text up to a limit only.
        info.add_text("recipe", text, zip=COMPRESSED < len(text) < MAX_TEXT_CHUNK)
    write_atomically(path, lambda file: image.save(file, format="PNG", pnginfo=info))
    return path


def read_recipe(path: str | Path) -> dict[str, Any]:
    """Returns the metadata that `save_png` stored. Raises KeyError if the file has none."""
    with Image.open(path) as image:
        return json.loads(image.text["recipe"])  # type: ignore[attr-defined]  # of PNGs
