"""From a shard's raw fields to a training sample, and what to do with a sample that cannot be read."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ldm_train.data.fields import boxes_of, captions_of, label_of
from ldm_train.data.files import IMAGE_EXTENSIONS
from ldm_train.data.masks import masked_image
from ldm_train.data.shards import DataError
from ldm_train.data.transforms import ImageTransform, Plan, decode_image, decode_labels, to_unit_range
from ldm_train.rng import derive_seed

# Which shard extensions can provide each field of a batch.
SOURCES = {
    "image": IMAGE_EXTENSIONS,
    "class_label": ("cls",),
    "caption": ("txt", "json"),
    "segmentation": ("seg.png",),
    "boxes": ("json",),
    "masked_image": ("mask.png",),
    "lowres": ("lowres.png",),
    "depth": ("depth.png",),
    "reference": IMAGE_EXTENSIONS,  # the cut image itself, for conditioners that embed it
}
# (image (C, H, W) in [-1, 1], rng) -> the field, for fields that are made from the image
Derive = Callable[[torch.Tensor, np.random.Generator], torch.Tensor]


def require_fields(
    fields: Sequence[str], counts: dict[str, int], total: int, where: str, derived: Sequence[str] = ()
) -> None:
    """Raises DataError where shards (fields counted in `counts`) lack a field that training needs and that is not
    derived from the image."""
    for field in fields:
        if field not in SOURCES:
            raise DataError(f"unknown batch field {field!r}; shards can provide {', '.join(SOURCES)}")
        if field in derived:
            continue
        # A sample has one image, under one of its extensions, but its caption may stand in .txt and in .json.
        count = (sum if field in ("image", "reference") else max)(counts.get(e, 0) for e in SOURCES[field])
        if count < total:
            remedy = {
                "caption": "prepare the data with captions (ldm-prepare source=csv, or .txt files beside the images), or "
                "choose conditioning without text: diffusion/conditioning=class or diffusion/conditioning=none",
                "class_label": "prepare the data with one folder per class, or choose diffusion/conditioning=none",
                "masked_image": "store a .mask.png beside each image, or have masks drawn: data/derived=masks",
                "lowres": "store a .lowres.png beside each image, or have it made: data/derived=bicubic_x4",
            }.get(field, "prepare the data again with it")
            have = ", ".join(f".{e} ({n})" for e, n in sorted(counts.items()))
            raise DataError(f"{where}: not every sample has a {field}: {total} samples with {have}; {remedy}")


def text_of(raw: Mapping[str, bytes], rng: np.random.Generator | None) -> str:
    """One of a sample's captions: drawn by rng, the first without."""
    captions = captions_of(raw)
    return captions[int(rng.integers(len(captions)))] if rng else captions[0]


def refuse_too_many(bad: int, seen: int, total: int, max_bad_fraction: float) -> None:
    """Raises DataError where more of the samples seen could not be read than allowed: one, and max_bad_fraction. Of
    `total` samples at least 1,000, or all, must have been seen."""
    if bad > max(1, max_bad_fraction * seen) and seen >= min(1000, total):
        raise DataError(
            f"{bad} of {seen} samples could not be read, more than data.max_bad_fraction={max_bad_fraction}; repair the "
            "data or raise the limit"
        )


def sample_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """Augmentation and caption choice of a sample: a function of (seed, epoch, sample) only, not of workers."""
    return np.random.default_rng([seed, epoch, index])


class SampleDecoder:
    """Turns raw fields into a sample: image float32 (C, H, W) in [-1, 1], class_label int, caption str,
    segmentation int64 (H, W), boxes float32 (N, 5), masked_image (C + 1, H, W), lowres (C, h, w), depth (1, H, W)
    in [0, 1], key. Crop and flip act on all of them alike.

    transform: ImageTransform. fields: what to decode beside "key". channels: image channels.
    derive: how fields are made from the image where the sample does not hold them.
    labels: how many there are, of "class_label" and of "boxes" (None: any).
    Raises OSError or ValueError for a sample that cannot be read.
    """

    def __init__(
        self,
        transform: ImageTransform,
        fields: Sequence[str],
        channels: int = 3,
        derive: Mapping[str, Derive] | None = None,
        labels: Mapping[str, int | None] | None = None,
    ):
        self.transform, self.fields, self.channels = transform, tuple(fields), channels
        self.derive, self.labels = dict(derive or {}), dict(labels or {})
        self.needs_image = bool({"image", "reference", "boxes", "masked_image", "lowres"} & set(fields))

    def __call__(self, key: str, raw: dict[str, bytes], rng: np.random.Generator | None) -> dict[str, Any]:
        sample: dict[str, Any] = {"key": key}
        plan, shape, pixels = None, None, None
        if self.needs_image:
            extension = next((e for e in IMAGE_EXTENSIONS if e in raw), None)
            if extension is None:
                raise ValueError(f"no image: it has {', '.join(f'.{e}' for e in raw)}")
            image = decode_image(raw[extension], extension, self.channels)
            shape = tuple(image.shape[1:])
            plan = self.transform.plan(*shape, rng)
            pixels = to_unit_range(self.transform.apply(image, plan))
        sample |= {field: pixels for field in ("image", "reference") if field in self.fields}
        for field in ("segmentation", "depth"):
            if field in self.fields:
                labels = decode_labels(raw[SOURCES[field][0]])
                if shape and labels.shape[1:] != shape:
                    raise ValueError(f"image of {shape} but {field} of {tuple(labels.shape[1:])} pixels")
                plan = plan or self.transform.plan(*labels.shape[1:], rng)
                if field == "segmentation":
                    sample[field] = self.transform.apply(labels, plan, nearest=True)[0].long()
                else:
                    depth = self.transform.apply(labels.float(), plan)
                    sample[field] = (depth / (65535 if labels.max() > 255 else 255)).clamp(0, 1)
        if "boxes" in self.fields:
            boxes = boxes_of(raw.get("json", b"{}"), self.labels.get("boxes"))
            sample["boxes"] = torch.from_numpy(self.transform.apply_to_boxes(boxes, plan, shape)).float()
        for field in ("masked_image", "lowres"):
            if field not in self.fields:
                continue
            if (stored := raw.get(SOURCES[field][0])) is not None:
                sample[field] = self._stored(field, stored, pixels, plan, shape)
            else:
                own = rng if rng is not None else np.random.default_rng(derive_seed(field, key))
                sample[field] = self.derive[field](pixels, own)
        if "class_label" in self.fields:
            sample["class_label"] = label_of(raw.get("cls", b""), self.labels.get("class_label"))
        if "caption" in self.fields:
            sample["caption"] = text_of(raw, rng)
        return sample

    def _stored(self, field: str, data: bytes, pixels: torch.Tensor, plan: Plan, shape: tuple) -> torch.Tensor:
        """A mask or low-resolution picture from the shard, cut like its image."""
        if field == "masked_image":
            mask = decode_image(data, "png", 1)
            if mask.shape[1:] != shape:
                raise ValueError(f"image of {shape} but mask of {tuple(mask.shape[1:])} pixels")
            return masked_image(pixels, self.transform.apply(mask, plan, nearest=True).float() / 255)
        small = decode_image(data, "png", self.channels)
        factor = shape[0] // small.shape[1]
        if (small.shape[1] * factor, small.shape[2] * factor) != shape:
            raise ValueError(f"image of {shape} but low-resolution picture of {tuple(small.shape[1:])} pixels")
        return to_unit_range(self.transform.reduced(factor).apply(small, plan.reduced(factor)))


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Stacks tensors, makes int64 of numbers, lists of strings; gathers notes on replaced samples in "replaced"."""
    batch: dict[str, Any] = {"replaced": [note for s in samples for note in s.pop("replaced", [])]}
    for name in samples[0]:
        values = [s[name] for s in samples]
        if isinstance(values[0], torch.Tensor) and name != "boxes":  # their number varies
            batch[name] = torch.stack(values)
        elif isinstance(values[0], int):
            batch[name] = torch.tensor(values)
        else:
            batch[name] = values
    return batch
