"""Errors that end a command with their message instead of a traceback, like some of Python's own."""

from ldm_train import interrupts


def first_line(error: BaseException) -> str:
    """The first line of an error's message; the error's type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def in_one_line(error: BaseException) -> str:
    """The first 200 characters of an error's message in one line; the error's type if it has none."""
    return " ".join(str(error).split())[:200] or type(error).__name__


class Refused(RuntimeError):
    """Raised if a run would silently reuse or overwrite something; the message names what differs and the choices."""


class Busy(Refused):
    """Raised if another process works in the run's folder."""


class Interrupted(Exception):
    """Raised after training has saved and stopped on a signal; the same command continues it."""

    def __init__(self, number: int, step: int):
        super().__init__(interrupts.farewell(number, f"after step {step}"))
        self.number = number
