"""Writes the latent cache: encodes every image once per autoencoder, shard by shard, on all ranks."""

import re
from collections.abc import Callable, Iterator
from itertools import tee
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ldm_train.data.batch import FIELDS
from ldm_train.data.buckets import Buckets
from ldm_train.data.datamodule import ShardDataModule
from ldm_train.data.files import encoded_npy
from ldm_train.data.latents import CACHED_FIELDS, REMEDY, CacheKeys, Encode, extensions_of
from ldm_train.data.samples import refuse_too_many
from ldm_train.data.shards import (
    ENTRIES,
    INDEX,
    DataError,
    finished_shard,
    noted_entry,
    shard_name,
    spread,
    write_shard,
)
from ldm_train.storage import write_json


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

    flips: also store the moments of the mirror image. known: maps a key in the cache to existing moments, used instead
    of encoding. Samples of which a field of `data` cannot be read are left out and named.
    Raises DataError if these are more than data.max_bad_fraction allows, ValueError for transforms with randomness
    beyond a flip.
    """
    if split == data.train_split and not data.transform.cacheable:
        raise ValueError(
            f"data.crop={data.transform.crop} is random, one cached encoding cannot stand for it; set latents.cache=false "
            "or data.crop=center"
        )
    folder, shards, b = Path(folder), data.shards(split), data.batching
    chunks = [range(i, min(i + per_shard, len(shards))) for i in range(0, len(shards), per_shard)]
    mine = list(enumerate(chunks))[b.rank :: b.world_size]
    done = {number: finished_shard(folder, shard_name(split, number)) for number, _ in mine}
    stream = _loaded(data, split, [chunk for number, chunk in mine if done[number] is None])
    keys, entries, seen = CacheKeys.of(shards, compared=known is not None), [], 0
    total = sum(len(chunk) for _, chunk in mine)
    progress = tqdm(total=total, desc=f"caching {split} latents", unit="img", disable=b.rank != 0)
    for number, chunk in mine:
        name, entry = shard_name(split, number), done[number]
        if entry is None:
            entry = write_shard(folder / name, _encoded(stream, chunk, encode, keys, flips, progress, known))
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
    """Yields (key in the cache, image) of samples spread evenly over a split."""
    dataset, keys = data.samples(split, ("image",), random=False), CacheKeys.of(data.shards(split), compared=True)
    for i in spread(len(keys.shards), count).tolist():
        if "replaced" not in (sample := dataset[(0, i)]):  # else it is another sample's image
            yield keys(i), sample["image"]


def written_entries(folder: Path, split: str) -> list[dict]:
    """The entries of a split's shards, as written by all ranks. Raises DataError naming a damaged entry."""
    entries = []
    names = re.compile(rf"{re.escape(split)}-\d{{6,}}\.tar\.json")  # and no split whose name begins like this one's
    for note in sorted(path for path in (folder / ENTRIES).glob(f"{split}-*.json") if names.fullmatch(path.name)):
        if (entry := noted_entry(folder, note.stem)) is None:
            raise DataError(f"{note} is damaged; rebuild the cache with: {REMEDY}")
        entries.append(entry)
    return entries


def both_encoded(encode: Encode, images: torch.Tensor, flips: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The moments of images and, with `flips`, of their mirror images (else None), on the CPU. They are copied only
    after both encodings have been queued on the device."""
    moments, mirrored = encode(images), encode(images.flip(3)) if flips else None
    return moments.cpu(), None if mirrored is None else mirrored.cpu()


def _loaded(data: ShardDataModule, split: str, chunks: list[range]) -> Iterator[tuple[list, dict[str, Any]]]:
    """Yields (places, batch) with the samples of all chunks in turn, from one loader: starting its processes takes
    seconds."""
    # Fields that are not cached are decoded, too, so that samples with a bad one are left out; but not those that are
    # only made from the image.
    held = [name for name in data.fields if name not in data.derive or data.holds(name)]
    dataset = data.samples(split, tuple(dict.fromkeys(("image", *held))), random=False)
    dataset.numbered = True  # keys may repeat in other shards
    most, buckets = max(1, min(64, data.batching.micro)), data.buckets(split)
    places, ahead = tee(batch for chunk in chunks for batch in _batches_of_one_size(chunk, most, buckets))
    yield from zip(places, data.batch_loader(dataset, ahead))


def _encoded(
    stream: Iterator[tuple[list, dict[str, Any]]],
    chunk: range,
    encode: Encode,
    keys: CacheKeys,
    flips: bool,
    progress: tqdm,
    known: Callable[[str], torch.Tensor] | None,
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yields the members of the samples of a chunk, which are the next ones of the stream."""
    shards = keys.shards
    made: dict[int, dict[str, bytes] | None] = {}  # samples whose turn has not come yet; None: left out
    turn = chunk.start
    while turn < chunk.stop:
        rows, batch = next(stream)
        moments, mirrored = both_encoded(encode, batch["image"], flips) if known is None else (None, None)
        for note in batch["replaced"]:
            tqdm.write(f"latent cache: leaving out unreadable {note}")
        for k, (_, i) in enumerate(rows):
            if batch["key"][k] != f"{shards.shard(i)}_{shards.key(i)}":  # unreadable, replaced by another sample
                made[i] = None
                continue
            own = known(keys(i)) if known is not None else moments[k]
            made[i] = {"moments.npy": encoded_npy(own.numpy())}
            if mirrored is not None:
                made[i]["flipped.npy"] = encoded_npy(mirrored[k].numpy())
        while turn in made:
            if (fields := made.pop(turn)) is not None:
                yield keys(turn), fields | shards.members(turn, extensions_of(FIELDS[f] for f in CACHED_FIELDS))
            turn += 1
        progress.update(len(rows))


def _batches_of_one_size(chunk: range, most: int, buckets: Buckets | None) -> list[list[tuple[int, int]]]:
    """(epoch, index) of all samples of a chunk, in batches of at most `most` samples of one bucket, ordered by first
    sample."""
    groups = [list(chunk)]
    if buckets is not None:
        numbers = buckets.number[chunk.start : chunk.stop]
        groups = [(chunk.start + np.flatnonzero(numbers == k)).tolist() for k in np.unique(numbers)]
    return sorted([(0, i) for i in group[k : k + most]] for group in groups for k in range(0, len(group), most))


def write_cache_index(
    folder: str | Path,
    splits: dict[str, list[dict]],
    classes: list[str] | None,
    stochastic: bool = True,
    bucketed: bool = False,
) -> None:
    """Completes a cache by writing index.json, without which it does not count as one. stochastic: it holds means
    and log-variances. bucketed: it holds latents of several sizes."""
    ordered = {split: sorted(entries, key=lambda e: e["file"]) for split, entries in splits.items()}
    index = {"splits": {s: {"shards": e, "count": sum(x["count"] for x in e)} for s, e in ordered.items()}}
    index |= {"stochastic": stochastic} | ({"bucketed": True} if bucketed else {})
    write_json(Path(folder) / INDEX, index | ({"classes": classes} if classes else {}))
