"""Checkpoints: last.ckpt every so many optimiser steps and on a signal, best.ckpt after a better validation."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from ldm_train.data.shards import write_atomically
from ldm_train.training.stages import Interrupted
from ldm_train.training.task import NotFinite, Task

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints appear under their final name only when complete, also when the disk fills up or power fails."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        write_atomically(path, lambda file: torch.save(checkpoint, file))


class Checkpoints(L.Callback):
    """folder/last.ckpt every `every` optimiser steps, at the end and on SIGTERM, SIGINT or SIGUSR1; folder/best.ckpt
    when validation's `monitor` (lower is better) improves; None leaves that to those who `offer` values.

    Where a validation is due at the same step, last.ckpt waits for it: a run that is killed in between repeats the
    steps and the validation. Signals only set a flag. All ranks agree on it at the next optimiser step, save, and raise
    Interrupted; a second signal leaves at once. Raises NotFinite rather than save weights that are no numbers.
    """

    def __init__(self, folder: str | Path, every: int, monitor: str | None):
        self.folder, self.every, self.monitor, self.by = Path(folder), every, monitor, monitor
        self._usual = monitor
        self.best, self._signal, self._signal_time, self._step = float("inf"), 0, 0.0, 0

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "by": self.by}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict.get("by", self._usual) == self.by:  # the best of another measure says nothing
            self.best = state_dict["best"]

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Around Trainer.fit: puts the handlers of before back, and raises Interrupted for a signal that came after the
        last step."""
        before = {number: signal.getsignal(number) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if self._signal:
            raise Interrupted(self._signal, self._step)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Here, because Lightning installs its own after `setup`, and its SIGTERM handler leaves without saving.
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: Any) -> None:
        if (
            self._signal and time.monotonic() - self._signal_time > 2
        ):  # torchrun passes on what the terminal sent already
            os._exit(128 + number)
        if self._signal:
            return
        self._signal, self._signal_time = number, time.monotonic()
        print(
            f"\n{signal.Signals(number).name}: saving at the next step, then leaving (once more: leave at once)",
            flush=True,
        )

    def _agreed_signal(self, trainer: L.Trainer) -> int:
        if trainer.world_size == 1:
            return self._signal
        flag = torch.tensor(self._signal, device=trainer.strategy.root_device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return int(flag)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Task, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % pl_module.accumulate:
            return
        self._step, number = trainer.global_step, self._agreed_signal(trainer)
        validates = (batch_idx + 1) % trainer.val_check_batch == 0
        if number or (self._due(trainer) and not validates):
            self._save_last(trainer, pl_module)
        if number:
            # What this step logged would only be written after this hook, and the resumed run begins with the next.
            trainer._logger_connector.update_train_step_metrics()
            raise Interrupted(number, self._step)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Task) -> None:
        value = trainer.callback_metrics.get(f"val/{self.monitor}") if self.monitor else None
        if value is not None:
            self.offer(trainer, float(value))
        if self._due(trainer):
            self._save_last(trainer, pl_module)

    def offer(self, trainer: L.Trainer, value: float) -> None:
        """Keeps best.ckpt where `value` is lower than all before."""
        if value < self.best:
            self.best = value
            trainer.save_checkpoint(self.folder / "best.ckpt", weights_only=False)

    def _due(self, trainer: L.Trainer) -> bool:
        return trainer.global_step % self.every == 0 or trainer.global_step >= trainer.max_steps

    def _save_last(self, trainer: L.Trainer, pl_module: Task) -> None:
        if not all(p.isfinite().all() for p in pl_module.trained().parameters()):
            raise NotFinite(pl_module.stage, "weights are", trainer.global_step)
        trainer.save_checkpoint(self.folder / "last.ckpt", weights_only=False)
