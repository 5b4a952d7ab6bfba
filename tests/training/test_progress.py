"""The bar shows losses and speed, and after a resume at once where the training stands."""

import io
from functools import partial
from pathlib import Path

import pytest
from chains import chain
from tqdm import tqdm

from ldm_train.training.callbacks import progress


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
