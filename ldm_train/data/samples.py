"""From a shard's raw fields to a training sample, and what to do with a sample that cannot be read."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ldm_train.data.files import IMAGE_EXTENSIONS
from ldm_train.data.shards import DataError
from ldm_train.data.transforms import ImageTransform, decode_image, decode_labels, to_unit_range

# Which shard extensions can provide each field of a batch.
SOURCES = {
    "image": IMAGE_EXTENSIONS,
    "class_label": ("cls",),
    "caption": ("txt", "json"),
    "segmentation": ("seg.png",),
}


def require_fields(fields: Sequence[str], counts: dict[str, int], total: int, where: str) -> None:
    """Raises DataError where shards (fields counted in `counts`) lack a field that training needs."""
    for field in fields:
        if field not in SOURCES:
            raise DataError(f"unknown batch field {field!r}; shards can provide {', '.join(SOURCES)}")
        # A sample has one image, under one of its extensions, but its caption may stand in .txt and in .json.
        count = (sum if field == "image" else max)(counts.get(e, 0) for e in SOURCES[field])
        if count < total:
            remedy = {
                "caption": "prepare the data with captions (ldm-prepare source=csv, or .txt files beside the images), or "
                "choose conditioning without text: diffusion/conditioning=class or diffusion/conditioning=none",
                "class_label": "prepare the data with one folder per class, or choose diffusion/conditioning=none",
            }.get(field, "prepare the data again with it")
            have = ", ".join(f".{e} ({n})" for e, n in sorted(counts.items()))
            raise DataError(f"{where}: not every sample has a {field}: {total} samples with {have}; {remedy}")


def text_of(raw: dict[str, bytes], rng: np.random.Generator | None) -> str:
    """A caption: one of .json's "captions" (drawn by rng, the first without) if there are several, else .txt."""
    if "json" in raw and (captions := json.loads(raw["json"]).get("captions")):
        return captions[int(rng.integers(len(captions)))] if rng else captions[0]
    if "txt" not in raw:
        raise ValueError('no caption: neither a .txt nor "captions" in its .json')
    return raw["txt"].decode().strip()


def sample_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """Augmentation and caption choice of a sample: a function of (seed, epoch, sample) only, not of workers."""
    return np.random.default_rng([seed, epoch, index])


class SampleDecoder:
    """Turns raw fields into a sample: image float32 (C, H, W) in [-1, 1], class_label int, caption str,
    segmentation int64 (H, W), key.

    transform: ImageTransform. fields: what to decode beside "key". channels: image channels.
    """

    def __init__(self, transform: ImageTransform, fields: Sequence[str], channels: int = 3):
        self.transform, self.fields, self.channels = transform, tuple(fields), channels

    def __call__(self, key: str, raw: dict[str, bytes], rng: np.random.Generator | None) -> dict[str, Any]:
        sample: dict[str, Any] = {"key": key}
        plan = None
        if "image" in self.fields:
            extension = next(e for e in IMAGE_EXTENSIONS if e in raw)
            image = decode_image(raw[extension], extension, self.channels)
            plan = self.transform.plan(*image.shape[1:], rng)
            sample["image"] = to_unit_range(self.transform.apply(image, plan))
        if "segmentation" in self.fields:
            labels = decode_labels(raw["seg.png"])
            if plan and labels.shape[1:] != image.shape[1:]:
                raise ValueError(f"image of {tuple(image.shape[1:])} but label map of {tuple(labels.shape[1:])} pixels")
            plan = plan or self.transform.plan(*labels.shape[1:], rng)
            sample["segmentation"] = self.transform.apply(labels, plan, nearest=True)[0].long()
        if "class_label" in self.fields:
            sample["class_label"] = int(raw["cls"])
        if "caption" in self.fields:
            sample["caption"] = text_of(raw, rng)
        return sample


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Stacks tensors, makes int64 of numbers, lists of strings; gathers notes on replaced samples in "replaced"."""
    batch: dict[str, Any] = {"replaced": [note for s in samples for note in s.pop("replaced", [])]}
    for name in samples[0]:
        values = [s[name] for s in samples]
        if isinstance(values[0], torch.Tensor):
            batch[name] = torch.stack(values)
        elif isinstance(values[0], int):
            batch[name] = torch.tensor(values)
        else:
            batch[name] = values
    return batch
