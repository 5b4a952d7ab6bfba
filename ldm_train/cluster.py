"""Runs functions in other processes, on this machine or on a Ray cluster.

Ray (`pip install 'ldm-train[ray]'`) is imported only when it is used.
"""

import errno
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any, TypeVar

from ldm_train.errors import first_line
from ldm_train.interrupts import become_worker

Result = TypeVar("Result")
RETRIES = 3  # retries of a task whose machine or process is lost
SEEN = 60.0  # seconds to wait for a shared file system to show a file that another machine has written


def connect() -> Any:
    """Returns the module `ray`, connected to the cluster at RAY_ADDRESS, or else to this machine's own cluster, which
    is started if necessary. Raises ValueError if Ray is not installed or the cluster does not answer."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ModuleNotFoundError:
        raise ValueError("engine=ray needs Ray: pip install 'ldm-train[ray]'") from None
    if not ray.is_initialized():
        before = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(logging_level="WARNING", log_to_driver=True)
        except Exception as error:  # some of Ray's errors have no class of their own
            where = os.environ.get("RAY_ADDRESS", "of this machine")
            raise ValueError(f"the Ray cluster {where} does not answer: {error}; see `ray status`") from error
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, before)  # Ray has replaced the handler
    return ray


def seen(path: str | Path) -> bool:
    """Waits up to SEEN seconds for `path`, written by another machine, to appear. Returns True if it exists."""
    end = time.monotonic() + SEEN
    while not (there := os.path.exists(path)) and time.monotonic() < end:
        time.sleep(0.5)
    return there


def in_shared_folder(folder: str, witness: str | None = None) -> None:
    """Makes `folder` the working directory. witness: a path that the command has created. Raises ValueError if this
    machine does not see both of them, because it has no such folder, or a different one of the same name."""
    try:
        os.chdir(folder)
        if witness and not seen(witness):
            raise OSError(errno.ENOENT, f"it does not see {witness}")
    except OSError as error:
        raise ValueError(
            f"{socket.gethostname()} cannot use {folder} ({error.strerror}); the machines of a cluster share the folder that the "
            "command runs in, and its runs"
        ) from error


def mapped(
    function: Callable[..., Result],
    shared: Any,
    tasks: Mapping[str, tuple],
    at_once: int,
    engine: str | None = None,
    gpus: bool = False,
) -> Iterator[tuple[str, Result]]:
    """Yields (name, function(shared, *task)) as tasks finish. `at_once` processes run in the current working directory.

    `shared` is sent once to each process. engine: "ray" uses the processes of a cluster; a task whose machine or
    process is lost is repeated elsewhere, so it may be done twice. gpus: each process sees exactly one GPU, its own.
    """
    return (_on_ray if engine == "ray" else _here)(function, shared, tasks, at_once, gpus)


# -- on a cluster --------------------------------------------------------------------------------------------------------


def _in_folder(folder: str, function: Callable[..., Result], shared: Any, *task: Any) -> Result:
    in_shared_folder(folder)
    return function(shared, *task)


def _on_ray(
    function: Callable[..., Result], shared: Any, tasks: Mapping[str, tuple], at_once: int, gpus: bool
) -> Iterator[tuple[str, Result]]:
    ray, folder = connect(), os.getcwd()
    remote = ray.remote(max_retries=RETRIES, num_gpus=1 if gpus else 0)(_in_folder)
    reference, waiting, running = ray.put(shared), list(reversed(tasks.items())), {}
    while waiting or running:
        while waiting and len(running) < at_once:
            name, task = waiting.pop()
            running[remote.remote(folder, function, reference, *task)] = name
        for finished in ray.wait(list(running))[0]:
            name = running.pop(finished)
            try:
                yield name, ray.get(finished)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None  # the error that the function raised, with its message
            except ray.exceptions.RayError as error:
                raise OSError(
                    f"Ray lost {name} {RETRIES + 1} times: {first_line(error)}; run the same command to continue"
                ) from error


# -- on this machine -----------------------------------------------------------------------------------------------------

_held: list[Any] = []  # in a pool process: the `shared` object, sent once instead of with every task


def _begin(shared: Any, own_gpu: Queue | None) -> None:
    become_worker()
    if own_gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = own_gpu.get()
    _held.append(shared)


def _with_held(function: Callable[..., Result], *task: Any) -> Result:
    return function(_held[0], *task)


def _here(
    function: Callable[..., Result], shared: Any, tasks: Mapping[str, tuple], at_once: int, gpus: bool
) -> Iterator[tuple[str, Result]]:
    context = get_context("spawn")
    own_gpu = context.Queue() if gpus else None
    if own_gpu is not None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(at_once)))
        for number in visible.split(",")[:at_once]:
            own_gpu.put(number)
    pool = ProcessPoolExecutor(at_once, context, _begin, (shared, own_gpu))
    try:
        running = {pool.submit(_with_held, function, *task): name for name, task in tasks.items()}
        for future in as_completed(running):
            yield running.pop(future), future.result()  # which would be kept otherwise, until all are done
    finally:
        pool.shutdown(cancel_futures=True)
