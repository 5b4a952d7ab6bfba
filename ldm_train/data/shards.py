"""Shards: plain tars in the WebDataset layout, written whole or not at all, read by offset. data/README.md has the schema."""

import hashlib
import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ldm_train.data.fields import captions_of, label_of, relabelled, relabelled_boxes
from ldm_train.data.files import DataError
from ldm_train.data.tars import Measured, entry_fault, is_count, is_remote, scan_tar
from ldm_train.storage import file_sha256, write_atomically

INDEX = "index.json"
REMEDY = "ldm-prepare source=index path=<folder of tars> out={root}"
ENTRIES = ".entries"  # notes on finished shards, in a folder that is being written


def write_shard(path: str | Path, samples: Iterable[tuple[str, dict[str, bytes]]]) -> dict:
    """Writes (key, {extension: bytes}) samples as one reproducible tar and returns its index entry.

    Entry: {"file", "count", "bytes", "sha256", "fields": {extension: count}}. Raises ValueError for a key with a dot
    or slash (readers split names at the first dot), OSError on a full disk; the shard is then not there at all.
    """
    path, counts, seen = Path(path), Counter(), set()
    entry: dict = {}

    def write(file: io.BufferedWriter) -> None:
        out = Measured(file)
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


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:06d}.tar"


# One folder of shards, or several that are drawn from together.
Roots = str | Path | Sequence[str]


def as_roots(root: Roots) -> list[str]:
    return [str(root)] if isinstance(root, str | Path) else [str(r) for r in root]


def read_index(root: Roots, remedy: str | None = None) -> dict:
    """The index.json in `root`; of several roots one index of all their shards, each with the number of its "set", its
    "root", and the labels of its classes among all names ("relabel").

    Raises FileNotFoundError or DataError naming the command that makes one.
    """
    roots = as_roots(root)
    if len(roots) > 1:
        return _merged({r: read_index(r, remedy) for r in roots})
    (root,) = roots
    path, remedy = Path(root) / INDEX, (remedy or REMEDY).format(root=root)
    if not path.is_file():
        what = "has no index.json" if Path(root).is_dir() else "does not exist"
        raise FileNotFoundError(f"data folder {root} {what}; make it with: {remedy}")
    try:
        fault = _index_fault(index := json.loads(path.read_bytes()))
    except (ValueError, RecursionError) as error:
        fault = str(error)
    if fault:
        raise DataError(f"{path} is no shard index ({fault}); make it anew with: {remedy}")
    return index


def _index_fault(index: object) -> str | None:
    """Why parsed JSON is no index of shards, in words; None where it is one."""
    if not isinstance(index, dict) or not isinstance(index.get("splits"), dict):
        return 'no "splits"'
    classes = index.get("classes")
    if classes is not None and not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
        return '"classes" is no list of names'
    for split, part in index["splits"].items():
        if not (isinstance(part, dict) and isinstance(part.get("shards"), list) and is_count(part.get("count"))):
            return f'split {split!r} has no "shards" and "count"'
        for number, entry in enumerate(part["shards"]):
            if fault := entry_fault(entry):
                return f"shard {number} of {split!r} {fault}"
    return None


def read_note(path: Path) -> Any:
    """The JSON that was noted while a folder was written; None where there is none or it is damaged."""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return None


def noted_entry(folder: Path, name: str) -> dict | None:
    """The entry of a shard, written when it was finished; None where there is none or it is invalid."""
    entry = read_note(folder / ENTRIES / f"{name}.json")
    return entry if entry_fault(entry) is None and entry["file"] == name else None


def finished_shard(folder: Path, name: str) -> dict | None:
    """The entry of a shard that is finished and complete, else None: it is then made again."""
    entry = noted_entry(folder, name)
    whole = entry and (folder / name).is_file() and file_sha256(folder / name) == entry["sha256"]
    return entry if whole else None


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
    if not any(shard["count"] for shard in index["splits"][split]["shards"]):
        raise DataError(f"{root} has no sample in split {split!r}; prepare it again or choose another split")
    return index["splits"][split]


def data_hash(index: dict, *splits: str) -> str:
    """Identifies the samples of some splits by content: a hash over the shards' checksums, never over paths."""
    sums = [[s["sha256"] for s in index["splits"][split]["shards"]] for split in splits]
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()[:16]


Offsets = tuple[np.ndarray, dict[str, np.ndarray], dict[str, np.ndarray]]  # keys, offsets and sizes of the members


def counted(offsets: Offsets) -> tuple[int, dict[str, int]]:
    """(number of samples, {extension: number}), as in an index entry."""
    return len(offsets[0]), {e: int((starts >= 0).sum()) for e, starts in offsets[1].items()}


def _kept_offsets(kept: Path, stamp: np.ndarray, entry: dict) -> Offsets | None:
    """The offsets that an earlier scan saved; None where they are of another file, damaged or impossible."""
    try:
        with np.load(kept, allow_pickle=False) as saved:
            if (saved["stamp"] != stamp).any() or str(saved["sha256"]) != entry["sha256"]:
                return None
            names = [n.removeprefix("offset.") for n in saved.files if n.startswith("offset.")]
            offsets, sizes = ({n: saved[f"{what}.{n}"] for n in names} for what in ("offset", "size"))
            keys = saved["keys"]
    except Exception:  # a damaged file raises errors of any type
        return None
    if keys.dtype.kind != "U" or keys.ndim != 1:
        return None
    for start, size in zip(offsets.values(), sizes.values()):
        if {start.dtype, size.dtype} != {np.dtype(np.int64)} or not start.shape == size.shape == keys.shape:
            return None
        inside = (start >= 0) & (size >= 0) & (start <= stamp[0]) & (size <= stamp[0] - start)
        if not (inside | (start == -1) & (size == -1)).all():
            return None
    same = counted((keys, offsets, sizes)) == (entry["count"], entry["fields"])
    return (keys, offsets, sizes) if same else None


def _load_offsets(root: Path, path: Path, entry: dict) -> Offsets:
    """Offsets of one shard, from the file kept beside the index if size and mtime still match, else scanned anew. A scan
    also compares the shard with what its index says. Raises DataError where that differs."""
    stat = os.stat(path)
    kept = root / ".offsets" / f"{path.name}.npz"
    stamp = np.array([stat.st_size, stat.st_mtime_ns], np.int64)
    if (cached := _kept_offsets(kept, stamp, entry)) is not None:
        return cached
    check_size(path, entry)
    if file_sha256(path) != entry["sha256"]:
        raise DataError(f"{path} does not match the sha256 in its index.json; copy or prepare it again")
    names, offsets, sizes = scan_tar(path)
    keys = np.array(names, str)
    count, fields = counted((keys, offsets, sizes))
    if (count, fields) != (entry["count"], entry["fields"]):
        raise DataError(
            f"{path} has {count} samples with {fields}, its index.json says {entry['count']} with {entry['fields']}; make "
            "the index anew with: ldm-prepare source=index"
        )
    arrays = {f"offset.{e}": a for e, a in offsets.items()} | {f"size.{e}": a for e, a in sizes.items()}
    if not kept.parent.is_symlink():  # nothing is written outside the data folder
        with suppress(OSError):  # a read-only data folder: scan again next time
            write_atomically(kept, lambda f: np.savez(f, stamp=stamp, sha256=entry["sha256"], keys=keys, **arrays))
    return keys, offsets, sizes


def check_size(path: Path, entry: dict) -> None:
    """Raises DataError where a shard has another length than its index says."""
    if (size := path.stat().st_size) != entry["bytes"]:
        raise DataError(
            f"{path} has {size} bytes, its index says {entry['bytes']}: truncated or changed; copy or prepare it again"
        )


def shard_paths(root: str | Path, shards: list[dict]) -> list[Path]:
    """Where local shards lie: `file` is relative to the index's folder, or absolute where they live elsewhere. Raises
    FileNotFoundError, naming the first, where some are missing."""
    paths = [Path(shard.get("root", root)) / shard["file"] for shard in shards]
    if missing := [p for p in paths if not p.is_file()]:
        raise FileNotFoundError(
            f"{len(missing)} of {len(paths)} shards of {root} are missing, first {missing[0]}; copy them back or prepare "
            "the data again"
        )
    return paths


def spread(total: int, count: int) -> np.ndarray:
    """At most `count` of the numbers below `total`, evenly spread, in order."""
    return np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(int))


def member_counts(shards: list[dict]) -> Counter[str]:
    """How many samples of some shards have each extension, from their entries."""
    counts: Counter[str] = Counter()
    for shard in shards:
        counts.update(shard["fields"])
    return counts


class IndexedShards:
    """Random access to the samples of one split by member offset; safe to use from forked workers.

    root: a folder with its index, or several. sets (N,): which of them each sample comes from; where there are several
    their samples alternate in proportion to their numbers.
    Raises FileNotFoundError or DataError, naming shard and remedy, for missing, truncated or changed shards.
    """

    def __init__(self, root: Roots, split: str, remedy: str | None = None):
        self.root = " + ".join(as_roots(root))
        index = read_index(root, remedy)
        entries = split_index(index, split, root)["shards"]
        self.classes: list[str] | None = index.get("classes")
        if remote := [e["file"] for e in entries if is_remote(e["file"])]:
            raise DataError(
                f"{remote[0]} ({split} of {root}) is remote and cannot be read by offset; copy the tars to a local folder "
                "and index that (only training batches can come from afar, with data.reader=streaming)"
            )
        self.paths = shard_paths(self.root, entries)
        slow = sum(e["bytes"] for e in entries) > 2**30
        loaded = [
            _load_offsets(Path(entry.get("root", self.root)), path, entry)
            for path, entry in tqdm(list(zip(self.paths, entries)), desc=f"checking {split} shards", disable=not slow)
        ]
        self.keys = np.concatenate([keys for keys, _, _ in loaded])
        self.shard = np.concatenate([np.full(len(keys), i, np.int32) for i, (keys, _, _) in enumerate(loaded)])
        self.extensions = sorted({e for _, offsets, _ in loaded for e in offsets})
        absent = [np.full(len(keys), -1, np.int64) for keys, _, _ in loaded]
        self.offsets, self.sizes = (
            {e: np.concatenate([part[k].get(e, gap) for part, gap in zip(loaded, absent)]) for e in self.extensions}
            for k in (1, 2)
        )
        self._files: dict[int, int] = {}
        self._relabel = [e.get("relabel") for e in entries]
        self.sets = np.array([e.get("set", 0) for e in entries], np.int32)[self.shard]
        if self.sets.any():
            place = np.concatenate(
                [(np.arange(n) + 0.5) / n for n in np.bincount(self.sets)]
            )  # within its set, in (0, 1)
            self._take(np.argsort(place, kind="stable"))

    def __len__(self) -> int:
        return len(self.keys)

    def keep(self, count: int) -> None:
        """Reduces this view to at most `count` samples, spread evenly: shards are often sorted by class."""
        self._take(spread(len(self), count))

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
            return relabelled(data, relabel)
        if relabel and extension == "json" and relabel != list(range(len(relabel))):
            return relabelled_boxes(data, relabel)
        return data

    def labels(self) -> np.ndarray:
        """The class of every sample (N,). Raises DataError, naming the sample, where one has none."""
        labels, count = np.empty(len(self), int), len(self.classes or []) or None
        for i in range(len(self)):
            try:
                labels[i] = label_of(self.read(i, "cls") or b"", count)
            except ValueError as error:
                raise DataError(f"{self.where(i)}: {error}; data.balance_classes needs every sample's class") from error
        return labels

    def fields(self, i: int) -> dict[str, bytes]:
        """All fields of a sample, {extension: bytes}."""
        return self.members(i, self.extensions)

    def members(self, i: int, extensions: Iterable[str]) -> dict[str, bytes]:
        """Those of some fields that a sample has, {extension: bytes}."""
        return {e: data for e in extensions if e in self.extensions and (data := self.read(i, e)) is not None}

    def where(self, i: int) -> str:
        """The sample's name for messages: shard and key."""
        return f"{self.paths[int(self.shard[i])].name}:{self.keys[i]}"

    def captions(self, limit: int = 100_000) -> Iterator[str]:
        """Every caption of the first `limit` samples; those that cannot be read are left out, as in training."""
        for i in range(min(limit, len(self))):
            with suppress(ValueError):
                yield from captions_of(self.members(i, ("txt", "json")))
