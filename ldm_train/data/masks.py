"""Masks for inpainting: free-form strokes of three widths and boxes in the style of LaMa (Suvorov et al. 2022, with
ranges chosen here), and image borders."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw


@dataclass(frozen=True)
class Strokes:
    """How strokes and boxes of one width are drawn. Lengths are in pixels of a 256-pixel image and scale with the
    size."""

    length: int
    width: int
    times: tuple[int, int]
    corners: tuple[int, int]
    box_share: float
    box_size: tuple[int, int]
    box_times: tuple[int, int]


WIDTHS = {
    "thin": Strokes(50, 10, (20, 40), (1, 5), 0.0, (10, 50), (0, 0)),
    "medium": Strokes(100, 50, (4, 5), (1, 5), 0.3, (10, 50), (1, 5)),
    "thick": Strokes(200, 100, (1, 5), (1, 5), 0.3, (30, 150), (1, 3)),
}
BORDERS = ("left", "right", "top", "bottom", "all")


def _strokes(draw: ImageDraw.ImageDraw, size: tuple[int, int], kind: Strokes, rng: np.random.Generator) -> None:
    height, width = size
    scale = min(size) / 256
    for _ in range(int(rng.integers(kind.times[0], kind.times[1] + 1))):
        x, y = float(rng.uniform(0, width)), float(rng.uniform(0, height))
        for corner in range(int(rng.integers(kind.corners[0], kind.corners[1] + 1))):
            angle = float(rng.uniform(0, 4.0))
            angle = 2 * np.pi - angle if corner % 2 == 0 else angle
            reach = scale * (10 + rng.uniform(0, kind.length))
            thick = max(1, round(scale * (5 + rng.uniform(0, kind.width))))
            to_x = float(np.clip(x + reach * np.sin(angle), 0, width))
            to_y = float(np.clip(y + reach * np.cos(angle), 0, height))
            draw.line([(x, y), (to_x, to_y)], fill=1, width=thick)
            radius = thick / 2
            draw.ellipse([to_x - radius, to_y - radius, to_x + radius, to_y + radius], fill=1)
            x, y = to_x, to_y
    if rng.random() < kind.box_share:
        for _ in range(int(rng.integers(kind.box_times[0], kind.box_times[1] + 1))):
            h, w = (max(1, round(scale * rng.uniform(*kind.box_size))) for _ in range(2))
            top, left = rng.uniform(0, max(1, height - h)), rng.uniform(0, max(1, width - w))
            draw.rectangle(
                [left, top, left + (w - 1), top + (h - 1)], fill=1
            )  # left + w - 1 can round to less than left


def _border(size: tuple[int, int], side: str, share: float) -> np.ndarray:
    mask = np.zeros(size, np.uint8)
    rows, columns = (max(1, round(share * length)) for length in size)
    edges = {"top": np.s_[:rows], "bottom": np.s_[-rows:], "left": np.s_[:, :columns], "right": np.s_[:, -columns:]}
    for edge in edges if side == "all" else (side,):
        mask[edges[edge]] = 1
    return mask


class MaskedImage:
    """Derives the field `masked_image` (C + 1, H, W) from an image: the image with the hole at -1, and the mask,
    which is 1 in the hole.

    kinds: relative frequency of each kind of mask ("thin", "medium", "thick" strokes, "border" for outpainting)
    most: masks that cover more than this share of the image are drawn again
    """

    def __init__(self, kinds: Mapping[str, float] | None = None, most: float = 0.6):
        self.kinds = dict(kinds or {"thin": 1, "medium": 1, "thick": 1, "border": 0.5})
        if unknown := set(self.kinds) - {*WIDTHS, "border"}:
            raise ValueError(f"unknown masks {sorted(unknown)}; kinds are {', '.join(WIDTHS)}, border")
        self.most = most

    def mask(self, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
        """Draws a mask (H, W) uint8, 1 in the hole, that is neither empty nor full."""
        names, weights = list(self.kinds), np.array(list(self.kinds.values()), float)
        for _ in range(100):
            kind = str(rng.choice(names, p=weights / weights.sum()))
            if kind == "border":
                drawn = _border(size, str(rng.choice(BORDERS)), float(rng.uniform(0.1, 0.4)))
            else:
                canvas = Image.new("L", (size[1], size[0]))
                _strokes(ImageDraw.Draw(canvas), size, WIDTHS[kind], rng)
                drawn = np.asarray(canvas)
            if 0 < drawn.mean() <= self.most:
                return drawn
        return _border(size, "left", min(0.25, self.most))

    def __call__(self, image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        """image (C, H, W) in [-1, 1] -> (C + 1, H, W)."""
        return masked_image(image, torch.from_numpy(self.mask(tuple(image.shape[1:]), rng).copy())[None])


def known_colour(images: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """The mean colour (B, C, 1, 1) outside the hole of images (B, C, H, W); masks (B, 1, H, W) are 1 in the hole."""
    known = 1 - masks
    return (images * known).sum(dim=(2, 3), keepdim=True) / known.sum(dim=(2, 3), keepdim=True).clamp(min=1)


def masked_image(image: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Combines an image (C, H, W) in [-1, 1] and a mask (1, H, W), over 0.5 in the hole, into (C + 1, H, W): the
    image with the hole at -1, and the mask as 0 or 1."""
    mask = (mask > 0.5).to(image.dtype)
    return torch.cat([image * (1 - mask) - mask, mask])
