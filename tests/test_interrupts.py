"""A signal ends a command at once, or after it has saved: with the right exit status and one line, and the same command
continues to the same weights."""

import csv
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from chains import SMALL
from forked import descendants
from tiers import tiered

from ldm_train import interrupts
from ldm_train.training import fit

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads /proc")
ROOT = Path(__file__).parents[1]
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
COUNT = int(os.environ.get("LDM_TRAIN_TEST_SIGNALS", "3"))  # signals sent to one training
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
WHEN = r"(before training|after step \d+|in the stage \w+)"


def command(folder: Path, name: str, *overrides: str) -> list[str]:
    return [
        sys.executable, str(ROOT / "train.py"), *SMALL, f"runs_dir={folder}", f"data_dir={folder}/data", f"name={name}",
        "autoencoder.max_steps=20", "autoencoder.checkpoint_every=100", "diffusion.max_steps=20", "diffusion.checkpoint_every=100",
        "autoencoder.val_every=10", "diffusion.val_every=10", "diffusion.evaluate_every=null", *overrides,
    ]  # fmt: skip


def start(arguments: list[str], folder: Path, **options) -> subprocess.Popen:
    return subprocess.Popen(
        arguments, cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def wait_until_answered(process: subprocess.Popen) -> None:
    """Waits until the process handles all signals (the first thing that a command sets up) or has ended."""
    while process.poll() is None:
        caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text())
        if all(int(caught[1], 16) >> (number - 1) & 1 for number in interrupts.SIGNALS):
            return
        time.sleep(0.001)


def weights(run: Path, stage: str) -> dict[str, torch.Tensor]:
    checkpoint = torch.load(run / stage / "checkpoints" / "last.ckpt", weights_only=True)
    return checkpoint["state_dict"] | {f"ema.{k}": v for k, v in checkpoint["ema"]["shadow"].items()}


@pytest.mark.slow
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
        if process.returncode == 0:  # it finished before the signal
            assert "finished before, skipped" in output or "model: " in output
            shutil.rmtree(tmp_path / "disturbed")
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


# Sends SIGTERM in a hook: after Lightning would install its own handlers and before the first step, or after a step.
AT_HOOK = """
import os, signal
from ldm_train.training.callbacks.monitor import Monitor

def hook(self, *given, real=Monitor.{hook}):
    os.kill(os.getpid(), signal.SIGTERM)
    real(self, *given)

Monitor.{hook} = hook
from ldm_train.cli.train import main
main()
"""


@pytest.mark.chain
@pytest.mark.parametrize(
    ("hook", "said", "steps"),
    [
        pytest.param(
            "on_train_start",
            "stopped by SIGTERM in the stage autoencoder; run the same command to continue",
            None,
            marks=pytest.mark.slow,
        ),
        ("on_train_batch_end", "stopped by SIGTERM after step 1; run the same command to continue", 1),
    ],
)
@pytest.mark.slow
def test_sigterm_within_lightning_leaves_at_once_before_the_first_step_and_saves_after_it(
    tmp_path: Path, hook: str, said: str, steps: int | None
):
    (tmp_path / "train.py").write_text(AT_HOOK.format(hook=hook))
    process = start([sys.executable, "train.py", *command(tmp_path, "run")[2:]], tmp_path)
    errors = process.communicate(timeout=200)[1]
    assert process.returncode == 128 + signal.SIGTERM
    assert errors.strip() == said
    assert fit.steps_done(tmp_path / "run/autoencoder/checkpoints/last.ckpt") == (steps or 0)


@pytest.mark.slow
def test_a_signal_in_a_step_with_a_validation_leaves_after_it(tmp_path: Path):
    (tmp_path / "train.py").write_text(AT_HOOK.format(hook="on_train_batch_end"))
    overrides = command(tmp_path, "run", "autoencoder.val_every=1")[2:]
    process = start([sys.executable, "train.py", *overrides], tmp_path)
    errors = process.communicate(timeout=200)[1]
    assert errors.strip() == "stopped by SIGTERM after step 1; run the same command to continue"
    checkpoints = tmp_path / "run/autoencoder/checkpoints"
    assert [fit.steps_done(checkpoints / name) for name in ("last.ckpt", "best.ckpt")] == [1, 1]
    rows = list(csv.DictReader((tmp_path / "run/autoencoder/metrics.csv").open()))
    assert [row["step"] for row in rows if row["val/l1"]] == ["1"]


LEAVING = """
import multiprocessing, time
from ldm_train import interrupts

def work(ready):
    interrupts.become_worker()
    ready.set()
    time.sleep(60)

if __name__ == "__main__":
    interrupts.install()
    context = multiprocessing.get_context("forkserver")
    ready = context.Event()
    child = context.Process(target=work, args=(ready,), daemon=True)
    child.start()
    ready.wait()
"""


def test_a_command_does_not_wait_at_its_end_for_loading_processes(tmp_path: Path):
    (tmp_path / "leaving.py").write_text(LEAVING)
    assert start([sys.executable, "leaving.py"], tmp_path).wait(30) == 0


@pytest.mark.slow
def test_a_loading_process_that_dies_is_named_and_the_same_command_continues(tmp_path: Path):
    def begun() -> subprocess.Popen:
        return start(command(tmp_path, "run", "num_workers=2", f"trace={trace}"), tmp_path)

    trace = tmp_path / "trace"
    process = begun()
    while not trace.is_file() or len(trace.read_text().splitlines()) < 3:
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(descendants(process.pid)[-1], signal.SIGKILL)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert re.fullmatch(r"error: a process that loads data has died \(.*\); .* num_workers=<fewer> .*", errors.strip())
    process = begun()
    assert process.wait(300) == 0, process.stderr.read()
    assert fit.steps_done(tmp_path / "run/diffusion/checkpoints/last.ckpt") == 20


def test_commands_leave_at_once_with_one_line(tmp_path: Path):
    modules = ("train", "sample", "evaluate", "prepare", "sweep", "search", "bench")
    for module, number in zip(modules, SIGNALS * 3):
        process = start([sys.executable, "-m", f"ldm_train.cli.{module}"], tmp_path)
        wait_until_answered(process)
        process.send_signal(number)
        errors = process.communicate(timeout=60)[1]
        assert process.returncode == 128 + number
        assert errors.strip() == f"stopped by {number.name}; run the same command to continue"


LOADING = """
import multiprocessing, sys, time
from ldm_train.interrupts import become_worker

def work():
    become_worker()
    time.sleep(1.5)  # longer than it takes to miss a parent
    print("there", flush=True)
    time.sleep(60)

if __name__ == "__main__":
    child = multiprocessing.get_context(sys.argv[1]).Process(target=work)
    child.start()
    print(child.pid, flush=True)
    time.sleep(60)
"""


@tiered("method", ["forkserver", "fork", "spawn"], fast=1)
def test_a_loading_process_outlives_the_first_signal_of_its_group_and_not_its_parent(method: str, tmp_path: Path):
    (tmp_path / "loading.py").write_text(LOADING)
    process = start([sys.executable, "loading.py", method], tmp_path)
    lines = {process.stdout.readline().strip() for _ in range(2)}
    child = int(next(line for line in lines if line != "there"))
    for number in SIGNALS:
        os.kill(child, number)
    time.sleep(0.3)
    assert Path(f"/proc/{child}").exists()
    process.kill()
    for _ in range(100):
        if not Path(f"/proc/{child}").exists() or ") Z" in Path(f"/proc/{child}/stat").read_text():
            return
        time.sleep(0.05)
    pytest.fail("the loading process lives on")
