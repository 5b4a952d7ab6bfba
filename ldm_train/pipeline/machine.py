"""Determines the devices of a command and this process's rank among them."""

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import astuple
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from omegaconf import DictConfig

from ldm_train.devices import device_of
from ldm_train.pipeline import ray_engine, slurm
from ldm_train.pipeline.ranks import launch
from ldm_train.training.fit import CheckOnlyMachine, Machine


def kind_of(accelerator: str) -> str:
    """Returns cpu, gpu or mps for `accelerator` on this machine. Raises ValueError if it is unknown or not
    available."""
    kind = device_of(accelerator).type
    return "gpu" if kind == "cuda" else kind


def _precision(config: DictConfig, accelerator: str) -> str:
    automatic = "bf16-mixed" if accelerator == "gpu" else "32"
    return automatic if config.precision == "auto" else str(config.precision)


def machine_of(config: DictConfig, environment: Mapping[str, str]) -> Machine:
    """This process's device and rank, from the config and torchrun's environment variables. Raises ValueError if a
    requested device is not available."""
    world_size, rank, local_rank, local_world_size = (
        int(environment.get(name, default))
        for name, default in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
    )
    accelerator = kind_of(config.accelerator)
    if accelerator == "mps" and world_size > 1:
        raise ValueError(f"devices={world_size}, but mps is one device; use devices=1")
    if accelerator == "gpu" and torch.cuda.device_count() < min(world_size, local_rank + 1):
        raise ValueError(f"accelerator=gpu, but {torch.cuda.device_count()} GPUs are visible; use accelerator=cpu")
    return Machine(accelerator, _precision(config, accelerator), world_size, rank, local_rank, local_world_size)


def planned_machine(config: DictConfig) -> Machine:
    """The devices that a command would use, whether or not they are available here."""
    accelerator = config.accelerator
    accelerator = accelerator if accelerator in ("cpu", "gpu", "mps") else kind_of(accelerator)
    world_size = int(os.environ.get("WORLD_SIZE", config.devices))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", config.devices))
    return CheckOnlyMachine(accelerator, _precision(config, accelerator), world_size, local_world_size=local)


def join_devices(config: DictConfig, module: str, check: Callable[[Machine], object]) -> Machine:
    """Returns this process's device and rank among `config.devices`.

    With several devices and outside torchrun and srun, or on a Ray cluster, it instead runs this same command once per
    device and exits with their exit status. module: the command's module. check: called before any process is started;
    raises errors known beforehand, and prepares what all ranks need. Raises ValueError for more devices than are
    available.
    """
    os.environ |= slurm.ranks(os.environ)
    devices = config.devices
    if "WORLD_SIZE" in os.environ:
        pass  # this process is a rank
    elif config.engine == "ray":
        accelerator = ray_engine.accelerator_of(config.accelerator, devices)
        decided = {"accelerator": accelerator, "precision": _precision(config, accelerator)}
        check(CheckOnlyMachine(*decided.values(), devices, local_world_size=devices))
        sys.exit(ray_engine.launch(devices, module, decided, config.max_failures, Path(config.runs_dir)))
    elif devices > 1:
        everywhere = {"WORLD_SIZE": str(devices), "LOCAL_WORLD_SIZE": str(devices)}
        machine = machine_of(config, everywhere)
        gpus = machine.accelerator == "gpu"
        there = torch.cuda.device_count() if gpus else os.cpu_count() or 1
        if devices > there:
            kind = "GPUs are visible" if gpus else "CPU cores are there"
            raise ValueError(f"devices={devices}, but {there} {kind}; use devices={there}")
        check(CheckOnlyMachine(*astuple(machine)))
        sys.exit(launch(devices, module))
    machine = machine_of(config, os.environ)
    if machine.world_size > 1:
        if machine.accelerator == "gpu":
            torch.cuda.set_device(machine.device)
        if not dist.is_initialized():
            # Ranks wait for each other for whole evaluations, longer than the default ten minutes.
            backend = "gloo" if machine.accelerator == "cpu" else "nccl"
            dist.init_process_group(backend, timeout=timedelta(days=1))
    return machine
