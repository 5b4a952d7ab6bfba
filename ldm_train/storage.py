"""File access: writes atomically and only below the intended folder, computes checksums, and reads config files as
plain values, even from untrusted sources."""

import csv
import errno
import fcntl
import hashlib
import io
import json
import math
import os
import platform
import re
import reprlib
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TextIO

import yaml

from ldm_train.errors import in_one_line

LARGEST_FILE = 16 << 20  # bytes; a config that holds its tokenizer has 1 or 2 MB
LARGEST_RECIPE = 256 << 20  # bytes; about a million images
MOST_VALUES = 200_000  # largest number of values in a YAML tree, aliases expanded
DEEPEST = 60  # largest depth of a tree
LONGEST_NUMBER = 8192  # bits; Python refuses to print integers of more than 4,300 digits

try:
    from yaml import CSafeLoader as Loader
except ImportError:  # PyYAML without libyaml
    from yaml import SafeLoader as Loader  # type: ignore[assignment]


HOST = re.sub(r"\W", "_", platform.node())[:32]


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def partial_of(path: Path, word: str = "partial") -> Path:
    """The temporary path to which this process writes before renaming to `path`: in the same folder, with a name that
    no other process on any machine uses."""
    return path.with_name(f".{path.name}.{HOST}-{os.getpid()}.{word}")


@cache
def _partials(folder: Path) -> list[Path]:
    """The temporary files in a folder when this process first writes there. Listed once, because a folder may hold
    hundreds of thousands of pictures."""
    return list(folder.glob(".*.partial"))


def _left_behind(path: Path) -> Iterator[Path]:
    """Yields temporary files for `path` that ended processes of this machine have left behind."""
    for partial in _partials(path.parent.absolute()):
        name, writer, _ = partial.name.rsplit(".", 2)
        host, _, pid = writer.rpartition("-")
        if name == f".{path.name}" and host in ("", HOST) and pid.isdigit() and not _is_running(int(pid)):
            yield partial


def check_links(folder: str | Path, beside: Sequence[Path] = (), but: Sequence[str] = ()) -> None:
    """Raises ValueError, naming the link, for a symbolic link that leads out of the folder (and out of `beside`). but:
    names of folders directly below that may contain such links, but may not be such links themselves."""
    roots = [Path(os.path.realpath(root)) for root in (folder, *beside)]
    for path in Path(folder).rglob("*"):
        top, *below = path.relative_to(folder).parts
        if (
            path.is_symlink()
            and not (below and top in but)
            and not any(Path(os.path.realpath(path)).is_relative_to(root) for root in roots)
        ):
            raise ValueError(f"{path} is a link that leads out of {folder}; put the file itself there")


def inside(path: str | Path, folder: str | Path) -> Path:
    """Returns `path`, which is to be written below `folder`, possibly a folder from a stranger. Raises ValueError if a
    link on the way leads out of the folder."""
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise ValueError(f"{path} leads through a link out of {folder}, where nothing is written; remove the link")
    return Path(path)


def open_lock(path: str | Path) -> TextIO:
    """Opens a file to lock, for reading and writing from its start, and creates it if necessary. The content is not
    truncated. Raises ValueError for a symbolic link, which is not followed."""
    try:
        return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+")
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ValueError(f"{path} is a link, which nothing is written through; remove it") from error
        raise


@contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """A context in which this process holds a file's lock, for which other processes wait. The lock ends with the
    process."""
    with open_lock(path) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


_held: dict[str, int] = {}  # path of a held folder -> its open file descriptor


class Moved(OSError):
    """Raised if the folder in which a command works was moved or deleted."""


@contextmanager
def held(folder: str | Path) -> Iterator[None]:
    """A context in which writing below `folder` fails if the folder was moved or deleted meanwhile. Otherwise the
    folder would be created again, with half of a run in each."""
    name = os.path.abspath(folder)
    _held[name] = os.open(name, os.O_RDONLY | os.O_DIRECTORY)  # while open, its inode number is not reused
    try:
        yield
    finally:
        os.close(_held.pop(name))


def check_held(path: str | Path) -> None:
    """Raises Moved if `path` lies in a held folder that no longer exists at its place."""
    for folder, descriptor in _held.items():
        if not Path(os.path.abspath(path)).is_relative_to(folder):
            continue
        try:
            same = os.path.samestat(os.stat(folder), os.fstat(descriptor))
        except OSError:
            same = False
        if not same:
            raise Moved(
                f"{folder} was moved or deleted while this command worked in it; move it back and run the same command to continue"
            )


def write_atomically(path: str | Path, write: Callable[[io.BufferedWriter], object]) -> None:
    """Calls `write` on a temporary file next to `path`, syncs it to disk and renames it. After an error no partial file
    remains; the temporary file of a killed process is removed by the next write to `path`. A symbolic link is replaced,
    not followed."""
    path = Path(path)
    check_held(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in _left_behind(path):
        stale.unlink(missing_ok=True)
    partial = partial_of(path)
    try:
        partial.unlink(missing_ok=True)  # a leftover of an earlier process with this id, or a link
        with open(partial, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        elsewhere = error.filename is not None and str(error.filename) != str(partial)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if isinstance(error, ConnectionError) or error.errno is None or (elsewhere and not full):
            raise  # from reading what was to be written
        raise OSError(
            error.errno,
            f"could not write {path}: {error.strerror or error}; nothing half-written remains, free some "
            "space or choose another folder, then run the same command to continue",
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def write_folder(path: str | Path, write: Callable[[Path], None]) -> None:
    """Calls `write` on a new temporary folder next to `path` and renames it, so that a folder under its final name is
    always complete. An existing folder is deleted once the new one is in its place."""
    path = Path(os.path.realpath(path))  # a link keeps leading to the folder, which may be on a larger disk
    check_held(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in _left_behind(path):
        shutil.rmtree(stale, ignore_errors=True)
    partial, old = partial_of(path), partial_of(path, "old")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        write(partial)
        if path.exists():
            os.replace(path, old)
        os.replace(partial, path)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        if old.exists() and not path.exists():
            os.replace(old, path)
        shutil.rmtree(partial, ignore_errors=True)


def check_holds_only(folder: Path, belongs: Callable[[Path], bool], what: str) -> None:
    """Raises FileExistsError if a folder that is to be replaced by `what` holds anything that does not belong to such a
    one, so that no other files are lost. A folder that does not exist may be written."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if not belongs(path):
            raise FileExistsError(
                f"to={folder} holds {path.name}, which is no part of {what}; move it away, or choose another to="
            )


def write_json(path: str | Path, value: object) -> None:
    """Writes a JSON file that appears under its final name only when it is complete."""
    write_atomically(path, lambda f: f.write((json.dumps(value, indent=1) + "\n").encode()))


def write_csv(path: str | Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes a CSV file that appears under its final name only when it is complete. A row may lack columns."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def read_csv(path: str | Path) -> list[dict[str, str]]:
    """Returns the complete rows of a CSV file, to which another process may be writing at the moment, or that a full disk
    has cut; [] if there is no such file."""
    if not Path(path).is_file():
        return []
    text = Path(path).read_text()
    return list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1])))


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """Makes `target` a hard link of `source`, or a copy of it if the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def file_sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_sha256(paths: Iterable[str | Path]) -> str:
    """The sha256 of several files' sha256, which identifies them together."""
    return hashlib.sha256("".join(map(file_sha256, paths)).encode()).hexdigest()


def shown(value: Any) -> str:
    """A value from a file as short text for error messages."""
    if isinstance(value, int) and value.bit_length() > LONGEST_NUMBER:
        return f"a number of {value.bit_length()} bits"
    return repr(value[:80]) if isinstance(value, str) else reprlib.repr(value)


def plain_values(tree: Any, where: str | Path, most: float = math.inf) -> Any:
    """Returns a copy of a tree that consists only of dictionaries, lists, strings, numbers, booleans and nulls.

    most: largest number of values, aliases expanded: with YAML's aliases a small file can stand for any number of them.
    Raises ValueError, naming `where`, for anything else and for trees that are too deep or, expanded, too large.
    """
    left = most

    def copied(value: Any, depth: int) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError(f"{where} unfolds into more than {most} values; no config does")
        if depth > DEEPEST:
            raise ValueError(f"{where} unfolds into more than {DEEPEST} levels; no config does")
        if isinstance(value, dict):
            if odd := [k for k in value if not isinstance(k, str)]:
                raise ValueError(f"{where} has the key {shown(odd[0])}, which is not text")
            return {k: copied(v, depth + 1) for k, v in value.items()}
        if isinstance(value, list):
            return [copied(v, depth + 1) for v in value]
        plain = value is None or isinstance(value, str | bool | int | float)
        if not plain or (isinstance(value, int) and value.bit_length() > LONGEST_NUMBER):
            raise ValueError(f"{where} holds {shown(value)}, which is not a plain value")
        return value

    return copied(tree, 0)


def _read(
    path: str | Path, parse: Callable[[str], Any], kind: str, largest: int = LARGEST_FILE, most: float = math.inf
) -> dict[str, Any]:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; take a whole copy of its folder")
    if (size := path.stat().st_size) > largest:
        raise ValueError(f"{path} has {size} bytes; {kind} of this package stays below {largest}")
    try:
        tree = parse(path.read_text(encoding="utf-8"))
    except OSError:
        raise
    except Exception as error:  # parsers raise errors of any type on invalid text
        raise ValueError(f"{path} is not a {kind} ({in_one_line(error)}); take an undamaged copy") from error
    if not isinstance(tree, dict):
        raise ValueError(
            f"{path} is not a {kind}: it holds a {type(tree).__name__} where names with values are expected"
        )
    return plain_values(tree, path, most)


def _parse_yaml(text: str) -> Any:
    depth = 0
    for event in yaml.parse(text, Loader):  # the C loader's stack overflows on deep nesting, parsing events does not
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise ValueError(f"more than {DEEPEST} levels")
        if (tag := getattr(event, "tag", None)) is not None:
            raise ValueError(f"it has the tag {tag[:80]}, and values say by themselves what they are")
    return yaml.load(text, Loader)


def read_config(path: str | Path) -> dict[str, Any]:
    """Reads a YAML file as plain values: tags are refused, `${...}` stays text, aliases become copies.

    Raises FileNotFoundError, or ValueError naming the file.
    """
    return _read(path, _parse_yaml, "YAML file", most=MOST_VALUES)


def read_record(path: str | Path, largest: int = LARGEST_FILE) -> dict[str, Any]:
    """Reads a JSON file that holds an object. Raises FileNotFoundError, or ValueError naming the file, also if the file
    has more than `largest` bytes."""
    return _read(path, json.loads, "JSON file", largest)


def read_tensors(path: str | Path, mmap: bool = False) -> Any:
    """Reads a torch.save file on the CPU, without executing code from it. mmap: tensors are read when they are used.
    For a damaged file, including a wrong checksum of a part, zipfile and torch raise errors of any type."""
    import torch  # imported late: it takes seconds, and preparing data does not need it

    # torch.save writes zip archives with a CRC-32 of every part, which torch.load does not check.
    with zipfile.ZipFile(path) as archive:
        if (part := archive.testzip()) is not None:
            raise zipfile.BadZipFile(f"the checksum of {part} differs")
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def read_older_tensors(path: str | Path) -> Any:
    """`read_tensors`, also for files of the form before torch 1.6, which is no archive and has no checksums."""
    import torch

    if zipfile.is_zipfile(path):
        return read_tensors(path)
    return torch.load(path, map_location="cpu", weights_only=True)


# By type: its name in messages, and a test for values.
KINDS: dict[type, tuple[str, Callable[[Any], bool]]] = {
    bool: ("true or false", lambda v: isinstance(v, bool)),
    int: ("a whole number", lambda v: type(v) is int),
    float: ("a finite number", lambda v: type(v) in (int, float) and abs(v) <= sys.float_info.max),
    str: ("a text", lambda v: isinstance(v, str)),
    list: ("a list", lambda v: isinstance(v, list)),
    dict: ("a section with options", lambda v: isinstance(v, dict)),
    type(None): ("null", lambda v: v is None),
}


def check_kinds(
    tree: dict[str, Any],
    usual: Mapping[str, Any],
    where: str | Path,
    may_be: Mapping[str, Sequence[type]],
    prefix: str = "",
) -> None:
    """Raises ValueError, naming file and option, for a value whose type differs from that in `usual`, a tree of
    defaults.

    may_be: {dotted option name: allowed types} instead of the default's type; an option whose default is null may also
    stay null. Other options that are null in `usual`, and options missing from the tree, are not checked.
    """
    for name in [n for n in usual if n in tree]:
        option, value, normal = f"{prefix}{name}", tree[name], usual[name]
        if normal is None and (value is None or option not in may_be):
            continue
        kinds = may_be.get(option, (type(normal),))
        if not any(KINDS[kind][1](value) for kind in kinds):
            expected = " or ".join(KINDS[kind][0] for kind in kinds)
            raise ValueError(f"{where}: {option} is {shown(value)}, not {expected}")
        if isinstance(normal, dict) and isinstance(value, dict):
            check_kinds(value, normal, where, may_be, f"{option}.")
