"""The progress bar shows losses and speed, and after a resume starts at the step that training has reached."""

import io
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from chains import chain
from tqdm import tqdm

from ldm_train.training.callbacks import pace, progress


def test_a_log_gets_a_line_in_ten_seconds_and_not_in_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bar keeps tqdm's own interval, which the commands set to 10 s for outputs that are not a terminal."""
    code = (
        "import os, sys; sys.argv = ['ldm-train']; os.environ.pop('TQDM_DISABLE', None); import ldm_train.cli\n"
        "from tqdm import tqdm; print(tqdm().mininterval)"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TQDM")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert float(done.stdout) == 10

    def usual(*arguments: Any, mininterval: float = 10, **options: Any) -> tqdm:
        return tqdm(*arguments, mininterval=mininterval, **options | {"disable": False, "file": io.StringIO()})

    monkeypatch.setattr(progress, "tqdm", usual)
    bar, task = progress.StepBar(), SimpleNamespace(stage="diffusion", shown=())
    bar.on_train_start(SimpleNamespace(global_step=0, max_steps=9, log_every_n_steps=5), task)
    assert bar.bar.mininterval == 10


@pytest.mark.chain
def test_the_pace_is_said_above_the_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(pace, "FIRST", 1)
    monkeypatch.setattr(pace, "MEASURED", 2)
    chain(tmp_path, "progress=true", "stages=[autoencoder]", "autoencoder.max_steps=4").execute()
    assert "images/s in its first steps" in capsys.readouterr().out


@pytest.mark.chain
def test_the_bar_goes_on_where_training_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("progress=true", "stages=[autoencoder]", "autoencoder.micro_batch_size=4", "autoencoder.log_every=2")
    for steps in (4, 8):
        said = io.StringIO()
        monkeypatch.setattr(progress, "tqdm", partial(tqdm, disable=False, file=said))
        chain(tmp_path, *options, f"autoencoder.max_steps={steps}").execute()
        lines = [line for line in said.getvalue().split("\r") if line.startswith("autoencoder")]
        assert f"| {steps - 4}/{steps} [" in lines[0]
        assert ("resumed at step 4" in "".join(lines[:2])) == (steps == 8)
        assert f"| {steps}/{steps} [" in lines[-1]
        assert "l1 0." in lines[-1]
        assert "img/s" in lines[-1]
        assert "validation: " in said.getvalue()
