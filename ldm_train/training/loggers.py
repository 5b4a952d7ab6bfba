"""Metric loggers: metrics.csv always, Weights & Biases unless switched off, TensorBoard if configured."""

import csv
import os
import secrets
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from PIL import Image

from ldm_train.configuration import numbers
from ldm_train.evaluation.evaluator import is_higher_better
from ldm_train.storage import check_held, inside, read_csv, write_atomically, write_csv


class Recorder(Logger):
    """A logger that also receives pictures (as files), histograms and alerts; subclasses implement those they support.

    logged: {step: names} of the metrics that an earlier process logged after the checkpoint from which this one
    continues (see `MetricsCSV`). They are not logged again: a resumed training reproduces them exactly.
    """

    name, version = "", ""  # required by Lightning

    def __init__(self) -> None:
        super().__init__()
        self.logged: Mapping[int, set[str]] = {}

    def unlogged(self, metrics: Mapping[str, float], step: int) -> dict[str, float]:
        """Returns the metrics without Lightning's "epoch" and those an earlier process already logged for this step."""
        return {k: v for k, v in metrics.items() if k != "epoch" and k not in self.logged.get(step, ())}

    def validated(self, step: int) -> bool:
        """Returns True if an earlier process completed this step's validation, including its pictures. Metrics of samples
        are logged before the validation."""
        return not {"val/loss", "val/score"}.isdisjoint(self.logged.get(step, ()))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_picture(self, name: str, path: Path, step: int, caption: str) -> None:
        pass

    def log_histogram(self, name: str, values: torch.Tensor, step: int) -> None:
        pass

    def log_alert(self, title: str, text: str) -> None:
        pass


class MetricsCSV(Recorder):
    """Writes metrics to a CSV file, one row per step. On resume, first removes the rows after the checkpoint's step.

    start: the step from which training starts or resumes. `cut`: {step: names} of the metrics in the removed
    rows; loggers that cannot remove rows skip these when they are logged again.
    """

    name = "metrics"

    def __init__(self, path: str | Path, start: int = 0):
        super().__init__()
        self.path, self.rows, self.columns = Path(path), [], ["step"]
        self.cut: dict[int, set[str]] = {}
        if rows := read_csv(self.path):
            self.rows = [row for row in rows if int(row["step"]) <= start]
            self.cut = {int(row["step"]): {k for k, v in row.items() if v} for row in rows if int(row["step"]) > start}
            self.columns += sorted({name for row in self.rows for name in row} - {"step"})
        self._rewrite()

    @rank_zero_only
    def _rewrite(self) -> None:
        write_csv(self.path, self.columns, self.rows)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        row = {"step": step} | self.unlogged(metrics, step)
        place = len(self.rows)  # callbacks may log under earlier steps
        while place and int(self.rows[place - 1]["step"]) > step:
            place -= 1
        if place and int(self.rows[place - 1]["step"]) == step:
            self.rows[place - 1] |= row
        else:
            self.rows.insert(place, row)
        columns = sorted(row.keys() - set(self.columns))
        self.columns += columns
        if columns or self.rows[-1] is not row:
            self._rewrite()
        else:
            check_held(self.path)
            try:
                with open(self.path, "a", newline="") as file:
                    csv.DictWriter(file, self.columns, restval="").writerow(row)
            except OSError as error:
                raise OSError(
                    error.errno,
                    f"could not write {self.path}: {error.strerror or error}; free some space, then run the same command "
                    "to continue",
                ) from error


def code_version() -> dict[str, str]:
    """Returns the versions of the package and torch and, in a git checkout, the commit (with + if files differ)."""
    versions = {"ldm_train": metadata.version("ldm-train"), "torch": torch.__version__}
    root = Path(__file__).parents[2]
    if (root / ".git").exists():
        describe = ["git", "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
        with suppress(OSError, subprocess.SubprocessError):
            versions["commit"] = subprocess.check_output(
                describe, cwd=root, text=True, timeout=5, stderr=subprocess.DEVNULL
            ).strip()
    return versions


class StockLogger(Recorder):
    """Wraps a logger of Lightning or the user's own; it receives the metrics only."""

    def __init__(self, logger: Logger):
        super().__init__()
        self.logger = logger

    @property
    def name(self) -> str | None:
        return self.logger.name

    @property
    def version(self) -> str | int | None:
        return self.logger.version

    @property
    def experiment(self) -> Any:
        return self.logger.experiment

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if unlogged := self.unlogged(metrics, step):
            self.logger.log_metrics(unlogged, step)

    def save(self) -> None:
        self.logger.save()

    def finalize(self, status: str) -> None:
        self.logger.finalize(status)


UPLOADING = 600.0  # seconds that a run waits at its end for the remaining data to upload


class WandbRun:
    """One W&B run for the whole chain of stages, which log through `StageLogger`. Never prompts, never waits long.

    Online if a key is present (WANDB_API_KEY or netrc) unless WANDB_MODE or `mode` says otherwise; if the server does
    not answer within `timeout` seconds, the run is offline and a printed line says so. The run's id is stored in the
    run folder, so that a resumed chain continues the same run. config: the run's, to which code versions are added.
    """

    def __init__(
        self, folder: Path, project: str, name: str, config: dict, timeout: float = 20.0, mode: str | None = None
    ):
        import wandb  # imported here because it is slow, and not needed with logger=csv

        self.wandb = wandb
        id_file = inside(folder / "wandb" / "run_id", folder)
        if not id_file.is_file():
            write_atomically(id_file, lambda file: file.write(secrets.token_hex(4).encode()))
        if mode is None and not (mode := os.environ.get("WANDB_MODE")):
            mode = "online" if wandb.login(prompt=False, verify=False) else "offline"
        config = config | {"code": code_version()}
        quiet = wandb.Settings(silent=True, init_timeout=timeout, finish_timeout=UPLOADING, console="off")
        server = wandb.setup().settings.base_url
        begin = partial(
            wandb.init,
            project=project,
            name=name,
            config=config,
            dir=str(folder),
            id=id_file.read_text(),
            resume="allow",
        )
        try:
            self.run = begin(mode=mode, settings=quiet)
            if mode == "online":
                print(f"W&B: {self.run.url} (server {server})")
        except (wandb.errors.CommError, wandb.errors.AuthenticationError, wandb.errors.UsageError) as error:
            if mode != "online":
                raise
            print(f"W&B: no answer from {server} ({error}); logging offline")
            wandb.teardown()  # its service process still holds the run it tried to start
            self.run = begin(mode="offline", settings=quiet)
        self.offline = mode != "disabled" and self.run.settings.mode == "offline"

    def stage(self, stage: str, batch_size: int) -> "StageLogger":
        return StageLogger(self.run, stage, batch_size)

    def log_evaluation(self, metrics: Mapping[str, Any]) -> None:
        """Logs metrics.json, flattened, below evaluation/: numbers as they are, intervals as <name>/low and /high."""
        self.run.log({f"evaluation/{name}": value for name, value in numbers(metrics).items()})

    def log_picture(self, name: str, path: Path) -> None:
        self.run.log({name: self.wandb.Image(str(path))})

    def log_film(self, name: str, path: Path, caption: str) -> None:
        self.run.log({name: self.wandb.Video(str(path), caption=caption, format="gif")})

    def log_model(self, folder: Path, name: str, metadata: Mapping[str, Any]) -> None:
        """Uploads a model folder as an artifact."""
        artifact = self.wandb.Artifact(name, type="model", metadata=dict(metadata))
        artifact.add_dir(str(folder))
        self.run.log_artifact(artifact)

    def finish(self) -> None:
        """Ends the run; if it is offline, prints the command that uploads it."""
        self.run.finish()
        if self.offline:
            print(f"W&B: offline; upload with: wandb sync {Path(self.run.settings.sync_dir)}")


# Columns whose summary in W&B has the run's best value beside the last.
SUMMARIES = (
    *("val/loss", "val/score", "val/perceptual", "val/l1", "val/psnr", "val/ssim", "val/accuracy"),
    *("val/fid_tiny", "val/fid", "val/kid_tiny", "val/kid"),
)


class StageLogger(Recorder):
    """Logs a stage's metrics to W&B as `<stage>/...` over that stage's optimiser steps. Also logs the number of images
    seen as `<stage>/images`, which can be chosen as the x-axis instead."""

    name = "wandb"

    def __init__(self, run: Any, stage: str, batch_size: int):
        super().__init__()
        self.run, self.stage, self.batch_size = run, stage, batch_size
        step = f"{stage}/step"
        run.define_metric(step)
        run.define_metric(f"{stage}/*", step_metric=step)
        for name in SUMMARIES:
            best = "max" if is_higher_better(name) else "min"
            run.define_metric(f"{stage}/{name}", step_metric=step, summary=f"{best},last")

    @property
    def version(self) -> str:
        return self.run.id

    def _log(self, values: dict[str, Any], step: int) -> None:
        axes = {f"{self.stage}/step": step, f"{self.stage}/images": step * self.batch_size}
        self.run.log({f"{self.stage}/{k}": v for k, v in values.items()} | axes)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if unlogged := self.unlogged(metrics, step):
            self._log(unlogged, step)

    @rank_zero_only
    def log_picture(self, name: str, path: Path, step: int, caption: str) -> None:
        import wandb

        if not self.validated(step):
            self._log({name: wandb.Image(str(path), caption=caption)}, step)

    @rank_zero_only
    def log_histogram(self, name: str, values: torch.Tensor, step: int) -> None:
        import wandb

        if not self.validated(step):
            self._log({name: wandb.Histogram(values.detach().float().flatten().cpu().numpy(), num_bins=64)}, step)

    @rank_zero_only
    def log_alert(self, title: str, text: str) -> None:
        self.run.alert(title=f"{self.stage}: {title}", text=text, level="WARN")


class TensorBoardLogger(Recorder):
    """Writes a stage's metrics, pictures and histograms to <folder>/tensorboard/<stage>, for `tensorboard --logdir`."""

    name = "tensorboard"

    def __init__(self, folder: Path, stage: str):
        super().__init__()
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as error:
            raise ValueError("logger=tensorboard needs `pip install tensorboard`") from error
        self.writer = SummaryWriter(str(inside(folder / "tensorboard" / stage, folder)), flush_secs=10)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        for name, value in self.unlogged(metrics, step).items():
            self.writer.add_scalar(name, value, step)

    @rank_zero_only
    def log_picture(self, name: str, path: Path, step: int, caption: str) -> None:
        if not self.validated(step):
            with Image.open(path) as picture:
                self.writer.add_image(name, np.array(picture.convert("RGB")), step, dataformats="HWC")

    @rank_zero_only
    def log_histogram(self, name: str, values: torch.Tensor, step: int) -> None:
        if not self.validated(step):
            self.writer.add_histogram(name, values.detach().float().flatten().cpu().numpy(), step)

    @rank_zero_only
    def log_alert(self, title: str, text: str) -> None:
        self.writer.add_text(f"alert/{title}", text)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.writer.close()  # the writer reopens its file for later values
