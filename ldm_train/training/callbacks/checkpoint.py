"""Checkpoints: last.ckpt at a fixed interval of optimiser steps and on a signal, best.ckpt when validation improves."""

import io
import os
import shutil
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

from ldm_train import interrupts
from ldm_train.data.shards import DataError
from ldm_train.errors import Interrupted, first_line
from ldm_train.storage import partial_of, read_tensors, write_atomically
from ldm_train.training.task import NotFinite, Task

LAST, PREVIOUS = "last.ckpt", "last-previous.ckpt"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Saves checkpoints so that they appear under their final name only when complete, even if the disk fills up or
    power fails. The previous last.ckpt is kept as last-previous.ckpt."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        path = Path(path)

        def write(file: io.BufferedWriter) -> None:
            remembering = _Remembering(file)
            try:
                torch.save(checkpoint, remembering)
                file.flush()
            except RuntimeError as error:  # torch replaces the disk's error by its own
                raise (remembering.error or error) from None
            if path.name == LAST and path.is_file():
                _keep(path)

        write_atomically(path, write)

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = None) -> dict:
        return read_checkpoint(path)


class _Remembering:
    """A file wrapper that keeps the first OSError of its writes, e.g. of a full disk."""

    def __init__(self, file: io.BufferedWriter):
        self.file, self.error = file, None

    def write(self, data: bytes) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self.file.flush()


def _keep(path: Path) -> None:
    partial = partial_of(path.with_name(f"{path.name}.previous"))
    partial.unlink(missing_ok=True)  # a link there would be followed
    try:
        os.link(path, partial)
    except OSError:  # not every file system supports links
        shutil.copyfile(path, partial)
    os.replace(partial, path.with_name(PREVIOUS))
    partial.unlink(missing_ok=True)  # os.replace does nothing if both names are the same file


def _read(path: Path, mmap: bool) -> dict[str, Any]:
    state = read_tensors(path, mmap)
    if not isinstance(state, dict) or not isinstance(state.get("global_step"), int) or "state_dict" not in state:
        raise ValueError("it holds no training state")
    return state


def read_checkpoint(path: str | Path, mmap: bool = False) -> dict[str, Any]:
    """Returns a checkpoint's state, on the CPU; no code from it is executed. mmap: read tensors only when used.

    Raises DataError, naming the file and what to do, if it is damaged or not a checkpoint.
    """
    path = Path(path)
    try:
        return _read(path, mmap)
    except (FileNotFoundError, PermissionError, MemoryError):
        raise
    except Exception as error:  # zipfile and torch raise errors of many types for damaged files
        raise DataError(f"{path} is damaged or no checkpoint ({first_line(error)}); {_choices(path)}") from error


def _choices(path: Path) -> str:
    if path.name != LAST:
        return "weights=last takes the finished model instead"
    anew = f"restart={path.parent.parent.name} runs the stage again from its start"
    previous = path.with_name(PREVIOUS)
    try:
        step = _read(previous, mmap=True)["global_step"]
    except Exception:  # missing, or damaged too
        return f"there is none before it that could be used; {anew}"
    return f"continue from the one before it, of step {step}: mv {previous} {path}, then run the same command ({anew})"


def steps_done(last: Path) -> int:
    """Returns the number of optimiser steps done at last.ckpt, 0 if training has not begun. Raises DataError as
    `read_checkpoint` does, and if last.ckpt is missing although last-previous.ckpt exists."""
    if last.is_file():
        return read_checkpoint(last, mmap=True)["global_step"]
    if last.with_name(PREVIOUS).is_file():
        raise DataError(f"{last} is missing; {_choices(last)}")
    return 0


def group_of_hosts() -> dist.ProcessGroup | None:
    """Returns a gloo process group over which ranks can agree at every step without waiting for their GPUs: the default
    group if it uses gloo, else a new one. Returns None if gloo cannot connect the hosts (GLOO_SOCKET_IFNAME names the
    interface)."""
    if dist.get_backend() == "gloo":
        return dist.group.WORLD
    try:
        return dist.new_group(backend="gloo")
    except RuntimeError:
        return None


class Checkpoints(L.Callback):
    """Saves folder/last.ckpt every `every` optimiser steps, at the end and on a signal (see `interrupts`), and
    folder/best.ckpt when the validation metric `monitor` (lower is better) improves. monitor None: others call `offer`
    with their values.

    If a validation is due at the same step, last.ckpt is saved after it, so a run killed in between repeats the steps
    and the validation. Once training has started, a signal only sets a flag. At the next optimiser step all ranks agree
    on it, save, and raise Interrupted; a second signal ends the process at once. If that step has a validation, they
    raise after it: a resumed run begins with the next step and would leave it out. Raises NotFinite instead of saving
    non-finite weights.
    """

    def __init__(self, folder: str | Path, every: int, monitor: str | None):
        self.folder, self.every, self.best = Path(folder), every, float("inf")
        self.monitor = self.by = self._usual = monitor
        self._training, self._signal, self._signal_time = False, 0, 0.0
        self._agreed = 0  # the signal on which all ranks leave, once they agree
        self._leave = interrupts.leave
        self._step = self._saved = 0  # the last step, and the step of last.ckpt
        self._hosts: dist.ProcessGroup | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "by": self.by}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict.get("by", self._usual) == self.by:  # best values of different metrics cannot be compared
            self.best = state_dict["best"]

    @contextmanager
    def signals(self) -> Iterator[None]:
        """The context in which Trainer.fit runs. Raises Interrupted for a signal after the last step, and for one that
        ended other ranks or data-loading processes before the step was finished."""
        with interrupts.handled(), interrupts.answered_by(self._on_signal) as self._leave:
            try:
                yield
            except RuntimeError as error:
                if not self._signal:
                    raise
                raise Interrupted(self._signal, self._saved) from error
        if self._signal:
            raise Interrupted(self._signal, self._step)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._training = True
        self._step = self._saved = trainer.global_step
        self._hosts = group_of_hosts() if trainer.world_size > 1 else None

    def _on_signal(self, number: int) -> None:
        if not self._training:  # nothing to save yet
            self._leave(number)
        if self._signal:
            if time.monotonic() - self._signal_time > 2:  # within 2 s: a launcher may repeat the terminal's signal
                self._leave(number)
            return
        self._signal, self._signal_time = number, time.monotonic()
        if os.environ.get("RANK", "0") == "0":
            said = "saving at the next step, then leaving (once more: leave at once)"
            os.write(1, f"\n{signal.Signals(number).name}: {said}\n".encode())  # a print may have been interrupted

    def _agreed_signal(self, trainer: L.Trainer) -> int:
        if trainer.world_size == 1:
            return self._signal
        device = torch.device("cpu") if self._hosts is not None else trainer.strategy.root_device
        flag = torch.tensor(self._signal, device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._hosts)
        return int(flag)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Task, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % pl_module.accumulate:
            return
        self._step, self._agreed = trainer.global_step, self._agreed_signal(trainer)
        ends = trainer.should_stop or (batch_idx + 1) % trainer.val_check_batch == 0
        validates = ends and trainer.enable_validation
        if self._agreed or (self._due(trainer) and not validates):
            self._save_last(trainer, pl_module)  # before a validation too: it may outlast the time left after a signal
        if self._agreed and not validates:
            # Lightning would write this step's metrics only after this hook; the resumed run starts at the next step.
            trainer._logger_connector.update_train_step_metrics()
            raise Interrupted(self._agreed, self._step)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Task) -> None:
        if self.monitor and (value := trainer.callback_metrics.get(f"val/{self.monitor}")) is not None:
            self.offer(trainer, float(value))
        if self._agreed or self._due(trainer):
            self._save_last(trainer, pl_module)
        if self._agreed:
            raise Interrupted(self._agreed, self._step)

    def offer(self, trainer: L.Trainer, value: float) -> None:
        """Saves best.ckpt if `value` is lower than all before."""
        if value < self.best:
            self.best = value
            trainer.save_checkpoint(self.folder / "best.ckpt", weights_only=False)

    def _due(self, trainer: L.Trainer) -> bool:
        return trainer.global_step % self.every == 0 or trainer.global_step >= trainer.max_steps or trainer.should_stop

    def _save_last(self, trainer: L.Trainer, pl_module: Task) -> None:
        pl_module.check_skips()  # raises NotFinite instead of saving amid a run of skipped steps
        if not torch.stack([p.isfinite().all() for p in pl_module.trained().parameters()]).all():
            raise NotFinite(pl_module.stage, "weights are", trainer.global_step)
        trainer.save_checkpoint(self.folder / LAST, weights_only=False)
        self._saved = trainer.global_step
