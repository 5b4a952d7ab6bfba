"""The offsets of samples' members in their shards: scanned once, stored beside the index, and left on disk if there
are very many."""

import json
import os
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
from tqdm import tqdm

from ldm_train.data.files import DataError
from ldm_train.data.remote import ShardCache, is_remote
from ldm_train.data.tars import scan_tar
from ldm_train.storage import file_sha256, locked, read_record, write_atomically, write_folder, write_json

KEPT = ".offsets"  # the folder beside an index
IN_MEMORY = (
    2_000_000  # up to this many samples, every process holds all offsets; beyond, they are read from a file as needed
)
FETCHED_TOGETHER = 8
Offsets = tuple[np.ndarray, dict[str, np.ndarray], dict[str, np.ndarray]]  # keys, offsets and sizes of the members
Key, Value = TypeVar("Key"), TypeVar("Value")


class LRUCache(Generic[Key, Value]):
    """An LRU cache of at most `most` values, which `make` makes on demand. drop: called with a value that is dropped."""

    def __init__(self, make: Callable[[Key], Value], most: int, drop: Callable[[Value], object] | None = None):
        self.make, self.most, self.drop = make, most, drop
        self.held: OrderedDict[Key, Value] = OrderedDict()

    def __getstate__(self) -> dict:  # open files are not sent to other processes
        return self.__dict__ | {"held": OrderedDict()}

    def __call__(self, key: Key) -> Value:
        if key in self.held:
            self.held.move_to_end(key)
            return self.held[key]
        if len(self.held) >= self.most:
            _, oldest = self.held.popitem(last=False)
            if self.drop is not None:
                self.drop(oldest)
        return self.held.setdefault(key, self.make(key))


def counted(offsets: Offsets) -> tuple[int, dict[str, int]]:
    """(number of samples, {extension: number of members}), as in an index entry."""
    return len(offsets[0]), {e: int((starts >= 0).sum()) for e, starts in offsets[1].items()}


class ShardFile:
    """A shard of an index: a local file, or a remote one of which `cache` holds a copy.

    root: the folder or address of the index. Raises DataError for a remote shard without a cache.
    """

    def __init__(self, entry: dict, root: str | Path, cache: ShardCache | None):
        self.entry, self.cache, self.remote = entry, cache, is_remote(entry["file"])
        self.path = Path(root) / entry["file"]  # if it is local
        self.name = entry["file"] if self.remote else str(self.path)
        if self.remote and cache is None:
            raise DataError(
                f"{self.name} is remote, and here only files of this machine are read; copy it to a local folder"
            )
        folder = cache.folder / "offsets" if self.remote and cache else Path(root) / KEPT
        name = entry["sha256"] if self.remote else self.path.name
        if not self.remote and entry["file"] != name:  # shards of several folders may have one name
            name += f"-{sha256(entry['file'].encode('utf-8', 'surrogatepass')).hexdigest()[:12]}"
        self.kept = folder / f"{name}.npz"

    @property
    def stamp(self) -> tuple[int, int]:
        """(bytes, modification time), which change when the shard does; a remote shard is identified by its checksum
        instead."""
        if self.remote:
            return self.entry["bytes"], 0
        stat = os.stat(self.path)
        return stat.st_size, stat.st_mtime_ns

    def open(self) -> int:
        """Returns a descriptor for os.pread, which the caller closes."""
        return self.cache.open(self.entry) if self.remote and self.cache else os.open(self.path, os.O_RDONLY)

    def check_size(self) -> None:
        """Raises DataError if the file's length is not the one in its index entry."""
        if (size := self.path.stat().st_size) != self.entry["bytes"]:
            raise DataError(
                f"{self.name} has {size} bytes, its index says {self.entry['bytes']}: truncated or changed; copy or prepare it "
                "again"
            )

    def offsets(self) -> Offsets:
        """The offsets of its members, from the stored file if its stamp still matches, else from a new scan. A scan
        also compares the shard with its index entry. Raises DataError if they differ."""
        if (kept := self._kept()) is not None:
            return kept
        if not self.remote:
            self.check_size()
            if file_sha256(self.path) != self.entry["sha256"]:
                raise DataError(f"{self.name} does not match the sha256 in its index.json; copy or prepare it again")
        file = self.open()
        try:
            names, starts, sizes = scan_tar(file, self.name)
        finally:
            os.close(file)
        offsets = np.array(names, str), starts, sizes
        count, fields = counted(offsets)
        if (count, fields) != (self.entry["count"], self.entry["fields"]):
            raise DataError(
                f"{self.name} has {count} samples with {fields}, its index.json says {self.entry['count']} with "
                f"{self.entry['fields']}; rebuild the index with: ldm-prepare source=index"
            )
        arrays = {f"offset.{e}": a for e, a in starts.items()} | {f"size.{e}": a for e, a in sizes.items()}
        self.keep(self.kept, arrays | {"keys": offsets[0]})
        return offsets

    def keep(self, path: Path, arrays: Mapping[str, np.ndarray]) -> None:
        """Stores what was read of this shard, with its stamp, if the folder is writable; otherwise it is read again
        next time."""
        if not path.parent.is_symlink():  # nothing is written outside the data folder
            note = {"stamp": np.array(self.stamp, np.int64), "sha256": np.array(self.entry["sha256"])}
            with suppress(OSError):
                write_atomically(path, lambda file: np.savez(file, **note, **arrays))

    def kept_arrays(self, path: Path) -> dict[str, np.ndarray]:
        """The arrays that `keep` stored; {} if they belong to another shard, are damaged or missing."""
        try:
            with np.load(path, allow_pickle=False) as saved:
                if (saved["stamp"] == self.stamp).all() and str(saved["sha256"]) == self.entry["sha256"]:
                    return {name: saved[name] for name in saved.files}
        except Exception:  # a damaged file raises errors of any type
            pass
        return {}

    def _kept(self) -> Offsets | None:
        """The offsets that an earlier scan stored; None if there are none or they are invalid."""
        saved, size_of_file = self.kept_arrays(self.kept), self.stamp[0]
        names = [n.removeprefix("offset.") for n in saved if n.startswith("offset.")]
        if "keys" not in saved or not {f"size.{n}" for n in names} <= saved.keys():
            return None
        offsets, sizes = ({n: saved[f"{what}.{n}"] for n in names} for what in ("offset", "size"))
        keys = saved["keys"]
        if keys.dtype.kind != "U" or keys.ndim != 1:
            return None
        for start, size in zip(offsets.values(), sizes.values()):
            if {start.dtype, size.dtype} != {np.dtype(np.int64)} or not start.shape == size.shape == keys.shape:
                return None
            inside = (start >= 0) & (size >= 0) & (start <= size_of_file) & (size <= size_of_file - start)
            if not (inside | (start == -1) & (size == -1)).all():
                return None
        same = counted((keys, offsets, sizes)) == (self.entry["count"], self.entry["fields"])
        return (keys, offsets, sizes) if same else None


class _File:
    """A file that is read at any position. A process that it is sent to opens it again."""

    def __init__(self, path: Path):
        self.path, self.file = path, open(path, "rb", buffering=0)  # noqa: SIM115 - open as long as it is needed
        self.size = os.fstat(self.file.fileno()).st_size

    def __call__(self, begin: int, end: int) -> bytes:
        return os.pread(self.file.fileno(), end - begin, begin) if 0 <= begin <= end <= self.size else b""

    def __reduce__(self) -> tuple:
        return _File, (self.path,)


class OffsetTable:
    """The key and members of every sample of some shards: one row per sample.

    extensions: of all members. first (S + 1,): the row of each shard's first sample, then the number of rows. extremes:
    {extension: (smallest, largest size)}.
    rows (N, 2 + 2 E): where the sample's key begins and ends in `letters` (UTF-8), then offset and size of each
    extension, -1 if the sample lacks it; int64, in memory, or in a file that is read row by row so that no process
    holds it.
    """

    def __init__(
        self, first: np.ndarray, extensions: list[str], extremes: dict, rows: np.ndarray | _File, letters: bytes | _File
    ):
        self.first, self.extensions, self.extremes = first, extensions, extremes
        self.rows, self.letters = rows, letters
        self.columns = {e: 2 + 2 * number for number, e in enumerate(extensions)}
        self._last: tuple[int, list[int]] = (-1, [])  # a sample's members are requested one after another

    def __len__(self) -> int:
        return int(self.first[-1])

    def _row(self, row: int) -> list[int]:
        if row != self._last[0]:
            if isinstance(self.rows, _File):
                width = 8 * (2 + 2 * len(self.extensions))
                values = np.frombuffer(self.rows(row * width, (row + 1) * width), np.int64).tolist()
            else:
                values = self.rows[row].tolist()
            self._last = row, values
        return self._last[1]

    def key(self, row: int) -> str:
        begin, end = self._row(row)[:2]
        letters = self.letters(begin, end) if isinstance(self.letters, _File) else self.letters[begin:end]
        return letters.decode("utf-8", "replace")

    def member(self, row: int, extension: str) -> tuple[int, int]:
        """(offset, size) of a member, -1 if the sample lacks it."""
        column = self.columns[extension]
        offset, size = self._row(row)[column : column + 2]
        return offset, size

    @classmethod
    def of(cls, shards: Sequence[ShardFile], split: str) -> "OffsetTable":
        """Builds the table in memory or, for more than IN_MEMORY samples, in files stored beside the first shard's
        offsets."""
        first = np.cumsum([0, *(s.entry["count"] for s in shards)], dtype=np.int64)
        if first[-1] <= IN_MEMORY:
            return cls._in_memory(shards, first, split)
        seen = [[s.entry["sha256"], *s.stamp, s.entry["count"], s.entry["fields"]] for s in shards]
        folder = shards[0].kept.parent / f"{split}-{sha256(json.dumps(seen).encode()).hexdigest()[:24]}"
        if folder.parent.is_symlink() or folder.is_symlink():  # nothing is written, or replaced, through a link
            return cls._in_memory(shards, first, split)
        if not (folder / "table.json").is_file():
            try:
                folder.parent.mkdir(parents=True, exist_ok=True)
                with locked(folder.parent / f".{folder.name}.lock"):  # only one of several ranks writes
                    if not (folder / "table.json").is_file():
                        write_folder(folder, lambda new: _write_table(new, shards, split))
            except OSError as error:
                print(f"offsets of {first[-1]} samples are held in memory: {folder} cannot be written ({error})")
                return cls._in_memory(shards, first, split)
        return cls._stored(folder, first)

    @classmethod
    def _in_memory(cls, shards: Sequence[ShardFile], first: np.ndarray, split: str) -> "OffsetTable":
        extensions, extremes = _extensions(shards), {}
        parts = list(_parts(shards, extensions, extremes, split))
        rows = np.concatenate([np.empty((0, 2 + 2 * len(extensions)), np.int64), *(rows for rows, _ in parts)])
        return cls(first, extensions, extremes, rows, b"".join(letters for _, letters in parts))

    @classmethod
    def _stored(cls, folder: Path, first: np.ndarray) -> "OffsetTable":
        """Opens a table that is stored in files. Raises DataError if they are damaged."""
        try:
            note = read_record(folder / "table.json")
            extensions, extremes = note["extensions"], {e: tuple(note["extremes"][e]) for e in note["extensions"]}
            if not all(isinstance(e, str) for e in extensions) or not all(len(x) == 2 for x in extremes.values()):
                raise ValueError("no names with two sizes each")
            rows, letters = _File(folder / "rows"), _File(folder / "letters")
            if rows.size != (expected := 8 * int(first[-1]) * (2 + 2 * len(extensions))):
                raise ValueError(f"{rows.size} bytes of rows, not {expected}")
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise DataError(f"the table of offsets in {folder} is damaged ({error}); delete that folder") from error
        return cls(first, extensions, extremes, rows, letters)


def _extensions(shards: Sequence[ShardFile]) -> list[str]:
    return sorted({e for shard in shards for e in shard.entry["fields"]})


def _scanned(shards: Sequence[ShardFile]) -> Iterator[Offsets]:
    """Yields the offsets of shards, in order; remote shards are fetched several at a time."""
    if not any(shard.remote for shard in shards):
        yield from (shard.offsets() for shard in shards)
        return
    pool, waiting = ThreadPoolExecutor(FETCHED_TOGETHER), deque()
    try:
        for shard in shards:
            waiting.append(pool.submit(shard.offsets))
            if len(waiting) > FETCHED_TOGETHER:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _parts(
    shards: Sequence[ShardFile], extensions: list[str], extremes: dict, split: str
) -> Iterator[tuple[np.ndarray, bytes]]:
    """Yields (rows, letters) of each shard and fills `extremes`."""
    end = 0  # of the letters so far
    slow = sum(s.entry["bytes"] for s in shards) > 2**30 or any(s.remote for s in shards)
    scanned = tqdm(_scanned(shards), f"checking {split} shards", len(shards), disable=not slow, unit="shard")
    for keys, starts, sizes in scanned:
        encoded = [str(key).encode() for key in keys]
        rows = np.full((len(keys), 2 + 2 * len(extensions)), -1, np.int64)
        rows[:, 1] = end + np.cumsum([len(key) for key in encoded], dtype=np.int64)
        rows[:, 0] = rows[:, 1] - [len(key) for key in encoded]
        end = int(rows[-1, 1]) if len(rows) else end
        for number, extension in enumerate(extensions):
            if extension in starts and len(keys):
                rows[:, 2 + 2 * number], rows[:, 3 + 2 * number] = starts[extension], sizes[extension]
                least, largest = int(sizes[extension].min()), int(sizes[extension].max())
                before = extremes.get(extension, (least, largest))
                extremes[extension] = (min(least, before[0]), max(largest, before[1]))
            elif len(keys):
                extremes[extension] = (-1, max(-1, *extremes.get(extension, (-1,))))
        yield rows, b"".join(encoded)


def _write_table(folder: Path, shards: Sequence[ShardFile], split: str) -> None:
    extensions, extremes = _extensions(shards), {}
    with open(folder / "rows", "wb") as rows_file, open(folder / "letters", "wb") as letters_file:
        for rows, letters in _parts(shards, extensions, extremes, split):
            rows_file.write(rows.tobytes())
            letters_file.write(letters)
        for file in (rows_file, letters_file):
            file.flush()
            os.fsync(file.fileno())
    write_json(folder / "table.json", {"extensions": extensions, "extremes": extremes})
