"""Files: written atomically and only below their folder, with checksums, and read as plain values even from strangers."""

import errno
import glob
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import yaml

LARGEST_FILE = 16 << 20  # bytes; a config that holds its tokenizer has 1 or 2 MB
LARGEST_RECIPE = 256 << 20  # about a million pictures
MOST_VALUES = 200_000  # of a YAML tree, its aliases unfolded
DEEPEST = 60  # levels of a tree
LONGEST_NUMBER = 8192  # bits; numbers of more than 4,300 digits Python does not even write

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
    """Where this process writes what is to become `path`: beside it, under a name that no process of any machine has."""
    return path.with_name(f".{path.name}.{HOST}-{os.getpid()}.{word}")


def _left_behind(path: Path) -> Iterator[Path]:
    """What processes of this machine that are gone began to write of `path`."""
    for partial in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        host, _, pid = partial.name.split(".")[-2].rpartition("-")
        if host in ("", HOST) and pid.isdigit() and not _is_running(int(pid)):
            yield partial


def check_links(folder: str | Path, beside: Sequence[Path] = (), but: Sequence[str] = ()) -> None:
    """Raises ValueError for a link that leads out of the folder (and out of `beside`), naming it. but: folders directly
    below that may hold such links, but may not be links themselves."""
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
    """`path`, which will be written below `folder`, perhaps one from a stranger. Raises ValueError where a link on the way leads
    elsewhere."""
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise ValueError(f"{path} leads through a link out of {folder}, where nothing is written; remove the link")
    return Path(path)


def open_lock(path: str | Path) -> TextIO:
    """A file to hold a lock on, for reading and writing from its beginning, made where it is not there. Its content is
    kept until the lock is held. Raises ValueError for a link, which is not followed."""
    try:
        return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+")
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ValueError(f"{path} is a link, which nothing is written through; remove it") from error
        raise


_held: dict[str, int] = {}  # folders by their paths: what they are open as


class Moved(OSError):
    """A folder is not where a command works in it."""


@contextmanager
def held(folder: str | Path) -> Iterator[None]:
    """A context in which nothing is written below a folder that is moved or deleted meanwhile: it would be made anew, half of a
    run in each."""
    name = os.path.abspath(folder)
    _held[name] = os.open(name, os.O_RDONLY | os.O_DIRECTORY)  # its number is given to no other folder then
    try:
        yield
    finally:
        os.close(_held.pop(name))


def check_held(path: str | Path) -> None:
    """Raises Moved where a folder that is held, and `path` lies in, is not there any more."""
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
    """Calls `write` on a temporary file beside `path`, syncs it to disk and renames it. On any error nothing
    remains; the temporary file of a killed process is removed by the next attempt. A link is replaced, not followed."""
    path = Path(path)
    check_held(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in _left_behind(path):
        stale.unlink(missing_ok=True)
    partial = partial_of(path)
    try:
        partial.unlink(missing_ok=True)  # left by an earlier process with this id, or a link
        with open(partial, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except ConnectionError:  # of what is written, not of the disk
        raise
    except OSError as error:
        raise OSError(
            error.errno,
            f"could not write {path}: {error.strerror or error}; nothing half-written remains, free some "
            "space or choose another folder, then run the same command to continue",
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def write_folder(path: str | Path, write: Callable[[Path], None], replace: bool = False) -> None:
    """Calls `write` on a new folder beside `path` and renames it, so that a folder under its final name is whole. replace: a
    folder that stands there is deleted, after the new one has its place; else FileExistsError is raised."""
    path = Path(path)
    check_held(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in _left_behind(path):
        shutil.rmtree(stale, ignore_errors=True)
    partial, old = partial_of(path), partial_of(path, "old")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        write(partial)
        if path.exists() and not replace:
            raise FileExistsError(f"{path} exists; choose another folder")
        if path.exists():
            os.replace(path, old)
        os.replace(partial, path)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        if old.exists() and not path.exists():
            os.replace(old, path)
        shutil.rmtree(partial, ignore_errors=True)


def write_json(path: str | Path, value: object) -> None:
    """JSON that appears under its final name only when complete."""
    write_atomically(path, lambda f: f.write((json.dumps(value, indent=1) + "\n").encode()))


def file_sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def shown(value: Any) -> str:
    """A value from a file as short text for a message."""
    if isinstance(value, int) and value.bit_length() > LONGEST_NUMBER:
        return f"a number of {value.bit_length()} bits"
    return repr(value[:80]) if isinstance(value, str) else reprlib.repr(value)


def plain_values(tree: Any, where: str | Path, most: float = math.inf) -> Any:
    """A copy of a tree that is nothing but dictionaries, lists, texts, numbers, booleans and nulls.

    most: values that it may unfold into, where a small file can stand for any number of them (YAML's aliases).
    Raises ValueError, naming `where`, for anything else and for trees that are too deep or, unfolded, too large.
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
                raise ValueError(f"{where} has the key {shown(odd[0])}, which is no text")
            return {k: copied(v, depth + 1) for k, v in value.items()}
        if isinstance(value, list):
            return [copied(v, depth + 1) for v in value]
        plain = value is None or isinstance(value, str | bool | int | float)
        if not plain or (isinstance(value, int) and value.bit_length() > LONGEST_NUMBER):
            raise ValueError(f"{where} holds {shown(value)}, which is no plain value")
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
    except Exception as error:  # on invalid text the parser raises errors of any type
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{path} is no {kind} ({said}); take an undamaged copy") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path} is no {kind}: it holds a {type(tree).__name__} where names with values are expected")
    return plain_values(tree, path, most)


def _parse_yaml(text: str) -> Any:
    depth = 0
    for event in yaml.parse(text, Loader):  # the C loader overflows its stack on deep nesting, events do not nest
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise ValueError(f"more than {DEEPEST} levels")
        if (tag := getattr(event, "tag", None)) is not None:
            raise ValueError(f"it has the tag {tag[:80]}, and values say by themselves what they are")
    return yaml.load(text, Loader)


def read_config(path: str | Path) -> dict[str, Any]:
    """A YAML file as plain values: tags are refused, `${...}` stays text, aliases are copies.

    Raises FileNotFoundError, or ValueError naming the file.
    """
    return _read(path, _parse_yaml, "YAML file", most=MOST_VALUES)


def read_record(path: str | Path, largest: int = LARGEST_FILE) -> dict[str, Any]:
    """A JSON file that holds names with values. Raises FileNotFoundError, or ValueError naming the file, also where it has
    more than `largest` bytes."""
    return _read(path, json.loads, "JSON file", largest)


def read_tensors(path: str | Path, mmap: bool = False) -> Any:
    """The content of a file of torch.save, on the CPU; no code is run from it. mmap: tensors are read when they are used.
    On damage, also where the checksum of a part differs, zipfile and torch raise errors of any type."""
    import torch  # the import takes seconds, and preparing data does not need it

    # torch.save's archives hold a CRC-32 of every part; torch.load does not check it.
    with zipfile.ZipFile(path) as archive:
        if (part := archive.testzip()) is not None:
            raise zipfile.BadZipFile(f"the checksum of {part} differs")
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


# By type: its name in messages, and the test of a value.
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
    """Raises ValueError, naming file and option, for a value of another type than in `usual`, a tree of default values.

    may_be: {option by its dotted name: types} that replace the default's type; an option whose default is null may also
    stay null. Other options that are null in `usual`, and options that the tree lacks, are not checked.
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
