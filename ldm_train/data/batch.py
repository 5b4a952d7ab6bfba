"""The fields of a batch. Each is declared once: which members of a shard hold it, how it is decoded and cropped with
its image, what to do if it is missing, and how it is read from the command line.

To add a field, write a subclass of `Field` beside the conditioner that reads it, and set that conditioner's `declares`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from ldm_train.data.fields import boxes_of, captions_of, label_of, weight_of
from ldm_train.data.files import IMAGE_EXTENSIONS
from ldm_train.data.masks import masked_image
from ldm_train.data.transforms import (
    ImageTransform,
    Plan,
    decode_image,
    decode_labels,
    largest_label,
    read_bytes,
    read_depth,
    read_image,
    read_map,
    to_signed_range,
)
from ldm_train.rng import derive_seed

# (image (C, H, W) in [-1, 1], rng) -> the field, for fields that are made from the image
Derive = Callable[[torch.Tensor, np.random.Generator], torch.Tensor]
Raw = Mapping[str, bytes]  # the members of a sample by extension


@dataclass
class Sample:
    """One sample while it is decoded from a shard's members to tensors. All its images and maps get the same crop,
    which is drawn for the first one requested."""

    key: str
    raw: Raw
    rng: np.random.Generator | None
    transform: ImageTransform | None
    channels: int
    derive: Mapping[str, Derive]
    labels: Mapping[str, int | None]
    shape: tuple[int, ...] | None = None  # (H, W) of the image in its file, once it has been read
    _plan: Plan | None = None

    @cached_property
    def pixels(self) -> torch.Tensor:
        """The cropped image: float32 (C, H, W) in [-1, 1]."""
        extension = next((e for e in IMAGE_EXTENSIONS if e in self.raw), None)
        if extension is None:
            raise ValueError(f"no image: it has {', '.join(f'.{e}' for e in self.raw)}")
        image = decode_image(self.raw[extension], extension, self.channels)
        self.shape = tuple(image.shape[1:])
        self._plan = self.transform.plan(*self.shape, self.rng)
        return to_signed_range(self.transform.apply(image, self._plan))

    def plan(self, size: Sequence[int], what: str) -> Plan:
        """The crop plan for a map of `size`. Raises ValueError if the image has another size."""
        if self.shape and tuple(size) != self.shape:
            raise ValueError(f"image of {self.shape} but {what} of {tuple(size)} pixels")
        if self._plan is None:
            self._plan = self.transform.plan(*size, self.rng)
        return self._plan

    def derived(self, field: "Field") -> torch.Tensor:
        """The field made from the image: by the config's data.derived if it has an entry, else by the field itself."""
        own = self.rng if self.rng is not None else np.random.default_rng(derive_seed(field.name, self.key))
        make = self.derive.get(field.name) or field.from_image
        assert make is not None
        return make(self.pixels, own)


class Field:
    """A field of a batch. Subclasses set the attributes and implement `decode`.

    name            in a batch, and the `field` of the conditioner that reads it
    extensions      of the shard members that can hold it
    needs_pixels    whether decoding needs the image
    cached          whether the latent cache holds it
    optional        whether samples may lack it
    option          the ldm-sample option that sets it; see `argument`
    input           what the app shows for it: text, choice (of the conditioner's `names`), picture, boxes, map, or
                    mask (the inpainting brush)
    members         extensions that `check` reads
    remedy          what to do if samples lack it
    from_image      how it is made from the image if a sample lacks it (also: data.derived)
    """

    name: str
    extensions: tuple[str, ...]
    needs_pixels = False
    cached = False
    optional = False
    option: str | None = None
    input = "text"
    members: tuple[str, ...] = ()
    remedy = "prepare the data again with it"
    from_image: Derive | None = None

    @property
    def argument(self) -> str:
        """The ldm-sample option that sets it."""
        return self.option or f"fields.{self.name}"

    def held(self, counts: Mapping[str, int]) -> int:
        """An estimate of the number of samples that have it: the largest number of members among its extensions (a .json
        counts whether or not it holds this field)."""
        return max(counts.get(e, 0) for e in self.extensions)

    def decode(self, sample: Sample) -> Any:
        """Decodes the field from a sample. Raises OSError or ValueError if it cannot be read."""
        raise NotImplementedError

    def check(self, raw: Raw, labels: int | None) -> None:
        """Validates the field by reading it, if that is cheap. labels: the number of labels. Raises ValueError or
        KeyError."""

    def collate(self, values: Sequence[Any]) -> Any:
        """Stacks tensors, makes an int64 tensor of integers, and returns a list of anything else."""
        if isinstance(values[0], torch.Tensor):
            return torch.stack(list(values))
        return torch.tensor(values) if isinstance(values[0], int) else list(values)

    def from_words(self, given: str, conditioner: Any, size: tuple[int, int], channels: int) -> Any:
        """Parses one entry from the command line, for images of `size`. Raises ValueError or FileNotFoundError."""
        return conditioner.parse(given)


class Image(Field):
    """image: float32 (C, H, W) in [-1, 1]."""

    name, extensions, needs_pixels = "image", IMAGE_EXTENSIONS, True

    def held(self, counts: Mapping[str, int]) -> int:
        return sum(counts.get(e, 0) for e in self.extensions)  # a sample has one image, under one of these extensions

    def decode(self, sample: Sample) -> torch.Tensor:
        return sample.pixels

    def from_words(self, given: str, conditioner: Any, size: tuple[int, int], channels: int) -> torch.Tensor:
        return read_image(given, size, channels)


class Reference(Image):
    """reference: the cropped image itself, for conditioners that embed it."""

    name, option = "reference", "image"
    input = "picture"


class Segmentation(Field):
    """segmentation: int64 (H, W), cropped and resized by nearest neighbour."""

    name, extensions, option = "segmentation", ("seg.png",), "map"
    input = "map"

    def decode(self, sample: Sample) -> torch.Tensor:
        labels = decode_labels(sample.raw[self.extensions[0]])
        plan = sample.plan(labels.shape[1:], self.name)
        return sample.transform.apply(labels, plan, nearest=True)[0].long()

    def from_words(self, given: str, conditioner: Any, size: tuple[int, int], channels: int) -> torch.Tensor:
        labels = read_map(given, size)
        conditioner.check_labels(labels[None])
        return labels


class Depth(Field):
    """depth: float32 (1, H, W) in [0, 1], from files of 8 or 16 bits."""

    name, extensions, option = "depth", ("depth.png",), "depth"
    input = "picture"

    def decode(self, sample: Sample) -> torch.Tensor:
        data = sample.raw[self.extensions[0]]
        values = decode_labels(data)
        depth = sample.transform.apply(values.float(), sample.plan(values.shape[1:], self.name))
        return (depth / largest_label(data)).clamp(0, 1)

    def from_words(self, given: str, conditioner: Any, size: tuple[int, int], channels: int) -> torch.Tensor:
        return read_depth(given, size)


class Boxes(Field):
    """boxes: float32 (N, 5): x, y, width, height in unit coordinates of the cropped image, and the label."""

    name, extensions, needs_pixels, option, members = "boxes", ("json",), True, "layout", ("json",)
    input = "boxes"

    def decode(self, sample: Sample) -> torch.Tensor:
        boxes = boxes_of(sample.raw.get("json", b"{}"), sample.labels.get(self.name))
        plan, shape = sample.plan(sample.shape or (), self.name), sample.shape
        return torch.from_numpy(sample.transform.apply_to_boxes(boxes, plan, shape)).float()

    def check(self, raw: Raw, labels: int | None) -> None:
        boxes_of(raw["json"], labels)

    def collate(self, values: Sequence[Any]) -> list[torch.Tensor]:
        return list(values)  # their number varies

    def from_words(self, given: str, conditioner: Any, size: tuple[int, int], channels: int) -> Any:
        return conditioner.parse(read_bytes(given, "layout").decode() if given.endswith(".json") else given)


class MaskedImage(Field):
    """masked_image: float32 (C + 1, H, W): the image with the hole at -1, and the mask, which is 1 in the hole."""

    name, extensions, needs_pixels, option = "masked_image", ("mask.png",), True, "image"
    input = "mask"
    remedy = "store a .mask.png beside each image, or have masks drawn: data/derived=masks"

    def decode(self, sample: Sample) -> torch.Tensor:
        if (stored := sample.raw.get(self.extensions[0])) is None:
            return sample.derived(self)
        mask = decode_image(stored, "png", 1)
        plan = sample.plan(mask.shape[1:], "mask")
        return masked_image(sample.pixels, sample.transform.apply(mask, plan, nearest=True).float() / 255)


class LowResolution(Field):
    """lowres: float32 (C, h, w) in [-1, 1], the image reduced by an integer factor."""

    name, extensions, needs_pixels, option = "lowres", ("lowres.png",), True, "image"
    input = "picture"
    remedy = "store a .lowres.png beside each image, or have it made: data/derived=bicubic_x4"

    def decode(self, sample: Sample) -> torch.Tensor:
        if (stored := sample.raw.get(self.extensions[0])) is None:
            return sample.derived(self)
        small, shape = decode_image(stored, "png", sample.channels), sample.shape or ()
        factor = shape[0] // small.shape[1]
        if (small.shape[1] * factor, small.shape[2] * factor) != shape:
            raise ValueError(f"image of {shape} but low-resolution picture of {tuple(small.shape[1:])} pixels")
        return to_signed_range(sample.transform.apply_reduced(small, sample.plan(shape, self.name), factor))

    def from_words(self, given: str, conditioner: Any, size: tuple[int, int], channels: int) -> torch.Tensor:
        return read_image(given, (size[0] // conditioner.factor, size[1] // conditioner.factor), channels)


class ClassLabel(Field):
    """class_label: int, below the number of classes."""

    name, extensions, cached, option, members = "class_label", ("cls",), True, "classes", ("cls",)
    input = "choice"
    remedy = "prepare the data with one folder per class, or choose diffusion/conditioning=none, or =text if there are captions"

    def decode(self, sample: Sample) -> int:
        return label_of(sample.raw.get("cls", b""), sample.labels.get(self.name))

    def check(self, raw: Raw, labels: int | None) -> None:
        label_of(raw["cls"], labels)


class Caption(Field):
    """caption: str, one of a sample's captions: a random one, or the first if there is no random generator."""

    name, extensions, cached, option, members = "caption", ("txt", "json"), True, "prompts", ("txt", "json")
    remedy = (
        "prepare the data with captions (ldm-prepare source=csv, or .txt files beside the images), or choose conditioning "
        "without text: diffusion/conditioning=class or diffusion/conditioning=none"
    )

    def decode(self, sample: Sample) -> str:
        captions = captions_of(sample.raw)
        return captions[int(sample.rng.integers(len(captions)))] if sample.rng else captions[0]

    def check(self, raw: Raw, labels: int | None) -> None:
        captions_of(raw)


class LossWeight(Field):
    """loss_weight: how much a sample counts in the loss of the diffusion stage, 1 by default. It distinguishes
    images of a class that a model generated itself from those of a subject (the prior-preservation term of
    DreamBooth, Ruiz et al. 2022, eq. 2)."""

    name, extensions, cached, optional, members = "loss_weight", ("loss_weight.txt",), True, True, ("loss_weight.txt",)

    def decode(self, sample: Sample) -> torch.Tensor:
        return torch.tensor(weight_of(sample.raw.get("loss_weight.txt", b"1")))

    def check(self, raw: Raw, labels: int | None) -> None:
        weight_of(raw["loss_weight.txt"])


KINDS = (Image, Reference, Segmentation, Depth, Boxes, MaskedImage, LowResolution, ClassLabel, Caption, LossWeight)
# In the order in which a sample is decoded, which matters because fields draw from the same random generator.
FIELDS: dict[str, Field] = {kind.name: kind() for kind in KINDS}
