"""An interrupted measurement continues with the same numbers, or begins anew."""

from pathlib import Path

import numpy as np
import pytest
import torch
from chains import composed
from torch import nn

from ldm_train.evaluation.evaluator import Evaluator, parse_metrics
from ldm_train.evaluation.measurement import _saved
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
