"""The order of very many samples is computed without a permutation in memory, and directly at any position."""

import tracemalloc

import numpy as np
import pytest
from scipy import stats

from ldm_train.data import order
from ldm_train.data.order import Batching, Permutation, StepBatches


@pytest.mark.parametrize("count", [1, 2, 3, 5, 16, 17, 100, 4096, 4097, 70_001])
def test_every_sample_occurs_once(count: int):
    assert sorted(Permutation(count, [0, 1])(np.arange(count))) == list(range(count))


def test_values_do_not_depend_on_what_is_asked_together():
    whole = Permutation(10_007, [3, 4])(np.arange(10_007))
    again = Permutation(10_007, [3, 4])
    picks = np.random.default_rng(0).integers(0, 10_007, 300)
    assert [int(again(np.array([p]))[0]) for p in picks] == whole[picks].tolist()


def test_each_key_has_its_own_order():
    orders = {tuple(Permutation(50, [seed, epoch])(np.arange(50))) for seed in range(10) for epoch in range(10)}
    assert len(orders) == 100


@pytest.mark.slow
def test_places_and_neighbours_are_uniform():
    """Chi-squared tests of 400,000 values below 10 ** 8 (their distribution, and that of pairs of neighbours), and of
    the places that each of 20 samples takes under 4,000 keys. A true shuffle would fail each for one in 10,000
    seeds."""
    values = Permutation(10**8, [0, 7])(np.arange(400_000)) // 10**6
    assert stats.chisquare(np.bincount(values, minlength=100)).pvalue > 1e-4
    pairs = np.bincount(values[:-1] // 10 * 10 + values[1:] // 10, minlength=100)
    assert stats.chisquare(pairs).pvalue > 1e-4
    places = np.zeros((20, 20))
    for key in range(4000):
        places[np.arange(20), Permutation(20, [key, 0])(np.arange(20))] += 1
    statistic = float(((places - 200) ** 2 / 200).sum())
    assert stats.chi2(19 * 19).sf(statistic) > 1e-4


def test_micro_batches_of_very_many_samples(monkeypatch: pytest.MonkeyPatch):
    """An epoch over all ranks and micro-batches has every sample once; a resumed order is the tail of the whole one."""
    monkeypatch.setattr(order, "IN_MEMORY", 0)
    ranks = [Batching(8, 2, world_size=2, rank=rank) for rank in range(2)]
    rows = [row for b in ranks for batch in StepBatches(96, b, 0, 0, 24) for row in batch]
    assert sorted(i for _, i in rows) == list(range(96))
    assert {epoch for epoch, _ in rows} == {0}
    whole = list(StepBatches(96, ranks[0], 0, 0, 100))
    assert list(StepBatches(96, ranks[0], 0, 37, 100)) == whole[37:]
    first = [i for batch in whole[:24] for _, i in batch]
    assert first != [i for batch in whole[24:48] for _, i in batch]


def test_a_thousand_million_samples_take_no_memory():
    """The last micro-batch of an epoch of 10 ** 9 samples is found without computing those before it."""
    tracemalloc.start()
    try:
        batches = StepBatches(10**9, Batching(100), 0, 0, 10**9)
        rows = batches.rows(10**7 - 1)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20
    assert len({i for _, i in rows}) == 100
    assert all(0 <= i < 10**9 and epoch == 0 for epoch, i in rows)
