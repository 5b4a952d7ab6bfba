"""Turns a source into a folder of shards: in several processes, resumable, with the index written last."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ldm_train.cluster import mapped
from ldm_train.data.fields import array_of, check_fields
from ldm_train.data.files import IMAGE_EXTENSIONS, open_image
from ldm_train.data.prepare.target import ORIGIN, Folder, target
from ldm_train.data.shards import ENTRIES, INDEX, DataError, read_note, shard_name

COUNTS = {"train": "count", "val": "val_count"}  # by split, the option of a source that says how many samples to make


class Source:
    """Samples by number. A source is picklable and deterministic, so that any process can write any shard. The
    user's own source need not be a subclass.

    classes: names of the class indices, or None. identity: what the samples depend on, JSON-able.
    items: per split, the items that `splits` counts and `sample` makes samples from.
    A source may also have `report(out)`, which writes a report on all samples into the folder of shards.
    """

    classes: list[str] | None = None
    identity: dict[str, Any]
    items: dict[str, Sequence[Any]]

    def splits(self) -> dict[str, int]:
        """Number of samples per split."""
        return {split: len(items) for split, items in self.items.items()}

    def sample(self, split: str, i: int) -> tuple[str, dict[str, bytes]]:
        """(key, {extension: bytes}). Raises OSError or ValueError for a sample that cannot be read; if most samples
        of a shard fail with errors that have `transient = True`, the shard is not written.

        A source for which single samples are slow may also have `samples(split, chunk)`: an iterator of the same in
        order, with the exception instead of a sample that cannot be read.
        """
        raise NotImplementedError


def class_and_captions(label: int | None = None, captions: Sequence[str] = ()) -> dict[str, bytes]:
    """The members that say what a sample shows: .cls, .txt (the first caption), .json (if there are several
    captions)."""
    members = {} if label is None else {"cls": str(label).encode()}
    if captions:
        members["txt"] = captions[0].encode()
    if len(captions) > 1:
        members["json"] = json.dumps({"captions": captions}).encode()
    return members


def digest(items: object) -> str:
    """A short hash of anything JSON-able, to tell sources with different content apart."""
    return hashlib.sha256(json.dumps(items).encode()).hexdigest()[:16]


def in_validation(key: str, fraction: float) -> bool:
    """Returns True if a sample belongs to validation. This depends on its key alone, so that new files do not move
    old ones."""
    name = key.encode("utf-8", "surrogateescape")  # a file's name need not be valid text
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little") < fraction * 2**64


def _checked_picture(fields: dict[str, bytes]) -> dict[str, Any]:
    """Reads a sample's image completely, because a truncated file must not reach training. Returns its "size"
    (width, height) and, for a .npy, its "channels" and its "least" and "largest" value in [-1, 1]; {} if there is no
    image."""
    extension = next((e for e in IMAGE_EXTENSIONS if e in fields), None)
    if extension is None:
        return {}
    if extension == "npy":
        array = array_of(fields["npy"])
        ends = [float(array.min()), float(array.max())]
        least, largest = [v / 127.5 - 1 for v in ends] if array.dtype == np.uint8 else ends
        height, width, channels = array.shape
        return {"size": (width, height), "channels": channels, "least": least, "largest": largest}
    with open_image(fields[extension]) as image:
        image.load()
        return {"size": image.size}


def _write(source: Source, out: Folder, name: str, split: str, chunk: range) -> dict:
    """Writes one shard and the entry that marks it as complete. Returns the entry with skipped samples and image
    sizes, for .npy images also the numbers of channels and the smallest and largest value."""
    pictures, skipped, transient = [], [], []
    together = source.samples(split, chunk) if hasattr(source, "samples") else None

    def samples() -> Iterator[tuple[str, dict[str, bytes]]]:
        for i in chunk:
            key = f"sample {i}"
            try:
                made = source.sample(split, i) if together is None else next(together)
                if isinstance(made, Exception):
                    raise made
                key, fields = made
                picture = _checked_picture(fields)
                key.encode()  # raises ValueError: a file's name need not be valid text
                check_fields(fields, len(source.classes) if source.classes else None)
            except DataError:  # an option is missing; no image is damaged
                raise
            except (OSError, ValueError) as error:
                skipped.append(f"{split} {key}: {error}")
                if getattr(error, "transient", False):
                    transient.append(str(error))
                continue
            pictures.append(picture)
            yield key, fields
        if len(transient) > max(1, len(chunk) // 2):  # raised inside this generator, so the shard is not written
            raise DataError(
                f"{len(transient)} of {len(chunk)} samples failed with possibly transient errors, the last: {transient[-1]}; check "
                "the network and run the same command to continue"
            )

    entry = out.write_shard(name, samples()) | {"skipped": skipped}
    if sizes := [picture["size"] for picture in pictures if picture]:
        entry["image_size"] = [[extreme(side) for side in zip(*sizes)] for extreme in (min, max)]
    if arrays := [picture for picture in pictures if "channels" in picture]:
        entry["channels"] = sorted({picture["channels"] for picture in arrays})
        entry["values"] = [min(picture["least"] for picture in arrays), max(picture["largest"] for picture in arrays)]
    out.write_json(f"{ENTRIES}/{name}.json", entry)
    return entry


def origin_of(folder: Path) -> dict[str, Any]:
    """What the data in a folder say they were prepared from: the source's name and options, and the number of samples of
    each split; {} if they say nothing."""
    made = read_note(folder / ENTRIES / ORIGIN)
    made = made if isinstance(made, dict) else {}
    return {k: v for part in ("source", "counts") if isinstance(made.get(part), dict) for k, v in made[part].items()}


def check_made_from(source: Source, folder: Path) -> None:
    """Raises DataError if `folder` holds data of the same kind of source with other options. Data of another origin are
    the user's own, and are not checked."""
    held = origin_of(folder)
    asked = json.loads(json.dumps({**source.identity, **source.splits()}))
    if "source" not in held or held["source"] != asked.get("source"):
        return
    if other := {COUNTS.get(k, k): (held.get(k), v) for k, v in asked.items() if held.get(k) != v}:
        options = " ".join(f"data.source.{option}={had}" for option, (had, _) in other.items())
        now = ", ".join(f"{option} {wanted}" for option, (_, wanted) in other.items())
        raise DataError(
            f"{folder} was prepared with {options}, and now {now} is asked for: set what it was prepared with, choose "
            f"data.root=<another folder>, or delete its tars, {INDEX} and {ENTRIES}"
        )


def build(source: Source, out: str | Path, per_shard: int = 1000, workers: int = 1, engine: str | None = None) -> dict:
    """Writes every split of `source` into `out`, a folder or an s3, gs or hf address, and returns the index. After
    an interruption, running it again continues. With engine "ray", the `workers` are processes of a Ray cluster,
    whose machines share `out` and the files that the source reads. Raises DataError if `out` holds data prepared
    differently, or a split would be empty."""
    place = target(out)
    counts = source.splits()
    if min(counts.values()) == 0 or "train" not in counts:
        raise DataError(
            f"of {sum(counts.values())} samples {counts.get('train', 0)} are for training and {counts.get('val', 0)} for validation; both "
            "need at least one: source.val_fraction=0.2 gives more to validation, and 0 makes no such split (its training "
            "takes data.val_split=train)"
        )
    identity = {"source": source.identity, "per_shard": per_shard, "counts": counts}
    note = f"{ENTRIES}/{ORIGIN}"
    if (other := place.foreign()) is not None:
        raise DataError(
            f"{out} holds other files (first: {other}); shards go into a folder of their own: out=<new folder>"
        )
    begun = place.has(note)
    if begun and place.note(note) != json.loads(json.dumps(identity)):
        raise DataError(
            f"{out} holds data prepared with other options or from other files; choose another out=<folder>, or delete its tars, "
            f"{INDEX} and {ENTRIES}"
        )
    if not begun and place.has(INDEX):
        raise DataError(f"{out} holds data of another origin; choose another out=<folder>")
    place.write_json(note, identity)
    if hasattr(source, "report"):
        place.filled(source.report)
    tasks = {
        shard_name(split, number): (split, range(first, min(first + per_shard, count)))
        for split, count in counts.items()
        for number, first in enumerate(range(0, count, per_shard))
    }
    done: dict[str, dict] = {}
    with tqdm(total=sum(counts.values()), desc=f"preparing {place.name}", unit="img") as progress:
        for name, (_, chunk) in tasks.items():
            if (entry := place.finished(name)) and _is_complete(entry):
                done[name] = entry
                progress.update(len(chunk))
        todo = {name: task for name, task in tasks.items() if name not in done}
        for name, entry in _written(source, place, todo, workers, engine):
            done[name] = entry
            progress.update(len(tasks[name][1]))
    return write_index(place, [(split, done[name]) for name, (split, _) in tasks.items()], source.classes)


def _written(
    source: Source, out: Folder, tasks: dict[str, tuple[str, range]], workers: int, engine: str | None
) -> Iterator[tuple[str, dict]]:
    """Writes shards, in several processes if requested; yields (name, entry) of each when it is finished."""
    if workers <= 1 and engine is None:
        for name, task in tasks.items():
            yield name, _write(source, out, name, *task)
        return
    shards = {name: (out.alone(), name, *task) for name, task in tasks.items()}
    for name, entry in mapped(_write, source, shards, workers, engine):
        if engine:
            out.check_seen(name)
        yield name, entry


def _is_complete(entry: dict) -> bool:
    """Returns True if a shard's entry also has the skipped samples and valid image sizes, which the index is made
    from."""
    sides = [side for pair in entry.get("image_size", ()) for side in pair]
    return isinstance(entry.get("skipped"), list) and all(isinstance(side, int) for side in sides)


def write_index(
    out: str | Path | Folder,
    shards: list[tuple[str, dict]],
    classes: list[str] | None,
    image_size: dict[str, list[int]] | None = None,
) -> dict:
    """Writes index.json from (split, entry) pairs and lists skipped samples in skipped.txt. image_size: if the entries
    do not say it. Raises DataError if a split has no sample."""
    out = target(out)
    splits: dict[str, dict] = {}
    skipped, smallest, largest, values = [], [], [], []
    for split, entry in shards:
        skipped += entry.get("skipped", [])
        values += entry.get("values", [])
        if "image_size" in entry:
            smallest.append(entry["image_size"][0])
            largest.append(entry["image_size"][1])
        part = splits.setdefault(split, {"count": 0, "shards": []})
        part["shards"].append({k: v for k, v in entry.items() if k not in ("skipped", "values", "image_size")})
        part["count"] += entry["count"]
    index: dict = {"splits": splits}
    if classes:
        index["classes"] = classes
    if smallest:
        index["image_size"] = {
            "min": [min(side) for side in zip(*smallest)],
            "max": [max(side) for side in zip(*largest)],
        }
    elif image_size:
        index["image_size"] = image_size
    out.delete("skipped.txt")
    if skipped:
        out.write("skipped.txt", ("\n".join(skipped) + "\n").encode("utf-8", "backslashreplace"))
        print(f"left out {len(skipped)} unreadable samples, listed in {out}/skipped.txt")
    if values and max(values) - min(values) < 1:
        print(
            f"the arrays use {min(values):.2f} to {max(values):.2f} of [-1, 1]; to use all of it, set what black and white are "
            "in the files (source.range=[low,high]) and another out=<folder>"
        )
    empty = [split for split, part in splits.items() if part["count"] == 0]
    if empty:
        raise DataError(f"no readable sample in {' and '.join(empty)}; {out}/skipped.txt lists why")
    out.write_json(INDEX, index)
    return index
