"""deterministic=true: the same command makes the same files with any number of data workers, except for the training
time that checkpoints hold."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from chains import SMALL, composed
from forked import trained

from ldm_train.pipeline.train import make_deterministic

RESULTS = ("*.tar", "*.safetensors", "metrics.json", "*.png", "*.gif")


def leaves(tree: Any) -> Iterator[Any]:
    """Yields the leaves of nested dicts, lists and tuples, each preceded by its keys and indices."""
    if isinstance(tree, dict | list | tuple):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield str(key)
            yield from leaves(value)
    else:
        yield tree


@pytest.mark.parametrize("asked", [True, False])
def test_torch_and_lightning_are_asked_for_it(asked: bool):
    config = composed("train", f"deterministic={str(asked).lower()}")
    try:
        make_deterministic(config)
        assert torch.are_deterministic_algorithms_enabled() == asked
        assert bool(config.trainer.deterministic) == asked
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.slow
def test_two_commands_make_equal_files_with_and_without_workers(tmp_path: Path):
    folders = [tmp_path / "none" / "run", tmp_path / "two" / "run"]
    for folder, workers in zip(folders, (0, 2)):
        trained(
            tmp_path, *SMALL, f"runs_dir={folder.parent}", "name=run", f"data_dir={tmp_path}/data", "deterministic=true",
            f"num_workers={workers}",
        )  # fmt: skip
    checkpoints = [sorted(f.rglob("*.ckpt")) for f in folders]
    assert len(checkpoints[0]) == len(checkpoints[1]) >= 4
    for ours, theirs in zip(*checkpoints):
        assert ours.name == theirs.name
        states = [torch.load(path, weights_only=True) for path in (ours, theirs)]
        assert all(state["callbacks"]["Monitor"].pop("seconds") > 0 for state in states)
        for a, b in zip(*(leaves(state) for state in states), strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    made = [{p.relative_to(f): p.read_bytes() for kind in RESULTS for p in f.rglob(kind)} for f in folders]
    assert made[0].keys() == made[1].keys()
    assert {path.name for path in made[0]} >= {"model.safetensors", "metrics.json", "samples.png"}
    assert [str(path) for path, content in made[0].items() if made[1][path] != content] == []
