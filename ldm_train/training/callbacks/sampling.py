"""Distances of samples to the data while the U-Net trains."""

from collections.abc import Callable
from typing import Any

import lightning as L
import torch

from ldm_train.metrics.distribution import Moments, frechet_distance
from ldm_train.training.diffusion_task import DiffusionTask
from ldm_train.training.evaluation import sample_like


class SampleDistance(L.Callback):
    """Every `every` optimiser steps: samples under the conditions of the reference split with the averaged weights,
    and logs val/fid_<extractor> by the same function as the evaluation stage.

    loader: this rank's share of the reference split. draw: as in `evaluate`. extractor: features, with a `name`.
    """

    def __init__(
        self, every: int, loader: Any, draw: Callable[..., torch.Tensor], extractor: torch.nn.Module, batch_size: int
    ):
        self.every, self.loader, self.draw, self.extractor = every, loader, draw, extractor
        self.batch_size = batch_size
        self._reference: torch.Tensor | None = None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: DiffusionTask, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if (batch_idx + 1) % pl_module.accumulate or step % self.every:
            return
        trained = pl_module.model.trainable().eval()
        with pl_module.with_ema():
            sampled = sample_like(
                pl_module.model, self.loader, self.draw, self.extractor.to(pl_module.device), self.batch_size,
                progress=False, reference=self._reference,
            )  # fmt: skip
        trained.train()
        self._reference = sampled.reference
        moments = [Moments.gathered(Moments.of([f]) if len(f) else None) for f in (sampled.reference, sampled.features)]
        metrics = {f"val/fid_{self.extractor.name}": frechet_distance(*moments), "val/fid_images": moments[1].count}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step)
