"""Errors that end a command with their message instead of a traceback, like some of Python's own."""

from ldm_train import interrupts


class Refused(RuntimeError):
    """Raised if a run would silently reuse or overwrite something; the message names what differs and the choices."""


class Busy(Refused):
    """Raised if another process works in the run's folder."""


class Interrupted(Exception):
    """Raised after training has saved and stopped on a signal; the same command continues it."""

    def __init__(self, number: int, step: int):
        super().__init__(interrupts.farewell(number, f"after step {step}"))
        self.number = number
