"""Where metrics go: metrics.csv always, Weights & Biases unless switched off."""

import csv
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only


class MetricsCSV(Logger):
    """One row per logged step; survives resume: rows after the checkpoint's step are cut, then it goes on.

    path: the file. start: the step training starts or resumes from.
    """

    def __init__(self, path: str | Path, start: int = 0):
        super().__init__()
        self.path, self.rows, self.columns = Path(path), [], ["step"]
        if self.path.is_file() and start > 0:
            with open(self.path, newline="") as file:
                self.rows = [row for row in csv.DictReader(file) if int(row["step"]) <= start]
            self.columns += sorted({c for row in self.rows for c in row} - {"step"})
        self._rewrite()

    @rank_zero_only
    def _rewrite(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        with open(partial, "w", newline="") as file:
            writer = csv.DictWriter(file, self.columns, restval="")
            writer.writeheader()
            writer.writerows(self.rows)
        os.replace(partial, self.path)

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_picture(self, name: str, path: Path, step: int, caption: str) -> None:
        pass  # the picture is a file already

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        row = {"step": step} | {k: v for k, v in metrics.items() if k != "epoch"}
        if self.rows and int(self.rows[-1]["step"]) == step:
            self.rows[-1] |= row
        else:
            self.rows.append(row)
        new = [k for k in row if k not in self.columns]
        self.columns += sorted(new)
        if new or self.rows[-1] is not row:
            self._rewrite()
        else:
            with open(self.path, "a", newline="") as file:
                csv.DictWriter(file, self.columns, restval="").writerow(row)


class WandbRun:
    """One W&B run for the whole chain; stages log through `StageLogger`. Never prompts, never waits long.

    Online when a key is present (WANDB_API_KEY or netrc) unless WANDB_MODE says otherwise; if the server does not
    answer within `timeout` seconds, offline with a line saying so. The run's id is kept in the run folder, so a resumed
    chain continues the same run.
    """

    def __init__(
        self, folder: Path, project: str, name: str, config: dict, timeout: float = 20.0, mode: str | None = None
    ):
        import wandb  # slow to import, and not needed with logger=csv

        self.folder = folder
        id_file = folder / "wandb" / "run_id"
        id_file.parent.mkdir(parents=True, exist_ok=True)
        if not id_file.is_file():
            id_file.write_text(secrets.token_hex(4))
        if mode is None and not (mode := os.environ.get("WANDB_MODE")):
            mode = "online" if wandb.login(prompt=False, verify=False) else "offline"
        arguments = {
            "project": project,
            "name": name,
            "config": config,
            "dir": str(folder),
            "id": id_file.read_text(),
            "resume": "allow",
        }
        quiet = wandb.Settings(silent=True, init_timeout=timeout, console="off")
        if mode == "online":
            try:
                self.run = wandb.init(mode="online", settings=quiet, **arguments)
                print(f"W&B: {self.run.url} (server {quiet.base_url})")
            except (wandb.errors.CommError, wandb.errors.AuthenticationError, wandb.errors.UsageError) as error:
                print(f"W&B: no answer from {quiet.base_url} ({error}); logging offline")
                self.run = wandb.init(mode="offline", settings=quiet, **arguments)
        else:
            self.run = wandb.init(mode=mode, settings=quiet, **arguments)
        self.offline = mode != "disabled" and self.run.settings.mode == "offline"

    def stage(self, stage: str) -> "StageLogger":
        return StageLogger(self.run, stage)

    def finish(self) -> None:
        """Ends the run; offline, prints the line that uploads it."""
        self.run.finish()
        if self.offline:
            print(f"W&B: offline; upload with: wandb sync {Path(self.run.settings.sync_dir)}")


class StageLogger(Logger):
    """A stage's metrics as `<stage>/...` over an honest axis: that stage's optimiser steps."""

    def __init__(self, run: Any, stage: str):
        super().__init__()
        self.run, self.stage = run, stage
        run.define_metric(f"{stage}/step")
        run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")

    @property
    def name(self) -> str:
        return "wandb"

    @property
    def version(self) -> str:
        return self.run.id

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        named = {f"{self.stage}/{k}": v for k, v in metrics.items() if k != "epoch"}
        self.run.log(named | {f"{self.stage}/step": step})

    @rank_zero_only
    def log_picture(self, name: str, path: Path, step: int, caption: str) -> None:
        import wandb

        self.run.log({f"{self.stage}/{name}": wandb.Image(str(path), caption=caption), f"{self.stage}/step": step})
