"""A signal ends a command at once or saves first: the right status, one line, nothing lost, at every moment of its life."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from chains import SMALL

ROOT = Path(__file__).parents[1]
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
COUNT = int(os.environ.get("LDM_TRAIN_TEST_SIGNALS", "6"))  # signals sent to one training
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
WHEN = r"(before training|after step \d+|in the stage \w+)"


def command(folder: Path, name: str, *overrides: str) -> list[str]:
    return [
        sys.executable, str(ROOT / "train.py"), *SMALL, f"runs_dir={folder}", f"data_dir={folder}/data", f"name={name}",
        "autoencoder.max_steps=40", "autoencoder.checkpoint_every=100", "diffusion.max_steps=40", "diffusion.checkpoint_every=100",
        "autoencoder.val_every=20", "diffusion.val_every=20", "diffusion.evaluate_every=null", *overrides,
    ]  # fmt: skip


def start(arguments: list[str], folder: Path, **options) -> subprocess.Popen:
    return subprocess.Popen(
        arguments, cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def wait_until_answered(process: subprocess.Popen) -> None:
    """Until SIGTERM has a handler: the first thing that a command does."""
    while process.poll() is None:
        caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text())
        if int(caught[1], 16) >> (signal.SIGTERM - 1) & 1:
            return
        time.sleep(0.001)


def weights(run: Path, stage: str) -> dict[str, torch.Tensor]:
    checkpoint = torch.load(run / stage / "checkpoints" / "last.ckpt", weights_only=True)
    return checkpoint["state_dict"] | {f"ema.{k}": v for k, v in checkpoint["ema"]["shadow"].items()}


@pytest.mark.chain
def test_signals_at_any_moment_leave_with_their_status_and_the_same_command_continues_to_the_same_weights(
    tmp_path: Path,
):
    begin = time.monotonic()
    calm = start(command(tmp_path, "calm"), tmp_path)
    assert calm.wait(300) == 0, calm.stderr.read()
    whole, dice, sent = time.monotonic() - begin, random.Random(COUNT), 0
    while sent < COUNT:
        process, number = start(command(tmp_path, "disturbed"), tmp_path), SIGNALS[sent % 3]
        wait_until_answered(process)
        moment = dice.uniform(0, 0.9 * whole)
        time.sleep(moment)
        process.send_signal(number)
        output, errors = process.communicate(timeout=120)
        if process.returncode == 0:  # it had less to do than the time it was given
            assert "finished before, skipped" in output or "model: " in output
            subprocess.run(["rm", "-r", tmp_path / "disturbed"], check=True)
            continue
        sent += 1
        assert process.returncode == 128 + number, (moment, output, errors)
        last = errors.strip().splitlines()[-1]
        assert re.fullmatch(rf"stopped by {number.name}( {WHEN})?; run the same command to continue", last), (
            moment,
            errors,
        )
        assert "Traceback" not in errors
    last = start(command(tmp_path, "disturbed"), tmp_path)
    assert last.wait(300) == 0, last.stderr.read()
    for stage in ("autoencoder", "diffusion"):
        ours, theirs = (weights(tmp_path / name, stage) for name in ("calm", "disturbed"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)
