"""From a source to a folder of shards: in several processes, resumable, index last."""

import hashlib
import json
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Protocol

import numpy as np
from tqdm import tqdm

from ldm_train.data.fields import array_of, check_fields
from ldm_train.data.files import IMAGE_EXTENSIONS, open_image
from ldm_train.data.shards import ENTRIES, INDEX, DataError, finished_shard, write_shard
from ldm_train.interrupts import become_worker
from ldm_train.storage import write_json


class Source(Protocol):
    """Samples by number. A source is picklable and deterministic, so that any process can write any shard.

    classes: names of the class indices, or None. identity: what the samples depend on, JSON-able.
    """

    classes: list[str] | None
    identity: dict

    def splits(self) -> dict[str, int]:
        """Number of samples per split."""
        ...

    def sample(self, split: str, i: int) -> tuple[str, dict[str, bytes]]:
        """(key, {extension: bytes}). Raises OSError or ValueError for a sample that cannot be read; where the error has
        `passing = True`, and so have most of a shard's, the shard is not written.

        A source that is slow one by one may also have `samples(split, chunk)`: an iterator of the same in order, with
        the exception in the place of a sample that cannot be read.
        """
        ...


def digest(items: object) -> str:
    """A short hash of anything JSON-able, to tell sources apart by what they hold."""
    return hashlib.sha256(json.dumps(items).encode()).hexdigest()[:16]


def in_validation(key: str, fraction: float) -> bool:
    """Whether a sample belongs to validation: a function of its key alone, so that new files do not move old ones."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") < fraction * 2**64


def _write(source: Source, out: Path, split: str, number: int, chunk: range) -> dict:
    """Writes one shard and the entry that marks it as complete. Returns its entry with skipped samples and image sizes, of .npy
    pictures also the numbers of channels and the least and largest value."""
    sizes, skipped, passing = [], [], []
    channels, values = set(), []

    together = source.samples(split, chunk) if hasattr(source, "samples") else None

    def samples():
        for i in chunk:
            key = f"sample {i}"
            try:
                made = source.sample(split, i) if together is None else next(together)
                if isinstance(made, Exception):
                    raise made
                key, fields = made
                extension = next((e for e in IMAGE_EXTENSIONS if e in fields), None)
                if extension == "npy":
                    array = array_of(fields["npy"])
                    size = (array.shape[1], array.shape[0])
                    channels.add(array.shape[2])
                    ends = [float(array.min()), float(array.max())]
                    values.extend(v / 127.5 - 1 if array.dtype == np.uint8 else v for v in ends)
                elif extension:
                    with open_image(fields[extension]) as image:
                        image.load()  # a truncated file must not reach training
                        size = image.size
                key.encode()  # a file's name need not be text
                check_fields(fields, len(source.classes) if source.classes else None)
                if extension:
                    sizes.append(size)
            except DataError:  # an option is missing, no picture damaged
                raise
            except (OSError, ValueError) as error:
                skipped.append(f"{split} {key}: {error}")
                if getattr(error, "passing", False):
                    passing.append(str(error))
                continue
            yield key, fields
        if len(passing) > max(1, len(chunk) // 2):  # raised here, the shard is not written
            raise DataError(
                f"{len(passing)} of {len(chunk)} samples failed for reasons that may pass, the last: {passing[-1]}; see to "
                "the network and run the same command to continue"
            )

    name = f"{split}-{number:06d}.tar"
    entry = write_shard(out / name, samples())
    entry["skipped"] = skipped
    if sizes:
        entry["image_size"] = [[min(s[k] for s in sizes) for k in (0, 1)], [max(s[k] for s in sizes) for k in (0, 1)]]
    if channels:
        entry |= {"channels": sorted(channels), "values": [min(values), max(values)]}
    write_json(out / ENTRIES / f"{name}.json", entry)
    return entry


_held: list[Source] = []  # in a worker: its source, sent once and not with every shard (it may list a million files)


def _hold(source: Source) -> None:
    become_worker()
    _held.append(source)


def _write_held(*task) -> dict:
    return _write(_held[0], *task)


def build(source: Source, out: str | Path, per_shard: int = 1000, workers: int = 1) -> dict:
    """Writes every split of `source` into `out` and returns the index. Run again after an interruption, it continues.

    Raises DataError if `out` holds data prepared otherwise, or a split would be empty.
    """
    out = Path(out)
    counts = source.splits()
    if min(counts.values()) == 0 or "train" not in counts:
        raise DataError(f"the source has {counts} samples; both train and val need at least one (see val_fraction)")
    identity = {"source": source.identity, "per_shard": per_shard, "counts": counts}
    note = out / ENTRIES / "source.json"
    if note.is_file() and _read(note) != json.loads(json.dumps(identity)):
        raise DataError(
            f"{out} holds data prepared with other options or from other files; choose another out=<folder> or delete this one"
        )
    if (out / INDEX).is_file() and not note.is_file():
        raise DataError(f"{out} holds data of another origin; choose another out=<folder>")
    write_json(note, identity)
    tasks = [
        (split, number, range(first, min(first + per_shard, count)))
        for split, count in counts.items()
        for number, first in enumerate(range(0, count, per_shard))
    ]
    done: dict[str, dict] = {}
    with tqdm(total=sum(counts.values()), desc=f"preparing {out.name}", unit="img") as progress:
        todo = []
        for split, number, chunk in tasks:
            name = f"{split}-{number:06d}.tar"
            if (entry := finished_shard(out, name)) and _is_complete(entry):
                done[name] = entry
                progress.update(len(chunk))
            else:
                todo.append((split, number, chunk))
        if workers <= 1:
            for split, number, chunk in todo:
                done[f"{split}-{number:06d}.tar"] = _write(source, out, split, number, chunk)
                progress.update(len(chunk))
        else:
            with ProcessPoolExecutor(workers, get_context("spawn"), _hold, (source,)) as pool:
                running = {pool.submit(_write_held, out, *task): task for task in todo}
                for future in as_completed(running):
                    split, number, chunk = running[future]
                    done[f"{split}-{number:06d}.tar"] = future.result()
                    progress.update(len(chunk))
    return write_index(out, [(split, done[f"{split}-{number:06d}.tar"]) for split, number, _ in tasks], source.classes)


def _is_complete(entry: dict) -> bool:
    """Whether a shard's entry also has the image sizes and other values that the index is made from."""
    sides = [side for pair in entry.get("image_size", ()) for side in pair]
    return isinstance(entry.get("skipped"), list) and all(isinstance(side, int) for side in sides)


def _read(note: Path) -> object:
    try:
        return json.loads(note.read_bytes())
    except (ValueError, RecursionError):
        return None  # which is nothing that data are prepared from


def write_index(out: Path, shards: list[tuple[str, dict]], classes: list[str] | None) -> dict:
    """Writes index.json from (split, entry) pairs and lists skipped samples in skipped.txt.

    Raises DataError where a split holds no sample.
    """
    splits: dict[str, dict] = {}
    skipped, ranges, values = [], [], []
    for split, entry in shards:
        entry = dict(entry)
        skipped += entry.pop("skipped", [])
        if "image_size" in entry:
            ranges.append(entry.pop("image_size"))
        values += entry.pop("values", [])
        part = splits.setdefault(split, {"count": 0, "shards": []})
        part["shards"].append(entry)
        part["count"] += entry["count"]
    index: dict = {"splits": splits}
    if classes:
        index["classes"] = classes
    if ranges:
        index["image_size"] = {
            "min": [min(r[0][k] for r in ranges) for k in (0, 1)],
            "max": [max(r[1][k] for r in ranges) for k in (0, 1)],
        }
    (out / "skipped.txt").unlink(missing_ok=True)
    if skipped:
        (out / "skipped.txt").write_text("\n".join(skipped) + "\n", "utf-8", "backslashreplace")
        print(f"left out {len(skipped)} unreadable samples, listed in {out / 'skipped.txt'}")
    if values and max(values) - min(values) < 1:
        print(
            f"the arrays use {min(values):.2f} to {max(values):.2f} of [-1, 1]; to use all of it, say what black and white are "
            "in the files (source.range=[low,high]) and another out=<folder>"
        )
    empty = [split for split, part in splits.items() if part["count"] == 0]
    if empty:
        raise DataError(f"no readable sample in {' and '.join(empty)}; {out / 'skipped.txt'} lists why")
    write_json(out / INDEX, index)
    return index
