"""Which samples make up each batch: a function of the seed and the step alone, even with more samples than fit in
memory."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
from torch.utils.data import Sampler

from ldm_train.data.buckets import BucketOrder, Buckets
from ldm_train.data.files import DataError

IN_MEMORY = 1 << 24  # up to this many samples, orders are permutations in memory; beyond, computed per sample


class Permutation:
    """A permutation of range(count) whose values are computed when requested, for any `count`.

    A Feistel network of eight rounds permutes the integers below the next power of four; values that are not below
    `count` are sent through it again until they are (cycle walking: Black and Rogaway, Ciphers with Arbitrary Finite
    Domains, 2002).
    """

    ROUNDS = 8

    def __init__(self, count: int, key: Sequence[int]):
        """key: non-negative integers that select the permutation."""
        self.count = count
        self.half = np.uint64(max(1, ((count - 1).bit_length() + 1) // 2))  # bits of each half
        self.mask = np.uint64((1 << int(self.half)) - 1)
        self.keys = np.random.SeedSequence(key).generate_state(self.ROUNDS, np.uint64)

    def _network(self, values: np.ndarray) -> np.ndarray:
        left, right = values >> self.half, values & self.mask
        for key in self.keys:
            mixed = right + key  # wraps around; then the finaliser of splitmix64
            mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(31))) & self.mask)
        return (left << self.half) | right

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """positions (N,) below `count` -> values (N,), int64."""
        values = self._network(positions.astype(np.uint64))
        while (beyond := values >= self.count).any():
            values[beyond] = self._network(values[beyond])
        return values.astype(np.int64)


def shuffled(count: int, key: Sequence[int], in_memory: bool) -> Callable[[np.ndarray], np.ndarray]:
    """Returns the permutation of range(count) that `key` selects: positions (N,) below `count` -> values (N,)."""
    return np.random.default_rng(key).permutation(count).take if in_memory else Permutation(count, key)


@dataclass(frozen=True)
class Batching:
    """How a global batch is split: batch_size = micro_batch_size x world_size x accumulate. Raises ValueError if no
    whole number `accumulate` fits."""

    batch_size: int
    micro_batch_size: int | None = None
    world_size: int = 1
    rank: int = 0

    def __post_init__(self):
        share = self.micro_batch_size or self.batch_size // self.world_size
        if share < 1 or self.batch_size % (share * self.world_size):
            raise ValueError(
                f"batch_size {self.batch_size} does not split over {self.world_size} devices with micro_batch_size "
                f"{self.micro_batch_size}; make batch_size a multiple of micro_batch_size x devices"
            )

    @property
    def micro(self) -> int:
        return self.micro_batch_size or self.batch_size // self.world_size

    @property
    def accumulate(self) -> int:
        return self.batch_size // (self.micro * self.world_size)


@dataclass(frozen=True)
class Mixture:
    """Groups of samples that are drawn in given shares, regardless of their sizes.

    members: per group, the indices of its samples, ascending. shares: of each group; they sum to 1.
    """

    members: list[np.ndarray]
    shares: np.ndarray
    _last: dict[int, tuple[int, np.ndarray]] = field(default_factory=dict, repr=False, compare=False)  # see `_quotas`

    @classmethod
    def of(cls, sets: np.ndarray, weights: Sequence[float] | None, labels: np.ndarray | None) -> "Mixture | None":
        """Builds a mixture. sets (N,): the set of each sample. weights: of the sets (None: by size). labels (N,): if
        given, each class of a set gets an equal share of that set. Returns None if all samples are drawn alike."""
        if weights is None and labels is None:
            return None
        sizes = np.bincount(sets)
        share = np.array(weights if weights is not None else sizes, float)
        share /= share.sum()
        members, shares = [], []
        for k in range(len(sizes)):
            mine = np.flatnonzero(sets == k).astype(np.min_scalar_type(len(sets)))
            parts = [mine] if labels is None else [mine[labels[mine] == c] for c in np.unique(labels[mine])]
            members += parts
            shares += [share[k] / len(parts)] * len(parts)
        return cls(members, np.array(shares))

    def epoch(self, seed: int, epoch: int, count: int) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
        """The draws of an epoch of `count` samples, as a function: positions (N,) in the epoch -> (visits (N,),
        sample indices (N,)). The groups get their exact shares at random positions, rounded to whole samples; what is
        rounded off in one epoch comes in a later one. Each group is traversed in one permutation after another,
        continuing from epoch to epoch; `visits` counts how often the sample was drawn before."""
        before, quotas = self._quotas(epoch, count)
        first = np.cumsum([0, *quotas])
        in_memory = count <= IN_MEMORY
        place = shuffled(count, [seed, epoch], in_memory)

        def order(group: int, visit: int) -> Callable[[np.ndarray], np.ndarray]:
            return shuffled(len(self.members[group]), [seed, 1, group, visit], in_memory)

        if in_memory:
            order = cache(order)

        def drawn(positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            places = place(positions)
            groups = np.searchsorted(first, places, "right") - 1
            turns = before[groups] + places - first[groups]
            visits, within = np.divmod(turns, np.array([len(members) for members in self.members])[groups])
            indices = np.empty(len(positions), int)
            for group, visit in np.unique(np.stack([groups, visits]), axis=1).T.tolist():
                here = (groups == group) & (visits == visit)
                indices[here] = self.members[group][order(group, visit)(within[here])]
            return visits, indices

        return drawn

    def _quotas(self, epoch: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(samples of each group in all epochs before this one, samples in this one)."""
        exact = self.shares * count
        least = np.floor(exact).astype(int)
        number, before = self._last.get(count, (0, np.zeros_like(least)))
        if number > epoch:
            number, before = 0, np.zeros_like(least)
        while True:
            quotas = least.copy()
            ahead = np.where(self.shares > 0, before + least - exact * (number + 1), np.inf)
            quotas[np.argsort(ahead, kind="stable")[: count - least.sum()]] += 1
            if number == epoch:
                self._last[count] = number, before
                return before, quotas
            number, before = number + 1, before + quotas


class StepBatches(Sampler):
    """This rank's samples of every micro-batch from `start` to `stop`, as lists of (visit, index); without a
    mixture, a visit is an epoch.

    Each epoch is a permutation seeded by (seed, epoch), or a draw from the mixture; samples that do not fill a global
    batch are dropped. With buckets, all samples of a global batch are from one bucket. Which samples make up a global
    batch does not depend on the number of ranks. Any micro-batch is computed without those before it.
    """

    def __init__(
        self,
        count: int,
        batching: Batching,
        seed: int,
        start: int,
        stop: int,
        mixture: Mixture | None = None,
        buckets: Buckets | None = None,
    ):
        self.count, self.batching, self.seed, self.start, self.stop = count, batching, seed, start, stop
        self.mixture = mixture
        self.buckets = BucketOrder(buckets, batching.batch_size) if buckets else None
        self.steps_per_epoch = self.buckets.batches if self.buckets else count // batching.batch_size
        if self.steps_per_epoch == 0:
            raise DataError(
                f"batch_size {batching.batch_size} exceeds the {count} training images; lower autoencoder.batch_size / "
                "diffusion.batch_size or prepare more data"
            )
        self._epoch = -1  # the epoch of `_drawn`
        # Positions in the epoch -> (visits, indices).
        self._drawn: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]

    def __len__(self) -> int:
        return self.stop  # Lightning counts micro-batches from the beginning of training, also after a resume

    def _begin(self, epoch: int) -> None:
        self._epoch = epoch
        if self.mixture is not None:
            self._drawn = self.mixture.epoch(self.seed, epoch, self.count)
            return
        if self.buckets is not None:
            order = self.buckets.epoch(self.seed, epoch)
        else:
            order = shuffled(self.count, [self.seed, epoch], self.count <= IN_MEMORY)
        self._drawn = lambda positions: (np.full(len(positions), epoch), order(positions))

    def rows(self, micro_batch: int) -> list[tuple[int, int]]:
        """(visit, index) of this rank's samples in one micro-batch."""
        step, part = divmod(micro_batch, self.batching.accumulate)
        epoch, step = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._begin(epoch)
        b = self.batching
        first = step * b.batch_size + (part * b.world_size + b.rank) * b.micro
        visits, indices = self._drawn(np.arange(first, first + b.micro))
        return list(zip(visits.tolist(), indices.tolist()))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return map(self.rows, range(self.start, self.stop))


def evaluation_batches(
    count: int, micro: int, rank: int, world_size: int, limit: int | None, repeat: bool = False
) -> list[list[tuple[int, int]]]:
    """This rank's part of all samples, each exactly once over all ranks, as lists of (visit, index); ranks may differ by
    one sample. limit: so many of them, the first of a fixed shuffle, because shards are often sorted by class. repeat:
    `limit` samples, starting over if there are fewer."""
    total = limit or count
    mine = np.arange(rank, total if repeat else min(count, total), world_size)
    visits, indices = np.divmod(mine, count)
    if limit:
        indices = shuffled(count, [0], count <= IN_MEMORY)(indices)
    rows = list(zip(visits.tolist(), indices.tolist()))
    return [rows[k : k + micro] for k in range(0, len(rows), micro)]
