"""Prints once, after the first steps, how fast training is, how long it will take and what that costs."""

import time
from typing import Any

import lightning as L
import torch

from ldm_train.training.task import Task

FIRST, MEASURED = 5, 20  # warm-up steps (kernels are selected, memory is allocated), and measured steps


def duration(seconds: float) -> str:
    """Formats a duration in s, min, h or days, whichever reads best."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def cost(price_per_hour: float | None, seconds: float) -> str:
    return "" if price_per_hour is None else f", cost {price_per_hour * seconds / 3600:.2f}"


class Pace(L.Callback):
    """Prints one line after FIRST + MEASURED steps, timed over the last MEASURED without validation. Synchronises with
    a CUDA device twice per training.

    batch_size: the global batch size. price_per_hour: of the machine; None: no cost is printed.
    """

    def __init__(self, batch_size: int, price_per_hour: float | None = None):
        self.batch_size, self.price_per_hour = batch_size, price_per_hour
        self._start = self._since = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: Task) -> None:
        self._start = trainer.global_step + FIRST

    def on_validation_start(self, trainer: L.Trainer, pl_module: Task) -> None:
        self._validation = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: Task) -> None:
        self._since += time.perf_counter() - self._validation

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Task, outputs: Any, batch: Any, batch_idx: int) -> None:
        done = trainer.global_step - self._start
        if (batch_idx + 1) % pl_module.accumulate or done not in (0, MEASURED):
            return
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if done == 0:
            self._since = now
            return
        seconds = (now - self._since) / MEASURED
        left = seconds * (trainer.max_steps - trainer.global_step)
        pl_module.print(
            f"{pl_module.stage}: {self.batch_size / seconds:.3g} images/s in its first steps, {duration(left)} left"
            f"{cost(self.price_per_hour, left)}"
        )
