"""The latent cache: posterior moments of every image, written once per autoencoder, checked before use, read by memory map."""

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from ldm_train.data.batch import FIELDS, Field
from ldm_train.data.datamodule import ShardDataModule
from ldm_train.data.files import encoded_npy
from ldm_train.data.foreign_latents import cache_key
from ldm_train.data.offsets import Recent
from ldm_train.data.order import Batching, Mixture, StepBatches, evaluation_batches
from ldm_train.data.samples import SampleDecoder, collate, refuse_too_many, require_fields, sample_rng
from ldm_train.data.shards import (
    ENTRIES,
    INDEX,
    MOST_OPEN,
    DataError,
    IndexedShards,
    finished_shard,
    member_counts,
    noted_entry,
    read_index,
    shard_name,
    split_index,
    spread,
    write_shard,
)
from ldm_train.interrupts import become_worker
from ldm_train.storage import write_json

REMEDY = "python train.py ... restart=latents"
AGAIN = "run again with restart=latents"
# Fields that the cache holds; others are read from the images' shards.
CACHED_FIELDS = tuple(name for name, field in FIELDS.items() if field.cached)
# images (B, C, H, W) in [-1, 1] -> moments (B, 2C, h, w), or latents (B, C, h, w) of deterministic models, float32
Encode = Callable[[torch.Tensor], torch.Tensor]


def _cache_keys(shards: IndexedShards) -> list[str]:
    """The samples' keys in the cache: the data's without dots and slashes, with the shard's number before them where
    the data use a key in several shards."""
    keys = [cache_key(key) for key in shards.keys]
    return keys if len(set(keys)) == len(keys) else [f"{shards.shard(i)}_{key}" for i, key in enumerate(keys)]


def write_cache(
    data: ShardDataModule,
    split: str,
    encode: Encode,
    folder: str | Path,
    per_shard: int = 1024,
    flips: bool = False,
    known: Callable[[str], torch.Tensor] | None = None,
) -> list[dict]:
    """Encodes this rank's part of a split, shard by shard; shards that are complete are kept. Returns their entries.

    flips: also store the moments of the mirror image. known: key in the cache -> moments that are there already, in the place
    of encoding. Samples whose picture, class or caption (where `data` ask for them)
    cannot be read are left out and named. Raises DataError where they are more than data.max_bad_fraction allows,
    ValueError for transforms that are random beyond a flip.
    """
    if split == data.train_split and not data.transform.cacheable:
        raise ValueError(
            f"data.crop={data.transform.crop} is random, one cached encoding cannot stand for it; set latents.cache=false "
            "or data.crop=center"
        )
    folder, shards, b = Path(folder), data.shards(split), data.batching
    chunks = [range(i, min(i + per_shard, len(shards))) for i in range(0, len(shards), per_shard)]
    mine = list(enumerate(chunks))[b.rank :: b.world_size]
    entries, seen = [], 0
    total = sum(len(chunk) for _, chunk in mine)
    progress = tqdm(total=total, desc=f"caching {split} latents", unit="img", disable=b.rank != 0)
    for number, chunk in mine:
        name = shard_name(split, number)
        entry = finished_shard(folder, name)
        if entry is None:
            entry = write_shard(folder / name, _encoded(data, split, encode, chunk, flips, progress, known))
            write_json(folder / ENTRIES / f"{name}.json", entry)
        else:
            progress.update(len(chunk))
        entries.append(entry)
        seen += len(chunk)
        bad = seen - sum(e["count"] for e in entries)
        refuse_too_many(bad, seen, total, data.max_bad_fraction)
    progress.close()
    return entries


def few_samples(data: ShardDataModule, split: str, count: int = 8) -> Iterator[tuple[str, torch.Tensor]]:
    """(key in the cache, picture) of samples spread over a split."""
    dataset, keys = data.samples(split, ("image",), random=False), _cache_keys(data.shards(split))
    for i in spread(len(keys), count).tolist():
        yield keys[i], dataset[(0, i)]["image"]


def written_entries(folder: Path, split: str) -> list[dict]:
    """The entries of a split's shards that all ranks have written. Raises DataError, naming an entry that is damaged."""
    entries = []
    for note in sorted((folder / ENTRIES).glob(f"{split}-*.json")):
        if (entry := noted_entry(folder, note.stem)) is None:
            raise DataError(f"{note} is damaged; make the cache anew with: {REMEDY}")
        entries.append(entry)
    return entries


def both_encoded(encode: Encode, images: torch.Tensor, flips: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The moments of pictures and, with `flips`, of their mirror images, on the host. Read when both are asked of the device."""
    moments, mirrored = encode(images), encode(images.flip(3)) if flips else None
    return moments.cpu(), None if mirrored is None else mirrored.cpu()


def _encoded(
    data: ShardDataModule,
    split: str,
    encode: Encode,
    chunk: range,
    flips: bool,
    progress: tqdm,
    known: Callable[[str], torch.Tensor] | None,
) -> Iterator[tuple[str, dict[str, bytes]]]:
    shards, stored = data.shards(split), [f for f in CACHED_FIELDS if f in data.fields]
    dataset, keys = data.samples(split, ("image", *stored), random=False), _cache_keys(shards)
    micro = max(1, min(64, data.batching.micro))
    batches = [[(0, i) for i in chunk[k : k + micro]] for k in range(0, len(chunk), micro)]
    loader = DataLoader(
        dataset, batch_sampler=batches, num_workers=data.num_workers, collate_fn=collate, worker_init_fn=become_worker
    )
    for rows, batch in zip(batches, loader):
        if known is None:
            moments, mirrored = both_encoded(encode, batch["image"], flips)
        else:
            moments, mirrored = torch.stack([known(keys[i]) for _, i in rows]), None
        for note in batch["replaced"]:
            tqdm.write(f"latent cache: leaving out unreadable {note}")
        for k, (_, i) in enumerate(rows):
            if batch["key"][k] != shards.key(i):  # unreadable, replaced by another sample
                continue
            fields = {"moments.npy": encoded_npy(moments[k].numpy())}
            if mirrored is not None:
                fields["flipped.npy"] = encoded_npy(mirrored[k].numpy())
            yield keys[i], fields | shards.members(i, _extensions(FIELDS[f] for f in CACHED_FIELDS))
        progress.update(len(rows))


def _extensions(fields: Iterable[Field]) -> list[str]:
    return [extension for field in fields for extension in field.extensions]


def write_cache_index(
    folder: str | Path, splits: dict[str, list[dict]], classes: list[str] | None, stochastic: bool = True
) -> None:
    """Completes a cache: without index.json it does not exist. stochastic: it holds means and log-variances."""
    ordered = {split: sorted(entries, key=lambda e: e["file"]) for split, entries in splits.items()}
    index = {"splits": {s: {"shards": e, "count": sum(x["count"] for x in e)} for s, e in ordered.items()}}
    index["stochastic"] = stochastic
    write_json(Path(folder) / INDEX, index | ({"classes": classes} if classes else {}))


class CachedLatents:
    """Moments and conditions of one split, straight out of memory-mapped tars, in whole batches.

    images: where fields come from that the cache does not hold (boxes, maps, masks, ...), cut and mirrored like the
    cached encodings. Raises DataError where the cache is damaged.
    """

    def __init__(
        self, folder: str | Path, split: str, fields: Sequence[str], seed: int, images: ShardDataModule | None = None
    ):
        try:
            self.shards = IndexedShards(folder, split, REMEDY)
        except (DataError, FileNotFoundError) as error:
            raise DataError(f"the latent cache is damaged: {error}; make it anew with: {REMEDY}") from error
        self.decoder, self.seed = SampleDecoder(None, [f for f in fields if f in CACHED_FIELDS]), seed
        self.flips = "flipped.npy" in self.shards.extensions
        self.stochastic = read_index(folder, REMEDY).get("stochastic")
        if not isinstance(self.stochastic, bool):
            raise DataError(f'{folder}/{INDEX} does not say whether it is "stochastic"; make it anew with: {REMEDY}')
        self._read_header()
        self._map = Recent(self._mapped, MOST_OPEN)
        others = [f for f in fields if f not in (*CACHED_FIELDS, "image")]
        self._place: Sequence[int] = range(len(self))  # of each sample in the data
        if others:
            if not images.shards(split).all_at_hand:
                raise DataError(
                    f"{', '.join(others)} are read from the pictures' shards in any order, whose copies do not fit "
                    "data.shard_cache.gigabytes; raise it"
                )
            self._place = places_in(images.shards(split), self.shards)
        self._others = {r: images.samples(split, others, random=r) for r in (False, True)} if others else {}

    def _read_header(self) -> None:
        """Reads the header that all arrays of the cache share: its length, shape and dtype."""
        first = self.shards.members(0, ["moments.npy"]).get("moments.npy", b"") if len(self) else b""
        header = io.BytesIO(first)
        try:
            version = np.lib.format.read_magic(header)
            if version != (1, 0):
                raise ValueError(f"unexpected npy version {version}")
            self.shape, fortran, self.dtype = np.lib.format.read_array_header_1_0(header)
            self.header, self.bytes = header.tell(), len(first)
            if self.dtype != np.float32 or fortran or len(self.shape) != 3 or (self.stochastic and self.shape[0] % 2):
                raise ValueError(f"{self.dtype} of shape {self.shape} are no latents")
            for extension in ("moments.npy", "flipped.npy") if self.flips else ("moments.npy",):
                if set(self.shards.table.extremes[extension]) != {len(first)}:
                    raise ValueError(f"not every sample has {extension} of {len(first)} bytes")
            if self.header + 4 * int(np.prod(self.shape)) != len(first):
                raise ValueError(f"{len(first)} bytes for shape {self.shape}")
        except ValueError as error:
            raise DataError(f"{self.shards.root}: {error}; {AGAIN}") from error

    def __len__(self) -> int:
        return len(self.shards)

    def _mapped(self, shard: int) -> np.memmap:
        return np.memmap(self.shards.files[shard].path, np.uint8, "r")

    def moments(self, i: int, flipped: bool = False) -> np.ndarray:
        """(2C or C, h, w), a view of the file."""
        extension = "flipped.npy" if flipped else "moments.npy"
        place = self.shards.member(i, extension)
        if place is None or place[1] != self.bytes:
            raise DataError(
                f"{self.shards.root}, {self.shards.where(i)}: no {extension} of {self.bytes} bytes; {AGAIN}"
            )
        data = self._map(self.shards.shard(i))[place[0] + self.header : place[0] + self.bytes]
        return data.view(self.dtype).reshape(self.shape)

    def mean_and_std(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Of the posterior, (C, h, w) float64 each; the standard deviation of deterministic latents is 0."""
        moments = self.moments(i).astype(np.float64)
        if not self.stochastic:
            return moments, np.zeros_like(moments)
        mean, logvar = np.split(moments, 2)
        return mean, np.exp(0.5 * np.clip(logvar, -30, 20))

    def fetch(self, rows: Sequence[tuple[int, int]], random: bool) -> dict[str, Any]:
        """rows: (epoch, index) per sample -> moments (B, 2C or C, h, w) and the fields asked for. random: flips, captions."""
        rngs = [sample_rng(self.seed, epoch, self._place[i]) if random else None for epoch, i in rows]
        flipped = [bool(self.flips and rng is not None and rng.random() < 0.5) for rng in rngs]
        batch = collate([self._decoded(i, rng) for (_, i), rng in zip(rows, rngs)])
        batch["moments"] = torch.from_numpy(np.stack([self.moments(i, f) for (_, i), f in zip(rows, flipped)]))
        if self._others:
            images = self._others[random]
            samples = [images[(epoch, self._place[i])] for epoch, i in rows]
            batch |= collate(samples, images.decoder.known) | {"key": batch["key"]}
        return batch

    def _decoded(self, i: int, rng: np.random.Generator | None) -> dict[str, Any]:
        """A sample's key and cached fields. Raises DataError, naming the sample, where it cannot be read."""
        try:
            raw = self.shards.members(i, _extensions(self.decoder.fields))
            return self.decoder(self.shards.key(i), raw, rng)
        except ValueError as error:
            raise DataError(
                f"{self.shards.root}, {self.shards.where(i)}: {error}; leave it out with: {REMEDY}"
            ) from error


def _not_in_data(cached: IndexedShards, key: str) -> DataError:
    return DataError(f"latent cache {cached.root}: sample {key} is not in the data; {AGAIN}")


def places_in(shards: IndexedShards, cached: IndexedShards) -> list[int]:
    """The positions of a cache's samples in the data. Raises DataError for one that is not there."""
    place = {key: i for i, key in enumerate(_cache_keys(shards))}
    if absent := [key for key in cached.keys if key not in place]:
        raise _not_in_data(cached, absent[0])
    return [place[key] for key in cached.keys]


class _Batches:
    """A re-iterable list of lazily fetched batches; its length is what Lightning counts to."""

    def __init__(self, latents: CachedLatents, rows: Any, random: bool):
        self.latents, self.rows, self.random = latents, rows, random

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for rows in self.rows:
            yield self.latents.fetch(rows, self.random)


class LatentDataModule(L.LightningDataModule):
    """Cached latents for stage 2, in the same order as ShardDataModule would deliver the images.

    folder: the cache. fields: conditions needed. images: the data it was made of, for fields that it does not hold.
    val_images: as in ShardDataModule.
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
        if images is not None and (images.weights is not None or images.balance_classes):
            shards = images.shards(train_split)
            sets = shards.sets[places_in(shards, self.train.shards)]
            labels = self.train.shards.labels() if images.balance_classes else None
            self.mixture = Mixture.of(sets, images.weights, labels)
        self.val = CachedLatents(folder, val_split, fields, seed, images)

    def train_loader(self, start: int) -> _Batches:
        stop = self.max_steps * self.batching.accumulate
        rows = StepBatches(len(self.train), self.batching, self.seed, start, stop, self.mixture)
        return _Batches(self.train, rows, random=True)

    def train_dataloader(self) -> _Batches:
        return self.train_loader(self.trainer.global_step * self.batching.accumulate if self.trainer else 0)

    def val_dataloader(self) -> _Batches:
        b = self.batching
        rows = evaluation_batches(len(self.val), b.micro, b.rank, b.world_size, self.val_images)
        return _Batches(self.val, rows, random=False)


def verify_cache(data: ShardDataModule, split: str, latents: CachedLatents, encode: Encode, count: int = 8) -> float:
    """Encodes a few images again and compares with the cache; returns the largest deviation of a mean in units of
    its posterior's standard deviation (plus one per cent of the latents' own spread).

    Raises DataError where that exceeds 1: the cache does not belong to this autoencoder or data.
    """
    dataset = data.samples(split, ("image",), random=False)
    keys = _cache_keys(data.shards(split))
    rows = {k: i for i, k in enumerate(keys)} if len(keys) != len(latents) else None
    worst = 0.0
    for j in spread(len(latents), count).tolist():
        key = latents.shards.key(j)
        i = j if rows is None else rows.get(key, -1)
        if i < 0 or keys[i] != key:
            raise _not_in_data(latents.shards, key)
        again = encode(dataset[(0, i)]["image"][None])[0].cpu().numpy().astype(np.float64)
        cached, std = latents.mean_and_std(j)
        tolerance = std + 0.01 * cached.std()
        worst = max(worst, float((np.abs(again[: len(cached)] - cached) / tolerance).max()))
    if worst > 1:
        raise DataError(
            f"latent cache {latents.shards.root} is stale: re-encoded samples differ by {worst:.1f} times the tolerance; {AGAIN}"
        )
    return worst
