"""From encoded bytes to tensors: decodes all kinds of image files, then crops, resizes and flips by one plan per
sample."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ldm_train.data.fields import array_of
from ldm_train.data.files import as_shown, open_image, read_npy


def channels_of(data: bytes) -> int:
    """The number of channels of a .npy image, (H, W, C) or (H, W). Raises ValueError if the data is not a .npy file."""
    shape = read_npy(data).shape
    return shape[2] if len(shape) == 3 else 1


def decode_image(data: bytes, extension: str, channels: int) -> torch.Tensor:
    """Decodes an image to uint8 (channels, H, W). A .npy, (H, W, C) or (H, W), gives uint8 or float32 in [-1, 1], as
    stored.

    Grey, palette, 16-bit, CMYK, RGBA (over white) and EXIF-rotated files all become what a viewer shows.
    Raises ValueError or OSError for data that is not an image, or an array with another number of channels.
    """
    if extension == "npy":
        array = array_of(data)
        if array.shape[2] != channels:
            raise ValueError(f"npy image of shape {array.shape}, expected (H, W, {channels})")
        return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))
    with open_image(data) as image:
        if channels not in (1, 3):
            raise ValueError(f"image files have 1 or 3 channels, the data asks for {channels}; store arrays as .npy")
        array = np.array(as_shown(image, "L" if channels == 1 else "RGB"))
    return torch.from_numpy(array[None] if channels == 1 else array.transpose(2, 0, 1).copy())


def decode_labels(data: bytes) -> torch.Tensor:
    """Decodes a label map to int32 (1, H, W): the numbers in the file, regardless of a palette's colours. Raises
    ValueError for files with colour channels."""
    with open_image(data) as image:
        if image.mode not in ("L", "P", "1") and not image.mode.startswith("I"):
            raise ValueError(f"label map with {image.mode} pixels, expected one channel of indices (grey or palette)")
        labels = torch.from_numpy(np.array(image).astype(np.int32))[None]
        # Pillow spreads grey PNGs of 2 and 4 bits over 0 to 255. The byte of the header that holds the depth is the 25th.
        scaled = image.format == "PNG" and image.mode == "L" and data[24] in (2, 4)
        return labels // (255 // (2 ** data[24] - 1)) if scaled else labels


def largest_label(data: bytes) -> int:
    """The largest number that a pixel of a label map's file can hold: 1, 255 or 65535."""
    with open_image(data) as image:
        return {"1": 1, "L": 255, "P": 255}.get(image.mode, 65535)


@dataclass(frozen=True)
class Plan:
    """A crop box in source pixels, then a resize to the target size, then possibly a horizontal flip."""

    top: int
    left: int
    height: int
    width: int
    flip: bool


class ImageTransform:
    """Crops to the target's aspect ratio, resizes with antialiasing and flips; never distorts.

    image_size: target side, or (height, width)
    crop: "center" and "random" take the largest box that fits; "random_resized" a box of `scale` (lowest, highest)
    times its area
    flip: mirror half of the samples
    """

    def __init__(
        self,
        image_size: int | Sequence[int],
        crop: str = "center",
        flip: bool = False,
        scale: Sequence[float] = (0.5, 1.0),
    ):
        if crop not in ("center", "random", "random_resized"):
            raise ValueError(f"data.crop is center, random or random_resized, not {crop!r}")
        self.size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        self.crop, self.flip, self.scale = crop, flip, tuple(scale)
        # Not at the top of the file: this import takes two seconds, which commands that read no images save.
        # Data-loading processes that are started later inherit it.
        import torchvision.transforms.v2.functional  # noqa: F401

    def deterministic(self) -> "ImageTransform":
        """The same size with a centre crop and without flips: for validation, caching and reference statistics."""
        return ImageTransform(self.size)

    def sized(self, size: tuple[int, int]) -> "ImageTransform":
        """The same transform for another target size, (height, width)."""
        return self if size == self.size else ImageTransform(size, self.crop, self.flip, self.scale)

    @property
    def cacheable(self) -> bool:
        """Whether one encoding per sample (and one of its mirror image) covers all outputs."""
        return self.crop == "center"

    def plan(self, height: int, width: int, rng: np.random.Generator | None) -> Plan:
        """Draws the crop for a source of (height, width); rng may be None if nothing is random."""
        target_h, target_w = self.size
        fit = min(height / target_h, width / target_w)
        if self.crop == "random_resized":
            fit *= rng.uniform(*self.scale) ** 0.5
        box_h, box_w = max(1, round(target_h * fit)), max(1, round(target_w * fit))
        free_h, free_w = height - box_h, width - box_w
        top, left = free_h // 2, free_w // 2
        if self.crop != "center":
            top, left = int(rng.integers(free_h + 1)), int(rng.integers(free_w + 1))
        return Plan(top, left, box_h, box_w, bool(self.flip and rng.random() < 0.5))

    def apply_to_boxes(self, boxes: np.ndarray, plan: Plan, shape: tuple[int, int], least: float = 0.2) -> np.ndarray:
        """Converts boxes (N, 5) from unit coordinates of an image of size `shape` to those of the cropped image.
        Boxes are clipped to it; boxes that keep no more than `least` of their area are dropped."""
        height, width = shape
        scale = np.array([width, height, width, height], float)
        corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:4]], axis=1) * scale
        corners = (corners - [plan.left, plan.top] * 2) / [plan.width, plan.height, plan.width, plan.height]
        if plan.flip:
            corners = np.stack([1 - corners[:, 2], corners[:, 1], 1 - corners[:, 0], corners[:, 3]], axis=1)
        clipped = corners.clip(0, 1)
        area, left = ((c[:, 2:] - c[:, :2]).clip(0).prod(axis=1) for c in (corners, clipped))
        kept = left > least * area
        return np.concatenate([clipped[:, :2], clipped[:, 2:] - clipped[:, :2], boxes[:, 4:]], axis=1)[kept]

    def apply(self, image: torch.Tensor, plan: Plan, nearest: bool = False) -> torch.Tensor:
        """(C, H, W) -> (C, *image_size), same dtype. nearest: for label maps."""
        image = image[:, plan.top : plan.top + plan.height, plan.left : plan.left + plan.width]
        if image.shape[1:] != self.size:
            from torchvision.transforms.v2 import InterpolationMode
            from torchvision.transforms.v2 import functional as TF

            mode = InterpolationMode.NEAREST if nearest else InterpolationMode.BICUBIC
            image = TF.resize(image, list(self.size), interpolation=mode, antialias=not nearest)
        return image.flip(2) if plan.flip else image

    def apply_reduced(self, image: torch.Tensor, plan: Plan, factor: int) -> torch.Tensor:
        """The same crop of an image (C, H, W), uint8 with 1 or 3 channels, that is `factor` times smaller: to a size as
        much smaller. Its box may lie between pixels."""
        (height, width), array = self.size, image.permute(1, 2, 0).numpy()
        box = (plan.left, plan.top, plan.left + plan.width, plan.top + plan.height)
        cut = Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).resize(
            (width // factor, height // factor), Image.Resampling.BICUBIC, box=tuple(v / factor for v in box)
        )
        cropped = torch.from_numpy(np.array(cut).reshape(height // factor, width // factor, -1)).permute(2, 0, 1)
        return cropped.flip(2) if plan.flip else cropped


def to_signed_range(image: torch.Tensor) -> torch.Tensor:
    """Converts uint8 to float32 in [-1, 1]; floats are already in that range, apart from overshoot of resizing,
    which is clamped."""
    return image.float() / 127.5 - 1 if image.dtype == torch.uint8 else image.float().clamp(-1, 1)


def read_bytes(path: str, option: str) -> bytes:
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{option}={path}: there is no such file")
    return file.read_bytes()


def _read_cut(
    path: str, option: str, decode: Callable[[bytes], torch.Tensor], size: tuple[int, int], nearest: bool = False
) -> torch.Tensor:
    """Reads the image file given by `option`, centre-cropped and resized to `size`. Raises ValueError or
    FileNotFoundError, naming option and file."""
    try:
        image = decode(read_bytes(path, option))
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise ValueError(f"{option}={path}: {error}") from error
    transform = ImageTransform(size)
    return transform.apply(image, transform.plan(*image.shape[1:], None), nearest)


def read_image(path: str, size: tuple[int, int], channels: int, option: str = "image") -> torch.Tensor:
    """Reads an image file as (C, H, W) in [-1, 1], centre-cropped and resized to `size`. Raises ValueError or
    FileNotFoundError naming the file."""
    decode = partial(decode_image, extension=Path(path).suffix.lower().lstrip("."), channels=channels)
    return to_signed_range(_read_cut(path, option, decode, size))


def read_depth(path: str, size: tuple[int, int]) -> torch.Tensor:
    """Reads a depth map as (1, H, W) in [0, 1], see `_read_cut`: grey of 8 or 16 bits with all its levels, or the grey
    of a picture with colours."""

    def decode(data: bytes) -> torch.Tensor:
        with open_image(data) as image:
            deep = image.mode.startswith("I")
        if deep:
            return decode_labels(data).float() / largest_label(data)
        return decode_image(data, Path(path).suffix.lower().lstrip("."), 1) / 255.0

    return _read_cut(path, "depth", decode, size).clamp(0, 1)


def read_map(path: str, size: tuple[int, int]) -> torch.Tensor:
    """Reads a label map as int64 (H, W), see `_read_cut`. It is resized by nearest neighbour, which keeps the
    labels."""
    return _read_cut(path, "map", decode_labels, size, nearest=True)[0].long()
