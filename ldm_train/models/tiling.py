"""Pictures larger than memory or training: overlapping windows, blended so that no seam shows."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise, product
from math import ceil

import torch
from torch import nn


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


def _edges(starts: list[int], window: int, length: int) -> list[tuple[float, float]]:
    """The part of each window that is nearer to its middle than to its neighbours': together they tile the length."""
    middles = [(a + window + b) / 2 for a, b in pairwise(starts)]
    return list(zip([0.0, *middles], [*middles, float(length)]))


def _feather(begin: int, window: int, edge: tuple[float, float], overlap: int, length: int, scale: int) -> torch.Tensor:
    """Weights of a window's `window * scale` rows: falling linearly across half the overlap about each inner edge. What lies
    beyond, nearest to the window's border, saw the border's padding and counts for nothing."""
    place = begin + (torch.arange(window * scale) + 0.5) / scale
    ramp, half = torch.ones(window * scale), max(overlap / 2, 1 / scale)
    for inner, distance in ((edge[0] > 0, place - edge[0]), (edge[1] < length, edge[1] - place)):
        if inner:
            ramp = torch.minimum(ramp, (distance / half + 0.5).clamp(0, 1))
    return ramp


@dataclass(frozen=True)
class Tiles:
    """How the autoencoder takes large pictures apart. In latent cells: `cells` a side, sharing `overlap`.

    passes: how often the tiles are evaluated beforehand for the statistics of the group norms. 0 leaves each tile its own,
        as most tiled decoders do: differences of contrast and colour (about 30 dB from the untiled picture). Each pass
        brings the whole nearer to the untiled result, to which it converges where the overlap covers what a pixel sees.
    Raises ValueError for counts that make no sense.
    """

    cells: int = 64
    overlap: int = 16
    passes: int = 3

    def __post_init__(self):
        if not 0 <= self.overlap < self.cells or self.passes < 0:
            raise ValueError(
                f"tiles of {self.cells} cells with overlap {self.overlap} and {self.passes} passes: the overlap is at least 0 and "
                "below the cells, passes at least 0"
            )

    def map(self, module: nn.Module, part: Callable[[slice, slice], torch.Tensor], size: Sequence[int], scale: int = 1):
        """`part` over tiles of `size` (h, w), the group norms of `module` sharing their statistics; see `Windows.average`."""
        windows = Windows(size, (self.cells, self.cells), self.overlap)
        with shared_statistics(module, windows, lambda: windows.average(part, scale), self.passes):
            return windows.average(part, scale)


class Windows:
    """Overlapping windows over a picture.

    size, window: (h, w) in cells; overlap: cells that neighbours share at least.
    """

    def __init__(self, size: Sequence[int], window: Sequence[int], overlap: int):
        self.size, self.window = tuple(size), tuple(min(w, s) for w, s in zip(window, size))
        self.overlap = [min(overlap, w - 1) for w in self.window]
        starts = [window_starts(*each) for each in zip(self.size, self.window, self.overlap)]
        edges = [_edges(*each) for each in zip(starts, self.window, self.size)]
        self.places = list(product(*(list(zip(*each)) for each in zip(starts, edges))))
        self.owned: tuple[tuple[float, float], tuple[float, float]] | None = None

    def average(self, evaluate: Callable[[slice, slice], torch.Tensor], scale: int = 1) -> torch.Tensor:
        """The feathered average of `evaluate` over the windows.

        evaluate: (rows, columns) in cells -> (B, C, rows * scale, columns * scale). Returns (B, C, h * scale, w * scale).
        """
        total, weights = None, None
        for place in self.places:
            (top, left), (height, width) = (begin for begin, _ in place), self.window
            # The share of the window, from its beginning, that is its own: what statistics count.
            self.owned = tuple(
                ((edge[0] - begin) / length, (edge[1] - begin) / length)
                for (begin, edge), length in zip(place, self.window)
            )
            part = evaluate(slice(top, top + height), slice(left, left + width))
            if total is None:
                total = part.new_zeros(*part.shape[:2], self.size[0] * scale, self.size[1] * scale)
                weights = part.new_zeros(self.size[0] * scale, self.size[1] * scale)
            weight = torch.outer(
                *(
                    _feather(begin, length, edge, overlap, size, scale)
                    for (begin, edge), length, overlap, size in zip(place, self.window, self.overlap, self.size)
                )
            ).to(part)
            rows = slice(top * scale, (top + height) * scale)
            columns = slice(left * scale, (left + width) * scale)
            total[..., rows, columns] += part * weight
            weights[rows, columns] += weight
        self.owned = None
        return total / weights


@contextmanager
def shared_statistics(
    module: nn.Module, windows: Windows, observe: Callable[[], object], passes: int
) -> Iterator[None]:
    """Group norms inside take the mean and variance over all windows instead of each window's own, which would give each
    its own contrast and colour.

    observe: runs the module over all windows once. passes: how often; a norm's statistics depend on the norms before it,
    so they settle as they are repeated.
    """
    norms = [m for m in module.modules() if isinstance(m, nn.GroupNorm)]
    sums: dict[nn.GroupNorm, list[torch.Tensor]] = {}
    known: dict[nn.GroupNorm, list[torch.Tensor]] = {}

    def normalise(norm: nn.GroupNorm, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        x = inputs[0].float().unflatten(1, (norm.num_groups, -1))
        if watching:
            rows, columns = (slice(round(own[0] * n), round(own[1] * n)) for own, n in zip(windows.owned, x.shape[-2:]))
            flat = x[..., rows, columns].flatten(2)
            found = [flat.sum(dim=2), flat.square().sum(dim=2), torch.tensor(float(flat.shape[2]))]
            sums[norm] = [a + b for a, b in zip(sums[norm], found)] if norm in sums else found
        if norm not in known:
            return output
        mean, square, count = known[norm]
        mean, square = mean / count, square / count
        shape = (*mean.shape, *[1] * (x.ndim - 2))
        spread = (square - mean.square()).clamp(min=0).add(norm.eps).sqrt()
        x = ((x - mean.view(shape)) / spread.view(shape)).flatten(1, 2)
        affine = (1, -1, *[1] * (x.ndim - 2))
        return (x * norm.weight.view(affine) + norm.bias.view(affine)).to(output.dtype)

    handles = [norm.register_forward_hook(normalise) for norm in norms]
    try:
        watching = True
        for _ in range(passes):
            observe()
            known, sums = sums, {}
        watching = False
        yield
    finally:
        for handle in handles:
            handle.remove()
