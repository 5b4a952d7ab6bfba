"""Overlapping windows, blended without visible seams, for images too large for memory or larger than in training."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from math import ceil, floor

import torch
from torch import nn

from ldm_train.diffusion.process import widest


def window_starts(length: int, window: int, overlap: int) -> list[int]:
    """Returns the starts of evenly spaced windows that cover `length`, each sharing at least `overlap` with the next.

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
    """A window along one axis, in cells: its begin and end, and `low` to `high`, the part of it that is nearer to its
    middle than to its neighbours' middles. These parts of all windows tile the length."""

    begin: int
    end: int
    low: float
    high: float
    length: int

    def weights(self, blend: float, scale: int, device: torch.device) -> torch.Tensor:
        """Returns a weight per row ((end - begin) * scale,): 1 inside, falling linearly over `blend` cells centred on
        each inner edge, and 0 beyond: rows next to the window's border are affected by its padding."""
        place = self.begin + (torch.arange((self.end - self.begin) * scale, device=device) + 0.5) / scale
        ramp, blend = torch.ones(len(place), device=device), max(blend, 1 / scale)
        for inner, distance in ((self.low > 0, place - self.low), (self.high < self.length, self.high - place)):
            if inner:
                ramp = torch.minimum(ramp, (distance / blend + 0.5).clamp(0, 1))
        return ramp

    def own(self, rows: int) -> slice:
        """Returns the slice from `low` to `high` of a window with `rows` rows."""
        scale = rows / (self.end - self.begin)
        # Rounds halves up for both neighbours; `round` goes to the even row, which may differ between the two.
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
    """Overlapping windows over an image.

    size, window: (h, w) in cells; overlap: minimum number of cells that neighbours share. blend: share of the overlap
    over which one window fades into the next; of the rest of the overlap, each window's outer half is left out.
    """

    def __init__(self, size: Sequence[int], window: Sequence[int], overlap: int, blend: float = 0.5):
        self.size = tuple(size)
        window = [min(w, s) for w, s in zip(window, size)]
        overlaps = [min(overlap, w - 1) for w in window]
        self.blend = [blend * cells for cells in overlaps]
        self.places = list(product(*(_sides(*each) for each in zip(self.size, window, overlaps))))

    def slices(self, scale: int = 1) -> list[tuple[slice, slice]]:
        """Returns the slices (rows, columns) of each window, at `scale` rows per cell."""
        return [(rows.at(scale), columns.at(scale)) for rows, columns in self.places]

    def average(self, parts: Iterable[torch.Tensor], scale: int = 1) -> torch.Tensor:
        """Returns the weighted average of the windows' contents, (B, C, h * scale, w * scale). parts: each window's
        content (B, C, its rows * scale, its columns * scale), in the order of `slices`."""
        total, weights = None, None
        for part, place, (rows, columns) in zip(parts, self.places, self.slices(scale)):
            if total is None:
                total = part.new_zeros(*part.shape[:2], *(s * scale for s in self.size))
                weights = part.new_zeros(total.shape[2:])
            sides = (side.weights(b, scale, part.device) for side, b in zip(place, self.blend))
            weight = torch.outer(*sides).to(part.dtype)
            total[..., rows, columns] += part * weight
            weights[rows, columns] += weight
        return total / weights


@dataclass(frozen=True)
class Step:
    """A part of a network that starts with a group norm. norm: applied to the last tensor of the state; None: no norm.

    run: (state, the normalised tensor) -> the next state, a tuple of tensors (B, C, h, w).
    """

    norm: nn.GroupNorm | None
    run: Callable[[tuple[torch.Tensor, ...], torch.Tensor | None], tuple[torch.Tensor, ...]]


class _Statistics:
    """Mean and variance per sample and group over windows, combined in float64 if available (Chan et al. 1979)."""

    def __init__(self) -> None:
        self.count, self.mean, self.spread = 0, 0.0, 0.0

    def add(self, x: torch.Tensor, groups: int, place: tuple[_Side, _Side]) -> None:
        """Adds the part of a window's content x (B, C, h, w) that no other window counts (see `_Side.own`)."""
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
    """Tiled computation of the autoencoder for large images. Tiles have `cells` latent cells a side, sharing `overlap`.

    All tiles pass through the network in lockstep and are synchronised at every group norm, whose statistics are over
    the whole image; otherwise each tile would have its own contrast and colour. Between steps the tiles are stored in
    CPU memory. The result equals the untiled one up to rounding if the overlap covers a pixel's receptive field: 3/8 of
    it is left out on each side. (Attention outside the middle, if a network has any, sees only its own tile.)
    Raises ValueError unless 0 <= overlap < cells.
    """

    cells: int = 64
    overlap: int = 24

    def __post_init__(self):
        if not 0 <= self.overlap < self.cells:
            raise ValueError(f"tiles of {self.cells} cells cannot share {self.overlap}; take 0 to {self.cells - 1}")

    @torch.no_grad()
    def run(self, steps: Sequence[Step], x: torch.Tensor, size: Sequence[int], input_scale: int, output_scale: int):
        """Runs the steps over x (B, C, h * input_scale, w * input_scale) in tiles. size: (h, w) in latent cells.

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
