"""Errors that end a command with one message, as do some of Python's own."""

from ldm_train import interrupts


class Refused(RuntimeError):
    """A run that would silently reuse or overwrite something; the message names what differs and the choices."""


class Busy(Refused):
    """Another process works in the run's folder."""


class Interrupted(Exception):
    """Training stopped on a signal after saving; the same command continues it."""

    def __init__(self, number: int, step: int):
        super().__init__(interrupts.farewell(number, f"after step {step}"))
        self.number = number
