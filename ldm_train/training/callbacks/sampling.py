"""Measures metrics of generated samples while the denoising network trains."""

import time
from collections.abc import Callable
from functools import cache
from typing import Any

import lightning as L

from ldm_train.evaluation.evaluator import Evaluator
from ldm_train.evaluation.measurement import Draw, Reference, measure_samples
from ldm_train.training.callbacks.checkpoint import Checkpoints
from ldm_train.training.callbacks.monitor import Monitor
from ldm_train.training.diffusion_task import DiffusionTask


class SampleMetrics(L.Callback):
    """Every `every` optimiser steps, samples images under the validation split's conditions with the averaged weights
    on all ranks, measures them with the evaluation stage's own function, and logs val/<metric> with val/<metric>_low
    and _high (the 95 % interval).

    conditions: this rank's share of the samples' conditions. reference: () -> the reference, called once.
    best_by: the metric that selects best.ckpt; None: the validation loss selects it.
    """

    def __init__(
        self,
        every: int,
        conditions: Any,
        draw: Draw,
        evaluator: Evaluator,
        reference: Callable[[], Reference],
        batch_size: int,
        best_by: str | None = None,
    ):
        self.every, self.conditions, self.draw, self.evaluator = every, conditions, draw, evaluator
        self.reference, self.batch_size, self.best_by = cache(reference), batch_size, best_by

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._checkpoints = next(c for c in trainer.callbacks if isinstance(c, Checkpoints))
        if self.best_by:
            self._checkpoints.monitor, self._checkpoints.by = None, self.best_by

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: DiffusionTask, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if (batch_idx + 1) % pl_module.accumulate or step % self.every:
            return
        begin = time.perf_counter()
        reference, metrics, extractors = self.reference(), self.evaluator.metrics, self.evaluator.extractors
        model = pl_module.model
        modes = {module: module.training for module in model.parts().modules()}
        model.parts().eval()
        with pl_module.with_ema():
            measured = measure_samples(
                model, self.conditions, self.draw, reference, metrics, extractors, self.batch_size, progress=False
            )
        for module, training in modes.items():
            module.training = training
        for callback in trainer.callbacks:
            if isinstance(callback, Monitor):
                callback.exclude(time.perf_counter() - begin)
        logged: dict[str, float] = {"val/sampled_images": measured.count}
        for name, estimate in measured.estimates.items():
            logged[f"val/{name}"] = estimate.value
            if estimate.has_interval:
                logged |= {f"val/{name}_low": estimate.low, f"val/{name}_high": estimate.high}
        for logger in trainer.loggers:
            logger.log_metrics(logged, step)
        for metric in metrics:
            if metric.name == self.best_by:
                self._checkpoints.offer(trainer, metric.sign * measured.estimates[metric.name].value)
