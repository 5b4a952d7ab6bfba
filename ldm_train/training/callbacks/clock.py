"""Ends training after a given time and stretches its schedules to that time."""

import re
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist

from ldm_train.training.callbacks.checkpoint import group_of_hosts, read_checkpoint
from ldm_train.training.task import Task

UNENDING = 10**9  # max_steps of a training that the clock ends
UNITS = {"s": 1, "min": 60, "h": 3600}


def seconds_of(text: str) -> float:
    """Converts e.g. "90s", "30min" or "1.5h" to seconds. Raises ValueError for other text and for a time of 0."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?(s|min|h)", text.strip())
    if found is None or float(found[1]) == 0:
        raise ValueError(f"{text!r} is not a time; write 90s, 30min or 1.5h")
    return float(found[1]) * UNITS[found[2]]


class Clock(L.Callback):
    """Ends training after `seconds` since its start, summed over all resumes and including validation and checkpoints.
    Whatever depends on the step (learning rate, the discriminator's start) follows `Task.schedule_step`, which reaches
    max_steps - 1 when the time is over, however many steps were done by then. Rank 0's clock counts for all ranks. A
    training that the clock ends is not reproducible bit for bit."""

    def __init__(self, seconds: float, max_steps: int):
        self.seconds, self.max_steps = seconds, max_steps
        self.elapsed, self._since = 0.0, time.perf_counter()
        self._hosts: dist.ProcessGroup | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"elapsed": self._now()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.elapsed = state_dict["elapsed"]

    def is_over(self, last: Path) -> bool:
        """Returns True if the checkpoint exists and its training had already used up its time."""
        if not last.is_file():
            return False
        state = read_checkpoint(last, mmap=True)["callbacks"].get(self.state_key, {})
        return float(state.get("elapsed", 0.0)) >= self.seconds

    def _now(self) -> float:
        return self.elapsed + time.perf_counter() - self._since

    def _agreed(self, trainer: L.Trainer) -> float:
        if trainer.world_size == 1:
            return self._now()
        device = torch.device("cpu") if self._hosts is not None else trainer.strategy.root_device
        now = torch.tensor(self._now(), dtype=torch.float64 if device.type == "cpu" else torch.float32, device=device)
        dist.broadcast(now, 0, group=self._hosts)
        return float(now)

    def on_train_start(self, trainer: L.Trainer, pl_module: Task) -> None:
        self._since = time.perf_counter()
        self._hosts = group_of_hosts() if trainer.world_size > 1 else None
        self._place(trainer, pl_module)  # before `Task.on_train_start`, which sets the first step's learning rate

    def _place(self, trainer: L.Trainer, task: Task) -> None:
        share = min(1.0, self._agreed(trainer) / self.seconds)
        task.schedule_step = int(share * (self.max_steps - 1))

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Task, batch: Any, batch_idx: int) -> None:
        if batch_idx % pl_module.accumulate == 0:
            self._place(trainer, pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Task, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % pl_module.accumulate == 0 and self._agreed(trainer) >= self.seconds:
            trainer.should_stop = True
