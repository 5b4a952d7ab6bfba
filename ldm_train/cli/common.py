"""Shared by the commands: Hydra with readable errors and did-you-mean suggestions."""

import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from hydra.utils import get_method
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm_train import interrupts, names
from ldm_train.cli.hints import readable, recipes
from ldm_train.configuration import ARGUMENTS, config_folder
from ldm_train.errors import Interrupted, Refused, first_line

# Errors that a user can act on: printed as one message, without a traceback (HYDRA_FULL_ERROR=1 shows it).
USER_ERRORS = (Refused, ValueError, OSError, HydraException, OmegaConfBaseException, FloatingPointError)
TRACEBACK = "LDM_TRAIN_TRACEBACK"  # environment variable: "1" if the user asked for tracebacks


def quoted(argument: str, free: Sequence[str]) -> str:
    """Quotes the value of a command-line argument for the options in `free`, so that it is taken as typed: commas,
    apostrophes, brackets and `=` have a meaning in Hydra. Lists stay lists, except for layouts, which are JSON."""
    option, _, value = argument.partition("=")
    if option not in free or value in ("", "null") or re.fullmatch(r"""'([^'\\]|\\.)*'|"([^"\\]|\\.)*\"""", value):
        return argument
    if value[0] == "[" and value[-1] == "]" and (option != "layout" or ".json" in value):
        return argument
    # Backslashes stand for themselves, except before a quote, before ${ and at the end.
    value = re.sub(r'(\\*)("|\$\{)', r"\1\1\\\2", value)
    return f'{option}="' + re.sub(r"(\\+)$", r"\1\1", value) + '"'


def null_as_none(argument: str) -> str:
    """Returns `group=null`, which Hydra does not take, as `group=none` if the group has such an option."""
    group, _, value = argument.partition("=")
    return f"{group}=none" if value == "null" and (config_folder() / group / "none.yaml").is_file() else argument


def _raise_file_limit() -> None:
    """Raises the limit on open files: every shard in use keeps one open, and the usual soft limit is 1,024."""
    with suppress(ImportError, ValueError, OSError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = 1 << 20 if hard == resource.RLIM_INFINITY else hard
        if soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _words(error: Exception) -> str:
    """Returns the message of an error; for one from a data-loading process, whose message is a whole traceback, the
    original message."""
    message = str(error)
    if re.match(r"Caught \w+ in [^\n]*\.\nOriginal Traceback", message):
        said = list(re.finditer(rf"^(\w+\.)*{re.escape(type(error).__name__)}: ", message, re.MULTILINE))
        return message[said[-1].end() :].strip() if said else message
    return message


def run_command(function: Callable[[DictConfig], Any] | str, config_name: str) -> None:
    """Composes conf/<config_name>.yaml with the command line and calls `function`; exits with 1 and one readable
    message if the user has to act, with 128 + signal and one line after an interruption.

    function: a function, or its dotted name, which is imported when it is called: torch takes seconds, which --help
    need not wait for.
    """
    _raise_file_limit()
    OmegaConf.register_new_resolver("recipes", recipes, replace=True)  # for --help
    sys.argv[1:] = [null_as_none(names.argument(a)) for a in sys.argv[1:]]
    os.environ[ARGUMENTS] = json.dumps(sys.argv[1:])
    # Hydra must raise, not print. The user's own setting is kept in TRACEBACK, also for the processes that torchrun starts.
    wants_traceback = os.environ.setdefault(TRACEBACK, os.environ.get("HYDRA_FULL_ERROR", "0")) == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"
    failed: list[Exception] = []

    def job(config: DictConfig) -> None:
        try:
            (get_method(function) if isinstance(function, str) else function)(config)
        except Exception as error:
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                raise
            failed.append(error)  # raised below: Hydra would write the whole command line before it

    decorated = hydra.main(version_base="1.3", config_path=str(config_folder()), config_name=config_name)(job)
    try:
        with interrupts.handled():
            decorated()
            if failed:
                raise failed[0]
    except (Interrupted, interrupts.Stopped) as error:
        interrupts.last_words(str(error))
        sys.exit(128 + error.number)
    except USER_ERRORS as error:
        if wants_traceback:
            raise
        message = _words(error)
        if isinstance(error, InstantiationException) and isinstance(error.__cause__, USER_ERRORS):
            message = _words(error.__cause__)
        elif isinstance(error, HydraException):
            if error.__cause__ is not None and not isinstance(error.__cause__, HydraException):
                message = f"{error.__cause__}\n{message}"
            message = readable(message, config_name, [a for a in sys.argv[1:] if not a.startswith("-")])
        interrupts.last_words(f"error: {message}")
        sys.exit(1)
    except RuntimeError as error:
        if wants_traceback or not str(error).startswith("DataLoader worker (pid"):
            raise
        interrupts.last_words(
            f"error: a process that loads data has died ({first_line(error)}); the machine may be out of memory, "
            "or of shared memory (/dev/shm): num_workers=<fewer> needs less. Run the same command to continue"
        )
        sys.exit(1)
