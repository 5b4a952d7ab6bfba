"""The data module for images: reads shards and delivers batches, in an order that is a pure function of the seed and
the step."""

import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ldm_train.data.batch import FIELDS, Derive, Field
from ldm_train.data.buckets import Buckets, bucket_sizes
from ldm_train.data.files import IMAGE_EXTENSIONS
from ldm_train.data.order import Batching, Mixture, StepBatches, evaluation_batches
from ldm_train.data.remote import ShardCache, remote_bytes
from ldm_train.data.samples import SampleDecoder, collate, note_unreadable, refuse_too_many, require_fields, sample_rng
from ldm_train.data.shards import (
    MOST_COMPARED,
    DataError,
    IndexedShards,
    Roots,
    as_roots,
    data_hash,
    member_counts,
    read_index,
    split_index,
    spread,
)
from ldm_train.data.streaming import StreamingBatches
from ldm_train.data.transforms import ImageTransform
from ldm_train.interrupts import become_worker


class ShardDataset(Dataset):
    """Decoded samples by (epoch, index). A sample that cannot be read is replaced by another (of the same bucket, if
    there are buckets), chosen by (seed, epoch, index), with notes on the failures in "replaced". Raises DataError
    after 20 failures in a row."""

    def __init__(
        self, shards: IndexedShards, decoder: SampleDecoder, seed: int, random: bool, buckets: Buckets | None = None
    ):
        self.shards, self.decoder, self.seed, self.random, self.buckets = shards, decoder, seed, random, buckets
        self.numbered = False  # True: keys begin with the number of their shard

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Any]:
        epoch, index = item
        rng = sample_rng(self.seed, epoch, index)
        replaced, candidate = [], index
        size = self.buckets.size(index) if self.buckets else None
        others = self.buckets.neighbours(index) if self.buckets else range(len(self))
        for attempt in itertools.count():
            # A shard that cannot be read ends the run: replacing its samples would silently change the data.
            key, raw = self.shards.key(candidate), self.shards.members(candidate)
            try:
                sample = self.decoder(key, raw, rng if self.random else None, size)
                break
            except Exception as error:  # on damaged data decoders raise errors of any type
                note_unreadable(replaced, self.shards.where(candidate), error)
                drawn = np.random.default_rng([self.seed, epoch, index, attempt]).integers(len(others))
                candidate = int(others[drawn])
        if replaced:
            sample["replaced"] = replaced
        if self.numbered:
            sample["key"] = f"{self.shards.shard(candidate)}_{sample['key']}"
        if epoch and not self.random:
            sample["key"] += f"#{epoch}"
        return sample


def check_channels(shards: list[dict], channels: int, where: str) -> None:
    """Raises DataError if shards, given by their index entries, hold images that cannot have `channels` channels."""
    counts = member_counts(shards)
    held = sorted({c for shard in shards for c in shard.get("channels", [])})
    if held and held != [channels]:
        said = " and ".join(map(str, held))
        remedy = f"set data.channels={held[0]}" if len(held) == 1 else "prepare each kind in a folder of its own"
        raise DataError(f"{where} holds .npy pictures of {said} channels, data.channels is {channels}; {remedy}")
    files = [e for e in (*IMAGE_EXTENSIONS, *FIELDS["lowres"].extensions) if e != "npy" and counts[e]]
    if channels not in (1, 3) and files:
        raise DataError(
            f"{where} holds .{files[0]} files ({counts[files[0]]}), which have 1 or 3 channels, data.channels is {channels}; "
            "pictures of other channels are prepared from .npy or .tif files"
        )


def check_buckets(reader: str, mixed: bool, one_split: bool) -> None:
    """Raises ValueError if aspect-ratio buckets cannot be combined with the other data options."""
    if reader == "streaming":
        raise ValueError("data.buckets needs every picture's size before training: data.reader=indexed")
    if mixed:
        raise ValueError("data.buckets and data.weights or data.balance_classes do not go together; leave one out")
    if one_split:
        raise ValueError("data.buckets needs a validation split of its own: data.val_split is data.train_split")


class ShardDataModule(L.LightningDataModule):
    """Images (and what the shards hold beside them) for one stage.

    root            folder or address with index.json, or several, whose samples are mixed
    weights         share of each root (None: by size). balance_classes: equal shares for the classes of a root
    batching        Batching; accumulation included
    max_steps       optimiser steps of the stage
    fields          batch fields needed: "image" and what the conditioners read (see data/batch.py)
    derive          how fields are made from the image if the shards lack them: {field: callable}
    image_size, crop, scale, flip   see ImageTransform;  channels: of the image
    reader          "indexed" (local files, copies of remote ones) or "streaming" (for more data than fits on the disk)
    val_images      validation uses only the first so many (None: all)
    max_bad_fraction    stop if more than this share of the samples read could not be decoded
    remedy          the command that makes this data, for error messages
    labels          the numbers of labels of "class_label" and "boxes", if the model sets them; None: as many as the
                    index has class names
    own_fields      further fields that conditioners declare, by name
    buckets         {"max_ratio", "step", "min_images"}: training keeps aspect ratios up to max_ratio, with one size
                    per batch; None: everything is cropped to image_size, as validation always is
    Raises ValueError for impossible options, FileNotFoundError or DataError, naming the remedy, before training starts.
    """

    def __init__(
        self,
        root: Roots,
        batching: Batching,
        max_steps: int,
        fields: Sequence[str] = ("image",),
        image_size: int | Sequence[int] = 256,
        crop: str = "center",
        scale: Sequence[float] = (0.5, 1.0),
        flip: bool = False,
        channels: int = 3,
        reader: str = "indexed",
        train_split: str = "train",
        val_split: str = "val",
        val_images: int | None = None,
        num_workers: int = 0,
        max_bad_fraction: float = 0.01,
        shuffle_buffer: int = 2000,
        seed: int = 0,
        remedy: str | None = None,
        derive: Mapping[str, Derive] | None = None,
        weights: Sequence[float] | None = None,
        balance_classes: bool = False,
        labels: Mapping[str, int | None] | None = None,
        own_fields: Mapping[str, Field] | None = None,
        shard_cache: Mapping[str, Any] | None = None,
        buckets: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        roots = len(as_roots(root))
        if reader not in ("indexed", "streaming"):
            raise ValueError(f"data.reader is 'indexed' or 'streaming', not {reader!r}")
        if reader == "streaming" and (roots > 1 or weights is not None or balance_classes):
            raise ValueError("several data.root, data.weights and data.balance_classes need data.reader=indexed")
        if weights is not None and (len(weights) != roots or min(weights) <= 0):
            raise ValueError(f"data.weights {list(weights)} must be positive numbers, one per data.root ({roots})")
        if buckets is not None:
            check_buckets(reader, weights is not None or balance_classes, train_split == val_split)
        self.root, self.batching, self.max_steps, self.fields = root, batching, max_steps, tuple(fields)
        self.weights, self.balance_classes, self.known = weights, balance_classes, FIELDS | dict(own_fields or {})
        self.transform = ImageTransform(image_size, crop, flip, scale)
        self.bucketing = buckets and (bucket_sizes(self.transform.size, buckets["step"], buckets["max_ratio"]), buckets)
        self.channels, self.reader, self.num_workers, self.seed = channels, reader, num_workers, seed
        self.train_split, self.val_split, self.val_images = train_split, val_split, val_images
        self.max_bad_fraction, self.shuffle_buffer, self.remedy = max_bad_fraction, shuffle_buffer, remedy
        self.derive = dict(derive or {})
        self.index = read_index(root, remedy)
        for split in (train_split, val_split):
            shards, where = split_index(self.index, split, root)["shards"], f"{root}, split {split} of index.json"
            check_channels(shards, channels, where)
            needed = (*self.fields, "class_label") if balance_classes else self.fields
            require_fields(needed, member_counts(shards), self.count(split), where, list(self.derive), self.known)
        named = len(self.index.get("classes") or []) or None
        self.labels = {field: count or named for field, count in ({"class_label": None} | dict(labels or {})).items()}
        self._shards: dict[str, IndexedShards] = {}
        self._buckets: Buckets | None = None
        self.cache = ShardCache(shard_cache["folder"], 1e9 * shard_cache["gigabytes"]) if shard_cache else None
        used = {split: self.index["splits"][split]["shards"] for split in (train_split, val_split)}
        far = sum(remote_bytes(shards) for shards in used.values())
        if reader == "indexed" and self.cache and far > self.cache.limit:
            raise DataError(
                f"{self.root} has {far / 1e9:.1f} GB of remote shards, their copies may have {self.cache.limit / 1e9:g}; raise "
                "data.shard_cache.gigabytes, or read them from afar as they are needed, with data.reader=streaming"
            )

    @property
    def content_hash(self) -> str:
        return data_hash(self.index, self.train_split, self.val_split)

    def count(self, split: str) -> int:
        return sum(s["count"] for s in self.index["splits"][split]["shards"])

    def holds(self, field: str) -> bool:
        """Returns True if any training sample has the field."""
        return self.known[field].held(member_counts(self.index["splits"][self.train_split]["shards"])) > 0

    def shards(self, split: str) -> IndexedShards:
        if split not in self._shards:
            self._shards[split] = IndexedShards(self.root, split, self.remedy, self.cache)
        return self._shards[split]

    def some(self, split: str, count: int, evenly: bool = True) -> IndexedShards:
        """At most `count` samples of a split, its first ones or spread evenly over it. Of a stream, which may be larger
        than the disk, only as many shards as hold them are read."""
        few = (count, evenly) if self.reader == "streaming" else None
        shards = IndexedShards(self.root, split, self.remedy, self.cache, few)
        shards.keep(count, evenly)
        return shards

    def restrict(self, split: str, count: int) -> None:
        """From now on the split is `some` of its samples."""
        self._shards[split] = self.some(split, count)

    def buckets(self, split: str) -> Buckets | None:
        """The buckets of the training samples; None if all have one size, and for other splits."""
        if self.bucketing is None or split != self.train_split:
            return None
        if self._buckets is None:
            sizes, options = self.bucketing
            self._buckets = Buckets.of(self.shards(split).picture_sizes(), sizes, options["min_images"])
        return self._buckets

    @property
    def mixture(self) -> Mixture | None:
        """How training draws its samples; None if all are drawn alike."""
        shards = self.shards(self.train_split)
        return Mixture.of(shards.sets, self.weights, shards.labels() if self.balance_classes else None)

    def _loader(self, dataset: Dataset, **options: Any) -> DataLoader:
        pin = torch.cuda.is_available()
        return DataLoader(
            dataset, num_workers=self.num_workers, pin_memory=pin, worker_init_fn=become_worker, **options
        )

    def batch_loader(self, dataset: Dataset, batches: Any) -> DataLoader:
        return self._loader(dataset, batch_sampler=batches, collate_fn=partial(collate, known=self.known))

    def _decoder(self, fields: Sequence[str], random: bool) -> SampleDecoder:
        transform = self.transform if random else self.transform.deterministic()
        return SampleDecoder(transform, fields, self.channels, self.derive, self.labels, self.known)

    def samples(self, split: str, fields: Sequence[str], random: bool, bucketed: bool = True) -> ShardDataset:
        """Single samples by (epoch, index). random: with training's crops, flips and captions. bucketed: training
        samples have the sizes of their buckets."""
        buckets = self.buckets(split) if bucketed else None
        return ShardDataset(self.shards(split), self._decoder(fields, random), self.seed, random, buckets)

    def check_conditions(self, limit: int = 50_000) -> None:
        """Reads the captions, classes and boxes that `fields` request (of `limit` samples per split, evenly spread)
        before hours of training are spent without them. Prints those that cannot be read; raises DataError if they
        are more than max_bad_fraction allows. Remote shards that are streamed are read only in training."""
        wanted = [field for name, field in self.known.items() if name in self.fields and field.members]
        members = {e for field in wanted for e in field.members}
        for split in (self.train_split, self.val_split) if wanted else ():
            if self.reader == "streaming" and remote_bytes(self.index["splits"][split]["shards"]):
                continue
            shards, bad = self.shards(split), 0
            picks = spread(len(shards), limit).tolist()
            for i in picks:
                raw = shards.members(i, members)
                try:
                    for field in wanted:
                        field.check(raw, self.labels.get(field.name))
                except (KeyError, ValueError) as error:
                    bad += 1
                    if bad <= 10 and self.batching.rank == 0:
                        print(f"cannot be read: {shards.where(i)}: {error}")
            refuse_too_many(bad, len(picks), len(picks), self.max_bad_fraction)

    def train_loader(self, start: int) -> DataLoader:
        """Micro-batches from number `start` to the end of training."""
        stop = self.max_steps * self.batching.accumulate
        if self.reader == "streaming":
            stream = StreamingBatches(
                as_roots(self.root)[0],
                self.index["splits"][self.train_split]["shards"],
                self._decoder(self.fields, random=True),
                self.batching,
                seed=self.seed,
                micro_batches=range(start, stop),
                shuffle_buffer=self.shuffle_buffer,
                workers=max(1, self.num_workers),
            )
            return self._loader(stream, batch_size=None)
        dataset = self.samples(self.train_split, self.fields, random=True)
        buckets = self.buckets(self.train_split)
        if buckets is not None and self.batching.rank == 0:
            print(f"training pictures in {buckets}", flush=True)
        batches = StepBatches(len(dataset), self.batching, self.seed, start, stop, self.mixture, buckets)
        return self.batch_loader(dataset, batches)

    def state_dict(self) -> dict[str, Any]:
        """Returns, for checkpoints, what a stream was divided by."""
        b = self.batching
        return {"devices": b.world_size, "micro_batch_size": b.micro} if self.reader == "streaming" else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises DataError if a stream was divided by another number of devices or, among several workers, into other
        micro-batches: samples would be missed or repeated."""
        if self.reader != "streaming":
            return
        for option, now in self.state_dict().items():
            before = state_dict.get(option, now)  # older checkpoints have the devices alone
            if before != now and (option == "devices" or self.num_workers > 1):
                name = option if option == "devices" else f"<stage>.{option}"
                raise DataError(
                    f"data.reader=streaming divided the shards by {name}={before}, so training cannot continue with {now}; "
                    f"set {name}={before}, or begin again with restart=<stage> or another name="
                )

    def train_dataloader(self) -> DataLoader:
        return self.train_loader(self.trainer.global_step * self.batching.accumulate if self.trainer else 0)

    def fixed_loader(
        self, split: str, limit: int | None = None, fields: Sequence[str] | None = None, repeat: bool = False
    ) -> DataLoader:
        """Every sample of a split once over all ranks, without randomness: cropped to image_size, first caption.
        repeat: `limit` samples, starting over if there are fewer; keys from the second round end in #1, and so on. If
        the split uses a key in several shards, keys begin with the number of their shard."""
        shards, b = self.shards(split), self.batching
        batches = evaluation_batches(len(shards), b.micro, b.rank, b.world_size, limit, repeat)
        dataset = self.samples(split, fields or self.fields, random=False, bucketed=False)
        if len(shards) <= MOST_COMPARED:
            dataset.numbered = len({*map(shards.key, range(len(shards)))}) < len(shards)
        return self.batch_loader(dataset, batches)

    def val_dataloader(self) -> DataLoader:
        return self.fixed_loader(self.val_split, self.val_images)
