"""Memorisation: a rank test of distances, the figure of closest pairs, and where it is measured."""

from pathlib import Path

import pytest
import torch
from chains import chain
from PIL import Image
from scipy.stats import mannwhitneyu

from ldm_train.evaluation.evaluator import parse_metrics
from ldm_train.metrics.distribution import Estimate
from ldm_train.metrics.measures import Collected
from ldm_train.metrics.memorisation import Copying, Memorisation, nearest
from ldm_train.metrics.sets import FeatureSet
from ldm_train.storage import read_record

METRIC = Memorisation("memorisation_mine", "memorisation", "mine")
COPYING = Copying("copying_mine", "copying", "mine")


def drawn(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, 8, generator=torch.Generator().manual_seed(seed))


TRAINING, HELD_OUT = drawn(300, 0), drawn(200, 1)
OTHERS = FeatureSet.of(TRAINING, groups=1), FeatureSet.of(HELD_OUT, groups=1)


def measured(samples: torch.Tensor):
    return METRIC.measure(FeatureSet.of(samples), torch.empty(0), *OTHERS)


@pytest.mark.parametrize("copies", [0, 30, 100])
def test_it_is_the_statistic_of_mann_and_whitney(copies: int) -> None:
    samples = torch.cat([drawn(100 - copies, 2), TRAINING[:copies], HELD_OUT[:5]])  # ties among them
    ours, theirs = (nearest(x, TRAINING)[0] for x in (samples, HELD_OUT))
    expected = mannwhitneyu(theirs.numpy(), ours.numpy()).statistic / (len(ours) * len(theirs))
    assert measured(samples).value == pytest.approx(expected, abs=1e-12)


def test_new_samples_are_as_new_as_held_out_pictures_and_copies_are_copies() -> None:
    inside, mean = 0, measured(drawn(20_000, 99)).value
    for seed in range(40):
        found = measured(drawn(150, 100 + seed))
        inside += found.low <= mean <= found.high
        assert abs(found.value - 0.5) < 0.15
    assert inside >= 34
    assert measured(TRAINING[:50]).value == 1.0
    assert measured(3 * drawn(50, 5)).value < 0.1


def copying(samples: torch.Tensor, held_out: torch.Tensor = HELD_OUT) -> Estimate:
    others = FeatureSet.of(TRAINING, groups=1), FeatureSet.of(held_out, groups=1)
    return COPYING.measure(FeatureSet.of(samples), torch.empty(0), *others)


@pytest.mark.parametrize("held_out", [drawn(200, 1), drawn(600, 1)], ids=["fewer", "more"])
def test_copying_is_the_share_of_copies_among_new_and_typical_samples(held_out: torch.Tensor) -> None:
    typical = 0.3 * drawn(20_000, 8)  # nearer to all pictures than these are to each other
    assert METRIC.measure(FeatureSet.of(typical), torch.empty(0), *OTHERS).value > 0.8
    for samples in (typical, drawn(20_000, 9)):  # 20,000 samples of these sets: a few percent of chance remain
        assert copying(samples, held_out).value == pytest.approx(0, abs=0.25)
        none = copying(samples[:6_000], held_out).value
        third = copying(torch.cat([samples[:6_000], TRAINING.repeat(10, 1)]), held_out)
        assert third.value == pytest.approx((2 * none + 1) / 3)
        assert third.low < third.value < third.high
    assert copying(TRAINING, held_out).value == 1
    assert copying(held_out, held_out).value == pytest.approx(-len(TRAINING) / len(held_out))
    assert copying(TRAINING, TRAINING).value == 0  # ties


def test_pairs_are_the_nearest_ones_wherever_the_copy_stands() -> None:
    made = FeatureSet(8)
    samples = torch.cat([drawn(40, 3), TRAINING[[7, 250]] + 1e-4, drawn(3, 4)])
    made.add(samples, torch.arange(len(samples)))
    pairs = METRIC.pairs(made, *OTHERS)
    assert {*pairs[:2]} == {(40, 7), (41, 250)}
    assert len(pairs) == 12


def test_it_changes_no_other_metric() -> None:
    """Kernel distances use at most 10,000 samples, whatever else is measured."""
    extractors = {"tiny": lambda images: images.flatten(1)}
    samples = drawn(12_000, 7).view(-1, 8, 1, 1)
    counts = []
    for names in (["kid_tiny"], ["kid_tiny", "memorisation_tiny"]):
        made = Collected(parse_metrics(names, ["tiny"]), extractors)
        made.add(samples, torch.arange(len(samples)))
        counts.append(len(made.sets["tiny"].kept()[0]))
    assert counts == [10_000, 10_000]


@pytest.mark.slow
def test_a_run_measures_it_and_shows_the_closest_pairs(tmp_path: Path) -> None:
    run = chain(tmp_path, "evaluation.metrics=[fid_tiny,memorisation_tiny]", "evaluation.paired=[]")
    run.execute()
    found = read_record(tmp_path / "run" / "evaluation" / "metrics.json")["samples"]["memorisation_tiny"]
    assert 0 <= found["value"] <= 1
    assert found["n_reference"] == 64
    assert "memorisation_tiny" not in read_record(tmp_path / "run" / "evaluation" / "metrics.json")["reconstructions"]
    with Image.open(tmp_path / "run" / "evaluation" / "memorisation_tiny.png") as picture:
        assert picture.width > 3 * picture.height  # eight samples above their nearest training pictures
