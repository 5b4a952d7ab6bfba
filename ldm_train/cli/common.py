"""Shared by the commands: Hydra with readable errors, did-you-mean, and types checked before anything starts."""

import difflib
import functools
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import ldm_train
from ldm_train import interrupts, names
from ldm_train.checkpoints.parts import read_config
from ldm_train.data.shards import DataError
from ldm_train.training.stages import Interrupted, Refused

# What a user can act on: printed as one message, without a traceback (HYDRA_FULL_ERROR=1 shows it).
USER_ERRORS = (
    DataError,
    Refused,
    FileNotFoundError,
    ValueError,
    OSError,
    HydraException,
    OmegaConfBaseException,
    FloatingPointError,
)

ARGUMENTS = "LDM_TRAIN_ARGUMENTS"  # environment: the command line, also for the processes that run a sweep's jobs
TRACEBACK = "LDM_TRAIN_TRACEBACK"  # environment: "1" where the user asked for tracebacks


def config_folder() -> Path:
    """conf/ beside the package in a checkout, inside it in a wheel."""
    package = Path(ldm_train.__file__).parent
    beside = package.parent / "conf"
    return beside if (beside / "train.yaml").is_file() else package / "conf"


def run_config(folder: Path) -> DictConfig:
    """config.yaml of a run folder, which may be a stranger's: plain values. Raises FileNotFoundError, or ValueError where it
    is none of a run or asks for interpolation (the config of a run is saved resolved)."""
    path = folder / "config.yaml"
    tree = read_config(path)
    if not isinstance(tree.get("stages"), list):
        raise ValueError(f"{path} is no config of a run: it names no stages")

    def check(value: Any) -> None:
        if isinstance(value, dict | list):
            for inner in value.values() if isinstance(value, dict) else value:
                check(inner)
        elif isinstance(value, str) and "${" in value:
            raise ValueError(f"{path} holds {value[:80]!r}; what a run has saved is resolved, this file is not its own")

    check(tree)
    return OmegaConf.create(names.options(tree))


def literal(tree: dict[str, Any]) -> DictConfig:
    """A config whose strings mean what they say: `${` in a caption asks for no other option."""

    def escaped(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: escaped(v) for k, v in value.items()}
        if isinstance(value, list):
            return [escaped(v) for v in value]
        # Backslashes before an interpolation escape each other, so each is doubled.
        return re.sub(r"(\\*)\$\{", lambda m: m[1] * 2 + "\\${", value) if isinstance(value, str) else value

    return OmegaConf.create(escaped(tree))


def _keys(config: Any, prefix: str = "") -> list[str]:
    if not isinstance(config, DictConfig):
        return []
    own = [f"{prefix}{k}" for k in config]
    return own + [k for name in config for k in _keys(config._get_node(name), f"{prefix}{name}.")]


def suggestions(config_name: str, overrides: list[str]) -> str:
    """ "Did you mean ..." for every override whose key or group is unknown, else ""."""
    from hydra import compose, initialize_config_dir

    known: list[str] = []
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        for attempt in ([o for o in overrides if o.startswith("experiment=")], []):
            try:
                known = _keys(compose(config_name, overrides=attempt))
                break
            except HydraException:
                continue
    groups = {
        str(p.parent.relative_to(config_folder())): p
        for p in config_folder().rglob("*.yaml")
        if p.parent != config_folder()
    }
    lines = []
    for override in overrides:
        name, _, value = override.partition("=")
        name = name.lstrip("+~")
        if name in groups or any(g.startswith(name + "/") for g in groups):
            options = sorted(p.stem for p in (config_folder() / name).glob("*.yaml"))
            for choice in value.split(","):
                if choice and choice not in options and (close := difflib.get_close_matches(choice, options, 3)):
                    lines.append(f"{name}={choice}: did you mean {' or '.join(close)}?")
        elif name not in known:
            candidates = known + list(groups)
            ends = [k for k in known if k.endswith("." + name)]
            close = list(dict.fromkeys(ends[:3] or difflib.get_close_matches(name, candidates, 3, cutoff=0.6)))
            if close:
                lines.append(f"{name}: did you mean {' or '.join(close)}?")
    return "\n".join(lines)


def quoted(argument: str, free: Sequence[str]) -> str:
    """An argument of the command line whose value is meant as it is typed, for the options in `free`: commas,
    apostrophes, brackets and `=` mean something to Hydra. A list stays one, but for layouts, which are JSON."""
    option, _, value = argument.partition("=")
    if option not in free or value in ("", "null") or value[0] in "'\"":
        return argument
    if value[0] == "[" and (option != "layout" or ".json" in value):
        return argument
    return f'{option}="' + value.replace("\\", "\\\\").replace('"', '\\"').replace("${", "\\${") + '"'


def without(argument: str) -> str:
    """`group=null`, which Hydra does not take, as `group=none` where the group has such an option."""
    group, _, value = argument.partition("=")
    return f"{group}=none" if value == "null" and (config_folder() / group / "none.yaml").is_file() else argument


def _raise_file_limit() -> None:
    """Every shard in use keeps a file open, and the usual soft limit is 1,024."""
    with suppress(ImportError, ValueError, OSError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = 1 << 20 if hard == resource.RLIM_INFINITY else hard
        if soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def run_command(function: Callable[[DictConfig], Any], config_name: str) -> None:
    """Composes conf/<config_name>.yaml with the command line and calls `function`; exits with 1 and one readable
    message where the user has to act, with 128 + signal and one line after an interruption."""
    _raise_file_limit()
    sys.argv[1:] = [without(names.argument(a)) for a in sys.argv[1:]]
    os.environ[ARGUMENTS] = json.dumps(sys.argv[1:])
    # Hydra shall raise, not print. What the user wanted is kept apart, also for the processes that torchrun starts.
    wants_traceback = os.environ.setdefault(TRACEBACK, os.environ.get("HYDRA_FULL_ERROR", "0")) == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"
    failed: list[Exception] = []

    @functools.wraps(function)
    def job(config: DictConfig) -> None:
        try:
            function(config)
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
        message = str(error)
        if isinstance(error, InstantiationException) and isinstance(error.__cause__, USER_ERRORS):
            message = str(error.__cause__)
        elif isinstance(error, HydraException):
            arguments = [a for a in sys.argv[1:] if not a.startswith("-")]
            message += "\n" + (
                suggestions(config_name, arguments) or f"python -m ldm_train.cli.{config_name} --help lists the options"
            )
            if error.__cause__ is not None and not isinstance(error.__cause__, HydraException):
                message = f"{error.__cause__}\n{message}"
        interrupts.last_words(f"error: {message}")
        sys.exit(1)
