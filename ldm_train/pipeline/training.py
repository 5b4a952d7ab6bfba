"""Functions shared by all stages that train: keys, checks, optimiser, training loop, and writing the model folder."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from lightning import Callback, LightningDataModule, Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Checkpoint
from omegaconf import OmegaConf
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ldm_train.checkpoints.native import read_metadata, save_model
from ldm_train.compiling import check_compiler
from ldm_train.configuration import config_folder, plain
from ldm_train.errors import first_line
from ldm_train.pipeline.data import batching_of
from ldm_train.pipeline.run import Run
from ldm_train.training.callbacks.clock import Clock, seconds_of
from ldm_train.training.callbacks.pace import Pace
from ldm_train.training.fit import Cadence, CheckOnlyMachine, fit
from ldm_train.training.task import Task

# Options that may differ when a stage resumes: they change its length, or its noise and rounding, but do not make it
# another experiment.
PACE = ("max_steps", "micro_batch_size", "checkpoint_every", "compile")
WATCHED = ("val_every", "val_images", "log_every", "samples", "evaluate_every", "evaluate_images", "best_by")
NOT_IN_KEY = ("data", "identifier", *PACE, *WATCHED)  # data enter the key by content instead


def training_key(run: Run, stage: str) -> dict[str, Any]:
    """What a stage's training depends on apart from its data: the options that change the result, seed and
    precision."""
    section = {k: v for k, v in plain(run.config[stage]).items() if k not in NOT_IN_KEY}
    return {stage: section, "seed": run.config.seed, "precision": run.machine.precision}


def trainer_options(run: Run) -> dict[str, Any]:
    """The options in `trainer` for Lightning's Trainer. Raises ValueError for options other than those of
    conf/trainer/default.yaml, which stages set themselves."""
    known = OmegaConf.load(config_folder() / "trainer" / "default.yaml")
    if others := sorted({*run.config.trainer} - {*known}):
        raise ValueError(
            f"trainer.{others[0]}: a stage sets it itself (max_steps, micro_batch_size, clip_norm, val_every, ...); here go "
            f"{', '.join(known)}"
        )
    return instantiate(plain(run.config.trainer), _convert_="all")


def own_callbacks(run: Run) -> list[Callback]:
    """The callbacks configured in `callbacks`. Raises ValueError for an object that is not a callback, or that saves
    checkpoints."""
    callbacks = []
    for name, tree in plain(run.config.callbacks).items():
        callback = instantiate(tree, _convert_="all")
        if not isinstance(callback, Callback):
            raise ValueError(f"callbacks.{name}: {tree['_target_']} is not a callback")
        if isinstance(callback, Checkpoint):
            raise ValueError(f"callbacks.{name}: {tree['_target_']} saves checkpoints, which training does itself")
        callbacks.append(callback)
    return callbacks


def check_optimisation(run: Run, stage: str) -> None:
    """Raises ValueError if the optimiser, the learning-rate schedule, or the options and callbacks of the Trainer
    cannot be built, if compile=true finds no compiler, or if ema_width is set without ema_decay."""
    section = run.config[stage]
    if section.get("compile") and not isinstance(run.machine, CheckOnlyMachine):
        check_compiler(f"{stage}.compile", run.machine.device)
    if section.get("ema_width") is not None and section.ema_decay is None:
        raise ValueError(
            f"{stage}.ema_width is the width of an average, and {stage}.ema_decay=null has none; set it to 0.999"
        )
    own_callbacks(run)
    bare = dict.fromkeys(("logger", "enable_checkpointing", "enable_model_summary", "enable_progress_bar"), False)
    try:
        with warnings.catch_warnings(action="ignore"):  # warnings about GPUs that this Trainer does not use
            Trainer(accelerator="cpu", **bare, **trainer_options(run))
    except (TypeError, MisconfigurationException) as error:
        raise ValueError(f"trainer: {error}") from error
    try:
        instantiate(section.optimizer, lr=section.lr, _convert_="all")([nn.Parameter(torch.zeros(1))])
    except Exception as error:  # optimisers raise errors of any type
        raise ValueError(f"{stage}.optimizer: {error.__cause__ or error}") from error
    try:
        instantiate(section.lr_schedule, max_steps=section.max_steps)(0)
    except Exception as error:
        raise ValueError(
            f"{stage}.lr_schedule is not a schedule of learning rates: {error.__cause__ or error}"
        ) from error


def optimisation(run: Run, stage: str) -> dict[str, Any]:
    """The arguments that every `Task` takes."""
    section = run.config[stage]
    return {
        "seed": run.config.seed,
        "optimizer": instantiate(section.optimizer, lr=section.lr, _convert_="all"),
        "lr_factor": instantiate(section.lr_schedule, max_steps=section.max_steps),
        "ema_decay": section.ema_decay,
        "ema_width": section.get("ema_width"),
        "clip_norm": section.clip_norm,
        "accumulate": batching_of(section, run.machine).accumulate,
    }


def train(
    run: Run,
    stage: str,
    task: Task,
    data: LightningDataModule,
    folder: Path,
    images: int,
    callbacks: Sequence[Callback] = (),
    health: Mapping[str, Any] | None = None,
) -> None:
    """Trains a task with the options of its stage's section. images: number of training images. health: the options
    that the health checks need."""
    config, section = run.config, run.config[stage]
    progress = config.progress and run.machine.rank == 0
    cadence = Cadence(section.val_every, section.checkpoint_every, section.log_every, progress, config.trace)
    clock = None if section.get("max_time") is None else Clock(seconds_of(section.max_time), section.max_steps)
    pace = [Pace(section.batch_size, config.price_per_hour)] if run.machine.rank == 0 and clock is None else []
    fit(
        task,
        data,
        folder,
        max_steps=section.max_steps,
        batch_size=section.batch_size,
        dataset_size=images,
        cadence=cadence,
        machine=run.machine,
        loggers=run.loggers(stage),
        max_bad_fraction=config.data.max_bad_fraction,
        callbacks=[*own_callbacks(run), *callbacks, *pace],
        effort=run.effort.get(stage, (None, None)),
        health_settings=health,
        options=trainer_options(run),
        clock=clock,
    )


def save(run: Run, folder: Path, module: nn.Module, tree: dict[str, Any], metadata: dict[str, Any]) -> str:
    """Writes a model folder, on rank 0; returns the sha256 of its weights."""
    if run.machine.rank == 0:
        save_model(folder, module, tree, metadata)
    run.barrier()
    return read_metadata(folder)["sha256"]


_counted: dict[Any, int] = {}


def forward_flops(option: str, tree: Mapping[str, Any], module: nn.Module, *inputs: Any, **named: Any) -> int:
    """Counts the FLOPs of one forward pass, cached by config tree, input shapes and module types, e.g. for the jobs of
    a sweep. Raises ValueError, naming the option, for a network that fails to run."""
    shapes = [(name, tuple(i.shape)) for name, i in (*enumerate(inputs), *named.items())]
    alike = (repr(tree), str(shapes), tuple(type(part) for part in module.modules()))
    if alike in _counted:
        return _counted[alike]
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module(*inputs, **named)
    except (RuntimeError, TypeError, IndexError, ZeroDivisionError) as error:
        shapes = ", ".join("x".join(map(str, i.shape)) for i in inputs)
        raise ValueError(f"{option} does not run on an input of {shapes}: {first_line(error)}") from error
    return _counted.setdefault(alike, counter.get_total_flops())
