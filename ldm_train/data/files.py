"""Image files: their extensions in a shard, and opening one. Without torch, so that preparing processes start fast."""

import io

from PIL import Image, UnidentifiedImageError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "npy")


def open_image(data: bytes) -> Image.Image:
    """The image of an encoded file, its pixels not yet read. Raises ValueError where it is no image."""
    try:
        return Image.open(io.BytesIO(data))
    except UnidentifiedImageError:  # whose own message is the address of a BytesIO
        raise ValueError(f"no image: {len(data)} bytes that begin with {data[:8]!r}") from None
    except Image.DecompressionBombError as error:  # neither an OSError nor a ValueError
        raise ValueError(str(error)) from error
