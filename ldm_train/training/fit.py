"""One stage's training run: Trainer, callbacks and resume, the same for all stages."""

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.plugins import MixedPrecision, Precision
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy

from ldm_train.devices import kept_memory
from ldm_train.training.callbacks.checkpoint import LAST, AtomicCheckpointIO, Checkpoints, read_checkpoint, steps_done
from ldm_train.training.callbacks.clock import UNENDING, Clock
from ldm_train.training.callbacks.health import Health
from ldm_train.training.callbacks.monitor import Monitor
from ldm_train.training.callbacks.progress import StepBar
from ldm_train.training.loggers import MetricsCSV, Recorder
from ldm_train.training.task import NotFinite, Task

# Lightning's messages that do not apply here. (Frozen parts are in eval mode on purpose; the loaders resume by
# position, not by state.)
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
logging.getLogger("lightning.pytorch.profilers").setLevel(logging.INFO)  # a configured profiler prints its report
for message in (
    ".*in eval mode at the start of training",
    ".*dataloader is not resumable",
    ".*does not have many workers",
    ".*number of training batches",
    ".*isinstance\\(treespec, LeafSpec\\)",
    ".*broadcast_buffers",
    ".*overridden `transfer_batch_to_device`",
    ".*The `srun` command is available",
    ".*sync_dist=True",  # the values of all ranks are gathered before they are logged
    "Grad strides do not match bucket view strides",  # from 1x1 convolutions, whose two layouts are the same in memory
):
    warnings.filterwarnings("ignore", message)

REWINDS = 3  # maximum number of returns to the last checkpoint in one training
PRECISIONS = ("32", "bf16-mixed", "16-mixed")


class HostInputs(DDPStrategy):
    """DDP that leaves inputs where they are: the task moves its batch itself, and keeps conditions on the host."""

    def determine_ddp_device_ids(self) -> None:
        return None


@dataclass(frozen=True)
class Machine:
    """The devices and precision of training. rank, world_size and their local_ forms are as torchrun sets them.

    accelerator: "cpu", "gpu" (CUDA) or "mps"
    precision: 32, bf16-mixed or 16-mixed; weights and optimiser state are float32 in all of them. Raises ValueError for
        any other, and for 16-mixed without "gpu"
    """

    accelerator: str
    precision: str
    world_size: int = 1
    rank: int = 0
    local_rank: int = 0
    local_world_size: int = 1

    def __post_init__(self):
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision is one of {', '.join(PRECISIONS)}, not {self.precision}")
        if self.precision == "16-mixed" and self.accelerator != "gpu":
            where = "a CPU" if self.accelerator == "cpu" else "mps"
            raise ValueError(f"precision=16-mixed needs a CUDA GPU; use precision=32 on {where}")

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.local_rank) if self.accelerator == "gpu" else torch.device(self.accelerator)

    def autocast(self) -> torch.autocast:
        """Returns an autocast context in the training precision, for forward passes outside a Trainer."""
        dtype = torch.float16 if self.precision == "16-mixed" else torch.bfloat16
        return torch.autocast(self.device.type, dtype, enabled=self.precision != "32")

    def strategy(self) -> Strategy:
        if self.world_size == 1:
            return SingleDeviceStrategy(self.device)
        backend = "gloo" if self.accelerator == "cpu" else "nccl"
        # Buffers are equal on all ranks by construction; broadcasting them in every forward pass would hang a validation
        # in which the ranks have different numbers of batches.
        return HostInputs(process_group_backend=backend, gradient_as_bucket_view=True, broadcast_buffers=False)

    def precision_plugin(self) -> Precision:
        return Precision() if self.precision == "32" else MixedPrecision(self.precision, self.device.type)


class CheckOnlyMachine(Machine):
    """The Machine of a process that only checks a run before the training processes start; it uses no GPU itself."""

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")


@dataclass(frozen=True)
class Cadence:
    """Intervals of validation, checkpoints, logging in optimiser steps. progress: show a bar. trace: see `Monitor`."""

    val_every: int
    checkpoint_every: int
    log_every: int
    progress: bool = True
    trace: str | None = None


def new_trainer(task: Task, folder: Path, max_steps: int, cadence: Cadence, machine: Machine, **own: Any) -> L.Trainer:
    """Returns Lightning's Trainer for one stage. own: further Trainer options."""
    alone = machine.world_size == 1
    trainer = L.Trainer(
        accelerator=machine.accelerator,
        strategy=machine.strategy(),
        devices=machine.local_world_size,
        num_nodes=machine.world_size // machine.local_world_size,
        # Otherwise Lightning refuses a single process inside a SLURM job that has several tasks.
        plugins=[AtomicCheckpointIO(), machine.precision_plugin(), *([LightningEnvironment()] if alone else [])],
        max_steps=max_steps,
        max_epochs=-1,
        accumulate_grad_batches=task.accumulate,
        val_check_interval=cadence.val_every * task.accumulate,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=cadence.log_every,
        use_distributed_sampler=False,
        sync_batchnorm=machine.accelerator == "gpu" and machine.world_size > 1,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=cadence.progress,
        default_root_dir=folder,
        **own,
    )
    # Lightning's SIGTERM handler would replace ours and exit without saving.
    trainer._signal_connector.register_signal_handlers = lambda: None
    return trainer


def load_trained(task: Task, last: Path) -> None:
    """Loads a checkpoint into a task."""
    task.setup("fit")
    state = read_checkpoint(last)
    task.on_load_checkpoint(state)
    task.load_state_dict(state["state_dict"])


def _say_rewound(error: NotFinite, step: int, attempt: int, loggers: Sequence[Recorder]) -> None:
    again = f"rewinding to step {step}, attempt {attempt} of {REWINDS}"
    print(f"\nhealth: {error}\n  {again}, with other random numbers", flush=True)
    for logger in loggers:
        logger.log_alert("not_finite", f"{error}; {again}")


def fit(
    task: Task,
    data: L.LightningDataModule,
    folder: Path,
    max_steps: int,
    batch_size: int,
    dataset_size: int,
    cadence: Cadence,
    machine: Machine,
    loggers: Sequence[Recorder] = (),
    max_bad_fraction: float = 0.01,
    callbacks: Sequence[L.Callback] = (),
    effort: tuple[float | None, float | None] = (None, None),
    health_settings: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    clock: Clock | None = None,
) -> None:
    """Trains `task` to `max_steps` optimiser steps in `folder`, resuming from checkpoints/last.ckpt if it exists.

    effort: FLOPs of training on one image and all devices' peak FLOPs per second, for train/tflop and train/mfu.
    health_settings: the options that the health checks need. options: further Trainer options. clock: ends the training
    instead of max_steps, which still defines the length of the schedules.

    If gradients or weights are non-finite, goes back to the last checkpoint up to REWINDS times. Afterwards the task
    holds the averaged weights if it averages. Raises Interrupted on a signal, NotFinite if going back did not help or
    there is no checkpoint.
    """
    last = folder / "checkpoints" / LAST
    start = steps_done(last)
    done = start >= max_steps if clock is None else clock.is_over(last)
    if done:
        load_trained(task, last)
    steps, timed, rewound = (max_steps, [], False) if clock is None else (UNENDING, [clock], False)
    while not done:
        rows = MetricsCSV(folder / "metrics.csv", start)
        for logger in loggers:
            # A resumed training repeats the steps after its checkpoint exactly, so they are not logged again. Steps
            # repeated after going back differ: loggers that cannot remove rows show both.
            logger.logged = {} if rewound else rows.cut
        checkpoints = Checkpoints(last.parent, cadence.checkpoint_every, task.monitor)
        monitor = Monitor(batch_size, dataset_size, max_bad_fraction, cadence.trace, *effort)
        watching = [*timed, *callbacks, monitor, Health(folder, health_settings or {}), checkpoints]
        shown = [StepBar()] if cadence.progress else []
        last_of_all = LambdaCallback(on_train_batch_end=lambda *_, ended=monitor.batch_ended: ended())
        own = {"logger": [rows, *loggers], "callbacks": [*watching, *shown, last_of_all]}
        trainer = new_trainer(task, folder, steps, cadence, machine, **own, **(options or {}))
        begin = {"ckpt_path": str(last), "weights_only": True} if start else {}
        try:
            with checkpoints.signals(), kept_memory(machine.device):
                trainer.fit(task, datamodule=data, **begin)
            done = True
        except NotFinite as error:
            if (not start and not last.is_file()) or task.attempt >= REWINDS:
                raise
            task.attempt += 1
            start, rewound = steps_done(last), True
            if machine.rank == 0:
                _say_rewound(error, start, task.attempt, loggers)
    task.to(machine.device)
    if task.ema is not None:
        task.ema.give(task.ema.shadow)
