"""Ends a process of this package at once, with a one-line message, on SIGTERM, SIGINT (Ctrl-C), SIGUSR1 or SIGUSR2, and
when its parent ends.

Imports nothing heavy: commands install the handlers before they import torch, which takes seconds.
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
PARENT = "LDM_TRAIN_PARENT"  # environment variable: id of the parent process; this process ends when the parent does
REPORT = "LDM_TRAIN_REPORT"  # environment variable: file for this process's final message, which the parent shows
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Stopped(BaseException):
    """Raised by the handler `stop`, so that code can clean up before the process ends."""

    def __init__(self, number: int):
        super().__init__(farewell(number))
        self.number = number


_when = ""


def during(words: str) -> None:
    """Sets the phase, e.g. "before training", that the message printed on a signal names from now on."""
    global _when
    _when = words


def farewell(number: int, when: str | None = None) -> str:
    when = _when if when is None else when
    return f"stopped by {signal.Signals(number).name}{when and ' '}{when}; run the same command to continue"


def last_words(text: str) -> None:
    """Reports why this process ends, in the file REPORT if set, otherwise on stderr. Only the first message goes to
    that file, which the parent shows. Safe to call in a signal handler."""
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
    """The default action on a signal: exits at once. Files are written atomically, so no clean-up is needed."""
    if os.environ.get(REPORT) or os.environ.get("RANK", "0") == "0":
        last_words(farewell(number))
    os._exit(128 + number)


def stop(number: int) -> None:
    raise Stopped(number)


_act: Callable[[int], None] = leave
_owner = 0  # id of the process that installed the handlers


def _on_signal(number: int, frame: Any) -> None:
    if os.getpid() == _owner:
        _act(number)
    elif number == signal.SIGTERM:  # a forked child: Ctrl-C in a terminal reaches it too, but the parent decides
        os._exit(128 + number)


@contextmanager
def answered_by(act: Callable[[int], None]) -> Iterator[Callable[[int], None]]:
    """A context in which signals call `act(number)` in the main thread. Yields the action that was set before."""
    global _act
    before, _act = _act, act
    try:
        yield before
    finally:
        _act = before


def handled_outside(number: int) -> bool:
    """Returns True if a signal has a handler that is not from this module, e.g. submitit's."""
    return callable(handler := signal.getsignal(number)) and handler not in (_on_signal, signal.default_int_handler)


def _taken() -> list[signal.Signals]:
    """The signals to handle. submitit ignores SIGTERM, which arrives together with the signal it acts on, so under
    submitit this package does not handle it either."""
    return [n for n in SIGNALS if not (n == signal.SIGTERM and "SUBMITIT_EXECUTOR" in os.environ)]


@contextmanager
def handled() -> Iterator[None]:
    """A context in which signals are handled; afterwards the previous handlers are restored. Does nothing outside the
    main thread."""
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
    """Called by the process of a command: signals are handled from now on until it ends."""
    global _owner
    if parent := os.environ.pop(PARENT, None):
        end_with(int(parent))
    if REPORT in os.environ:
        sys.excepthook = lambda *error: last_words("".join(traceback.format_exception(*error)))
    if "--multiprocessing-fork" in sys.orig_argv:  # a worker that imports its parent's main module
        return leave_signals_to_parent()
    if _owner != os.getpid():
        _owner = os.getpid()
        with suppress(AttributeError):  # Windows lacks it; Ray's processes block SIGINT, which their children inherit
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        for number in SIGNALS:
            signal.signal(number, _on_signal)
        atexit.register(_ignore)  # registered first, so it runs last
        import multiprocessing.util  # noqa: F401 - registers its function for the end of a process, which runs after ours

        atexit.register(_end_children)


def _ignore() -> None:
    """Ignores signals at the very end of the process, where Python would restore the system's default handlers."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _end_children() -> None:
    """Kills the loading processes that are left. multiprocessing would send each one SIGTERM, which such a process
    ignores (see `leave_signals_to_parent`), and then wait for it forever."""
    from multiprocessing import active_children

    for child in active_children():
        if child.daemon:
            child.kill()


def leave_signals_to_parent() -> None:
    """Called in a worker process: it ignores signals, except that a second SIGTERM ends it. The first may have been
    sent to all processes of a job, while the parent still needs its workers to save."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))


def end_with(parent: int, alive: Callable[[], bool] = lambda: True) -> None:
    """Ends this process when its parent ends for any reason: on Linux through the kernel, elsewhere within a second.

    alive: a further condition for this process to continue.
    """
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch() -> None:
        while os.getppid() == parent and alive():
            time.sleep(1)
        os._exit(128 + signal.SIGKILL)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def become_worker(number: int = 0) -> None:
    """Called in a process of a pool or a data loader (`number` is its index there): leaves signals to the parent and
    ends with it."""
    from multiprocessing import parent_process

    leave_signals_to_parent()
    # With a fork server the direct parent is the server, which lives as long as its workers, so the real parent is
    # checked too.
    parent = parent_process()
    end_with(os.getppid(), parent.is_alive if parent else lambda: True)
