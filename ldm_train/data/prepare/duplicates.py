"""Shards without near duplicates: keeps one of the images that show the same, whatever their size, format and
compression."""

import csv
import io
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional
from tqdm import tqdm

from ldm_train.data.fields import array_of
from ldm_train.data.files import IMAGE_EXTENSIONS, as_shown, encoded_npy, open_image
from ldm_train.data.offsets import LRUCache
from ldm_train.data.prepare.build import Source
from ldm_train.data.remote import is_address, is_remote
from ldm_train.data.shards import ENTRIES, MOST_OPEN, DataError, IndexedShards, data_hash, read_index
from ldm_train.images import from_uint8
from ldm_train.interrupts import become_worker
from ldm_train.storage import write_atomically

BITS, SIDE = 64, 16
PRINT = np.dtype([("hash", "<u8"), ("pixels", "<u8"), ("thumbnail", "u1", (SIDE, SIDE, 3))])
MOST_DIFFERENT_BITS = 10
# Small objects on a uniform background may have similar hashes and thumbnails although they differ. Of CIFAR-10's pairs
# within the other limits, two correlate by 0.58 and 0.63; all others, which do show the same, by at least 0.86.
LEAST_CORRELATION = 0.8
NOISE = 2.0  # of 255: deviations that uniform images may have from each other
SHOWN = 12  # pairs in duplicates.png
_PLAIN = str.maketrans("/.", "__")  # characters that keys in new shards may not contain

# Rows of the discrete cosine transform of 32 samples (type 2): the 8 lowest frequencies.
_COSINES = np.cos(np.pi / 32 * np.arange(8)[:, None] * (np.arange(32) + 0.5))


def perceptual_hash(image: Image.Image) -> int:
    """64 bits of a grey image: which of the 8 x 8 lowest frequencies of its 32 x 32 reduction lie above their median
    (pHash, Zauner 2010, "Implementation and Benchmarking of Perceptual Image Hash Functions", section 3.2.1)."""
    grey = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.LANCZOS), np.float64)
    frequencies = (_COSINES @ grey @ _COSINES.T).round(6)  # for uniform images all but one become 0, not 1e-13
    return int(np.packbits(frequencies > np.median(frequencies)).view(">u8")[0])


def _read_picture(extension: str, data: bytes, side: int | None = None) -> tuple[Image.Image, int]:
    """(an encoded image as a viewer shows it, its number of pixels). For a .npy: its first, middle and last channel
    as RGB. side: a JPEG is decoded no larger than needed for this size. Raises OSError or ValueError if it cannot be
    read."""
    if extension == "npy":
        array = array_of(data)
        if array.dtype != np.uint8:
            array = ((array.astype(np.float64).clip(-1, 1) + 1) * 127.5).round().astype(np.uint8)
        channels = array.shape[2]
        image = Image.fromarray(np.ascontiguousarray(array[..., [0, channels // 2, channels - 1]]))
        return image, image.width * image.height
    with open_image(data) as image:
        pixels = image.width * image.height
        if side:
            image.draft("RGB", (side, side))
        return as_shown(image), pixels


def fingerprint(extension: str, data: bytes) -> tuple[int, int, np.ndarray]:
    """(perceptual hash, number of pixels, thumbnail (16, 16, 3) uint8) of an encoded image. Raises OSError or
    ValueError if it cannot be read."""
    image, pixels = _read_picture(extension, data, 128)
    return perceptual_hash(image), pixels, _thumbnail(image)


def _thumbnail(image: Image.Image) -> np.ndarray:
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX))


def pairs_within(hashes: np.ndarray, distance: int) -> np.ndarray:
    """All pairs of different 64-bit hashes (N,) that differ in at most `distance` bits: (M, 2) indices, the lower
    one first.

    With the bits split into distance + 3 groups, at least three groups are equal in such a pair: so the hashes are
    sorted by every three groups, and those that are equal in them are compared.
    """
    pairs = [np.empty((0, 2), np.int64)]
    groups = [sum(1 << int(bit) for bit in bits) for bits in np.array_split(np.arange(BITS), distance + 3)]
    for chosen in itertools.combinations(groups, 3):
        keys = hashes & np.uint64(sum(chosen))
        order = np.argsort(keys, kind="stable")
        keys, sorted_hashes = keys[order], hashes[order]
        places = np.arange(len(hashes))
        for step in itertools.count(1):  # neighbours, then those two apart, ... while they share the bits
            places = places[: np.searchsorted(places, len(hashes) - step)]
            places = places[keys[places] == keys[places + step]]
            if not len(places):
                break
            bits = np.bitwise_count(sorted_hashes[places] ^ sorted_hashes[places + step])
            near = places[bits <= distance]
            pairs.append(np.sort(np.stack([order[near], order[near + step]], axis=1), axis=1))
    return np.unique(np.concatenate(pairs), axis=0)


def duplicates_among(
    hashes: np.ndarray,
    thumbnails: Callable[[np.ndarray], np.ndarray],
    distance: int,
    difference: float,
    similar: Callable[[int, int], bool] = lambda row, other: True,
) -> dict[int, tuple[int, float]]:
    """{row: (row of the image it repeats, difference)} for images in order of preference: of two that are alike, the
    first is kept. Two images are alike if their hashes differ in at most `distance` bits, the root mean square
    difference of their thumbnails, (n, 16, 16, 3) for n rows, is at most `difference` (of 255), the thumbnails
    correlate by at least 0.8 after each channel's mean is subtracted, and `similar`, which is called last, returns
    True."""
    dropped: dict[int, tuple[int, float]] = {}

    def drop_those_like(row: int, rows: np.ndarray) -> np.ndarray:
        ours, theirs = (thumbnails(r).astype(np.float32) for r in (rows, np.array([row])))
        differences = np.sqrt(np.square(ours - theirs).mean(axis=(1, 2, 3)))
        a, b = (t - t.mean(axis=(1, 2), keepdims=True) for t in (ours, theirs))
        products, squares_a, squares_b = ((x * y).sum(axis=(1, 2, 3)) for x, y in ((a, b), (a, a), (b, b)))
        correlated = products + a[0].size * NOISE**2 >= LEAST_CORRELATION * np.sqrt(squares_a * squares_b)
        alike = (differences <= difference) & correlated
        alike[alike] = [similar(int(r), row) for r in rows[alike]]
        dropped.update((int(r), (row, float(d))) for r, d in zip(rows[alike], differences[alike]))
        return rows[~alike]

    # First among equal hashes, of which there may be many; then among those that are kept, between different hashes.
    different, first, which, counts = np.unique(hashes, return_index=True, return_inverse=True, return_counts=True)
    order, ends = np.argsort(which, kind="stable"), np.cumsum(counts)
    several: dict[int, list[int]] = {}  # {number of a hash: its rows that are kept}, if more than one row has it
    for number in np.flatnonzero(counts > 1).tolist():
        rows, kept = order[ends[number] - counts[number] : ends[number]], []
        while len(rows):
            kept.append(int(rows[0]))
            rows = drop_those_like(kept[-1], rows[1:]) if len(rows) > 1 else rows[1:]
        several[number] = kept

    def staying(number: int) -> list[int]:
        return several.get(number) or [int(first[number])]

    later: dict[int, list[int]] = {}  # {row: later rows whose hashes are near}
    for a, b in pairs_within(different, distance).tolist():
        for one, other in itertools.product(staying(a), staying(b)):
            later.setdefault(min(one, other), []).append(max(one, other))
    for row in sorted(later):
        if row not in dropped and (rows := [r for r in later[row] if r not in dropped]):
            drop_those_like(row, np.array(rows))
    return dropped


def _picture(shards: IndexedShards, i: int) -> tuple[str, bytes] | None:
    return next(((e, data) for e in IMAGE_EXTENSIONS if (data := shards.members(i, (e,)).get(e))), None)


_open: dict[tuple[str, str], IndexedShards] = {}  # by (path, split), in a process that makes fingerprints


def _fingerprint_shard(path: str, split: str, rows: range, target: Path) -> int:
    """Writes the fingerprints of one shard's samples to `target` and returns their number; samples without a
    readable image get `pixels` 0."""
    if (path, split) not in _open:
        _open[path, split] = IndexedShards(path, split)
    shards = _open[path, split]
    prints = np.zeros(len(rows), PRINT)
    for place, i in enumerate(rows):
        if picture := _picture(shards, i):
            try:
                prints[place] = fingerprint(*picture)
            except (OSError, ValueError):
                continue
    write_atomically(target, lambda file: file.write(encoded_npy(prints)))
    return len(rows)


def _read_prints(files: list[tuple[Path, int]], number: int) -> np.ndarray:
    """The fingerprints of one shard, memory-mapped. Raises DataError if the file holds something else."""
    file, count = files[number]
    try:
        prints = np.load(file, mmap_mode="r", allow_pickle=False)
        if prints.dtype == PRINT and prints.shape == (count,):
            return prints
    except (OSError, ValueError, EOFError):
        pass
    raise DataError(f"{file} holds no fingerprints of its shard; delete it and run the same command again")


class WithoutDuplicates(Source):
    """The samples of a folder of shards without near duplicates. Of images that are alike, the one with the most
    pixels is kept; a training image takes precedence over those of other splits, so that no split holds what another
    has.

    path: a folder with an index and shards. out: the folder for the new shards; duplicates.csv and duplicates.png
    beside them show what was left out, least alike first. distance: in how many of 64 bits the perceptual hashes of
    near duplicates may differ. difference: largest root mean square difference of their thumbnails, of 255. features:
    maps an image (1, 3, H, W) in [-1, 1] to features (1, D), e.g. a `metrics.features` extractor; if given, only images
    whose features have a cosine similarity of at least `similarity` are alike. workers: number of processes.
    Raises DataError for remote shards or an unsuitable `out`, ValueError for impossible options.
    """

    def __init__(
        self,
        path: str,
        out: str | Path,
        distance: int = 6,
        difference: float = 20.0,
        features: Callable[[torch.Tensor], torch.Tensor] | None = None,
        similarity: float = 0.97,
        workers: int = 1,
    ):
        if distance not in range(MOST_DIFFERENT_BITS + 1):
            raise ValueError(
                f"source.distance={distance}: 0 to {MOST_DIFFERENT_BITS} bits; unlike pictures differ in about 32"
            )
        if not isinstance(difference, int | float) or not 0 <= difference <= 255:
            raise ValueError(f"source.difference={difference}: 0 to 255, as pixel values are")
        if not isinstance(similarity, int | float) or not -1 <= similarity <= 1:
            raise ValueError(f"source.similarity={similarity}: -1 to 1, a cosine")
        if features is not None and not callable(features):
            raise ValueError(
                f"source.features={features} makes no features; set source.features={{_target_: <class of an extractor>}}"
            )
        if is_address(out):
            raise DataError(f"near duplicates are left out on this machine: out=<folder>, not {out}; copy it there")
        if Path(path).resolve() == Path(out).resolve():
            raise DataError(f"out={out} is the folder that is read; choose another")
        index = read_index(path)
        entries = {split: part["shards"] for split, part in index["splits"].items()}
        if afar := [e["file"] for part in entries.values() for e in part if is_remote(e["file"])]:
            raise DataError(f"{afar[0]} lies elsewhere; near duplicates are looked for among shards on this machine")
        self.path, self.classes = str(path), index.get("classes")
        # Training first: it keeps the images that two splits share.
        self._splits = sorted(entries, key=lambda split: split != "train")
        self._counts = [sum(entry["count"] for entry in entries[split]) for split in self._splits]
        self._opened: dict[str, IndexedShards] = {}
        self.identity = {
            "without_duplicates": data_hash(index, *self._splits), "distance": distance, "difference": difference,
        }  # fmt: skip
        if features is not None:
            self.identity |= {
                "features": f"{type(features).__module__}.{type(features).__qualname__}",
                "similarity": similarity,
            }
        prints = self._fingerprinted(entries, Path(out) / ENTRIES / "fingerprints", workers)
        of_row = lru_cache(4096)(partial(self._features, features)) if features is not None else None
        similar = None if of_row is None else lambda a, b: float(of_row(a) @ of_row(b)) >= similarity
        dropped = self._repeated(prints, distance, difference, similar)
        self.items = {}
        for split, first, count in zip(self._splits, self._first, self._counts):
            kept = np.ones(count, bool)
            kept[[row - first for row in dropped if first <= row < first + count]] = False
            self.items[split] = np.flatnonzero(kept)
            print(f"{split}: {count - kept.sum()} of {count} pictures are near duplicates")
        self._dropped = dropped

    @property
    def _first(self) -> list[int]:
        """The row of each split's first sample when the samples of all splits are numbered together."""
        return [0, *itertools.accumulate(self._counts)][:-1]

    def _fingerprinted(self, entries: dict[str, list[dict]], folder: Path, workers: int) -> list[tuple[Path, int]]:
        """The fingerprint files of all shards, in order, each with its number of samples; missing ones are made."""
        files, tasks = [], []
        for split in self._splits:
            first = 0
            for entry in entries[split]:
                file = folder / f"{entry['sha256']}.npy"
                files.append((file, entry["count"]))
                if not file.is_file():
                    tasks.append((self.path, split, range(first, first + entry["count"]), file))
                first += entry["count"]
        folder.mkdir(parents=True, exist_ok=True)
        with tqdm(total=sum(self._counts), desc="looking for near duplicates", unit="img") as progress:
            progress.update(sum(self._counts) - sum(len(task[2]) for task in tasks))
            if workers <= 1 or len(tasks) <= 1:
                for task in tasks:
                    progress.update(_fingerprint_shard(*task))
                _open.clear()
                return files
            with ProcessPoolExecutor(workers, get_context("spawn"), become_worker) as pool:
                for count in pool.map(_fingerprint_shard, *zip(*tasks)):
                    progress.update(count)
        return files

    def _features(self, extractor: Callable[[torch.Tensor], torch.Tensor], row: int) -> torch.Tensor:
        """The features of one sample's image, (D,), normalized to length 1."""
        pixels = torch.from_numpy(np.array(self._picture(row).convert("RGB"))).movedim(-1, 0)[None]
        with torch.no_grad():
            return functional.normalize(extractor(from_uint8(pixels)).float().flatten(), dim=0)

    def _repeated(
        self,
        files: list[tuple[Path, int]],
        distance: int,
        difference: float,
        similar: Callable[[int, int], bool] | None = None,
    ) -> dict[int, tuple[int, float, int]]:
        """{row: (row it repeats, thumbnail difference, differing bits)}; rows number the samples of all splits
        together."""
        prints = LRUCache(partial(_read_prints, files), MOST_OPEN)
        hashes, pixels = np.empty((2, sum(self._counts)), np.uint64)
        first = [0]
        for number in range(len(files)):
            part = prints(number)
            first.append(first[-1] + len(part))
            hashes[first[-2] : first[-1]], pixels[first[-2] : first[-1]] = part["hash"], part["pixels"]
        split = np.repeat(np.arange(len(self._counts)), self._counts)
        preferred = np.lexsort((-pixels.astype(np.int64), split != 0))
        preferred = preferred[pixels[preferred] > 0]

        def thumbnails(rows: np.ndarray) -> np.ndarray:
            rows = preferred[rows]
            shards = np.searchsorted(first, rows, "right") - 1
            return np.stack([prints(s)["thumbnail"][r - first[s]] for s, r in zip(shards.tolist(), rows.tolist())])

        asked = {} if similar is None else {"similar": lambda a, b: similar(int(preferred[a]), int(preferred[b]))}
        dropped = duplicates_among(hashes[preferred], thumbnails, distance, difference, **asked)
        pairs = {int(preferred[a]): (int(preferred[b]), apart) for a, (b, apart) in dropped.items()}
        return {a: (b, apart, int(np.bitwise_count(hashes[a] ^ hashes[b]))) for a, (b, apart) in pairs.items()}

    def report(self, out: Path) -> None:
        """Writes duplicates.csv, every image that was left out, and duplicates.png, the least alike pairs, for
        judging the limits."""
        dropped = self._dropped
        ordered = sorted(dropped, key=lambda row: (-dropped[row][1], row))

        def named(row: int) -> tuple[str, str]:
            split, i = self._place(row)
            return split, self._shards(split).where(i)

        table = io.StringIO()
        writer = csv.writer(table)
        writer.writerow(("split", "sample", "of_split", "of_sample", "different_bits", "thumbnail_difference"))
        for row in ordered:
            of, apart, bits = dropped[row]
            writer.writerow((*named(row), *named(of), bits, f"{apart:.2f}"))
        text = table.getvalue().encode("utf-8", "backslashreplace")
        write_atomically(out / "duplicates.csv", lambda file: file.write(text))
        (out / "duplicates.png").unlink(missing_ok=True)
        if ordered:
            pictures = [[self._picture(row).resize((128, 128)) for row in (a, dropped[a][0])] for a in ordered[:SHOWN]]
            sheet = Image.new("RGB", (2 * 132 * 3, 132 * -(-len(pictures) // 3)), "white")
            for k, pair in enumerate(pictures):
                for side, picture in enumerate(pair):
                    sheet.paste(picture, (264 * (k % 3) + 130 * side, 132 * (k // 3)))
            write_atomically(out / "duplicates.png", lambda file: sheet.save(file, format="PNG"))
            print(f"look at {out / 'duplicates.png'}: the least alike of what is left out; all of it: duplicates.csv")

    def _picture(self, row: int) -> Image.Image:
        split, i = self._place(row)
        return _read_picture(*(_picture(self._shards(split), i) or ("", b"")))[0]

    def _place(self, row: int) -> tuple[str, int]:
        number = int(np.searchsorted(self._first, row, "right")) - 1
        return self._splits[number], row - self._first[number]

    def _shards(self, split: str) -> IndexedShards:
        if split not in self._opened:
            self._opened[split] = IndexedShards(self.path, split)
        return self._opened[split]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": {}, "_dropped": {}}

    def samples(self, split: str, chunk: range) -> Iterator[tuple[str, dict[str, bytes]]]:
        """The samples of a new shard, with their old names, in which slashes and dots become "_"; if two names are
        equal, the second gets its sample number appended."""
        shards, seen = self._shards(split), set()
        for i in self.items[split][chunk.start : chunk.stop].tolist():
            key = shards.key(i).translate(_PLAIN)
            while key in seen:
                key = f"{key}-{i}"
            seen.add(key)
            yield key, shards.members(i)
