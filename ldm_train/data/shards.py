"""Shards: plain tars in the WebDataset layout, written atomically and read by offset. data/README.md has the schema."""

import hashlib
import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ldm_train.data.buckets import picture_sizes
from ldm_train.data.fields import captions_of, label_of, relabelled, relabelled_boxes
from ldm_train.data.files import IMAGE_EXTENSIONS, DataError
from ldm_train.data.offsets import LRUCache, OffsetTable, ShardFile
from ldm_train.data.remote import Measured, ShardCache, address_fault, fetched, is_address, is_remote, remote_bytes
from ldm_train.data.tars import entry_fault, is_count
from ldm_train.storage import file_sha256, write_atomically

INDEX = "index.json"
FROM_PICTURES = (
    "if these are pictures to train on, make shards of them: ldm-prepare source=image_folder path={root} out=data/mine, and "
    "set data.root=data/mine"
)
REMEDY = "ldm-prepare source=index path=<folder of tars> out={root}"
MOST_COMPARED = 2_000_000  # up to this many samples, all keys are checked for repetitions
MOST_OPEN = 256  # files that are open at a time
ENTRIES = ".entries"  # subfolder for the entries of finished shards, in a folder that is being written


def write_shard(path: str | Path, samples: Iterable[tuple[str, dict[str, bytes]]]) -> dict:
    """Writes (key, {extension: bytes}) samples as one reproducible tar and returns its index entry.

    Entry: {"file", "count", "bytes", "sha256", "fields": {extension: count}}. Raises ValueError for a key that repeats
    or contains a dot or slash (readers split names at the first dot), OSError on a full disk; in both cases no shard is
    left behind.
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


# One folder or address of shards, or several whose samples are mixed.
Roots = str | Path | Sequence[str]


def as_roots(root: Roots) -> list[str]:
    return [str(root)] if isinstance(root, str | Path) else [str(r) for r in root]


def read_index(root: Roots, remedy: str | None = None) -> dict:
    """Reads the index.json in `root`. Several roots give one index of all their shards, each with the number of its
    "set", its "root", and "relabel", which maps its class labels to those among all class names.

    Raises FileNotFoundError or DataError naming the command that makes an index.
    """
    roots = as_roots(root)
    if len(roots) > 1:
        return _merged({r: read_index(r, remedy) for r in roots})
    (root,) = roots
    remedy = (remedy or REMEDY).format(root=root)
    if is_address(root):
        path, data = f"{root.rstrip('/')}/{INDEX}", fetched(f"{root.rstrip('/')}/{INDEX}")
    elif not (path := Path(root) / INDEX).is_file():
        what = "has no index.json" if Path(root).is_dir() else "does not exist"
        some = [p.suffix.lower().lstrip(".") for p in islice(Path(root).rglob("*"), 1000)]
        if not {"tar"} & {*some} and {*IMAGE_EXTENSIONS} & {*some}:
            raise FileNotFoundError(f"data folder {root} has no index.json; {FROM_PICTURES.format(root=root)}")
        raise FileNotFoundError(f"data folder {root} {what}; make it with: {remedy}")
    else:
        data = path.read_bytes()
    try:
        fault = index_fault(index := json.loads(data))
    except (ValueError, RecursionError) as error:
        fault = str(error)
    if not fault and is_address(root):
        fault = _lead_afar(index, root.rstrip("/"))
    if fault:
        raise DataError(f"{path} is not a shard index ({fault}); rebuild it with: {remedy}")
    return index


def _lead_afar(index: dict, root: str) -> str | None:
    """Turns the shards' relative names in an index read from an address into addresses below it. Returns why one is
    refused, if any: such an index may not name local files."""
    for part in index["splits"].values():
        for entry in part["shards"]:
            if entry["file"].startswith("/"):
                return f"the shard {entry['file']!r} is a file of another machine"
            if not is_remote(entry["file"]):
                entry["file"] = f"{root}/{entry['file']}"
            if fault := address_fault(entry["file"]):
                return f"a shard {fault}"
    return None


def index_fault(index: object) -> str | None:
    """Returns why parsed JSON is not an index of shards, or None if it is one."""
    if not isinstance(index, dict) or not isinstance(index.get("splits"), dict):
        return 'no "splits"'
    classes = index.get("classes")
    if classes is not None and not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
        return '"classes" is not a list of names'
    for split, part in index["splits"].items():
        if not (isinstance(part, dict) and isinstance(part.get("shards"), list) and is_count(part.get("count"))):
            return f'split {split!r} has no "shards" and "count"'
        for number, entry in enumerate(part["shards"]):
            if fault := entry_fault(entry):
                return f"shard {number} of {split!r} {fault}"
    return None


def read_note(path: Path) -> Any:
    """Reads JSON that was stored while a folder was written; None if it is missing or damaged."""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return None


def noted(entry: Any, name: str) -> dict | None:
    """Returns `entry` if it is a valid index entry of the shard `name`, else None."""
    return entry if entry_fault(entry) is None and entry["file"] == name else None


def noted_entry(folder: Path, name: str) -> dict | None:
    """The entry of a shard, stored when it was finished; None if it is missing or invalid."""
    return noted(read_note(folder / ENTRIES / f"{name}.json"), name)


def finished_shard(folder: Path, name: str) -> dict | None:
    """The entry of a shard that is finished and complete; None if it has to be made again."""
    entry = noted_entry(folder, name)
    whole = entry and (folder / name).is_file() and file_sha256(folder / name) == entry["sha256"]
    return entry if whole else None


def _merged(indices: dict[str, dict]) -> dict:
    """Merges the indices of several roots. Class labels are matched by name, so sets with different class lists keep
    their meaning. If any set has no class names, the result has none. Raises DataError if a root names a class
    twice."""
    named = {root: index.get("classes") for root, index in indices.items()}
    for root, names in named.items():
        if twice := [name for name, count in Counter(names or []).items() if count > 1]:
            raise DataError(
                f"{root}/{INDEX} names the class {twice[0]} twice; classes of several roots are joined by name"
            )
    classes = list(dict.fromkeys(n for names in named.values() for n in names)) if all(named.values()) else []
    place = {name: number for number, name in enumerate(classes)}
    splits: dict[str, dict] = {}
    for number, (root, index) in enumerate(indices.items()):
        relabel = [place[name] for name in named[root]] if classes else []
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
        raise DataError(
            f"{root} has no sample in split {split!r} of its index.json; prepare it again or choose another split"
        )
    return index["splits"][split]


def data_hash(index: dict, *splits: str) -> str:
    """Identifies the samples of some splits by content: a hash over the shards' checksums, never over paths."""
    sums = [[s["sha256"] for s in index["splits"][split]["shards"]] for split in splits]
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()[:16]


def shard_paths(root: str | Path, shards: list[dict]) -> list[Path]:
    """The paths of local shards: `file` is relative to the index's folder, or absolute if they lie elsewhere. Raises
    FileNotFoundError, naming the first, if some are missing."""
    paths = [Path(shard.get("root", root)) / shard["file"] for shard in shards]
    if missing := [p for p in paths if not p.is_file()]:
        raise FileNotFoundError(
            f"{len(missing)} of {len(paths)} shards of {root} are missing, first {missing[0]}; copy them back or prepare "
            "the data again"
        )
    return paths


def spread(total: int, count: int) -> np.ndarray:
    """At most `count` of the integers below `total`, evenly spread, in order."""
    return np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(int))


def _few(entries: list[dict], count: int, evenly: bool) -> list[dict]:
    """The entries of as many shards as hold `count` samples."""
    for number in range(1, len(entries)):
        chosen = [entries[i] for i in spread(len(entries), number)] if evenly else entries[:number]
        if sum(entry["count"] for entry in chosen) >= count:
            return chosen
    return entries


def member_counts(shards: list[dict]) -> Counter[str]:
    """How many samples of some shards have each extension, from their entries."""
    counts: Counter[str] = Counter()
    for shard in shards:
        counts.update(shard["fields"])
    return counts


class IndexedShards:
    """Random access to the samples of one split by member offset; safe to use from forked workers. The offsets of
    more than two million samples stay on disk (see `OffsetTable`).

    root: a folder or address with its index, or several. sets (N,): the root of each sample; samples of several roots
    alternate in proportion to their numbers. cache: for remote shards. few: (count, evenly): read only as many shards as
    hold so many samples, spread evenly over the split, or its first ones.
    Raises FileNotFoundError or DataError, naming shard and remedy, for missing, truncated or changed shards.
    """

    def __init__(
        self,
        root: Roots,
        split: str,
        remedy: str | None = None,
        cache: ShardCache | None = None,
        few: tuple[int, bool] | None = None,
    ):
        self.root = " + ".join(as_roots(root))
        index = read_index(root, remedy)
        entries = split_index(index, split, root)["shards"]
        if few is not None and (few[1] or not any(entry.get("set") for entry in entries)):  # sets alternate
            entries = _few(entries, *few)
        self.classes: list[str] | None = index.get("classes")
        shard_paths(self.root, [e for e in entries if not is_remote(e["file"])])
        self.files = [ShardFile(entry, entry.get("root", self.root), cache) for entry in entries]
        self.table = OffsetTable.of(self.files, split)
        self.extensions = self.table.extensions
        self.all_at_hand = cache is None or remote_bytes(entries) <= cache.limit
        # Open copies cannot be deleted to make room for others.
        self._descriptor = LRUCache(self._open, MOST_OPEN if self.all_at_hand else 2, os.close)
        self._relabel = [e.get("relabel") for e in entries]
        self._set = np.array([e.get("set", 0) for e in entries], np.int32)
        self._rows: np.ndarray | None = None  # of the table, if not all are used in their order
        if self._set.any():  # alternate: order by the position of each within its set, in (0, 1)
            place = np.concatenate([(np.arange(n) + 0.5) / n for n in np.bincount(self.sets)])
            self._rows = np.argsort(place, kind="stable").astype(np.min_scalar_type(len(place)))

    def __len__(self) -> int:
        return len(self.table) if self._rows is None else len(self._rows)

    def keep(self, count: int, evenly: bool = True) -> None:
        """Reduces this view to at most `count` samples: evenly spread, because shards are often sorted by class, or the
        first ones."""
        picks = spread(len(self), count) if evenly else np.arange(min(count, len(self)))
        self._rows = picks if self._rows is None else self._rows[picks]

    def _open(self, shard: int) -> int:
        return self.files[shard].open()

    def _row(self, i: int) -> int:
        return int(i) if self._rows is None else int(self._rows[i])

    def shard(self, i: int) -> int:
        """The number of the shard that holds a sample."""
        return int(np.searchsorted(self.table.first, self._row(i), "right")) - 1

    @property
    def sets(self) -> np.ndarray:
        sets = np.repeat(self._set, np.diff(self.table.first))
        return sets if self._rows is None else sets[self._rows]

    def picture_sizes(self) -> np.ndarray:
        """(height, width) of every sample's image (N, 2), (0, 0) if it cannot be read. Read once and stored."""
        sizes = picture_sizes(self.files, self.table)
        return sizes if self._rows is None else sizes[self._rows]

    def key(self, i: int) -> str:
        return self.table.key(self._row(i))

    @property
    def keys(self) -> list[str]:
        return [self.key(i) for i in range(len(self))]

    def member(self, i: int, extension: str) -> tuple[int, int] | None:
        """(offset, size) of a field's bytes in its shard, or None if the sample lacks it. Raises DataError if they
        lie beyond the shard's end."""
        offset, size = self.table.member(self._row(i), extension)
        if offset < 0:
            return None
        if size < 0 or offset + size > self.files[self.shard(i)].entry["bytes"]:
            raise DataError(f"{self.where(i)}: offsets beyond the shard's end; delete {self.files[0].kept.parent}")
        return offset, size

    def read(self, i: int, extension: str) -> bytes | None:
        """The bytes of a field, or None if the sample lacks it."""
        if (place := self.member(i, extension)) is None:
            return None
        shard = self.shard(i)
        data = os.pread(self._descriptor(shard), place[1], place[0])
        relabel = self._relabel[shard]
        if relabel and extension == "cls":
            return relabelled(data, relabel)
        if relabel and extension == "json" and relabel != list(range(len(relabel))):
            return relabelled_boxes(data, relabel)
        return data

    def labels(self) -> np.ndarray:
        """The class of every sample (N,). Raises DataError, naming the sample, if one has no valid class."""
        labels, count = np.empty(len(self), int), len(self.classes or []) or None
        for i in range(len(self)):
            try:
                labels[i] = label_of(self.read(i, "cls") or b"", count)
            except ValueError as error:
                raise DataError(f"{self.where(i)}: {error}; data.balance_classes needs every sample's class") from error
        return labels

    def members(self, i: int, extensions: Iterable[str] | None = None) -> dict[str, bytes]:
        """A sample's members, {extension: bytes}: all, or those of `extensions` in their order."""
        wanted = self.extensions if extensions is None else [e for e in extensions if e in self.extensions]
        return {e: data for e in wanted if (data := self.read(i, e)) is not None}

    def where(self, i: int) -> str:
        """The sample's name in messages: shard and key."""
        return f"{PurePosixPath(self.files[self.shard(i)].entry['file']).name}:{self.key(i)}"

    def captions(self) -> Iterator[str]:
        """Yields every caption; those that cannot be read are skipped."""
        for i in range(len(self)):
            with suppress(ValueError):
                yield from captions_of(self.members(i, ("txt", "json")))
