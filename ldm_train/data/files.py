"""The files of a sample: their names in a shard, and opening an image. Without torch, so that preparing processes start
fast."""

import io
import tarfile

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
