"""Files: written whole or not at all and where they are meant to be, with checksums, and read as plain values whoever made
them."""

import errno
import glob
import hashlib
import io
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

import yaml

LARGEST_FILE = 16 << 20  # bytes; a config that holds its tokenizer has 1 or 2 MB
MOST_VALUES = 200_000  # of a YAML tree, its aliases unfolded
DEEPEST = 60  # levels of a tree

try:
    from yaml import CSafeLoader as Loader
except ImportError:  # PyYAML without libyaml
    from yaml import SafeLoader as Loader


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def check_links(folder: str | Path, beside: Sequence[Path] = ()) -> None:
    """Raises ValueError for a link that leads out of the folder (and out of `beside`), naming it."""
    roots = [Path(os.path.realpath(root)) for root in (folder, *beside)]
    for path in Path(folder).rglob("*"):
        if path.is_symlink() and not any(Path(os.path.realpath(path)).is_relative_to(root) for root in roots):
            raise ValueError(f"{path} is a link that leads out of {folder}; put the file itself there")


def inside(path: str | Path, folder: str | Path) -> Path:
    """`path`, which is to be written below `folder`, a stranger's perhaps. Raises ValueError where a link on the way leads
    elsewhere."""
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise ValueError(f"{path} leads through a link out of {folder}, where nothing is written; remove the link")
    return Path(path)


def open_lock(path: str | Path) -> TextIO:
    """A file to hold a lock on, for reading and writing from its beginning, made where it is not there. What another process
    wrote into it stays until the lock is held. Raises ValueError for a link, which is not followed."""
    try:
        return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+")
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ValueError(f"{path} is a link, which nothing is written through; remove it") from error
        raise


def write_atomically(path: str | Path, write: Callable[[io.BufferedWriter], None]) -> None:
    """Calls `write` on a temporary file beside `path`, syncs it to disk and renames it. On any error nothing remains;
    what a killed process left behind goes with the next attempt. A link is replaced, not followed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        pid = stale.name.split(".")[-2]
        if pid.isdigit() and not _is_running(int(pid)):
            stale.unlink(missing_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.unlink(missing_ok=True)  # of a process with this number before, or a link
        with open(partial, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise OSError(
            error.errno,
            f"could not write {path}: {error.strerror or error}; nothing half-written remains, free some "
            "space or choose another folder, then run the same command to continue",
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: str | Path, value: object) -> None:
    """JSON that appears under its final name only when complete."""
    write_atomically(path, lambda f: f.write((json.dumps(value, indent=1) + "\n").encode()))


def file_sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def plain_values(tree: Any, where: str | Path) -> Any:
    """A copy of a tree that is nothing but dictionaries, lists, texts, numbers, booleans and nulls.

    Raises ValueError, naming `where`, for anything else and for trees that are too deep or, unfolded, too large.
    """
    left = MOST_VALUES

    def copied(value: Any, depth: int) -> Any:
        nonlocal left
        left -= 1
        if left < 0 or depth > DEEPEST:
            raise ValueError(f"{where} unfolds into more than {MOST_VALUES} values or {DEEPEST} levels; no config does")
        if isinstance(value, dict):
            if odd := next((k for k in value if not isinstance(k, str)), None):
                raise ValueError(f"{where} has the key {odd!r}, which is no text")
            return {k: copied(v, depth + 1) for k, v in value.items()}
        if isinstance(value, list):
            return [copied(v, depth + 1) for v in value]
        if value is None or isinstance(value, str | bool | int | float):
            return value
        raise ValueError(f"{where} holds {value!r}, which is no plain value")

    return copied(tree, 0)


def _read(path: str | Path, parse: Callable[[str], Any], kind: str) -> dict[str, Any]:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there")
    if (size := path.stat().st_size) > LARGEST_FILE:
        raise ValueError(f"{path} has {size} bytes; {kind} of this package stays below {LARGEST_FILE}")
    try:
        tree = parse(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(
            f"{path} is no {kind} ({' '.join(str(error).split())[:200]}); take an undamaged copy"
        ) from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path} is no {kind}: it holds a {type(tree).__name__} where names with values are expected")
    return plain_values(tree, path)


def _parse_yaml(text: str) -> Any:
    depth = 0
    for event in yaml.parse(text, Loader):  # the C loader overflows its stack on deep nesting, events do not nest
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise ValueError(f"more than {DEEPEST} levels")
    return yaml.load(text, Loader)


def read_config(path: str | Path) -> dict[str, Any]:
    """A YAML file as plain values: tags build nothing, `${...}` stays text, aliases are copies.

    Raises FileNotFoundError, or ValueError naming the file.
    """
    return _read(path, _parse_yaml, "YAML file")


def read_record(path: str | Path) -> dict[str, Any]:
    """A JSON file that holds names with values. Raises FileNotFoundError, or ValueError naming the file."""
    return _read(path, json.loads, "JSON file")
