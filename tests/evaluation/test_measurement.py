"""An interrupted measurement continues with the same numbers, or begins again."""

from pathlib import Path

import numpy as np
import pytest
import torch
from chains import composed
from torch import nn

from ldm_train.evaluation.evaluator import Evaluator, is_higher_better, parse_metrics
from ldm_train.evaluation.measurement import _saved, collect_reference
from ldm_train.metrics.features import TinyEval
from ldm_train.metrics.measures import Collected

EMPTY = {"done": 0, "batch_size": 4, "images": [], "captions": [], "seconds": 0.0}


@pytest.fixture(scope="module")
def extractor() -> TinyEval:
    return TinyEval()


def collected(extractor: TinyEval, images: int = 0) -> Collected:
    made = Collected(parse_metrics(["fid_tiny", "kid_tiny"], ["tiny"]), {"tiny": extractor})
    if images:
        made.add(torch.rand(images, 3, 16, 16) * 2 - 1, torch.arange(images))
    return made


@pytest.mark.slow
def test_a_damaged_state_changes_no_number(extractor: TinyEval, tmp_path: Path, request: pytest.FixtureRequest):
    whole, partial = collected(extractor, 8), tmp_path / "partial"
    torch.save({"state": EMPTY | {"done": 8}, "made": whole.state()}, partial)
    data = partial.read_bytes()
    before = _saved(partial, EMPTY, again := collected(extractor))
    assert before == EMPTY | {"done": 8}
    mean = again.sets["tiny"].moments.mean
    assert torch.equal(mean, whole.sets["tiny"].moments.mean)
    refused = 0
    for number in range(request.config.getoption("--fuzz")):
        rng, damaged = np.random.default_rng([number, 13]), bytearray(data)
        damaged[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
        partial.write_bytes(bytes(damaged))
        made = collected(extractor)
        if _saved(partial, EMPTY, made) is None:
            refused += 1
            assert not made.sets
        else:
            assert torch.equal(made.sets["tiny"].moments.mean, mean), f"case {number}"
            assert torch.equal(made.sets["tiny"].moments.covariance, whole.sets["tiny"].moments.covariance)
    assert refused


@pytest.mark.parametrize("change", [{"values": [1]}, {"values": {"a": [1]}}, {"sets": {"tiny": {}}}, {"sets": []}])
def test_a_state_of_another_kind_leaves_nothing_behind(change: dict, extractor: TinyEval, tmp_path: Path):
    torch.save({"state": EMPTY, "made": collected(extractor, 8).state() | change}, tmp_path / "partial")
    made = collected(extractor)
    assert _saved(tmp_path / "partial", EMPTY, made) is None
    assert not made.sets
    assert not made.values


class Dropping(nn.Module):
    """Features that differ from call to call while it trains."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(images.flatten(1), 0.5, self.training)


def test_an_extractor_of_the_users_own_is_not_in_training_mode() -> None:
    overrides = ["+evaluation.extractors.mine._target_=test_measurement.Dropping", "evaluation.metrics=[fid_mine]"]
    evaluator = Evaluator(composed("train", "experiment=quickstart", *overrides).evaluation, torch.device("cpu"))
    images = torch.rand(2, 3, 8, 8)
    assert torch.equal(evaluator.extractors["mine"](images), images.flatten(1))


class Reducing(nn.Module):
    """An extractor without weights, whose features depend on an option."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return nn.functional.adaptive_avg_pool2d(images, self.size)[..., :1, :1].flatten(1)


def test_an_option_of_an_extractor_is_part_of_what_is_cached(tmp_path: Path) -> None:
    hashes, means = [], []
    batches = [{"image": torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))}]
    for size in (1, 4):
        overrides = [
            "+evaluation.extractors.mine._target_=test_measurement.Reducing",
            f"+evaluation.extractors.mine.size={size}",
        ]
        config = composed("train", "experiment=quickstart", *overrides, "evaluation.metrics=[fid_mine,fid_tiny]")
        evaluator = Evaluator(config.evaluation, torch.device("cpu"))
        wanted = Collected(evaluator.metrics, evaluator.extractors)
        found = collect_reference(
            "reference", wanted, lambda: batches, {}, tmp_path, torch.device("cpu"), False, evaluator.own_options
        )
        hashes.append(evaluator.hashes)
        means.append(found.sets["reference"]["mine"].moments.mean)
    assert hashes[0]["mine"] != hashes[1]["mine"]
    assert hashes[0]["tiny"] == hashes[1]["tiny"]
    assert not torch.allclose(means[0], means[1])


def test_columns_know_whether_higher_is_better() -> None:
    higher = ["val/psnr", "val/ms_ssim", "val/is", "val/recall_tiny", "val/class_accuracy_mine", "val/code_usage"]
    lower = ["val/loss", "val/fid_inf_tiny", "val/lpips", "val/memorisation_tiny", "val/isolated", "anything"]
    assert all(map(is_higher_better, [*higher, *(f"diffusion:{c}" for c in higher)]))
    assert not any(map(is_higher_better, [*lower, *(f"diffusion:{c}" for c in lower)]))
