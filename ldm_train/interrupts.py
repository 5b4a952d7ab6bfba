"""Ends a process of this package at once, with one line, on SIGTERM, SIGINT (Ctrl-C), SIGUSR1 and SIGUSR2, and when its parent ends.

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

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
PARENT = "LDM_TRAIN_PARENT"  # environment: id of the parent process; this one ends when it ends
REPORT = "LDM_TRAIN_REPORT"  # environment: the file for this process's final message, which its parent shows
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Stopped(BaseException):
    """Raised by the handler `stop`, so that code can clean up before the process ends."""

    def __init__(self, number: int):
        super().__init__(farewell(number))
        self.number = number


_when = ""


def during(words: str) -> None:
    """Sets the phase that the message of a signal names from now on, such as "before training"."""
    global _when
    _when = words


def farewell(number: int, when: str | None = None) -> str:
    when = _when if when is None else when
    return f"stopped by {signal.Signals(number).name}{when and ' '}{when}; run the same command to continue"


def last_words(text: str) -> None:
    """Writes why this process ends. Only the first message goes to the file that the parent shows. Callable in a handler."""
    with suppress(Exception):  # the interrupted code may be in the middle of a write
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
    """The usual handling of a signal. Files are written atomically, so no clean-up is needed."""
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
def answered_by(act: Callable[[int], None]) -> Iterator[Callable[[int], None]]:
    """A context in which signals call `act(number)` in the main thread. Gives what they called before."""
    global _act
    before, _act = _act, act
    try:
        yield before
    finally:
        _act = before


def handled_outside(number: int) -> bool:
    """Whether a signal has a handler that is not of this module, such as submitit's."""
    return callable(handler := signal.getsignal(number)) and handler not in (_on_signal, signal.default_int_handler)


def _taken() -> list[signal.Signals]:
    """The signals to handle. submitit ignores SIGTERM, which comes with the one that it acts on; so must we there."""
    return [n for n in SIGNALS if not (n == signal.SIGTERM and "SUBMITIT_EXECUTOR" in os.environ)]


@contextmanager
def handled() -> Iterator[None]:
    """A context in which signals are handled; the old handlers return after it. Does nothing outside the main thread."""
    global _owner
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner, _owner = _owner, os.getpid()
    before = {number: signal.signal(number, _on_signal) for number in _taken()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        _owner = owner


def install() -> None:
    """For the process of a command: signals are handled from here to its end."""
    global _owner
    if parent := os.environ.pop(PARENT, None):
        end_with(int(parent))
    if REPORT in os.environ:
        sys.excepthook = lambda *error: last_words("".join(traceback.format_exception(*error)))
    if "--multiprocessing-fork" in sys.orig_argv:  # a worker that imports its parent's main module
        return leave_signals_to_parent()
    if _owner != os.getpid():
        _owner = os.getpid()
        with suppress(AttributeError):  # Windows; Ray's processes block SIGINT, and so would those that they start
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        for number in SIGNALS:
            signal.signal(number, _on_signal)
        atexit.register(_ignore)  # the first registered runs last


def _ignore() -> None:
    """Ignores signals at the very end of the process, where Python would restore the system's own handlers."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def leave_signals_to_parent() -> None:
    """For a worker process. The second SIGTERM ends it: the first may have been sent to all processes of a job, while
    the parent still needs its workers to save."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))


def end_with(parent: int, alive: Callable[[], bool] = lambda: True) -> None:
    """Ends this process when its parent ends, for any reason: on Linux through the kernel, elsewhere within a second.
    alive: a further condition for this process to continue."""
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
    # With a fork server the direct parent is the server, which lives as long as a worker: the real parent is checked too.
    parent = parent_process()
    end_with(os.getppid(), parent.is_alive if parent else lambda: True)
