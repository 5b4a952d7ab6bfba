"""The latent cache: the posterior moments of every image, checked before use and read through memory maps."""

import io
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch

from ldm_train.data.batch import FIELDS, Field
from ldm_train.data.buckets import Buckets
from ldm_train.data.datamodule import ShardDataModule
from ldm_train.data.foreign_latents import cache_key
from ldm_train.data.offsets import LRUCache
from ldm_train.data.order import Batching, Mixture, StepBatches, evaluation_batches
from ldm_train.data.samples import SampleDecoder, collate, require_fields, sample_rng
from ldm_train.data.shards import (
    INDEX,
    MOST_COMPARED,
    MOST_OPEN,
    DataError,
    IndexedShards,
    member_counts,
    read_index,
    split_index,
    spread,
)

REMEDY = "python train.py ... restart=latents"
COMPARED = 1000  # keys that are compared to tell that a cache with as many samples as the data holds all of them
FIRST = 100_000  # the first sample of a cache is searched for among this many samples of the data
AGAIN = "run again with restart=latents"
# Fields that the cache holds; others are read from the images' shards.
CACHED_FIELDS = tuple(name for name, field in FIELDS.items() if field.cached)
# images (B, C, H, W) in [-1, 1] -> moments (B, 2C, h, w), or latents (B, C, h, w) of deterministic models, float32
Encode = Callable[[torch.Tensor], torch.Tensor]


class CacheKeys:
    """The samples' keys in the cache, by sample number: the data's keys with dots and slashes as "_", preceded by
    the shard's number if the data use a key in several shards."""

    def __init__(self, shards: IndexedShards, numbered: bool):
        self.shards, self.numbered = shards, numbered

    @classmethod
    def of(cls, shards: IndexedShards, compared: bool = False) -> "CacheKeys":
        """The keys of a cache that is to be written. With more than MOST_COMPARED samples, keys are not checked for
        repetitions but always numbered, unless `compared`."""
        if len(shards) > MOST_COMPARED and not compared:
            return cls(shards, numbered=True)
        plain = cls(shards, numbered=False)
        return cls(shards, numbered=len({*map(plain, range(len(shards)))}) < len(shards))

    @classmethod
    def in_cache(cls, shards: IndexedShards, cached: IndexedShards) -> "CacheKeys":
        """The keys of an existing cache. Raises DataError if its first sample is not among the first of the data."""
        for i in range(min(len(shards), FIRST)):  # not just 0: unreadable samples are not in the cache
            for keys in (cls(shards, False), cls(shards, True)):
                if len(cached) and keys(i) == cached.key(0):
                    return keys
        raise _not_in_data(cached, cached.key(0) if len(cached) else "")

    def __call__(self, i: int) -> str:
        key = cache_key(self.shards.key(i))
        return f"{self.shards.shard(i)}_{key}" if self.numbered else key


def extensions_of(fields: Iterable[Field]) -> list[str]:
    return [extension for field in fields for extension in field.extensions]


def _array_header(data: bytes) -> tuple[tuple[int, ...], int]:
    """(shape, header length in bytes) of a .npy file with float32 (C, h, w). Raises ValueError for anything else."""
    header = io.BytesIO(data)
    version = np.lib.format.read_magic(header)
    if version != (1, 0):
        raise ValueError(f"unexpected npy version {version}")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(header)
    if dtype != np.float32 or fortran or len(shape) != 3:
        raise ValueError(f"{dtype} of shape {shape} are not latents")
    return shape, header.tell()


class CachedLatents:
    """Moments and conditions of one split, read in whole batches from memory-mapped tars.

    images: provides the fields that the cache does not hold (boxes, maps, masks, ...), cropped and mirrored like the
    cached encodings. Raises DataError if the cache is damaged.
    """

    def __init__(
        self, folder: str | Path, split: str, fields: Sequence[str], seed: int, images: ShardDataModule | None = None
    ):
        try:
            self.shards = IndexedShards(folder, split, REMEDY)
        except (DataError, FileNotFoundError) as error:
            raise DataError(f"the latent cache is damaged: {error}; rebuild it with: {REMEDY}") from error
        self.decoder, self.seed = SampleDecoder(None, [f for f in fields if f in CACHED_FIELDS]), seed
        self.flips = "flipped.npy" in self.shards.extensions
        index = read_index(folder, REMEDY)
        self.stochastic, self.bucketed = index.get("stochastic"), index.get("bucketed") is True
        if not isinstance(self.stochastic, bool):
            raise DataError(f'{folder}/{INDEX} does not say whether it is "stochastic"; rebuild it with: {REMEDY}')
        self._read_header()
        self._map, self._shapes = LRUCache(self._mapped, MOST_OPEN), LRUCache(self._shape_of, MOST_OPEN)
        others = [f for f in fields if f not in (*CACHED_FIELDS, "image")]
        self._place: Sequence[int] | np.ndarray = range(len(self))  # position of each sample in the data
        if others:
            if not images.shards(split).all_at_hand:
                raise DataError(
                    f"{', '.join(others)} are read from the pictures' shards in any order, whose copies do not fit "
                    "data.shard_cache.gigabytes; raise it"
                )
            self._place = places_in(images.shards(split), self.shards)
        self._others = {r: images.samples(split, others, random=r) for r in (False, True)} if others else {}

    def _read_header(self) -> None:
        """Sets the latents' shape and the header's length from the first array. All arrays of the cache share this
        header, except for the height and width of bucketed ones. Raises DataError if they do not."""
        first = self.shards.members(0, ["moments.npy"]).get("moments.npy", b"") if len(self) else b""
        try:
            self.shape, self.header = _array_header(first)
            self.bytes = len(first)
            if self.stochastic and self.shape[0] % 2:
                raise ValueError(f"means and log-variances of shape {self.shape}")
            if self.bucketed:
                return
            for extension in ("moments.npy", "flipped.npy") if self.flips else ("moments.npy",):
                if set(self.shards.table.extremes[extension]) != {len(first)}:
                    raise ValueError(f"not every sample has {extension} of {len(first)} bytes")
            if self.header + 4 * int(np.prod(self.shape)) != len(first):
                raise ValueError(f"{len(first)} bytes for shape {self.shape}")
        except ValueError as error:
            raise DataError(f"{self.shards.root}: {error}; {AGAIN}") from error

    def __len__(self) -> int:
        return len(self.shards)

    def _shape_of(self, header: bytes) -> tuple[int, ...]:
        """The shape of an array, from its header; (0,) if it does not hold latents with as many channels as the
        first."""
        try:
            shape, length = _array_header(header)
        except ValueError:
            return (0,)
        return shape if length == self.header and shape[0] == self.shape[0] else (0,)

    def _mapped(self, shard: int) -> np.memmap:
        return np.memmap(self.shards.files[shard].path, np.uint8, "r")

    def moments(self, i: int, flipped: bool = False) -> np.ndarray:
        """The moments of a sample or its mirror image, (2C or C, h, w), as a view of the file."""
        extension = "flipped.npy" if flipped else "moments.npy"
        place = self.shards.member(i, extension)
        offset, size = place or (0, 0)
        data = self._map(self.shards.shard(i))[offset : offset + size]
        shape = self._shapes(data[: self.header].tobytes()) if self.bucketed else self.shape
        if size != self.header + 4 * math.prod(shape):
            raise DataError(
                f"{self.shards.root}, {self.shards.where(i)}: no {extension} of latents of shape {shape}; {AGAIN}"
            )
        return data[self.header :].view(np.float32).reshape(shape)

    def mean_and_std(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of the posterior, (C, h, w) float64 each; the latter is 0 for deterministic
        latents."""
        moments = self.moments(i).astype(np.float64)
        if not self.stochastic:
            return moments, np.zeros_like(moments)
        mean, logvar = np.split(moments, 2)
        return mean, np.exp(0.5 * np.clip(logvar, -30, 20))

    def fetch(self, rows: Sequence[tuple[int, int]], random: bool) -> dict[str, Any]:
        """A batch: moments (B, 2C or C, h, w) and the requested fields. rows: (epoch, index) per sample. random:
        with random flips and captions."""
        rngs = [sample_rng(self.seed, epoch, int(self._place[i])) if random else None for epoch, i in rows]
        flipped = [bool(self.flips and rng is not None and rng.random() < 0.5) for rng in rngs]
        batch = collate([self._decoded(i, rng) for (_, i), rng in zip(rows, rngs)])
        moments = [self.moments(i, f) for (_, i), f in zip(rows, flipped)]
        if len({m.shape for m in moments}) > 1:
            raise DataError(f"{self.shards.root}: latents of several sizes in one batch; {AGAIN}")
        batch["moments"] = torch.from_numpy(np.stack(moments))
        if self._others:
            images = self._others[random]
            samples = [images[(epoch, int(self._place[i]))] for epoch, i in rows]
            if notes := [note for sample in samples for note in sample.get("replaced", ())]:
                # Another sample's conditions would not belong to these latents.
                raise DataError(f"{self.shards.root}: {notes[0]}; leave it out with: {REMEDY}")
            batch |= collate(samples, images.decoder.known) | {"key": batch["key"]}
        return batch

    def _decoded(self, i: int, rng: np.random.Generator | None) -> dict[str, Any]:
        """A sample's key and cached fields. Raises DataError, naming the sample, if it cannot be read."""
        try:
            raw = self.shards.members(i, extensions_of(self.decoder.fields))
            return self.decoder(self.shards.key(i), raw, rng)
        except ValueError as error:
            raise DataError(
                f"{self.shards.root}, {self.shards.where(i)}: {error}; leave it out with: {REMEDY}"
            ) from error


def _not_in_data(cached: IndexedShards, key: str) -> DataError:
    return DataError(f"latent cache {cached.root}: sample {key} is not in the data; {AGAIN}")


def places_in(shards: IndexedShards, cached: IndexedShards) -> Sequence[int] | np.ndarray:
    """The positions of a cache's samples in the data, which have the same order. Raises DataError if a sample is not
    in the data."""
    keys, count = CacheKeys.in_cache(shards, cached), len(cached)
    if count == len(shards) and all(keys(i) == cached.key(i) for i in spread(count, COMPARED).tolist()):
        return range(count)
    places, i = np.empty(count, np.int64), 0
    for j in range(count):
        key = cached.key(j)
        while i < len(shards) and keys(i) != key:
            i += 1
        if i == len(shards):
            raise _not_in_data(cached, key)
        places[j] = i
    return places


class _Batches:
    """A re-iterable sequence of lazily fetched batches; Lightning takes the number of batches from its length."""

    def __init__(self, latents: CachedLatents, rows: Any, random: bool):
        self.latents, self.rows, self.random = latents, rows, random

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for rows in self.rows:
            yield self.latents.fetch(rows, self.random)


class LatentDataModule(L.LightningDataModule):
    """Cached latents for stage 2, in the order in which ShardDataModule would deliver the images.

    folder: the cache. fields: the conditions needed. images: the data that the cache was made from, for the fields that
    it does not hold, buckets and sampling weights. val_images: as in ShardDataModule.
    """

    def __init__(
        self,
        folder: str | Path,
        batching: Batching,
        max_steps: int,
        fields: Sequence[str],
        seed: int,
        train_split: str = "train",
        val_split: str = "val",
        val_images: int | None = None,
        images: ShardDataModule | None = None,
    ):
        super().__init__()
        index = read_index(folder, REMEDY)
        for split in (train_split, val_split):
            part = split_index(index, split, folder)
            held = [f for f in fields if f in CACHED_FIELDS]
            require_fields(held, member_counts(part["shards"]), part["count"], f"{folder}, split {split}")
        self.folder, self.batching, self.max_steps, self.seed = folder, batching, max_steps, seed
        self.val_images = val_images
        self.train = CachedLatents(folder, train_split, fields, seed, images)
        self.mixture: Mixture | None = None
        self.buckets: Buckets | None = None
        if images is not None and (buckets := images.buckets(train_split)) is not None:
            self.buckets = Buckets(
                buckets.sizes, buckets.number[places_in(images.shards(train_split), self.train.shards)]
            )
        if images is not None and (images.weights is not None or images.balance_classes):
            shards = images.shards(train_split)
            sets = shards.sets[places_in(shards, self.train.shards)]
            labels = self.train.shards.labels() if images.balance_classes else None
            self.mixture = Mixture.of(sets, images.weights, labels)
        self.val = CachedLatents(folder, val_split, fields, seed, images)

    def train_loader(self, start: int) -> _Batches:
        stop = self.max_steps * self.batching.accumulate
        rows = StepBatches(
            len(self.train), self.batching, self.seed, start, stop, mixture=self.mixture, buckets=self.buckets
        )
        return _Batches(self.train, rows, random=True)

    def train_dataloader(self) -> _Batches:
        return self.train_loader(self.trainer.global_step * self.batching.accumulate if self.trainer else 0)

    def val_dataloader(self) -> _Batches:
        b = self.batching
        rows = evaluation_batches(len(self.val), b.micro, b.rank, b.world_size, self.val_images)
        return _Batches(self.val, rows, random=False)


def verify_cache(data: ShardDataModule, split: str, latents: CachedLatents, encode: Encode, count: int = 8) -> float:
    """Encodes a few images again and compares them with the cache. Returns the largest deviation of a mean, in units
    of its posterior's standard deviation plus one per cent of the latents' own standard deviation.

    Raises DataError if that exceeds 1: the cache then belongs to another autoencoder or to other data.
    """
    dataset = data.samples(split, ("image",), random=False)
    places, worst = places_in(data.shards(split), latents.shards), 0.0
    for j in spread(len(latents), count).tolist():
        i = int(places[j])
        again = encode(dataset[(0, i)]["image"][None])[0].cpu().numpy().astype(np.float64)
        cached, std = latents.mean_and_std(j)
        tolerance = std + 0.01 * cached.std()
        worst = max(worst, float((np.abs(again[: len(cached)] - cached) / tolerance).max()))
    if worst > 1:
        raise DataError(
            f"latent cache {latents.shards.root} is stale: re-encoded samples differ by {worst:.1f} times the tolerance; {AGAIN}"
        )
    return worst
