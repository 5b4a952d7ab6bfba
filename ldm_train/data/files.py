"""The files of a sample: their names in a shard, reading and writing them. Does not import torch, so that the
processes that prepare data start fast."""

import importlib
import io
import math
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "npy")
# The formats that are decoded, of those that Pillow has here: its others start programs (EPS), or are rare.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF", "HEIF")
ARRAYS = {".npy", ".tif", ".tiff"}  # files that hold an image with any number of channels, or other data
# Endings of images that few sources read.
PICTURES = (".gif", ".tif", ".tiff", ".heic", ".heif", ".avif", ".jfif", ".jp2")
RECIPE = "recipe.json"  # how a folder's pictures were drawn by ldm-sample
OWN_PICTURE = re.compile(r"\d{5,}_seed\d+\.png")  # names of these pictures


class DataError(ValueError):
    """Data that cannot be used for training; the message names the file and the remedy."""


def has_surrogates(text: str) -> bool:
    """Returns True if `text` holds halves of surrogate pairs, which are not valid text."""
    return any("\ud800" <= letter <= "\udfff" for letter in text)


def sample_and_field(member: str) -> tuple[str, str]:
    """Splits a tar member's name into (key of its sample, extension), at the first dot of the file name. Raises
    tarfile.ReadError for a name that is not UTF-8."""
    if has_surrogates(member):  # bytes that are not UTF-8
        raise tarfile.ReadError(f"a member's name is not UTF-8: {member!r}")
    folder, _, name = member.rpartition("/")
    stem, _, extension = name.partition(".")
    return f"{folder}/{stem}" if folder else stem, extension


def files_below(folder: Path) -> list[Path]:
    """The files in a folder and its subfolders, also linked ones, in the order of their paths; without hidden ones."""
    files, seen = [], {os.path.realpath(folder)}
    for place, inner, names in os.walk(folder, followlinks=True):
        inner[:] = [n for n in inner if not n.startswith(".") and os.path.realpath(os.path.join(place, n)) not in seen]
        seen |= {os.path.realpath(os.path.join(place, name)) for name in inner}
        files += [Path(place, name) for name in names if not name.startswith(".")]
    return sorted(files)


def tell_left_out(folder: str | Path, files: Sequence[Path], read: Sequence[str]) -> None:
    """Prints how many of a folder's files are images with endings that are not among those in `read`."""
    if left := Counter(s for p in files if (s := p.suffix.lower()) in PICTURES and s not in read):
        counts = ", ".join(f"{count} {suffix}" for suffix, count in sorted(left.items()))
        print(f"{folder}: left out {counts}; read are {', '.join(read)}", flush=True)


def pictures_among(files: Sequence[Path]) -> list[Path]:
    """The images among a folder's files, in their order. An array beside an image of the same name is not an image:
    it holds features or the like. In folders of ldm-sample the pictures of the job are the images, without their grid,
    films and replays; if it has drawn arrays, these are, since the PNGs are false colours."""
    own = [p for p in files if OWN_PICTURE.fullmatch(p.with_suffix(".png").name)]
    jobs = {folder for folder in {p.parent for p in own} if (folder / RECIPE).is_file()}
    arrays = {p.parent for p in own if p.suffix.lower() == ".npy"}
    drawn = {p for p in own if p.suffix.lower() == (".npy" if p.parent in arrays else ".png")}
    usual = {p.with_suffix("") for p in files if p.suffix.lower() not in ARRAYS}

    def is_picture(path: Path) -> bool:
        if path.parent in jobs:
            return path in drawn and not (path.parent.name.startswith("replay") and path.parent.parent in jobs)
        return path.suffix.lower() not in ARRAYS or path.with_suffix("") not in usual

    return [p for p in files if is_picture(p)]


@cache
def _formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


@contextmanager
def open_image(data: bytes) -> Iterator[Image.Image]:
    """Opens an encoded image without reading its pixels. Raises ValueError if it is not an image, also for what
    Pillow raises within the block while it reads pixels; OSError if the file is truncated."""
    try:
        with Image.open(io.BytesIO(data), formats=_formats()) as image:
            yield image
    except UnidentifiedImageError:  # Pillow's message would show the address of a BytesIO
        raise ValueError(f"no image: {len(data)} bytes that begin with {data[:8]!r}") from None
    except (OSError, ValueError):
        raise
    except Exception as error:  # a decompression bomb, or any error of a decoder on damaged data
        raise ValueError(f"no image that can be read: {str(error) or type(error).__name__}") from error


def as_shown(image: Image.Image, mode: str = "RGB") -> Image.Image:
    """Converts an opened image to what a viewer shows, in mode RGB or L: 16-bit grey is scaled, transparency put
    over white, the EXIF rotation applied."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":  # 16-bit grey: scaled, because convert() would clip
        grey = np.asarray(image, dtype=np.float64)
        deep = image.mode.startswith("I;16") or grey.max() > 255
        image = Image.fromarray((grey / (257.0 if deep else 1.0)).round().clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert(mode)


def read_npy(data: bytes) -> np.ndarray:
    """The array of a .npy file, in native byte order; never a pickle. Raises ValueError for everything else, before
    memory is allocated, because a header may claim any shape."""
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, _, dtype = header(file)
    except Exception as error:  # headers are Python literals: numpy raises errors of many types on damaged ones
        raise ValueError(f"no .npy of version 1.0 or 2.0: {str(error)[:100] or type(error).__name__}") from error
    if dtype.hasobject:
        raise ValueError("npy of Python objects, which are never unpickled (allow_pickle=False)")
    if (claimed := dtype.itemsize * math.prod(shape)) != len(data) - file.tell() or min(shape, default=0) < 0:
        raise ValueError(f"npy of {len(data) - file.tell()} bytes for {claimed} of shape {shape}")
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except Exception as error:
        raise ValueError(f"no .npy: {str(error)[:100] or type(error).__name__}") from error
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def encoded_npy(array: np.ndarray) -> bytes:
    """Encodes an array as .npy in C order, so that readers can memory-map it."""
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()


def encoded_png(image: Image.Image | np.ndarray, **options: int) -> bytes:
    """Encodes an image, or a uint8 array (H, W) or (H, W, 3), as PNG. options: for Pillow's PNG writer."""
    buffer = io.BytesIO()
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(buffer, format="PNG", **options)
    return buffer.getvalue()


def optional_package(name: str, user: str) -> ModuleType:
    """Imports a module of a package that only some data need. Raises DataError if it is not installed, with a
    message that begins with `user` (e.g. "LSUN needs")."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise DataError(f"{user} the package {package}: pip install 'ldm-train[prepare]'") from error
