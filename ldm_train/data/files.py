"""The files of a sample: their names in a shard, and opening an image. Without torch, so that preparing processes start
fast."""

import io
import math
import tarfile

import numpy as np
from PIL import Image, UnidentifiedImageError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "npy")


class DataError(ValueError):
    """Data that training must not start on; the message names the file and the remedy."""


def sample_and_field(member: str) -> tuple[str, str]:
    """A tar member's name -> (key of its sample, extension): the file's own name is cut at its first dot. Raises
    tarfile.ReadError for a name that is no text."""
    if any("\ud800" <= letter <= "\udfff" for letter in member):  # bytes that are not UTF-8
        raise tarfile.ReadError(f"a member's name is not UTF-8: {member!r}")
    folder, _, name = member.rpartition("/")
    stem, _, extension = name.partition(".")
    return f"{folder}/{stem}" if folder else stem, extension


def open_image(data: bytes) -> Image.Image:
    """The image of an encoded file, its pixels not yet read. Raises ValueError where it is no image."""
    try:
        return Image.open(io.BytesIO(data))
    except UnidentifiedImageError:  # whose own message is the address of a BytesIO
        raise ValueError(f"no image: {len(data)} bytes that begin with {data[:8]!r}") from None
    except Image.DecompressionBombError as error:  # neither an OSError nor a ValueError
        raise ValueError(str(error)) from error


def npy_header(data: bytes) -> tuple[tuple[int, ...], np.dtype, int]:
    """(shape, dtype, length of the header) of a .npy. Raises ValueError where it is none, is of Python objects, or does not hold
    the bytes that it claims: a header may claim any size."""
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
        if read is None:
            raise ValueError(f"version {version}, expected 1.0 or 2.0")
        shape, _, dtype = read(file)
    except Exception as error:  # a damaged header makes numpy and Python's parser raise whatever comes first
        raise ValueError(f"no .npy: {' '.join(str(error).split())[:200]}") from error
    if dtype.hasobject:
        raise ValueError("npy of Python objects, which are never unpickled (allow_pickle=False)")
    if (claimed := dtype.itemsize * math.prod(shape)) != len(data) - file.tell():
        raise ValueError(f"npy of {len(data) - file.tell()} bytes for {claimed} of shape {shape}")
    return shape, dtype, file.tell()


def read_npy(data: bytes) -> np.ndarray:
    """The array of a .npy, in this machine's byte order. Raises ValueError as `npy_header`."""
    npy_header(data)
    array = np.load(io.BytesIO(data), allow_pickle=False)
    return array.astype(array.dtype.newbyteorder("="), copy=False)
