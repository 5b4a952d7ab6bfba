"""Decodes a shard's raw members into training samples, and handles samples that cannot be read."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ldm_train.data.batch import FIELDS, Derive, Field, Sample
from ldm_train.data.shards import DataError
from ldm_train.data.transforms import ImageTransform

PLAIN = Field()  # collates entries that are not declared fields (keys, moments)


def require_fields(
    fields: Sequence[str],
    counts: Mapping[str, int],
    total: int,
    where: str,
    derived: Sequence[str] = (),
    known: Mapping[str, Field] = FIELDS,
) -> None:
    """Raises DataError if a field is unknown, or if not all samples of the shards have it (`counts`: members per
    extension) and it is neither optional nor made from the image."""
    for name in fields:
        if name not in known:
            raise DataError(f"unknown batch field {name!r}; shards can provide {', '.join(known)}")
        field = known[name]
        made = name in derived or field.from_image is not None or field.optional
        if not made and field.held(counts) < total:
            have = ", ".join(f".{e} ({n})" for e, n in sorted(counts.items()))
            raise DataError(f"{where}: not every sample has a {name}: {total} samples with {have}; {field.remedy}")


def refuse_too_many(bad: int, seen: int, total: int, max_bad_fraction: float) -> None:
    """Raises DataError if more than one and more than max_bad_fraction of the samples seen could not be read.
    Applies only once 1,000 samples, or all of `total`, have been seen."""
    if bad > max(1, max_bad_fraction * seen) and seen >= min(1000, total):
        raise DataError(
            f"{bad} of {seen} samples could not be read, more than data.max_bad_fraction={max_bad_fraction}; repair the "
            "data or raise the limit"
        )


def note_unreadable(notes: list[str], where: str, error: Exception) -> None:
    """Appends a note on an unreadable sample to the notes on those before it. Raises DataError at the 20th in a row."""
    notes.append(f"{where}: {type(error).__name__}: {error}")
    if len(notes) == 20:
        raise DataError("20 unreadable samples in a row:\n" + "\n".join(notes[:5])) from error


def sample_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The random generator for a sample's augmentation and caption choice: depends only on (seed, epoch, index), not
    on workers."""
    return np.random.default_rng([seed, epoch, index])


class SampleDecoder:
    """Decodes raw members into a sample: its key, and the requested fields as `data/batch.py` declares them. All
    fields of a sample get the same crop and flip.

    transform: None if no field is cropped from an image or map. fields: what to decode besides "key". channels: image
    channels.
    derive: {field: function that makes it from the image if the sample lacks it}.
    labels: the number of labels of "class_label" and of "boxes" (None: any). known: all declared fields.
    Raises OSError or ValueError for a sample that cannot be read.
    """

    def __init__(
        self,
        transform: ImageTransform | None,
        fields: Sequence[str],
        channels: int = 3,
        derive: Mapping[str, Derive] | None = None,
        labels: Mapping[str, int | None] | None = None,
        known: Mapping[str, Field] = FIELDS,
    ):
        self.transform, self.channels, self.known = transform, channels, known
        self.derive, self.labels = dict(derive or {}), dict(labels or {})
        self.fields = tuple(known[name] for name in known if name in fields)
        self.needs_pixels = any(field.needs_pixels for field in self.fields)

    def __call__(
        self, key: str, raw: Mapping[str, bytes], rng: np.random.Generator | None, size: tuple[int, int] | None = None
    ) -> dict[str, Any]:
        """size: the (height, width) to which images are cropped and resized, if not the transform's."""
        transform = self.transform.sized(size) if self.transform and size else self.transform
        sample = Sample(key, raw, rng, transform, self.channels, self.derive, self.labels)
        if self.needs_pixels:
            sample.pixels  # noqa: B018 - the picture draws the plan, before what is cut with it
        return {"key": key} | {field.name: field.decode(sample) for field in self.fields}


def collate(samples: Sequence[dict[str, Any]], known: Mapping[str, Field] = FIELDS) -> dict[str, Any]:
    """Combines samples into a batch, each field with its own `collate`; notes on replaced samples are collected in
    "replaced"."""
    batch: dict[str, Any] = {"replaced": [note for s in samples for note in s.pop("replaced", [])]}
    for name in samples[0]:
        field = known.get(name, PLAIN)
        batch[name] = field.collate([s[name] for s in samples])
    return batch
