"""Converts images with any number of channels, from .npy and .tif files, to what shards hold: .npy, (H, W, C), uint8
or float32 in [-1, 1]."""

import io
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageOps

from ldm_train.data.files import DataError, encoded_npy, encoded_png, open_image, optional_package, read_npy

LAYOUTS = ("hwc", "chw")
MOST_COMPRESSED, LEAST_CLAIM = 2_000, 1 << 25  # ratio (deflate reaches 1,032); bytes that are not checked
# Modes of single-page TIFFs that image viewers show; TIFFs of other modes are read as arrays.
VIEWED = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "I;16", "I;16B", "I;16L")


def channels_last(array: np.ndarray, layout: str | None, name: str) -> np.ndarray:
    """Converts (H, W), (H, W, C) or (C, H, W) to (H, W, C).

    layout: "hwc" or "chw". None: the channels are the first or the last axis, whichever is at most half as long as both
    others. Raises ValueError for other shapes; DataError, naming the remedy, if the shape is ambiguous.
    """
    if array.ndim == 2:
        return array[..., None]
    if array.ndim != 3 or not array.size:
        raise ValueError(f"an array of shape {array.shape} is not a picture; expected (H, W), (H, W, C) or (C, H, W)")
    a, b, c = array.shape
    last, first = 2 * c <= min(a, b), 2 * a <= min(b, c)
    if layout is None and not (last or first):
        raise DataError(
            f"{name}: the shape {array.shape} does not say which axis holds the channels; set source.layout=hwc (the last) "
            "or source.layout=chw (the first), which source=image_folder has"
        )
    layout = layout or ("hwc" if last else "chw")
    return np.moveaxis(array, 0, 2) if layout == "chw" else array


def in_signed_range(array: np.ndarray, limits: Sequence[float] | None, name: str) -> np.ndarray:
    """Converts values to those that shards hold. limits: the values that become -1 and 1; values beyond are clipped.
    None: uint8 is kept, uint16 is scaled from its whole range, floats must be in [-1, 1].

    Raises ValueError for values that are not finite numbers; DataError, naming the remedy, if limits are needed.
    """
    if array.dtype.kind not in "uif" or not np.isfinite(array).all():
        raise ValueError(f"an array of {array.dtype} with NaN, inf or no numbers is not a picture")
    if limits is None and array.dtype == np.uint8:
        return array
    if limits is None and array.dtype == np.uint16:
        limits = (0, 65535)
    if limits is not None:
        low, high = limits
        return np.clip((array.astype(np.float64) - low) / (high - low) * 2 - 1, -1, 1).astype(np.float32)
    if array.dtype.kind != "f" or abs(array).max() > 1:
        raise DataError(
            f"{name} holds {array.dtype} from {array.min():g} to {array.max():g}, which is neither uint8, uint16 nor float in "
            "[-1, 1]; set what black and white are: source.range=[low,high] of source=image_folder"
        )
    return array.astype(np.float32)


def _bands(data: bytes) -> np.ndarray:
    """The first series of a TIFF as (H, W, C): its bands and pages are the channels. Raises ValueError if it is
    unreadable."""
    tifffile = optional_package("tifffile", "TIFFs with several pages or bands need")
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            series = file.series[0]
            # Checked before the array is allocated: no compression in use has such a ratio.
            if math.prod(series.shape) * series.dtype.itemsize > max(LEAST_CLAIM, MOST_COMPRESSED * len(data)):
                raise ValueError(f"{len(data)} bytes for the shape {series.shape}")
            axes, array = series.axes, series.asarray()
            array = array.astype(array.dtype.newbyteorder("="), copy=False)
    except Exception as error:  # on damaged data its decoders raise errors of any type
        raise ValueError(f"no TIFF that can be read: {error}") from error
    if not {"Y", "X"} <= set(axes):
        raise ValueError(f"a TIFF with the axes {axes} is not a picture")
    array = np.moveaxis(array, (axes.index("Y"), axes.index("X")), (0, 1))
    return array.reshape(*array.shape[:2], -1)


def _viewed(data: bytes) -> bytes | None:
    """Converts a single-page TIFF with a mode in VIEWED to PNG; None for any other file."""
    try:
        with open_image(data) as image:
            if getattr(image, "n_frames", 1) > 1 or image.mode not in VIEWED:
                return None
            image = ImageOps.exif_transpose(image)
            written = {"CMYK": "RGB", "PA": "RGBA"}.get(image.mode, image.mode)  # PNG supports neither
            return encoded_png(image.convert(written))
    except Exception:  # more bands than Pillow supports, or damage, which `_bands` reports
        return None


def reduced_size(size: tuple[int, int], max_size: int | None) -> tuple[int, int] | None:
    """(width, height) with the short side reduced to `max_size` pixels; None if no reduction is needed."""
    if max_size is None or min(size) <= max_size:
        return None
    factor = max_size / min(size)
    return round(size[0] * factor), round(size[1] * factor)


def _reduced(array: np.ndarray, max_size: int | None) -> np.ndarray:
    """The array (H, W, C) with its short side reduced to `max_size` pixels, each channel separately."""
    if (size := reduced_size((array.shape[1], array.shape[0]), max_size)) is None:
        return array
    bands = [Image.fromarray(np.ascontiguousarray(band)) for band in np.moveaxis(array, 2, 0)]
    resized = np.stack([np.asarray(band.resize(size, Image.Resampling.LANCZOS)) for band in bands], axis=2)
    return resized if array.dtype == np.uint8 else resized.clip(-1, 1)


def picture_of(
    data: bytes, extension: str, max_size: int | None, layout: str | None, limits: Sequence[float] | None, name: str
) -> tuple[str, bytes]:
    """(extension, bytes) of a .npy or .tif file as shards hold it: a TIFF that viewers can show becomes a PNG (not
    yet reduced) unless `limits` are given, everything else a .npy.

    Raises ValueError for a file that cannot be read, DataError if an option is needed to interpret it.
    """
    if extension == "npy":
        array = channels_last(read_npy(data), layout, name)
    elif limits is None and (png := _viewed(data)) is not None:
        return "png", png
    else:
        array = _bands(data)
    return "npy", encoded_npy(_reduced(in_signed_range(array, limits, name), max_size))
