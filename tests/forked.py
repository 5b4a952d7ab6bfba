"""Runs commands and functions in processes of their own that import nothing: Python's fork server has done it for all
of them.

A newly started process spends most of a short training on imports (12 of 17 seconds). Tests of how a command starts and
ends, from its first signal to its exit status, still use newly started processes.
"""

import atexit
import multiprocessing
import os
import runpy
import sys
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch

TRAIN = Path(__file__).parents[1] / "train.py"
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["ldm_train.cli.train", "ldm_train.pipeline.train", "ldm_train.pipeline.run", "ldm_train.data.datamodule"]
)


def begun(function: Callable[..., None], *arguments: Any) -> ForkServerProcess:
    """Starts a function of a test's module in a process and returns the process. It can be killed, and may have
    children."""
    process = CONTEXT.Process(target=function, args=arguments)
    process.start()
    return process


def begun_training(folder: Path, *options: str) -> ForkServerProcess:
    """Starts `python train.py` with these options in this folder, on one thread; its output goes to folder/log."""
    return begun(_train, folder, options)


def trained(folder: Path, *options: str) -> None:
    """Runs `python train.py` with these options until it ends; fails if its exit status is not 0."""
    process = begun_training(folder, *options)
    process.join()
    assert process.exitcode == 0, (folder / "log").read_text()[-6000:]


def _train(folder: Path, options: tuple[str, ...]) -> None:
    os.chdir(folder)
    os.environ["OMP_NUM_THREADS"] = "1"  # for the data loader's processes
    torch.set_num_threads(1)
    log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = [str(TRAIN), *options]
    try:
        runpy.run_path(str(TRAIN), run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # a process of multiprocessing leaves this out; loading processes are ended here


def end_within(seconds: float, processes: list[int]) -> bool:
    """Waits until all of these processes have ended; returns false if one lives on after so many seconds."""
    end = time.monotonic() + seconds
    while any(_runs(p) for p in processes) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(_runs(p) for p in processes)


def _runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def descendants(process: int) -> list[int]:
    """Returns the ids of the process's children, their children and so on, as far as they still run."""
    try:
        own = [int(p) for p in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []
    return own + [p for child in own for p in descendants(child)]
