"""A chain's offline W&B run, read back from its file: keys, steps, pictures, and the same run after a resume."""

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from chains import chain

from ldm_train.configuration import numbers
from ldm_train.training.loggers import MetricsCSV, StageLogger, TensorBoardLogger

BLOCK = 32768


def records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file (LevelDB's log format)."""
    from wandb.proto import wandb_internal_pb2 as pb

    data, offset, whole = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while offset + 7 <= len(data):
        left = BLOCK - offset % BLOCK
        if left < 7:
            offset += left
            continue
        _, length, kind = struct.unpack("<IHB", data[offset : offset + 7])
        offset += 7
        if kind == 0 and length == 0:
            return
        part, offset = data[offset : offset + length], offset + length
        whole = part if kind in (1, 2) else whole + part
        if kind in (1, 4):
            record = pb.Record()
            record.ParseFromString(whole)
            yield record


def read(folder: Path) -> tuple[list[Any], list[dict[str, Any]]]:
    """Returns (records, history rows) of an offline run's folder, after waiting for its last record on disk."""
    (file,) = folder.glob("*.wandb")
    for _ in range(100):
        found = list(records(file))
        if any(r.HasField("exit") for r in found):
            break
        time.sleep(0.1)
    rows = [
        {("/".join(i.nested_key) or i.key): json.loads(i.value_json) for i in r.history.item}
        for r in found
        if r.HasField("history")
    ]
    return found, rows


@pytest.mark.slow
def test_an_offline_run_holds_what_was_logged_and_goes_on_after_a_resume(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    options = ("logger=[wandb,tensorboard]", "autoencoder.log_every=1", "diffusion.log_every=1", "wandb_artifact=true")
    chain(tmp_path, *options, "stages=[autoencoder]", "autoencoder.max_steps=3").execute()
    chain(tmp_path, *options).execute()
    folders = sorted((tmp_path / "run" / "wandb").glob("offline-run-*"), key=lambda p: p.stat().st_ctime_ns)
    assert len(folders) == 2
    rows, ids, found = [], set(), []
    for folder in folders:
        found, part = read(folder)
        rows += part
        ids |= {r.run.run_id for r in found if r.HasField("run")}
    assert len(ids) == 1
    seen = [(stage, r[f"{stage}/step"], k) for stage in ("autoencoder", "diffusion") for r in rows for k in r
            if f"{stage}/step" in r and k.startswith((f"{stage}/train/l", f"{stage}/val/"))]  # fmt: skip
    assert len(seen) == len(set(seen))  # no step twice
    for stage in ("autoencoder", "diffusion"):
        steps = sorted({s for name, s, k in seen if name == stage and k.endswith("/lr")})
        assert steps == [1, 2, 3, 4, 5, 6]  # none missing
    keys = {k for row in rows for k in row}
    assert {
        "autoencoder/train/grad_norm_autoencoder", "autoencoder/train/lr", "autoencoder/train/mfu", "autoencoder/images",
        "autoencoder/train/seconds", "autoencoder/train/peak_memory_gib", "autoencoder/val/fid_tiny",
        "autoencoder/val/posterior_std", "autoencoder/reconstructions/path", "autoencoder/latents/bins",
        "diffusion/train/images_per_second", "diffusion/train/data_wait", "diffusion/val/loss_t0", "diffusion/train/latent_std",
        "diffusion/samples/path", "diffusion/latents/bins", "evaluation/samples/fid_tiny/value", "evaluation/denoising/path",
        "evaluation/latents/equivariance_error/value", "evaluation/reconstructions/path",
    } <= keys  # fmt: skip
    metrics = {r.metric.name or r.metric.glob_name: r.metric for r in found if r.HasField("metric")}
    assert metrics["diffusion/val/loss"].step_metric == "diffusion/step"
    assert metrics["diffusion/val/loss"].summary.min
    assert any(r.HasField("artifact") for r in found)
    config = {u.key for r in found if r.HasField("run") for u in r.run.config.update}
    assert {"code", "autoencoder", "diffusion", "seed"} <= config
    assert list((folders[1] / "files" / "media" / "images").rglob("*.png"))
    assert list((folders[1] / "files" / "media" / "videos").rglob("*.gif"))
    assert list((tmp_path / "run" / "tensorboard" / "diffusion").glob("events.*"))


class Recorder:
    """A stand-in for a W&B run."""

    def __init__(self):
        self.rows: list[dict] = []

    def define_metric(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log(self, row: dict) -> None:
        self.rows.append(row)


def test_a_resumed_run_repeats_nothing_and_leaves_nothing_out(tmp_path: Path) -> None:
    """Killed at step 9 after the checkpoint of step 6: the exact resume repeats steps 7 to 9, logged only once."""
    run, path = Recorder(), tmp_path / "metrics.csv"

    def log(first: int, last: int, start: int) -> None:
        rows, logger = MetricsCSV(path, start), StageLogger(run, "diffusion", 4)
        logger.logged = rows.cut
        for step in range(first, last + 1):
            for values in ({"train/loss": 1 / step, "epoch": 0}, *([{"val/loss": 2.0}] if step % 3 == 0 else [])):
                if start or (step, *values) != (9, "val/loss"):  # the process died before it logged this one
                    for target in (rows, logger):
                        target.log_metrics(values, step)

    log(1, 9, 0)
    log(7, 12, 6)
    for key, expected in (("diffusion/train/loss", list(range(1, 13))), ("diffusion/val/loss", [3, 6, 9, 12])):
        assert [r["diffusion/step"] for r in run.rows if key in r] == expected
    assert [r["diffusion/images"] for r in run.rows if "diffusion/train/loss" in r] == [4 * s for s in range(1, 13)]


def test_numbers_are_flat_and_intervals_have_two_ends() -> None:
    tree = {
        "samples": {"fid": {"value": 2.0, "interval": [1.0, 3.0], "n": 8, "sampler": "ddim"}, "kid": {"interval": None}}
    }
    assert numbers(tree) == {
        "samples/fid/value": 2.0, "samples/fid/low": 1.0, "samples/fid/high": 3.0, "samples/fid/n": 8,
    }  # fmt: skip


def test_tensorboard_holds_scalars_histograms_and_texts(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, "diffusion")
    logger.logged = {2: {"val/loss"}}
    for step in (1, 2, 3):
        logger.log_metrics({"val/loss": float(step), "epoch": 0}, step)
    logger.log_histogram("latents", torch.randn(100), 3)
    logger.log_alert("not_finite", "why")
    logger.finalize("success")
    found = EventAccumulator(str(tmp_path / "tensorboard" / "diffusion"), size_guidance={"histograms": 0}).Reload()
    assert [(e.step, e.value) for e in found.Scalars("val/loss")] == [(1, 1.0), (3, 3.0)]
    assert [e.step for e in found.Histograms("latents")] == [3]
    assert "epoch" not in found.Tags()["scalars"]
