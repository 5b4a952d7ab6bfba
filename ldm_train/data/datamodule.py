"""One data module for all images: shards in, batches out, in an order that is a pure function of the seed and the step."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from ldm_train.data.batch import FIELDS, Derive, Field
from ldm_train.data.files import IMAGE_EXTENSIONS
from ldm_train.data.samples import SampleDecoder, collate, note_unreadable, refuse_too_many, require_fields, sample_rng
from ldm_train.data.shards import (
    DataError,
    IndexedShards,
    Roots,
    as_roots,
    data_hash,
    is_remote,
    member_counts,
    read_index,
    split_index,
    spread,
)
from ldm_train.data.streaming import StreamingBatches
from ldm_train.data.transforms import ImageTransform
from ldm_train.interrupts import become_worker


@dataclass(frozen=True)
class Batching:
    """How a global batch is cut: batch_size = micro_batch_size x world_size x accumulate. Raises ValueError where that is no
    whole number."""

    batch_size: int
    micro_batch_size: int | None = None
    world_size: int = 1
    rank: int = 0

    def __post_init__(self):
        share = self.micro_batch_size or self.batch_size // self.world_size
        if share < 1 or self.batch_size % (share * self.world_size):
            raise ValueError(
                f"batch_size {self.batch_size} does not split over {self.world_size} devices with micro_batch_size "
                f"{self.micro_batch_size}; make batch_size a multiple of micro_batch_size x devices"
            )

    @property
    def micro(self) -> int:
        return self.micro_batch_size or self.batch_size // self.world_size

    @property
    def accumulate(self) -> int:
        return self.batch_size // (self.micro * self.world_size)


@dataclass(frozen=True)
class Mixture:
    """Groups of samples that are drawn from in given shares, whatever their sizes.

    members: per group the indices of its samples. shares: per group, their sum is 1.
    """

    members: list[np.ndarray]
    shares: np.ndarray

    @classmethod
    def of(cls, sets: np.ndarray, weights: Sequence[float] | None, labels: np.ndarray | None) -> "Mixture | None":
        """sets (N,): which set each sample belongs to. weights: of the sets (None: by their sizes). labels (N,): where
        given, each class of a set has the same share of it. None where every sample is drawn alike."""
        if weights is None and labels is None:
            return None
        sizes = np.bincount(sets)
        share = np.array(weights if weights is not None else sizes, float)
        share /= share.sum()
        members, shares = [], []
        for k in range(len(sizes)):
            mine = np.flatnonzero(sets == k)
            parts = [mine] if labels is None else [mine[labels[mine] == c] for c in np.unique(labels[mine])]
            members += parts
            shares += [share[k] / len(parts)] * len(parts)
        return cls(members, np.array(shares))

    def epoch(self, seed: int, epoch: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(visits, indices) of `count` draws: the groups' shares to the sample, shuffled. Each group is gone through in
        permutations, from one epoch into the next; `visits` counts how often its sample was drawn before."""
        exact = self.shares * count
        quotas = np.floor(exact).astype(int)
        quotas[np.argsort(quotas - exact, kind="stable")[: count - quotas.sum()]] += 1
        visits, indices = [], []
        for k, (group, quota) in enumerate(zip(self.members, quotas)):
            positions = np.arange(epoch * quota, (epoch + 1) * quota)
            rounds = positions // len(group)
            orders = {r: np.random.default_rng([seed, 1, k, r]).permutation(group) for r in np.unique(rounds).tolist()}
            visits.append(rounds)
            indices.append(np.array([orders[r][p % len(group)] for r, p in zip(rounds.tolist(), positions)], int))
        shuffled = np.random.default_rng([seed, epoch]).permutation(count)
        return np.concatenate(visits)[shuffled], np.concatenate(indices)[shuffled]


class StepBatches(Sampler):
    """The samples of every micro-batch from `start` to `stop` as lists of (visit, index); a visit is an epoch where
    there is no mixture.

    Each epoch is a permutation seeded by (seed, epoch), or a draw from the mixture; what does not fill a global batch
    is dropped. Which samples make up a global batch does not depend on the number of ranks.
    """

    def __init__(
        self, count: int, batching: Batching, seed: int, start: int, stop: int, mixture: Mixture | None = None
    ):
        self.count, self.batching, self.seed, self.start, self.stop = count, batching, seed, start, stop
        self.mixture = mixture
        self.steps_per_epoch = count // batching.batch_size
        if self.steps_per_epoch == 0:
            raise DataError(
                f"batch_size {batching.batch_size} exceeds the {count} training images; lower autoencoder.batch_size / "
                "diffusion.batch_size or prepare more data"
            )
        self._epoch = -1  # whose samples are in _visits and _order

    def __len__(self) -> int:
        return self.stop  # Lightning counts micro-batches from the beginning of training, also after a resume

    def rows(self, micro_batch: int) -> list[tuple[int, int]]:
        """(visit, index) of this rank's samples in one micro-batch."""
        step, part = divmod(micro_batch, self.batching.accumulate)
        epoch, step = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch = epoch
            if self.mixture is None:
                self._order = np.random.default_rng([self.seed, epoch]).permutation(self.count)
                self._visits = np.full(self.count, epoch)
            else:
                self._visits, self._order = self.mixture.epoch(self.seed, epoch, self.count)
        b = self.batching
        first = step * b.batch_size + (part * b.world_size + b.rank) * b.micro
        rows = slice(first, first + b.micro)
        return list(zip(self._visits[rows].tolist(), self._order[rows].tolist()))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return map(self.rows, range(self.start, self.stop))


class ShardDataset(Dataset):
    """Decoded samples by (epoch, index). A sample that cannot be read is replaced by another, chosen by (seed, epoch,
    index), and the sample says so in "replaced"; after 20 failures in a row it raises DataError."""

    def __init__(self, shards: IndexedShards, decoder: SampleDecoder, seed: int, random: bool):
        self.shards, self.decoder, self.seed, self.random = shards, decoder, seed, random

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Any]:
        epoch, index = item
        rng = sample_rng(self.seed, epoch, index)
        replaced, candidate = [], index
        for attempt in itertools.count():
            try:
                key = str(self.shards.keys[candidate])
                sample = self.decoder(key, self.shards.fields(candidate), rng if self.random else None)
                break
            except Exception as error:  # on damaged data decoders raise errors of any type
                note_unreadable(replaced, self.shards.where(candidate), error)
                candidate = int(np.random.default_rng([self.seed, epoch, index, attempt]).integers(len(self)))
        if replaced:
            sample["replaced"] = replaced
        if epoch and not self.random:
            sample["key"] += f"#{epoch}"
        return sample


def evaluation_batches(
    count: int, micro: int, rank: int, world_size: int, limit: int | None, repeat: bool = False
) -> list[list[tuple[int, int]]]:
    """Every sample (or the first `limit`) exactly once over all ranks, as lists of (visit, index); ranks may differ by one.
    repeat: `limit` samples, going round where there are fewer."""
    total = limit or count
    mine = list(range(rank, total if repeat else min(count, total), world_size))
    return [[divmod(i, count) for i in mine[k : k + micro]] for k in range(0, len(mine), micro)]


def check_channels(shards: list[dict], channels: int, where: str) -> None:
    """Raises DataError where shards, of which these are the entries, hold pictures that cannot have so many channels."""
    counts = member_counts(shards)
    held = sorted({c for shard in shards for c in shard.get("channels", [])})
    if held and held != [channels]:
        said = " and ".join(map(str, held))
        remedy = f"say data.channels={held[0]}" if len(held) == 1 else "prepare each kind in a folder of its own"
        raise DataError(f"{where} holds .npy pictures of {said} channels, data.channels is {channels}; {remedy}")
    files = [e for e in (*IMAGE_EXTENSIONS, *FIELDS["lowres"].extensions) if e != "npy" and counts[e]]
    if channels not in (1, 3) and files:
        raise DataError(
            f"{where} holds .{files[0]} files ({counts[files[0]]}), which have 1 or 3 channels, data.channels is {channels}; "
            "pictures of other channels are prepared from .npy or .tif files"
        )


class ShardDataModule(L.LightningDataModule):
    """Images (and what the shards hold beside them) for one stage.

    root            folder with index.json, or several: their samples are drawn from together
    weights         share of each root (None: by their sizes). balance_classes: equal shares of the classes of a root
    batching        Batching; accumulation included
    max_steps       optimiser steps of the stage
    fields          batch fields needed: "image" and what the conditioners read (see data/batch.py)
    derive          how fields are made from the image where the shards lack them: {field: callable}
    image_size, crop, scale, flip   see ImageTransform;  channels: of the image
    reader          "indexed" (local or shared disk) or "streaming" (remote or very large sets)
    val_images      validation uses the first so many (None: all)
    max_bad_fraction    stop when more than this share of the samples read could not be decoded
    remedy          the command that makes this data, for error messages
    labels          how many there are of "class_label" and "boxes", where the model sets it; None: as many as classes are
                    named in the index
    own_fields      further fields that conditioners declare, by name
    Raises FileNotFoundError or DataError before training starts, naming the remedy.
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
    ):
        super().__init__()
        roots = len(as_roots(root))
        if reader not in ("indexed", "streaming"):
            raise ValueError(f"data.reader is 'indexed' or 'streaming', not {reader!r}")
        if reader == "streaming" and (roots > 1 or weights is not None or balance_classes):
            raise ValueError("several data.root, data.weights and data.balance_classes need data.reader=indexed")
        if weights is not None and (len(weights) != roots or min(weights) <= 0):
            raise ValueError(f"data.weights {list(weights)} must be positive numbers, one per data.root ({roots})")
        self.root, self.batching, self.max_steps, self.fields = root, batching, max_steps, tuple(fields)
        self.weights, self.balance_classes, self.known = weights, balance_classes, FIELDS | dict(own_fields or {})
        self.transform = ImageTransform(image_size, crop, flip, scale)
        self.channels, self.reader, self.num_workers, self.seed = channels, reader, num_workers, seed
        self.train_split, self.val_split, self.val_images = train_split, val_split, val_images
        self.max_bad_fraction, self.shuffle_buffer, self.remedy = max_bad_fraction, shuffle_buffer, remedy
        self.derive = dict(derive or {})
        self.index = read_index(root, remedy)
        for split in (train_split, val_split):
            shards, where = split_index(self.index, split, root)["shards"], f"{root}, split {split}"
            check_channels(shards, channels, where)
            needed = (*self.fields, "class_label") if balance_classes else self.fields
            require_fields(needed, member_counts(shards), self.count(split), where, list(self.derive), self.known)
        named = len(self.index.get("classes") or []) or None
        self.labels = {field: count or named for field, count in ({"class_label": None} | dict(labels or {})).items()}
        self._shards: dict[str, IndexedShards] = {}

    @property
    def content_hash(self) -> str:
        return data_hash(self.index, self.train_split, self.val_split)

    def count(self, split: str) -> int:
        return sum(s["count"] for s in self.index["splits"][split]["shards"])

    def holds(self, field: str) -> bool:
        """Whether any training sample has a field."""
        return self.known[field].held(member_counts(self.index["splits"][self.train_split]["shards"])) > 0

    def shards(self, split: str) -> IndexedShards:
        if split not in self._shards:
            self._shards[split] = IndexedShards(self.root, split, self.remedy)
        return self._shards[split]

    @property
    def mixture(self) -> Mixture | None:
        """How training draws its samples; None where all are drawn alike."""
        shards = self.shards(self.train_split)
        return Mixture.of(shards.sets, self.weights, shards.labels() if self.balance_classes else None)

    def _loader(self, dataset: Dataset, **options: Any) -> DataLoader:
        pin = torch.cuda.is_available()
        return DataLoader(
            dataset, num_workers=self.num_workers, pin_memory=pin, worker_init_fn=become_worker, **options
        )

    def _batch_loader(self, dataset: Dataset, batches: Any) -> DataLoader:
        return self._loader(dataset, batch_sampler=batches, collate_fn=partial(collate, known=self.known))

    def _decoder(self, fields: Sequence[str], random: bool) -> SampleDecoder:
        transform = self.transform if random else self.transform.deterministic()
        return SampleDecoder(transform, fields, self.channels, self.derive, self.labels, self.known)

    def samples(self, split: str, fields: Sequence[str], random: bool) -> ShardDataset:
        """Single samples by (epoch, index). random: with training's crops, flips and captions."""
        return ShardDataset(self.shards(split), self._decoder(fields, random), self.seed, random)

    def check_conditions(self, limit: int = 50_000) -> None:
        """Reads the captions, classes and boxes that `fields` ask for (of `limit` samples of a split, spread evenly),
        before hours are spent on training without them. Prints those that cannot be read; raises DataError where they
        are more than max_bad_fraction allows. Remote shards are read in training only."""
        wanted = [field for name, field in self.known.items() if name in self.fields and field.members]
        members = {e for field in wanted for e in field.members}
        for split in (self.train_split, self.val_split) if wanted else ():
            if any(is_remote(shard["file"]) for shard in self.index["splits"][split]["shards"]):
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
                self.root,
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
        batches = StepBatches(len(dataset), self.batching, self.seed, start, stop, self.mixture)
        return self._batch_loader(dataset, batches)

    def train_dataloader(self) -> DataLoader:
        return self.train_loader(self.trainer.global_step * self.batching.accumulate if self.trainer else 0)

    def fixed_loader(
        self, split: str, limit: int | None = None, fields: Sequence[str] | None = None, repeat: bool = False
    ) -> DataLoader:
        """Each sample of a split once over all ranks, without randomness: centre crop, first caption. repeat: `limit`
        samples, going round; those of the second round have keys that end in #1, and so on."""
        shards, b = self.shards(split), self.batching
        batches = evaluation_batches(len(shards), b.micro, b.rank, b.world_size, limit, repeat)
        return self._batch_loader(self.samples(split, fields or self.fields, random=False), batches)

    def val_dataloader(self) -> DataLoader:
        return self.fixed_loader(self.val_split, self.val_images)
