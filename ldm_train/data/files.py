"""The files of a sample: their names in a shard, reading and writing them. Without torch, so that preparing processes start
fast."""

import importlib
import io
import math
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "npy")
ARRAYS = {".npy", ".tif", ".tiff"}  # files that hold a picture of any number of channels, or other data


class DataError(ValueError):
    """Data that cannot be trained on; the message names the file and the remedy."""


def has_surrogates(text: str) -> bool:
    """Whether it holds halves of surrogate pairs, which are no text."""
    return any("\ud800" <= letter <= "\udfff" for letter in text)


def sample_and_field(member: str) -> tuple[str, str]:
    """A tar member's name -> (key of its sample, extension): the file's own name is cut at its first dot. Raises
    tarfile.ReadError for a name that is no text."""
    if has_surrogates(member):  # bytes that are not UTF-8
        raise tarfile.ReadError(f"a member's name is not UTF-8: {member!r}")
    folder, _, name = member.rpartition("/")
    stem, _, extension = name.partition(".")
    return f"{folder}/{stem}" if folder else stem, extension


def pictures_among(files: Sequence[Path]) -> list[Path]:
    """Those of a folder's files that are its pictures, in their order. An array beside a picture of its name is not another
    picture: it holds features or the like. Where ldm-sample has drawn arrays, it is they: the PNGs are false colours."""
    drawn = {f for f in {p.parent for p in files if p.suffix.lower() == ".npy"} if (f / "recipe.json").is_file()}
    usual = {p.with_suffix("") for p in files if p.suffix.lower() not in ARRAYS}

    def is_picture(path: Path) -> bool:
        if path.parent in drawn:
            return path.suffix.lower() == ".npy"
        return path.suffix.lower() not in ARRAYS or path.with_suffix("") not in usual

    return [p for p in files if is_picture(p)]


@contextmanager
def open_image(data: bytes) -> Iterator[Image.Image]:
    """The image of an encoded file, its pixels not yet read. Raises ValueError where it is no image, also for what Pillow
    raises within the block while it reads pixels; OSError where it is cut short."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            yield image
    except UnidentifiedImageError:  # Pillow's message would be the address of a BytesIO
        raise ValueError(f"no image: {len(data)} bytes that begin with {data[:8]!r}") from None
    except (OSError, ValueError):
        raise
    except Exception as error:  # a decompression bomb, or any error of a decoder on damaged data
        raise ValueError(f"no image that can be read: {str(error) or type(error).__name__}") from error


def as_shown(image: Image.Image, mode: str = "RGB") -> Image.Image:
    """What a viewer shows of an image that was opened, in mode RGB or L: 16-bit grey scaled, transparency over white, turned as
    its EXIF says."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":  # 16-bit grey: scale, where convert() would clip
        grey = np.asarray(image, dtype=np.float64)
        deep = image.mode.startswith("I;16") or grey.max() > 255
        image = Image.fromarray((grey / (257.0 if deep else 1.0)).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert(mode)


def read_npy(data: bytes) -> np.ndarray:
    """The array of a .npy file, in this machine's order of bytes; never a pickle. Raises ValueError for everything else,
    before memory is taken for it: a header may claim any shape."""
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
    """A .npy in C order, which its readers may map into memory."""
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()


def encoded_png(image: Image.Image | np.ndarray, **options: int) -> bytes:
    """image: also an array (H, W) or (H, W, 3) of uint8. options: of Pillow's PNG writer."""
    buffer = io.BytesIO()
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(buffer, format="PNG", **options)
    return buffer.getvalue()


def optional_package(name: str, user: str) -> ModuleType:
    """A module of a package that only some data need. Raises DataError, which begins with `user` ("LSUN needs")."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise DataError(f"{user} the package {package}: pip install 'ldm-train[prepare]'") from error
