"""Logs the speed of training and its use of data: images per second, waiting for data, replaced samples, memory."""

import resource
import time
from typing import Any

import lightning as L
import torch

from ldm_train.data.samples import refuse_too_many
from ldm_train.training.callbacks.verdict import verdict
from ldm_train.training.task import Task


class Monitor(L.Callback):
    """Logs train/images_per_second, train/data_wait (share of time), train/epoch (passes over the data), train/images and
    train/seconds (so far, over all resumes, without validation and sampling), train/tflop (so far), train/mfu,
    train/peak_memory_gib (of the GPU that it trains on, else of the process) and train/bad_fraction. Raises DataError if more than
    `max_bad_fraction` of the samples were unreadable. At the end it prints what limited the speed.

    flops: FLOPs of training on one image; None: compute and MFU are not logged. peak_flops: per second, of all
    devices together.
    batch_size: the global batch size. dataset_size: number of training samples. trace: a file to which one line per
    micro-batch is appended, "stage step micro-batch rank|keys", as a record of the order of the samples.
    """

    def __init__(
        self,
        batch_size: int,
        dataset_size: int,
        max_bad_fraction: float,
        trace: str | None = None,
        flops: float | None = None,
        peak_flops: float | None = None,
    ):
        self.trace, self.flops, self.peak_flops = trace, flops, peak_flops
        self.batch_size, self.dataset_size, self.max_bad_fraction = batch_size, dataset_size, max_bad_fraction
        self.seen = self.bad = self._steps = 0  # samples seen, unreadable ones, step of the last log
        self.seconds = self._waited = 0.0
        self._batch_end = self._since = time.perf_counter()
        # For each stretch between logged steps: (seconds, images, seconds of waiting for data), for the verdict.
        self._stretches: list[tuple[float, int, float]] = []

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds + time.perf_counter() - self._since}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seconds = state_dict["seconds"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._batch_end = self._since = time.perf_counter()
        self._steps, self._waited = trainer.global_step, 0.0

    def batch_ended(self) -> None:
        """Called by the last callback after a step: what callbacks do between steps, like writing a checkpoint, is no
        waiting for data."""
        self._batch_end = time.perf_counter()

    def exclude(self, seconds: float) -> None:
        """Excludes `seconds` spent on work other than training from the measurement."""
        self._since += seconds

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._validation = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._batch_end = time.perf_counter()  # from here on, time counts as waiting for data again
        self.exclude(self._batch_end - self._validation)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Task, batch: Any, batch_idx: int) -> None:
        self._waited += time.perf_counter() - self._batch_end
        self.seen += len(batch["key"])
        if self.trace:
            micro, rank = batch_idx % pl_module.accumulate, trainer.global_rank
            with open(self.trace, "a") as file:
                file.write(f"{pl_module.stage} {trainer.global_step} {micro} {rank}|{','.join(batch['key'])}\n")
        for note in batch["replaced"]:
            self.bad += 1
            if self.bad <= 10:
                print(f"replaced an unreadable sample: {note}")
        refuse_too_many(self.bad, self.seen, self.dataset_size, self.max_bad_fraction)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Task, outputs: Any, batch: Any, batch_idx: int) -> None:
        now = self._batch_end = time.perf_counter()
        step = trainer.global_step
        if (batch_idx + 1) % pl_module.accumulate or step % trainer.log_every_n_steps:
            return
        elapsed, images = now - self._since, step * self.batch_size
        rate = (step - self._steps) * self.batch_size / elapsed
        self.seconds += elapsed
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if pl_module.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(pl_module.device)
        metrics = {
            "images_per_second": rate,
            "images": float(images),
            "seconds": self.seconds,
            "peak_memory_gib": memory / 2**30,
            "data_wait": self._waited / elapsed,
            "epoch": images / self.dataset_size,
            "bad_fraction": self.bad / max(1, self.seen),
        }
        if self.flops:
            metrics["tflop"] = self.flops * images / 1e12
            if self.peak_flops:
                metrics["mfu"] = self.flops * rate / self.peak_flops
        pl_module.log_dict({f"train/{name}": value for name, value in metrics.items()})
        self._stretches.append((elapsed, (step - self._steps) * self.batch_size, self._waited))
        self._since, self._steps, self._waited = now, step, 0.0

    def on_train_end(self, trainer: L.Trainer, pl_module: Task) -> None:
        stretches = self._stretches[1:]  # the first includes compilation and kernel selection
        if trainer.global_rank or not stretches:
            return
        seconds, images, waited = (sum(parts) for parts in zip(*stretches))
        known = self.flops and self.peak_flops
        mfu = self.flops * images / seconds / self.peak_flops if known else None
        accelerated = pl_module.device.type != "cpu"
        print(verdict(pl_module.stage, images / seconds, waited / seconds, mfu, accelerated), flush=True)
