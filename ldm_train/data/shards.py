"""Shards: plain tars in the WebDataset layout, written whole or not at all, read by offset. data/README.md has the schema."""

import glob
import hashlib
import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from tqdm import tqdm

INDEX = "index.json"


class DataError(ValueError):
    """Data that training must not start on; the message names the file and the remedy."""


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def write_atomically(path: str | Path, write: Callable[[io.BufferedWriter], None]) -> None:
    """Calls `write` on a temporary file beside `path`, syncs it to disk and renames it. On any error nothing remains;
    what a killed process left behind goes with the next attempt."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        pid = stale.name.split(".")[-2]
        if pid.isdigit() and not _is_running(int(pid)):
            stale.unlink(missing_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
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


class _Hashing(io.RawIOBase):
    def __init__(self, file: io.BufferedWriter):
        self.file, self.sha256, self.size = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.size += len(data)
        return self.file.write(data)


def write_shard(path: str | Path, samples: Iterable[tuple[str, dict[str, bytes]]]) -> dict:
    """Writes (key, {extension: bytes}) samples as one reproducible tar and returns its index entry.

    Entry: {"file", "count", "bytes", "sha256", "fields": {extension: count}}. Raises ValueError for a key with a dot
    or slash (readers split names at the first dot), OSError on a full disk; the shard is then not there at all.
    """
    path, counts, seen = Path(path), Counter(), set()
    entry: dict = {}

    def write(file: io.BufferedWriter) -> None:
        out = _Hashing(file)
        # PAX is byte for byte USTAR except for names that USTAR cannot hold: over 100 bytes or not ASCII.
        with tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT, bufsize=1 << 16) as tar:
            for key, fields in samples:
                if "." in key or "/" in key or key in seen:
                    raise ValueError(
                        f"sample key {key!r} contains a dot or slash or repeats; keys are unique plain names"
                    )
                seen.add(key)
                for extension, data in fields.items():
                    info = tarfile.TarInfo(f"{key}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
                    counts[extension] += 1
        entry.update(bytes=out.size, sha256=out.sha256.hexdigest())

    write_atomically(path, write)
    return {"file": path.name, "count": len(seen), **entry, "fields": dict(counts)}


def file_sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# One folder of shards, or several that are drawn from together.
Roots = str | Path | Sequence[str]


def as_roots(root: Roots) -> list[str]:
    return [str(root)] if isinstance(root, str | Path) else [str(r) for r in root]


def read_index(root: Roots, remedy: str = "ldm-prepare source=index path=<folder of tars> out={root}") -> dict:
    """The index.json in `root`; of several roots one index of all their shards, each with the number of its "set", its
    "root", and the labels of its classes among all names ("relabel").

    Raises FileNotFoundError or DataError naming the command that makes one.
    """
    roots = as_roots(root)
    if len(roots) > 1:
        return _merged({r: read_index(r, remedy) for r in roots})
    (root,) = roots
    path = Path(root) / INDEX
    if not path.is_file():
        what = "has no index.json" if Path(root).is_dir() else "does not exist"
        raise FileNotFoundError(f"data folder {root} {what}; make it with: {remedy.format(root=root)}")
    try:
        index = json.loads(path.read_text())
        if not isinstance(index["splits"], dict):
            raise TypeError
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no shard index; make it anew with: {remedy.format(root=root)}") from error
    return index


def _merged(indices: dict[str, dict]) -> dict:
    """Labels are by name: sets with other lists of classes keep their meaning. Where a set names none, none are named."""
    named = {root: index.get("classes") for root, index in indices.items()}
    for root, names in named.items():
        if twice := [n for n in names or [] if names.count(n) > 1]:
            raise DataError(
                f"{root}/{INDEX} names the class {twice[0]} twice; classes of several roots are joined by name"
            )
    classes = list(dict.fromkeys(n for names in named.values() for n in names)) if all(named.values()) else []
    splits: dict[str, dict] = {}
    for number, (root, index) in enumerate(indices.items()):
        relabel = [classes.index(name) for name in named[root]] if classes else []
        for split, part in index["splits"].items():
            whole = splits.setdefault(split, {"count": 0, "shards": []})
            whole["shards"] += [shard | {"set": number, "root": root, "relabel": relabel} for shard in part["shards"]]
            whole["count"] += part["count"]
    for split in splits:
        if lacking := [root for root, index in indices.items() if split not in index["splits"]]:
            splits[split]["lacking"] = lacking
    return {"splits": splits} | ({"classes": classes} if classes else {})


def split_index(index: dict, split: str, root: Roots) -> dict:
    if split not in index["splits"]:
        raise DataError(
            f"{root} has no split {split!r}, only {', '.join(index['splits'])}; set data.train_split / data.val_split"
        )
    if lacking := index["splits"][split].get("lacking"):
        raise DataError(f"{', '.join(lacking)} has no split {split!r}, the other data.root do; prepare it with one")
    return index["splits"][split]


def data_hash(index: dict, *splits: str) -> str:
    """Identifies the samples of some splits by content: a hash over the shards' checksums, never over paths."""
    sums = [[s["sha256"] for s in index["splits"][split]["shards"]] for split in splits]
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()[:16]


def scan_tar(path: str | Path) -> tuple[list[str], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(keys, {extension: data offsets}, {extension: sizes}), -1 where a sample lacks a field.

    Raises DataError for a truncated or unreadable tar, which tar readers otherwise accept in silence.
    """
    length = os.path.getsize(path)
    keys: list[str] = []
    rows: list[dict[str, tuple[int, int]]] = []
    try:
        with tarfile.open(path, mode="r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                if member.offset_data + member.size > length:
                    raise tarfile.ReadError("unexpected end of data")
                if not keys or keys[-1] != key:
                    keys.append(key)
                    rows.append({})
                if extension in rows[-1]:
                    raise DataError(f"{path}: {member.name} occurs twice; a key must not repeat or contain a dot")
                rows[-1][extension] = (member.offset_data, member.size)
            end = tar.offset
    except tarfile.ReadError as error:
        raise DataError(f"{path} is truncated or no tar ({error}); copy or prepare it again") from error
    with open(path, "rb") as file:
        file.seek(end)
        if file.read(512) != bytes(512):
            raise DataError(f"{path} is truncated (no end-of-archive marker); copy or prepare it again")
    extensions = sorted({e for row in rows for e in row})
    offsets = {e: np.array([row.get(e, (-1, -1))[0] for row in rows], np.int64) for e in extensions}
    sizes = {e: np.array([row.get(e, (-1, -1))[1] for row in rows], np.int64) for e in extensions}
    return keys, offsets, sizes


def _load_offsets(root: Path, path: Path, entry: dict) -> tuple[np.ndarray, dict, dict]:
    """Offsets of one shard, from the file kept beside the index if size and mtime still match, else scanned anew.

    A scan also checks the size and sha256 that the index records.
    """
    stat = os.stat(path)
    kept = root / ".offsets" / f"{path.name}.npz"
    stamp = np.array([stat.st_size, stat.st_mtime_ns], np.int64)
    if kept.is_file():
        with np.load(kept) as saved:
            if (saved["stamp"] == stamp).all() and str(saved["sha256"]) == entry["sha256"]:
                names = [n.removeprefix("offset.") for n in saved.files if n.startswith("offset.")]
                offsets, sizes = ({n: saved[f"{what}.{n}"] for n in names} for what in ("offset", "size"))
                return saved["keys"], offsets, sizes
    if stat.st_size != entry["bytes"]:
        raise DataError(
            f"{path} has {stat.st_size} bytes, its index says {entry['bytes']}: truncated or changed; copy or prepare it again"
        )
    if file_sha256(path) != entry["sha256"]:
        raise DataError(f"{path} does not match the sha256 in its index.json; copy or prepare it again")
    key_list, offsets, sizes = scan_tar(path)
    keys = np.array(key_list)
    arrays = {f"offset.{e}": a for e, a in offsets.items()} | {f"size.{e}": a for e, a in sizes.items()}
    with suppress(OSError):  # a read-only data folder: scan again next time
        write_atomically(kept, lambda f: np.savez(f, stamp=stamp, sha256=entry["sha256"], keys=keys, **arrays))
    return keys, offsets, sizes


def is_remote(file: str) -> bool:
    """Whether an index entry's `file` is a URL that webdataset opens (https://, s3://, pipe:, ...)."""
    return "://" in file or file.startswith("pipe:")


def shard_paths(root: str | Path, shards: list[dict]) -> list[Path]:
    """Where local shards lie: `file` is relative to the index's folder, or absolute where they live elsewhere.

    Raises FileNotFoundError, naming the first, where some are missing.
    """
    paths = [Path(root) / shard["file"] for shard in shards]
    missing = [p for p in paths if not p.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(paths)} shards of {root} are missing, first {missing[0]}; copy them back or prepare "
            "the data again"
        )
    return paths


class IndexedShards:
    """Random access to the samples of one split by member offset; safe to use from forked workers.

    root: a folder with its index, or several. sets (N,): which of them each sample comes from; where there are several
    their samples alternate in proportion to their numbers.
    Raises FileNotFoundError or DataError, naming shard and remedy, for missing, truncated or changed shards.
    """

    def __init__(self, root: Roots, split: str, remedy: str | None = None):
        self.root = " + ".join(as_roots(root))
        index = read_index(root, remedy) if remedy else read_index(root)
        entries = split_index(index, split, root)["shards"]
        self.classes: list[str] | None = index.get("classes")
        remote = [e["file"] for e in entries if is_remote(e["file"])]
        if remote:
            raise DataError(
                f"{remote[0]} ({split} of {root}) is remote and cannot be read by offset; copy the tars to a local folder "
                "and index that (only training batches can come from afar, with data.reader=streaming)"
            )
        self.paths = [shard_paths(e.get("root", self.root), [e])[0] for e in entries]
        slow = sum(e["bytes"] for e in entries) > 2**30
        loaded = [
            _load_offsets(Path(entry.get("root", self.root)), path, entry)
            for path, entry in tqdm(list(zip(self.paths, entries)), desc=f"checking {split} shards", disable=not slow)
        ]
        self.keys = np.concatenate([keys for keys, _, _ in loaded])
        self.shard = np.concatenate([np.full(len(keys), i, np.int32) for i, (keys, _, _) in enumerate(loaded)])
        self.extensions = sorted({e for _, offsets, _ in loaded for e in offsets})

        def joined(which: int, extension: str) -> np.ndarray:
            return np.concatenate([part[which].get(extension, np.full(len(part[0]), -1, np.int64)) for part in loaded])

        self.offsets = {e: joined(1, e) for e in self.extensions}
        self.sizes = {e: joined(2, e) for e in self.extensions}
        self._files: dict[int, int] = {}
        self._relabel = [e.get("relabel") for e in entries]
        sets = np.array([e.get("set", 0) for e in entries], np.int32)
        self.sets = sets[self.shard]
        if len(set(sets.tolist())) > 1:
            counts = np.bincount(self.sets)
            place = np.concatenate([(np.arange(n) + 0.5) / n for n in counts if n])
            self._take(np.argsort(place[np.argsort(np.argsort(self.sets, kind="stable"))], kind="stable"))

    def __len__(self) -> int:
        return len(self.keys)

    def keep(self, count: int) -> None:
        """Reduces this view to at most `count` samples, spread evenly: shards are often sorted by class."""
        self._take(np.unique(np.linspace(0, len(self) - 1, min(count, len(self))).round().astype(int)))

    def _take(self, picks: np.ndarray) -> None:
        self.keys, self.shard, self.sets = self.keys[picks], self.shard[picks], self.sets[picks]
        self.offsets = {e: values[picks] for e, values in self.offsets.items()}
        self.sizes = {e: values[picks] for e, values in self.sizes.items()}

    def read(self, i: int, extension: str) -> bytes | None:
        """One field's bytes, or None where the sample lacks it."""
        offset, size = int(self.offsets[extension][i]), int(self.sizes[extension][i])
        if offset < 0:
            return None
        shard = int(self.shard[i])
        if shard not in self._files:
            self._files[shard] = os.open(self.paths[shard], os.O_RDONLY)
        data = os.pread(self._files[shard], size, offset)
        relabel = self._relabel[shard]
        if relabel and extension == "cls":
            data = str(relabel[int(data)]).encode()
        elif relabel and extension == "json" and relabel != list(range(len(relabel))):
            record = json.loads(data)
            if "boxes" in record:
                boxes = [[*box[:4], relabel[int(box[4])]] for box in record["boxes"]]
                data = json.dumps(record | {"boxes": boxes}).encode()
        return data

    def labels(self) -> np.ndarray:
        """The class of every sample (N,); every sample must have one."""
        return np.array([int(self.read(i, "cls")) for i in range(len(self))])

    def fields(self, i: int) -> dict[str, bytes]:
        """All fields of a sample, {extension: bytes}."""
        found = {e: self.read(i, e) for e in self.extensions}
        return {e: data for e, data in found.items() if data is not None}

    def where(self, i: int) -> str:
        """The sample's name for messages: shard and key."""
        return f"{self.paths[int(self.shard[i])].name}:{self.keys[i]}"

    def captions(self, limit: int = 100_000) -> Iterator[str]:
        """Every caption of the first `limit` samples: all of .json's "captions" where there are some, else .txt."""
        for i in range(min(limit, len(self))):
            data = self.read(i, "json") if "json" in self.extensions else None
            several = json.loads(data).get("captions") if data is not None else None
            if several:
                yield from several
            elif "txt" in self.extensions and (text := self.read(i, "txt")) is not None:
                yield text.decode()
