"""ldm-bench: what it measures is there and compares equals; speed itself is never tested."""

import json
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from ldm_train.bench import bench
from ldm_train.configuration import config_folder


def run(*options: str) -> dict:
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        return bench(compose("bench", list(options)))


def test_sampling_is_measured_against_a_loop_that_computes_the_same(tmp_path: Path, capsys: pytest.CaptureFixture):
    found = run("runs=1", "steps=2", "batch_size=1", "accelerator=cpu", f"out={tmp_path}/bench.json")
    assert [set(row) for row in found.values()] == [{"ours", "diffusers"}, {"kept", "computed"}, {"ours", "diffusers"}]
    assert all(value > 0 for row in found.values() for value in row.values())
    assert json.loads((tmp_path / "bench.json").read_text())["results"] == found
    assert "ratio" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "message"),
    [("what=everything", "what=sampling is what can be measured"), ("runs=0", "must be at least 1")],
)
def test_what_cannot_be_measured_is_named(option: str, message: str):
    with pytest.raises(ValueError, match=message):
        run(option)
