"""How a process of ours ends: at once and with one line on SIGTERM, SIGINT (Ctrl-C) and SIGUSR1, and with its parent.

Imports nothing heavy: the commands install it before they import torch, which takes seconds.
"""

import atexit
import ctypes
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
PARENT = "LDM_TRAIN_PARENT"  # environment: the process that this one ends with
REPORT = "LDM_TRAIN_REPORT"  # environment: the file for this process's last words, which its parent shows
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Stopped(BaseException):
    """Raised by the handler `stop`, for what has to be put in order before it leaves."""

    def __init__(self, number: int):
        super().__init__(farewell(number))
        self.number = number


_when = ""


def during(words: str) -> None:
    """Says when a signal will have stopped this process, from now on: "before training"."""
    global _when
    _when = words


def farewell(number: int, when: str | None = None) -> str:
    when = _when if when is None else when
    return f"stopped by {signal.Signals(number).name}{when and ' '}{when}; run the same command to continue"


def last_words(text: str) -> None:
    """Writes why this process ends; of several, what comes first stands where a parent shows it. Callable in a handler."""
    with suppress(Exception):  # the interrupted code may be writing just now
        sys.stdout.flush()
    if path := os.environ.get(REPORT):
        with suppress(OSError):
            os.write(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), f"{text}\n".encode())
        return
    try:
        print(f"\n{text}", file=sys.stderr, flush=True)
    except Exception:
        with suppress(OSError):
            os.write(2, f"\n{text}\n".encode())


def leave(number: int) -> None:
    """The usual answer to a signal. Files appear whole or not at all, so nothing has to be put in order."""
    if os.environ.get(REPORT) or os.environ.get("RANK", "0") == "0":
        last_words(farewell(number))
    os._exit(128 + number)


def stop(number: int) -> None:
    raise Stopped(number)


_act: Callable[[int], None] = leave
_owner = 0  # the process whose handlers these are


def _on_signal(number: int, frame: Any) -> None:
    if os.getpid() == _owner:
        _act(number)
    elif number == signal.SIGTERM:  # a forked child: a terminal sends Ctrl-C to it too, and its parent decides
        os._exit(128 + number)


@contextmanager
def answered_by(act: Callable[[int], None]) -> Iterator[None]:
    """Within it, signals call `act(number)` in the main thread."""
    global _act
    before, _act = _act, act
    try:
        yield
    finally:
        _act = before


@contextmanager
def handled() -> Iterator[None]:
    """Within it, signals are answered; afterwards as before. In another thread than the main one it does nothing."""
    global _owner
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner, _owner = _owner, os.getpid()
    before = {number: signal.signal(number, _on_signal) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        _owner = owner


def install() -> None:
    """For a process that is one command: signals are answered from here to its end."""
    global _owner
    if parent := os.environ.pop(PARENT, None):
        end_with(int(parent))
    if REPORT in os.environ:
        sys.excepthook = lambda *error: last_words("".join(traceback.format_exception(*error)))
    if "--multiprocessing-fork" in sys.orig_argv:  # a worker that imports its parent's main module
        return leave_signals_to_parent()
    if _owner != os.getpid():
        _owner = os.getpid()
        for number in SIGNALS:
            signal.signal(number, _on_signal)
        atexit.register(_ignore)  # the first registered runs last


def _ignore() -> None:
    """All is done and said; in what remains, Python would put the system's own answers back."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def leave_signals_to_parent() -> None:
    """For a worker process. The second SIGTERM ends it: the first may have been sent to all processes of a job, while
    the parent still needs its workers to save."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))


def end_with(parent: int, alive: Callable[[], bool] = lambda: True) -> None:
    """Ends this process as soon as its parent has ended, by whatever means: on Linux through the kernel, elsewhere
    within a second. alive: what else must be the case for it to go on."""
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch() -> None:
        while os.getppid() == parent and alive():
            time.sleep(1)
        os._exit(128 + signal.SIGKILL)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def become_worker(number: int = 0) -> None:
    """For a process of a pool or a loader (`number` there): leaves signals to its parent and ends with it."""
    from multiprocessing import parent_process

    leave_signals_to_parent()
    # A server that forks the workers is not who they work for, and lives as long as one of them.
    parent = parent_process()
    end_with(os.getppid(), parent.is_alive if parent else lambda: True)
