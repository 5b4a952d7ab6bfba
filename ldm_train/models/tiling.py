"""Pictures larger than memory or training: overlapping windows, blended so that no seam shows."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from math import ceil, floor

import torch
from torch import nn

from ldm_train.models.layers import widest


def window_starts(length: int, window: int, overlap: int) -> list[int]:
    """Where windows begin that cover `length` evenly, each sharing at least `overlap` with the next.

    Raises ValueError unless 0 <= overlap < window.
    """
    if not 0 <= overlap < window:
        raise ValueError(f"windows of {window} cells cannot overlap by {overlap}; take 0 to {window - 1}")
    if window >= length:
        return [0]
    count = ceil((length - window) / (window - overlap)) + 1
    return [round(i * (length - window) / (count - 1)) for i in range(count)]


@dataclass(frozen=True)
class _Side:
    """A window along one axis, in cells: where it begins and ends, and the part of it, from `low` to `high`, that is
    nearer to its middle than to its neighbours'. These parts tile the length."""

    begin: int
    end: int
    low: float
    high: float
    length: int

    def weights(self, blend: float, scale: int) -> torch.Tensor:
        """Per row: falling linearly over `blend` cells about each inner edge. Rows beyond, next to
        the window's border, have weight 0, as they saw the border's padding."""
        place = self.begin + (torch.arange((self.end - self.begin) * scale) + 0.5) / scale
        ramp, blend = torch.ones(len(place)), max(blend, 1 / scale)
        for inner, distance in ((self.low > 0, place - self.low), (self.high < self.length, self.high - place)):
            if inner:
                ramp = torch.minimum(ramp, (distance / blend + 0.5).clamp(0, 1))
        return ramp

    def own(self, rows: int) -> slice:
        """The slice from `low` to `high` where the window has `rows` rows."""
        scale = rows / (self.end - self.begin)
        # Halves go up for both neighbours; `round` would send them to the even row, which may be another in each.
        return slice(*(floor((edge - self.begin) * scale + 0.5) for edge in (self.low, self.high)))

    def at(self, scale: int) -> slice:
        return slice(self.begin * scale, self.end * scale)


def _sides(length: int, window: int, overlap: int) -> list[_Side]:
    starts = window_starts(length, window, overlap)
    middles = [(a + window + b) / 2 for a, b in pairwise(starts)]
    return [
        _Side(a, a + window, low, high, length)
        for a, low, high in zip(starts, [0.0, *middles], [*middles, float(length)])
    ]


class Windows:
    """Overlapping windows over a picture.

    size, window: (h, w) in cells; overlap: cells that neighbours share at least. blend: the share of the overlap over which
    one gives way to the next; of the rest, each window's outer half is left out.
    """

    def __init__(self, size: Sequence[int], window: Sequence[int], overlap: int, blend: float = 0.5):
        self.size = tuple(size)
        window = [min(w, s) for w, s in zip(window, size)]
        overlaps = [min(overlap, w - 1) for w in window]
        self.blend = [blend * cells for cells in overlaps]
        self.places = list(product(*(_sides(*each) for each in zip(self.size, window, overlaps))))

    def slices(self, scale: int = 1) -> list[tuple[slice, slice]]:
        """(rows, columns) of each window, in cells of 1 / scale."""
        return [(rows.at(scale), columns.at(scale)) for rows, columns in self.places]

    def average(self, parts: Iterable[torch.Tensor], scale: int = 1) -> torch.Tensor:
        """The feathered average of the windows' contents, (B, C, its rows * scale, its columns * scale), in the order of
        `slices`. Returns (B, C, h * scale, w * scale)."""
        total, weights = None, None
        for part, place, (rows, columns) in zip(parts, self.places, self.slices(scale)):
            if total is None:
                total = part.new_zeros(*part.shape[:2], *(s * scale for s in self.size))
                weights = part.new_zeros(total.shape[2:])
            weight = torch.outer(*(side.weights(b, scale) for side, b in zip(place, self.blend))).to(part)
            total[..., rows, columns] += part * weight
            weights[rows, columns] += weight
        return total / weights


@dataclass(frozen=True)
class Step:
    """A stretch of a network between two group norms. norm: of the last tensor of the state, None where there is none.

    run: (state, the normalised tensor) -> the next state, a tuple of tensors (B, C, h, w).
    """

    norm: nn.GroupNorm | None
    run: Callable[[tuple[torch.Tensor, ...], torch.Tensor | None], tuple[torch.Tensor, ...]]


class _Statistics:
    """Mean and variance per sample and group over several windows, joined in float64 where there is one (Chan et al. 1979)."""

    def __init__(self) -> None:
        self.count, self.mean, self.spread = 0, 0.0, 0.0

    def add(self, x: torch.Tensor, groups: int, place: tuple[_Side, _Side]) -> None:
        """The part of x (B, C, h, w) that is the window's own."""
        own = x[..., place[0].own(x.shape[2]), place[1].own(x.shape[3])]
        values = own.float().unflatten(1, (groups, -1)).flatten(2)
        variance, mean = (v.to(widest(v.device)) for v in torch.var_mean(values, dim=2, correction=0))
        count = values.shape[2]
        total = self.count + count
        difference = mean - self.mean
        self.spread = self.spread + variance * count + difference.square() * (self.count * count / total)
        self.mean = self.mean + difference * (count / total)
        self.count = total

    def normalise(self, x: torch.Tensor, norm: nn.GroupNorm) -> torch.Tensor:
        deviation = (self.spread / self.count + norm.eps).sqrt()
        per_channel = x.shape[1] // norm.num_groups
        scale = norm.weight / deviation.float().repeat_interleave(per_channel, dim=1)  # (B, C)
        shift = norm.bias - self.mean.float().repeat_interleave(per_channel, dim=1) * scale
        return (x.float() * scale[..., None, None] + shift[..., None, None]).to(x.dtype)


@dataclass(frozen=True)
class Tiles:
    """Tiled computation of the autoencoder for large pictures. In latent cells: `cells` a side, sharing `overlap`.

    All tiles go through the network in step and wait for each other at every group norm, whose statistics are over
    the whole picture; a tile on its own would have its own contrast and colour. Between the steps they wait in the CPU's
    memory. The result equals the untiled one to rounding where the overlap covers what a pixel sees: 3/8 of it is left out
    on each side. (Attention outside the middle, where a network has some, sees its own tile only.)
    Raises ValueError for counts that make no sense.
    """

    cells: int = 64
    overlap: int = 24

    def __post_init__(self):
        if not 0 <= self.overlap < self.cells:
            raise ValueError(f"tiles of {self.cells} cells cannot share {self.overlap}; take 0 to {self.cells - 1}")

    @torch.no_grad()
    def run(self, steps: Sequence[Step], x: torch.Tensor, size: Sequence[int], input_scale: int, output_scale: int):
        """The steps over x (B, C, h * input_scale, w * input_scale), in tiles of its `size` (h, w).

        Returns (B, C', h * output_scale, w * output_scale).
        """
        windows = Windows(size, (self.cells, self.cells), self.overlap, blend=0.25)
        waiting = [(x[..., rows, columns],) for rows, columns in windows.slices(input_scale)]
        statistics = _Statistics()
        if steps[0].norm is not None:
            for state, place in zip(waiting, windows.places):
                statistics.add(state[-1], steps[0].norm.num_groups, place)
        for step, then in zip(steps, [*steps[1:], None]):
            following = _Statistics()
            for i, place in enumerate(windows.places):
                state = tuple(part.to(x.device) for part in waiting[i])
                state = step.run(state, None if step.norm is None else statistics.normalise(state[-1], step.norm))
                if then is not None and then.norm is not None:
                    following.add(state[-1], then.norm.num_groups, place)
                waiting[i] = tuple(part.cpu() for part in state)
            statistics = following
        return windows.average((state[-1].to(x.device) for state in waiting), output_scale)
