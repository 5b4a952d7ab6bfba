"""Aspect-ratio buckets: all images of a batch have one size, so that wide and tall images need not be cropped to
squares."""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ldm_train.data.files import IMAGE_EXTENSIONS, open_image, read_npy
from ldm_train.data.offsets import OffsetTable, ShardFile
from ldm_train.storage import locked

ORIENTATION, TURNED = 0x0112, (5, 6, 7, 8)  # EXIF tag, and its values for images that lie on their side
ORIENTED = (b"eXIf", b"exif", b"Orientation")  # markers in a PNG that may state its orientation
Size = tuple[int, int]  # height, width


def bucket_sizes(base: Size, step: int, max_ratio: float) -> list[Size]:
    """`base`, and the sizes in multiples of `step` that have at most as many pixels and sides of at most `max_ratio`
    to 1: the widest for each height, the tallest for each width. Raises ValueError if there is none but `base`."""
    sizes = _sizes(base, step, max_ratio)
    if len(sizes) == 1:
        raise ValueError(
            f"data.buckets.step={step} and max_ratio={max_ratio} leave no size beside {base[0]}x{base[1]}; lower the one or raise "
            "the other"
        )
    return sizes


def nearest_size(base: Size, step: int, ratio: float) -> Size:
    """Of `base` and the sizes in multiples of `step` with at most as many pixels, the one whose ratio of height to
    width is nearest to `ratio`."""
    return min(_sizes(base, step, math.inf), key=lambda size: abs(math.log(size[0] / size[1] / ratio)))


def _sizes(base: Size, step: int, max_ratio: float) -> list[Size]:
    area = base[0] * base[1]
    pairs = [(side, area // side // step * step) for side in range(step, area // step + 1, step)]
    sizes = [size for a, b in pairs if b for size in ((a, b), (b, a)) if max(size) <= max_ratio * min(size)]
    return list(dict.fromkeys([base, *sorted(sizes, key=lambda size: size[0] / size[1])]))


class Buckets:
    """The size to which each sample is cropped and resized, one of several.

    sizes: (height, width) of each bucket. number (N,): the bucket of each sample.
    """

    def __init__(self, sizes: list[Size], number: np.ndarray):
        self.sizes, self.number = sizes, number
        places = np.int32 if len(number) < 2**31 else np.int64
        self.members = [np.flatnonzero(number == k).astype(places) for k in range(len(sizes))]

    @classmethod
    def of(cls, pictures: np.ndarray, sizes: list[Size], min_images: int) -> "Buckets":
        """Assigns images to buckets. pictures (N, 2): height and width of each image; (0, 0) if it cannot
        be read. Each goes into the bucket with the nearest aspect ratio, unreadable ones into the largest; buckets of
        fewer than `min_images` readable ones are merged into their neighbours, the smallest first."""
        packed = pictures[:, 0].astype(np.int64) << 32 | pictures[:, 1]
        kinds, kind, counts = np.unique(packed, return_inverse=True, return_counts=True)
        heights, widths = (
            np.where(kinds > 0, side, size) for side, size in zip((kinds >> 32, kinds & 2**32 - 1), sizes[0])
        )
        ratios = np.log(heights / widths)
        while True:
            apart = np.abs(ratios[:, None] - np.log([h / w for h, w in sizes]))
            nearest = apart.argmin(axis=1)
            held = np.bincount(nearest, np.where(kinds > 0, counts, 0), len(sizes))
            if held.min() >= min_images or len(sizes) == 1:
                nearest[kinds == 0] = held.argmax()  # training replaces them by samples of the same bucket
                return cls(sizes, nearest.astype(np.uint16)[kind])
            sizes = [size for k, size in enumerate(sizes) if k != held.argmin()]

    def size(self, i: int) -> Size:
        return self.sizes[self.number[i]]

    def neighbours(self, i: int) -> np.ndarray:
        """The samples in the same bucket."""
        return self.members[self.number[i]]

    def __str__(self) -> str:
        parts = [f"{h}x{w} ({len(members)})" for (h, w), members in zip(self.sizes, self.members)]
        return f"{len(self.sizes)} sizes, height x width (images): {', '.join(parts)}"


class BucketOrder:
    """The order of an epoch in which each batch comes from one bucket: the batches of all buckets are shuffled, and
    so are the samples within each bucket. Samples that do not fill a batch of their bucket are left out of the
    epoch."""

    def __init__(self, buckets: Buckets, batch_size: int):
        self.members, self.batch_size = buckets.members, batch_size
        self.first = np.cumsum([0, *(len(members) // batch_size for members in self.members)])  # bucket's first batch

    @property
    def batches(self) -> int:
        return int(self.first[-1])

    def epoch(self, seed: int, epoch: int) -> Callable[[np.ndarray], np.ndarray]:
        """The order as a function: positions in the epoch (M,), all of one batch -> sample indices (M,)."""
        order = np.random.default_rng([seed, epoch]).permutation(self.batches)
        shuffled: dict[int, np.ndarray] = {}

        def drawn(positions: np.ndarray) -> np.ndarray:
            batch = order[positions[0] // self.batch_size]
            bucket = int(np.searchsorted(self.first, batch, "right")) - 1
            if bucket not in shuffled:
                shuffled[bucket] = np.random.default_rng([seed, epoch, 1 + bucket]).permutation(self.members[bucket])
            return shuffled[bucket][(batch - self.first[bucket]) * self.batch_size + positions % self.batch_size]

        return drawn


def shown_size(data: bytes, extension: str) -> Size:
    """(height, width) of an encoded image as a viewer shows it; (0, 0) if it cannot be read."""
    try:
        if extension == "npy":
            height, width = read_npy(data).shape[:2]
        else:
            with open_image(data) as image:
                width, height = image.size
                # Pillow looks for a PNG's orientation after the pixels too, and decodes them to get there.
                turned = image.format != "PNG" or any(mark in data for mark in ORIENTED)
                if turned and image.getexif().get(ORIENTATION, 1) in TURNED:
                    width, height = height, width
    except Exception:  # damaged data: training replaces the sample and reports it
        return 0, 0
    return (height, width) if 0 < height < 2**31 and 0 < width < 2**31 else (0, 0)


def picture_sizes(files: Sequence[ShardFile], table: OffsetTable) -> np.ndarray:
    """(height, width) of the image in every row of a table (N, 2), (0, 0) if a row has no readable image. The sizes
    are read once and stored beside the shards' offsets."""
    sizes, bar, others = [np.empty((0, 2), np.int32)], None, os.environ.get("RANK", "0") != "0"
    for number, file in enumerate(files):
        rows = range(int(table.first[number]), int(table.first[number + 1]))
        if (known := _kept(file, len(rows))) is None:
            bar = bar or tqdm(
                desc="reading the pictures' sizes", total=len(table), initial=rows.start, unit="img", disable=others
            )
            with _alone(file):  # only one of several ranks reads
                if (known := _kept(file, len(rows))) is None:
                    known = _read_sizes(file, table, rows, bar)
                    file.keep(_place(file), {"sizes": known})
        sizes.append(known)
    if bar is not None:
        bar.close()
    return np.concatenate(sizes)


def _place(file: ShardFile) -> Path:
    return file.kept.with_suffix(".sizes.npz")


@contextmanager
def _alone(file: ShardFile) -> Iterator[None]:
    """A lock for reading a shard's sizes, if the folder is writable; otherwise all ranks read them."""
    with ExitStack() as stack:
        if not file.kept.parent.is_symlink():
            with suppress(OSError):
                stack.enter_context(locked(file.kept.with_suffix(".sizes.lock")))
        yield


def _kept(file: ShardFile, count: int) -> np.ndarray | None:
    """The sizes that were read earlier; None if there are none or they are invalid."""
    sizes = file.kept_arrays(_place(file)).get("sizes")
    if sizes is None or sizes.shape != (count, 2) or sizes.dtype != np.int32:
        return None
    return sizes if not count or sizes.min() >= 0 else None


def _read_sizes(file: ShardFile, table: OffsetTable, rows: range, bar: tqdm) -> np.ndarray:
    sizes = np.zeros((len(rows), 2), np.int32)
    extensions = [e for e in IMAGE_EXTENSIONS if e in table.extensions]
    descriptor = file.open()
    try:
        for k, row in enumerate(rows):
            for extension in extensions:
                offset, size = table.member(row, extension)
                if offset >= 0 and 0 <= size <= file.entry["bytes"]:
                    sizes[k] = shown_size(os.pread(descriptor, size, offset), extension)
                    break
            bar.update()
    finally:
        os.close(descriptor)
    return sizes
