"""A user's own stage outside the package, named by `_target_`, is skipped, refused and restarted like the others."""

import sys
from pathlib import Path

import pytest
from chains import chain

from ldm_train.errors import Refused
from ldm_train.pipeline.resume import read_note

STAGE = '''
from ldm_train.checkpoints.native import load_model
from ldm_train.pipeline.stage import Stage


class Sizes(Stage):
    """How many weights a trained model has."""

    name, needs, identity = "sizes", ("diffusion",), "weights"

    def key(self, run):
        return {"weights": run.result("diffusion"), "unit": run.config.unit}

    def check(self, run):
        if run.config.unit <= 0:
            raise ValueError(f"unit={run.config.unit} is not a unit")

    def run(self, run, folder):
        model = load_model(run.folder / "diffusion" / "model")
        count = sum(p.numel() for p in model.parameters()) / run.config.unit
        (folder / "count.txt").write_text(str(count))
        return {"weights": count}
'''
OWN = ("+stage.sizes._target_=my_stage.Sizes", "diffusion.evaluate_every=null")


@pytest.fixture
def _own_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "my_stage.py").write_text(STAGE)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("my_stage", None)


@pytest.mark.slow
@pytest.mark.usefixtures("_own_package")
def test_a_stage_of_ones_own_runs_after_what_it_needs(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    stages = "stages=[autoencoder,latents,diffusion,sizes]"
    chain(tmp_path, *OWN, "+unit=1", stages).execute()
    count = float((tmp_path / "run/sizes/count.txt").read_text())
    assert read_note(tmp_path / "run/sizes")["result"] == {"weights": count}
    capsys.readouterr()
    chain(tmp_path, *OWN, "+unit=1", stages).execute()
    assert "sizes: finished before, skipped" in capsys.readouterr().out
    with pytest.raises(Refused, match=r"unit: 1 -> 2"):
        chain(tmp_path, *OWN, "+unit=2", stages).execute()
    with pytest.raises(ValueError, match="unit=-1 is not a unit"):
        chain(tmp_path, *OWN, "+unit=-1", stages).execute()
    with pytest.raises(Refused, match=r"sizes were made from it"):  # further training would make it outdated
        chain(tmp_path, *OWN, "+unit=1", stages, "diffusion.max_steps=8").execute()
    chain(tmp_path, *OWN, "+unit=1000", stages, "restart=sizes").execute()
    assert float((tmp_path / "run/sizes/count.txt").read_text()) == count / 1000


@pytest.mark.usefixtures("_own_package")
def test_a_stage_that_stands_before_what_it_needs_or_is_none_is_named(tmp_path: Path) -> None:
    run = chain(tmp_path, *OWN, "~stage.diffusion", "~stage.evaluation", "~stage.export")
    with pytest.raises(ValueError, match=r"stage\.sizes needs diffusion, which is not among the stages before it"):
        run.chosen()
    with pytest.raises(ValueError, match=r"stage\.mine: builtins\.dict is not a stage of that name"):
        chain(tmp_path, "+stage.mine._target_=builtins.dict").chosen()
