"""Killed and resumed training equals undisturbed training to the bit: same samples per step, same weights."""

import csv
import errno
import hashlib
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from chains import chain
from forked import begun_training, descendants, end_within, trained
from lightning import Trainer
from omegaconf import OmegaConf

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
    "diffusion.evaluate_every=null",
    "data.flip=true",
    "evaluation.images=8",
    "evaluation.reference_images=8",
    "evaluation.metrics=[fid_tiny]",
    "data.adherence.scenes=4",
    "data.adherence.held_out=2",
    "data.adherence.seeds=2",
    "accelerator=cpu",
]


def options(folder: Path, name: str, *overrides: str) -> list[str]:
    return [
        f"runs_dir={folder}", f"name={name}", f"data_dir={folder}/data", f"trace={folder}/{name}.trace",
        *OVERRIDES, *overrides,
    ]  # fmt: skip


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
def test_a_finished_training_that_goes_on_keeps_the_steps_of_its_rows(tmp_path: Path):
    short = ("data.source.count=32", "stages=[autoencoder]", "autoencoder.log_every=2", "autoencoder.val_every=4",
             "autoencoder.checkpoint_every=4")  # fmt: skip
    for steps in (4, 8):
        chain(tmp_path, *short, f"autoencoder.max_steps={steps}").execute()
    with open(tmp_path / "run" / "autoencoder" / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [2, 4, 6, 8]
    assert all(row["train/lr"] for row in rows)
    assert [bool(row["val/psnr"]) for row in rows] == [False, True, False, True]
    chain(tmp_path, *short, "autoencoder.max_steps=4").execute()  # fewer: what is there stays
    assert OmegaConf.load(tmp_path / "run" / "config.yaml").autoencoder.max_steps == 8


@pytest.mark.chain
@pytest.mark.slow
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
        at[0] = 0  # the run makes fewer writes than the first, which also made the data
        chain(tmp_path, *short, name="full").execute()
        assert results(tmp_path / "full") == calm, f"write {number}"
        shutil.rmtree(tmp_path / "full")


# Each two of the choices (ranks, loading processes, cache) occur together in one of these.
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="reads /proc")
@pytest.mark.parametrize(
    "overrides",
    [
        ("num_workers=0",),
        ("num_workers=2", "latents.cache=false"),
        ("devices=2", "num_workers=0", "latents.cache=false"),
        ("devices=2", "num_workers=2"),
    ],
    ids=["cached", "two_workers_on_the_fly", "two_ranks_on_the_fly", "two_ranks_with_two_workers_each_cached"],
)
def test_killed_at_any_moment_and_continued_equals_undisturbed(
    tmp_path: Path, overrides: tuple[str, ...], kills: int, record_property: Callable[[str, object], None]
):
    """kill -9 of the command or one of its processes, `--kills` times, from the first import to the exported model."""
    begin = time.monotonic()
    trained(tmp_path, *options(tmp_path, "calm", *overrides))
    whole, calm = time.monotonic() - begin, outcome(tmp_path, "calm")
    dice, killed, finished = random.Random(), list[str](), False
    while len(killed) < kills or not finished:
        process = begun_training(tmp_path, *options(tmp_path, "killed", *overrides))
        finished = False
        process.join(dice.uniform(0, whole) if len(killed) < kills else None)
        if process.exitcode is None:
            everyone = [process.pid, *descendants(process.pid)]
            victim = dice.choice(everyone)
            killed.append(f"{everyone.index(victim)} of {len(everyone)} after {progress(tmp_path)}")
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(victim, signal.SIGKILL)
            process.join(300)
            assert end_within(120, everyone), f"processes live on: {killed}"
        if process.exitcode == 0:
            finished = True
            assert outcome(tmp_path, "killed") == calm, killed
            shutil.rmtree(tmp_path / "killed")
            (tmp_path / "killed.trace").unlink()
    record_property("killed", killed)
    print(*killed, sep="\n")


def progress(folder: Path) -> str:
    """Returns the last micro-batch that the killed run's trace names, or the last stage that has a folder."""
    trace = folder / "killed.trace"
    lines = trace.read_text().splitlines() if trace.is_file() else []
    stages = ("autoencoder", "latents", "diffusion", "evaluation", "export")
    begun = [stage for stage in stages if (folder / "killed" / stage).is_dir()]
    return f"{lines[-1].partition('|')[0] if lines else 'no step'} ({begun[-1] if begun else 'no stage'})"


def outcome(folder: Path, name: str) -> dict[str, str]:
    """Returns what each micro-batch saw and the hashes of both stages' weights and of the run's results."""
    hashes = results(folder / name) | keys_per_micro_batch(folder / f"{name}.trace")
    for stage in ("autoencoder", "diffusion"):
        for key, tensor in weights(folder, name, stage).items():
            hashes[f"{stage}.{key}"] = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
    assert len(hashes) > 4 * STEPS
    return hashes


@pytest.mark.chain
def test_training_without_validation_saves_its_end_and_more_steps_follow_their_own_schedule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    short = (
        "autoencoder.checkpoint_every=2", "autoencoder.val_every=3", "trainer.limit_val_batches=0", "autoencoder.lr=1e-3",
        "autoencoder.lr_schedule.schedule=cosine", "autoencoder.lr_schedule.final=0.1", "stages=[autoencoder]",
    )  # fmt: skip
    chain(tmp_path, *short, "autoencoder.max_steps=6").execute()
    last = torch.load(tmp_path / "run/autoencoder/checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] == 6
    used, ended = list[tuple[float, float]](), Monitor.on_train_batch_start

    def note(self: Monitor, trainer: Trainer, task: Task, batch: object, index: int):
        used.append((trainer.optimizers[0].param_groups[0]["lr"], 1e-3 * task.lr_factor(task.global_step)))
        ended(self, trainer, task, batch, index)

    monkeypatch.setattr(Monitor, "on_train_batch_start", note)
    chain(tmp_path, *short, "autoencoder.max_steps=9").execute()
    assert len(used) == 3
    assert all(lr == pytest.approx(wanted) for lr, wanted in used)
    assert used[0][0] > 2e-4  # not the end of the shorter schedule
