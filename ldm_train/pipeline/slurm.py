"""SLURM support: the ranks of a job's tasks, and requeueing of jobs after the signal that announces their end."""

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

from lightning.fabric.plugins.environments import SLURMEnvironment

from ldm_train import interrupts
from ldm_train.storage import write_atomically

ANNOUNCED = (signal.SIGUSR1, signal.SIGUSR2)  # sbatch --signal=USR1@120; USR2 is submitit's
ASKING = 10.0  # seconds that rank 0 has to ask for the requeue
RESTARTED = ".replaced/restarted"  # in a run folder: the job that carried out restart=, and the stage
PORTS = range(20_000, 40_000)  # MASTER_PORT is chosen from these by job and step number


def ranks(environment: Mapping[str, str]) -> dict[str, str]:
    """torchrun's environment variables for one of several tasks started by srun (directly or by submitit); empty for
    any other process. MASTER_ADDR and MASTER_PORT are kept if they are set.

    Raises ValueError if nodes have different numbers of tasks, or if each of several tasks on a node sees only one GPU.
    """
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", 1))
    if tasks == 1 or "WORLD_SIZE" in environment:
        return {}
    placed = environment["SLURM_STEP_TASKS_PER_NODE"]  # 4, 4(x2) or 4(x2),3
    if not (even := re.fullmatch(r"(\d+)(?:\(x\d+\))?", placed)):
        raise ValueError(
            f"srun placed {placed} tasks on its nodes; --ntasks-per-node=<n> gives all of them the same number"
        )
    visible = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if int(even[1]) > 1 and len(visible) == 1 and visible[0]:
        raise ValueError(
            f"each of {even[1]} tasks sees one GPU of its node alone (--gpus-per-task); use --gpus-per-node={even[1]} and "
            "--gpu-bind=none"
        )
    job, step = int(environment["SLURM_JOB_ID"]), int(environment.get("SLURM_STEP_ID", 0))
    own = {
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "GROUP_RANK": environment["SLURM_NODEID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_WORLD_SIZE": even[1],
        "MASTER_ADDR": SLURMEnvironment.resolve_root_node_address(environment["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": str(PORTS[(job + step) % len(PORTS)]),
        "TORCHELASTIC_RUN_ID": f"slurm-{job}",  # makes Lightning use these variables, as under torchrun
    }
    return own | {name: environment[name] for name in ("MASTER_ADDR", "MASTER_PORT") if name in environment}


def note_restart(run_folder: Path, stage: str) -> None:
    """Notes, in a SLURM job, that it has carried out restart=<stage>."""
    if (job := os.environ.get("SLURM_JOB_ID")) is not None:
        path = run_folder / RESTARTED
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, lambda file: file.write(f"{job} {stage}".encode()))


def has_restarted(run_folder: Path, stage: str) -> bool:
    """Returns True if this SLURM job carried out restart=<stage> before it was requeued, so that its command, which is
    run again as it was, must continue now."""
    path, job = run_folder / RESTARTED, os.environ.get("SLURM_JOB_ID")
    requeued = job is not None and int(os.environ.get("SLURM_RESTART_COUNT", 0)) > 0
    return requeued and path.is_file() and path.read_text(errors="replace") == f"{job} {stage}"


def run_again(number: int, most: int) -> None:
    """Called after the work is saved: asks SLURM to requeue this job if signal `number` announces its end, at most
    `most` times. Rank 0 asks; SLURM then ends the other ranks.

    Under submitit the signal handler that submitit had installed does this, counting by hydra.launcher.max_num_timeout.
    """
    if number not in ANNOUNCED:
        return  # e.g. SIGTERM, from scancel (the job stays cancelled) or preemption (SLURM requeues it itself)
    job, done = os.environ.get("SLURM_JOB_ID"), int(os.environ.get("SLURM_RESTART_COUNT", 0))
    if job is not None and int(os.environ.get("RANK", 0)):
        time.sleep(ASKING)  # if a failing task ends all others, rank 0 must have asked before this one exits
        return
    if interrupts.handled_outside(number):
        signal.raise_signal(number)
        return
    if job is None or (scontrol := shutil.which("scontrol")) is None:
        return
    if done >= most:
        print(
            f"\njob {job} has been run again {done} times (requeues={most}); submit it once more to continue",
            flush=True,
        )
        return
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    said = f"SLURM runs job {job} again"
    try:
        answer = subprocess.run([scontrol, "requeue", job], capture_output=True, text=True, timeout=60)
        if answer.returncode:
            said = f"scontrol requeue {job}: {answer.stderr.strip()}"
    except (OSError, subprocess.TimeoutExpired) as error:
        said = f"scontrol requeue {job}: {error}"
    print(f"\n{said}", flush=True)
