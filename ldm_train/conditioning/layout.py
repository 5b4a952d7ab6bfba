"""Layouts as a condition: labelled boxes as a sequence of tokens (Rombach et al. 2022, section 4.3.2; encoded as in
VQGAN's layout models)."""

import json
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw

from ldm_train.conditioning.base import Conditioner
from ldm_train.conditioning.text import TokenEncoder, mean_of
from ldm_train.devices import to_device


def _whole(label: float) -> int:
    if label != int(label):
        raise ValueError(f"{label} is not the number of a label")
    return int(label)


class LayoutBoxes(Conditioner):
    """Encodes a layout as three tokens per object (label, top left corner, bottom right corner), padding, and two
    tokens for the crop.

    dim: width; must equal the U-Net's context_dim. labels: their names, or their number
    max_objects: 30 as published, 92 tokens; objects are sorted from large to small, and the smallest are left out
        beyond that
    vocab_size: 8192 as published: corners are rounded to a grid with floor(sqrt(vocab_size)) = 90 points per side, the
        last token is padding
    depth, heads: of the transformer
    pooled: also fill the vector slot with the mean hidden state of the objects' tokens (not published; short training
        runs learn positions from it long before cross-attention does)
    The null condition is the empty layout.
    """

    field = "boxes"

    def __init__(
        self,
        dim: int,
        labels: Sequence[str] | int,
        max_objects: int = 30,
        vocab_size: int = 8192,
        depth: int = 16,
        heads: int = 8,
        pooled: bool = False,
        dropout: float = 0.1,
    ):
        super().__init__(dropout)
        self.names = [str(i) for i in range(labels)] if isinstance(labels, int) else list(labels)
        self.grid, self.padding = int(vocab_size**0.5), vocab_size - 1
        if max(len(self.names), self.grid**2) >= vocab_size:
            raise ValueError(
                f"vocab_size {vocab_size} is too small for {len(self.names)} labels and a grid of {self.grid}"
            )
        self.max_objects, self.length, self.pooled = max_objects, 3 * max_objects + 2, pooled
        self.widths = {"context": dim} | ({"vector": dim} if pooled else {})
        self.encoder = TokenEncoder(vocab_size, dim, depth, heads, self.length)

    def _corner(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Unit coordinates -> tokens of the nearest grid points."""
        column, row = ((v.clamp(0, 1) * (self.grid - 1)).round().long() for v in (x, y))
        return row * self.grid + column

    def tokens(self, boxes: torch.Tensor) -> torch.Tensor:
        """boxes (N, 5): x, y, width, height in unit coordinates, label -> (3 * max_objects + 2,) int64.

        Raises ValueError for an unknown label, or a box without an extent or not inside the image.
        """
        x, y, w, h, label = boxes.float().T if len(boxes) else torch.zeros(5, 0)
        if not (boxes.isfinite().all() and (w > 0).all() and (h > 0).all()):
            raise ValueError(
                f"a box has no extent: {boxes[:, :4].tolist()} (x, y, width, height in 0..1, the last two above 0)"
            )
        if len(unknown := label[(label < 0) | (label >= len(self.names))]):
            raise ValueError(f"box label {int(unknown[0])} is outside the {len(self.names)} labels of this model")
        if len(boxes) and (min(x.min(), y.min()) < -0.01 or max((x + w).max(), (y + h).max()) > 1.01):
            raise ValueError(f"a box is not inside the picture: {boxes[:, :4].tolist()} (x, y, width, height in 0..1)")
        order = (w * h).argsort(descending=True, stable=True)[: self.max_objects]
        objects = torch.stack([label.long(), self._corner(x, y), self._corner(x + w, y + h)], dim=1)[order]
        sequence = torch.full((self.length,), self.padding, dtype=torch.long)
        sequence[: objects.numel()] = objects.flatten()
        # The boxes are already relative to the cropped image, so the crop is always the whole image.
        zero, one = torch.zeros(1), torch.ones(1)
        sequence[-2:] = torch.cat([self._corner(zero, zero), self._corner(one, one)])
        return sequence

    def forward(self, values: Sequence[torch.Tensor], drop: torch.Tensor) -> dict[str, torch.Tensor]:
        """B layouts (N_i, 5) -> context (B, L, dim) and its mask (padding is not masked, as published), with `pooled`
        also vector (B, dim)."""
        empty = torch.zeros(0, 5)
        rows = [self.tokens(empty if dropped else boxes.cpu()) for boxes, dropped in zip(values, drop.tolist())]
        ids = to_device(torch.stack(rows), self.device)
        x = self.encoder(ids)
        condition = {"context": x, "context_mask": torch.ones_like(ids, dtype=torch.bool)}
        if self.pooled:
            condition["vector"] = mean_of(x, ids != self.padding)
        return condition

    def null_values(self, count: int, latent_size: Sequence[int]) -> list[torch.Tensor]:
        return [torch.zeros(0, 5)] * count

    def parse(self, text: str) -> torch.Tensor:
        """Parses JSON: [[x, y, width, height, label], ...], with labels by name or number and everything else in 0..1.
        Raises ValueError for an invalid layout."""
        try:
            rows = [(*map(float, row[:4]), row[4]) for row in json.loads(text)]
            labels = [label if isinstance(label, str) else _whole(label) for *_, label in rows]
        except (ValueError, TypeError, IndexError, OverflowError) as error:
            raise ValueError(f"{text!r} is not a layout; write [[x, y, width, height, label], ...]") from error
        rows = [[*box, self._label(label)] for (*box, _), label in zip(rows, labels)]
        boxes = torch.tensor(rows).reshape(-1, 5)
        self.tokens(boxes)  # raises ValueError for unknown labels and boxes not inside the image
        return boxes

    def _label(self, label: str | int) -> int:
        if isinstance(label, int):
            return label
        if label not in self.names:
            raise ValueError(f"unknown label {label!r}; this model knows {', '.join(self.names[:50])}")
        return self.names.index(label)

    def picture(self, values: Sequence[torch.Tensor], size: Sequence[int]) -> torch.Tensor:
        """Draws the outlines of the boxes on white, with one colour per label."""
        height, width = size
        drawn = []
        for boxes in values:
            canvas = Image.new("RGB", (width, height), "white")
            pen = ImageDraw.Draw(canvas)
            for x, y, w, h, label in boxes.tolist():
                left, top = x * width, y * height  # a box may be narrower than a pixel
                corners = [left, top, max(left, left + w * width - 1), max(top, top + h * height - 1)]
                pen.rectangle(corners, outline=f"hsv({int(label) * 222 % 360}, 100%, 80%)", width=max(1, width // 64))
            drawn.append(torch.frombuffer(bytearray(canvas.tobytes()), dtype=torch.uint8).view(height, width, 3))
        return torch.stack(drawn).permute(0, 3, 1, 2) / 127.5 - 1

    def describe(self, values: Sequence[torch.Tensor]) -> list[str]:
        return [", ".join(self.names[int(row[4])] for row in boxes[:3]) for boxes in values]
