"""Ray: functions on the machines of a cluster. Ray itself (`pip install 'ldm-train[ray]'`) is imported when it is asked for."""

import os
import socket
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

Result = TypeVar("Result")
RETRIES = 3  # of a task whose machine or process is lost


def connect() -> Any:
    """The module `ray`, connected to the cluster of RAY_ADDRESS, else to the one of this machine, which is begun where there is
    none. Raises ModuleNotFoundError without Ray, and ValueError where the cluster does not answer."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ModuleNotFoundError:
        raise ModuleNotFoundError("engine=ray needs Ray: pip install 'ldm-train[ray]'") from None
    if not ray.is_initialized():
        try:
            ray.init(logging_level="WARNING", log_to_driver=True)
        except (ConnectionError, RuntimeError) as error:
            where = os.environ.get("RAY_ADDRESS", "of this machine")
            raise ValueError(f"the Ray cluster {where} does not answer: {error}; see `ray status`") from error
    return ray


def in_shared_folder(folder: str) -> None:
    """Makes `folder` the working directory. Raises ValueError where this machine has none of that name."""
    try:
        os.chdir(folder)
    except OSError as error:
        raise ValueError(
            f"{socket.gethostname()} cannot use {folder} ({error.strerror}); the machines of a cluster share the folder that the "
            "command runs in"
        ) from error


def _in_folder(folder: str, function: Callable[..., Result], shared: Any, *task: Any) -> Result:
    in_shared_folder(folder)
    return function(shared, *task)


def mapped(
    function: Callable[..., Result], shared: Any, tasks: Mapping[str, tuple], at_once: int
) -> Iterator[tuple[str, Result]]:
    """Yields (name, function(shared, *task)) in the order in which they end, at most `at_once` at a time, each in this process's
    working directory. `shared` is sent once to each machine. A task whose machine or process is lost is done again elsewhere, so
    that it may be done twice."""
    ray = connect()
    folder = os.getcwd()
    remote, reference = ray.remote(max_retries=RETRIES)(_in_folder), ray.put(shared)
    waiting, running = list(reversed(tasks.items())), {}
    while waiting or running:
        while waiting and len(running) < at_once:
            name, task = waiting.pop()
            running[remote.remote(folder, function, reference, *task)] = name
        for finished in ray.wait(list(running))[0]:
            name = running.pop(finished)
            try:
                yield name, ray.get(finished)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None  # the function's own, with its message
