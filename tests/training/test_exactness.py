"""Killed and resumed training equals undisturbed training to the bit: same samples per step, same weights."""

import errno
import os
import random
import re
import shutil
import time
from pathlib import Path

import pytest
import torch
from chains import chain
from forked import begun_training, trained
from lightning import Trainer

from ldm_train import storage
from ldm_train.pipeline.resume import run_lock
from ldm_train.training.callbacks.monitor import Monitor
from ldm_train.training.task import Task

STEPS = 18

# 96 images in batches of 16: six steps an epoch, so that two epoch boundaries are crossed.
OVERRIDES = [
    "logger=csv",
    "progress=false",
    "data.source.count=96",
    "data.source.val_count=16",
    "data.per_shard=32",
    f"autoencoder.max_steps={STEPS}",
    "autoencoder.batch_size=16",
    "autoencoder.micro_batch_size=8",
    "autoencoder.loss.disc_start=8",
    "autoencoder.checkpoint_every=4",
    "autoencoder.val_every=10",
    f"diffusion.max_steps={STEPS}",
    "diffusion.batch_size=16",
    "diffusion.micro_batch_size=8",
    "diffusion.checkpoint_every=4",
    "diffusion.val_every=14",
    "diffusion.samples=2",
    "diffusion.network.channels=32",
    "sampling.num_inference_steps=2",
    "data.flip=true",
]


def options(folder: Path, name: str, *overrides: str) -> list[str]:
    return [
        f"runs_dir={folder}", f"name={name}", f"data_dir={folder}/data", f"trace={folder}/{name}.trace",
        "stages=[autoencoder,latents,diffusion]", *OVERRIDES, *overrides,
    ]  # fmt: skip


def kill_when(folder: Path, name: str, lines: int, *overrides: str) -> None:
    """Starts training and kills it (SIGKILL) as soon as its trace has grown by `lines` micro-batches."""
    trace = folder / f"{name}.trace"
    before = len(trace.read_text().splitlines()) if trace.is_file() else 0
    process = begun_training(folder, *options(folder, name, *overrides))
    for _ in range(6000):
        if trace.is_file() and len(trace.read_text().splitlines()) >= before + lines:
            break
        assert process.exitcode is None, "training ended before it could be killed"
        time.sleep(0.02)
    process.kill()
    process.join()


def keys_per_micro_batch(trace: Path) -> dict[str, str]:
    """Returns the samples that each (stage, micro-batch) saw; asserts that repeated micro-batches saw the same."""
    seen: dict[str, str] = {}
    for line in trace.read_text().splitlines():
        place, _, keys = line.partition("|")
        assert seen.setdefault(place, keys) == keys, f"{place} saw other samples after a resume"
    return seen


def weights(folder: Path, name: str, stage: str, steps: int = STEPS) -> dict[str, torch.Tensor]:
    checkpoint = torch.load(folder / name / stage / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == steps
    return checkpoint["state_dict"] | {f"ema.{k}": v for k, v in checkpoint["ema"]["shadow"].items()}


class Stopped(Exception):
    """Raised to stop training midway."""


@pytest.mark.chain
def test_interrupted_training_continues_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A short form of the last test below: stopped once in each stage, between two checkpoints."""
    short = (
        "data.source.count=32", "data.flip=true", "autoencoder.max_steps=8", "autoencoder.micro_batch_size=4",
        "autoencoder.checkpoint_every=4", "diffusion.max_steps=6", "diffusion.checkpoint_every=3",
        "diffusion.evaluate_every=null", "stages=[autoencoder,latents,diffusion]",
    )  # fmt: skip
    chain(tmp_path, *short, name="calm").execute()
    ended = Monitor.on_train_batch_end
    for steps in (5, 4 + 5):  # the second run starts from step 4, the last checkpoint of the first
        done = iter(range(steps - 1))

        def stop(self: Monitor, trainer: Trainer, task: Task, outputs: object, batch: object, index: int, left=done):
            ended(self, trainer, task, outputs, batch, index)
            if (index + 1) % task.accumulate == 0 and next(left, None) is None:
                raise Stopped

        monkeypatch.setattr(Monitor, "on_train_batch_end", stop)
        with pytest.raises(Stopped):
            chain(tmp_path, *short, name="stopped").execute()
        monkeypatch.undo()
    chain(tmp_path, *short, name="stopped").execute()
    for stage, steps in (("autoencoder", 8), ("diffusion", 6)):
        calm, stopped = (weights(tmp_path, name, stage, steps) for name in ("calm", "stopped"))
        assert calm.keys() == stopped.keys()
        assert all(torch.equal(calm[k], stopped[k]) for k in calm)


@pytest.mark.chain
def test_a_run_whose_folder_is_moved_stops_and_goes_on_once_it_is_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    short = (
        "data.source.count=32", "autoencoder.max_steps=8", "autoencoder.checkpoint_every=4", "autoencoder.log_every=2",
        "stages=[autoencoder]",
    )  # fmt: skip
    chain(tmp_path, *short, name="calm").execute()
    folder, ended = tmp_path / "moved", Monitor.on_train_batch_end

    def move(self: Monitor, trainer: Trainer, task: Task, outputs: object, batch: object, index: int):
        ended(self, trainer, task, outputs, batch, index)
        if index == 4:
            folder.rename(tmp_path / "elsewhere")

    monkeypatch.setattr(Monitor, "on_train_batch_end", move)
    with run_lock(folder), pytest.raises(OSError, match=f"{folder} was moved or deleted while .* move it back"):
        chain(tmp_path, *short, name="moved").execute()
    monkeypatch.undo()
    assert not folder.exists()
    (tmp_path / "elsewhere").rename(folder)
    chain(tmp_path, *short, name="moved").execute()
    calm, moved = (weights(tmp_path, name, "autoencoder", 8) for name in ("calm", "moved"))
    assert all(torch.equal(calm[k], moved[k]) for k in calm)


def results(folder: Path) -> dict[str, str]:
    """Returns the hashes of a run's results: exported model, latents and evaluation metrics."""
    paths = [*folder.glob("latents/*.tar"), folder / "export/model.safetensors", folder / "evaluation/metrics.json"]
    return {str(path.relative_to(folder)): storage.file_sha256(path) for path in paths}


@pytest.mark.slow
def test_a_full_disk_at_any_write_is_named_and_the_same_command_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
):
    """At every twentieth write, or at each with `--fuzz 800`."""
    short = ("data.source.count=32", "diffusion.evaluate_every=null", "evaluation.metrics=[fid_tiny]")
    writes, at, synced = [0], [0], os.fsync

    def fsync(file: int) -> None:
        writes[0] += 1
        if writes[0] == at[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        synced(file)

    monkeypatch.setattr(storage.os, "fsync", fsync)
    chain(tmp_path, *short, name="calm").execute()
    calm, total = results(tmp_path / "calm"), writes[0]
    assert total > 30
    for number in range(1, total + 1, max(1, 800 // count)):
        writes[0], at[0] = 0, number
        said = ""  # stays empty if the file only saves time: the run goes on without it
        try:
            chain(tmp_path, *short, name="full").execute()
        except OSError as error:
            said = str(error)
        assert not said or re.search("could not write .*free some space", said), f"write {number}: {said}"
        chain(tmp_path, *short, name="full").execute()
        assert results(tmp_path / "full") == calm, f"write {number}"
        shutil.rmtree(tmp_path / "full")


# 36 micro-batches a stage; the numbers say how many pass between two kills.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "between_kills"),
    [
        (("num_workers=0",), [(8, 12), (8, 12), (26, 32), (8, 12)]),  # twice in each stage
        (("num_workers=2", "latents.cache=false"), [(12, 24), (33, 38)]),  # once in each
    ],
    ids=["cached", "two_workers_on_the_fly"],
)
def test_killed_and_resumed_equals_undisturbed(
    tmp_path: Path, overrides: tuple[str, ...], between_kills: list[tuple[int, int]]
):
    trained(tmp_path, *options(tmp_path, "undisturbed", *overrides))
    dice = random.Random(0)
    for fewest, most in between_kills:
        kill_when(tmp_path, "killed", dice.randint(fewest, most), *overrides)
    trained(tmp_path, *options(tmp_path, "killed", *overrides))
    calm, killed = (keys_per_micro_batch(tmp_path / f"{n}.trace") for n in ("undisturbed", "killed"))
    assert calm == killed
    assert len(calm) == 2 * 2 * STEPS
    for stage in ("autoencoder", "diffusion"):
        ours, theirs = weights(tmp_path, "undisturbed", stage), weights(tmp_path, "killed", stage)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)
