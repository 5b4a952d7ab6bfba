"""The progress bar on the terminal."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

from ldm_train.training.callbacks.clock import UNENDING
from ldm_train.training.task import Task


class StepBar(ProgressBar):
    """One bar per stage over its optimiser steps, starting at the resumed step, with the task's `shown` metrics and the
    images per second of the last logged step; a second bar while validation runs."""

    def __init__(self) -> None:
        super().__init__()
        self.bar: Any = None
        self.validation: Any = None

    @property
    def is_enabled(self) -> bool:  # read by LightningModule.print
        return True

    def on_train_start(self, trainer: L.Trainer, pl_module: Task) -> None:
        start = trainer.global_step
        total = trainer.max_steps if trainer.max_steps < UNENDING else None
        self.bar = tqdm(total=total, initial=start, desc=pl_module.stage, unit="step", dynamic_ncols=True)
        if start:
            self.bar.set_postfix_str(f"resumed at step {start}")

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Task, *batch: Any) -> None:
        step = trainer.global_step
        if step == self.bar.n:  # a micro-batch within a step
            return
        if step % trainer.log_every_n_steps == 0:
            metrics = trainer.callback_metrics
            shown = [f"{n} {float(metrics[f'train/{n}']):.3g}" for n in pl_module.shown if f"train/{n}" in metrics]
            if (speed := metrics.get("train/images_per_second")) is not None:  # from the Monitor, which runs first
                shown.append(f"{float(speed):.0f} img/s")
            self.bar.set_postfix_str(", ".join(shown), refresh=False)
        self.bar.update(step - self.bar.n)

    def on_validation_start(self, trainer: L.Trainer, pl_module: Task) -> None:
        batches = int(sum(trainer.num_val_batches))
        self.validation = tqdm(total=batches, desc="validation", unit="batch", leave=False, dynamic_ncols=True)

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: Task, *batch: Any) -> None:
        self.validation.update()

    def on_validation_end(self, trainer: L.Trainer, pl_module: Task) -> None:
        self.validation.close()

    def on_train_end(self, trainer: L.Trainer, pl_module: Task) -> None:
        self.bar.close()

    def on_exception(self, trainer: L.Trainer, pl_module: Task, exception: BaseException) -> None:
        for bar in (self.validation, self.bar):
            if bar is not None:
                bar.close()

    def print(self, *words: Any, **options: Any) -> None:
        tqdm.write(" ".join(map(str, words)))
