"""The work of train.py: completes the config, finds this process's device and rank, and runs the stages."""

import hashlib
import io
import json
import os
import re
import sys
import traceback
from contextlib import redirect_stdout
from pathlib import Path

import torch
import torch.distributed as dist
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from ldm_train import interrupts
from ldm_train.configuration import ARGUMENTS
from ldm_train.errors import Busy, Interrupted
from ldm_train.pipeline import ray_engine, slurm
from ldm_train.pipeline.data import ensure_data, stage_data
from ldm_train.pipeline.machine import join_devices, planned_machine
from ldm_train.pipeline.resume import run_lock
from ldm_train.pipeline.run import Run, own_parts
from ldm_train.pipeline.sweep import FAILED
from ldm_train.pipeline.values import check_values
from ldm_train.storage import Moved, held, write_json
from ldm_train.training.fit import Machine

LONGEST = 150  # largest number of characters in the name of a job's folder
ARM = ("technique=", "seed=")  # overrides that tell a ledger's arms apart; kept in the names of its jobs


def _bare(override: str) -> str:
    return re.sub(r"['\"\s]", "", override).lower()


def run_name(config: DictConfig) -> str:
    """The name of the run's folder: name=..., else the experiment's name; in a multirun <that>/<the overrides in which
    its jobs differ>."""
    hydra_config = HydraConfig.get()
    name = config.name if config.name is not None else hydra_config.runtime.choices.get("experiment") or "run"
    if isinstance(name, bool) or not isinstance(name, str | int) or not str(name).strip("./ "):
        raise ValueError(f"name={name} is not the name of a folder")
    if hydra_config.mode == RunMode.MULTIRUN:
        # Overrides typed without a sweep are the same for all jobs; Hydra only formats them differently.
        typed = {_bare(a) for a in json.loads(os.environ.get(ARGUMENTS, "[]"))}
        kept = ARM if any(o.startswith("technique=") for o in hydra_config.overrides.task) else ()
        differing = sorted(o for o in hydra_config.overrides.task if _bare(o) not in typed or o.startswith(kept))
        own = ",".join(differing).replace("/", "_") or "default"
        if len(own) > LONGEST:
            own = f"{own[: LONGEST - 9]}-{hashlib.sha256(own.encode()).hexdigest()[:8]}"
        return f"{name}/{own}"
    return str(name)


def train(config: DictConfig) -> None:
    interrupts.during("before training")
    sweeping = HydraConfig.get().mode == RunMode.MULTIRUN
    config.name = run_name(config)
    folder = Path(str(config.runs_dir)) / config.name
    if config.plan == "only":
        return _train(config, folder, sweeping)

    def leave(number: int) -> None:
        slurm.run_again(number, config.requeues)
        interrupts.leave(number)

    try:
        with interrupts.answered_by(leave):
            _train(config, folder, sweeping)
    except Interrupted as error:
        slurm.run_again(error.number, config.requeues)
        if sweeping:  # Hydra would treat it as a failed job and start the next one
            interrupts.last_words(str(error))
            sys.exit(128 + error.number)
        raise
    except Exception as error:
        if not sweeping:
            raise
        # The other jobs of the sweep continue; the report at its end lists this one.
        if not isinstance(error, Busy | Moved):  # the folder belongs to another process, or is gone
            folder.mkdir(parents=True, exist_ok=True)
            said = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
            write_json(folder / FAILED, said)
        print(
            f"\n{config.name} failed ({type(error).__name__}: {error}); the sweep goes on", file=sys.stderr, flush=True
        )


def make_deterministic(config: DictConfig) -> None:
    """With `deterministic`, the same command produces the same files on one machine: operations without a deterministic
    implementation raise an error."""
    torch.use_deterministic_algorithms(bool(config.deterministic))
    if config.deterministic:
        config.trainer.deterministic = True  # because Lightning's Trainer sets it again
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # must be set before the first use of cuBLAS


def _make_data(config: DictConfig) -> None:
    for stage in ("autoencoder", "diffusion"):
        ensure_data(stage_data(config, stage))


def _train(config: DictConfig, folder: Path, sweeping: bool) -> None:
    check_values(config)
    make_deterministic(config)
    if (config.devices > 1 or config.engine == "ray") and (sweeping or config.share):
        raise ValueError(
            "devices>1 and engine=ray cannot be combined with -m or share=true: such jobs share a process, or wait for each "
            "other's stages; use one device of this machine each, or start the other runs one after the other"
        )

    if config.plan == "only":
        return Run(config, folder, planned_machine(config), own_parts(config)).plan()

    restarted = config.restart if config.restart and slurm.has_restarted(folder, config.restart) else None
    if restarted:
        config.restart = None

    def check(machine: Machine) -> None:
        _make_data(config)
        with redirect_stdout(io.StringIO()):  # the run prints the plan
            run = Run(config, folder, machine, own_parts(config))
            run.prepare()
            if config.engine == "ray" and config.restart:  # only once, not again by restarted ranks
                with run_lock(folder):
                    run.set_aside()

    machine = join_devices(config, "ldm_train.cli.train", check)
    world_size, rank = machine.world_size, machine.rank
    torch.set_float32_matmul_precision("high")
    if rank == 0:
        if restarted:
            print(f"restart={restarted} was carried out before this job was requeued; it continues")
        _make_data(config)
    if world_size > 1:
        dist.barrier()
    folder.mkdir(parents=True, exist_ok=True)
    again = os.environ.get("TORCHELASTIC_RUN_ID") == ray_engine.RUN_ID
    with run_lock(folder, ray_engine.PATIENCE if again else 0.0) if rank == 0 else held(folder):
        (folder / FAILED).unlink(missing_ok=True)
        try:
            share = (sweeping or config.share) and world_size == 1
            Run(config, folder, machine, own_parts(config), share).execute()
        except Interrupted:
            if config.restart and rank == 0:
                how = "of a new job" if "SLURM_JOB_ID" in os.environ else "when you continue"
                print(f"\nomit restart={config.restart} {how}: it would restart that stage from scratch")
            raise
    if world_size > 1:
        dist.destroy_process_group()
