"""Reads images from folders and tars that were not prepared as shards."""

import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from ldm_train.data.batch import FIELDS
from ldm_train.data.files import IMAGE_EXTENSIONS, files_below, pictures_among, tell_left_out
from ldm_train.data.transforms import ImageTransform, channels_of, decode_image, to_signed_range

# File endings of a sample's members that are not its image.
BESIDE = tuple(f".{e}" for field in FIELDS.values() for e in field.extensions if "." in e)


def _is_image(name: str, members: set[str]) -> bool:
    """Returns True if a member of a tar is a sample's image, not one of its other pictures, such as a mask."""
    if name.rpartition(".")[2] not in IMAGE_EXTENSIONS or name.endswith(BESIDE):
        return False
    folder, slash, file = name.rpartition("/")
    own, _, extension = file.partition(".")
    of_sample = {f"{folder}{slash}{own}.{e}" for e in IMAGE_EXTENSIONS}
    return extension in IMAGE_EXTENSIONS or not of_sample & members


def _files(source: str) -> Iterator[tuple[str, bytes]]:
    """Yields (name, content) of the images in a folder (and its subfolders) or tar, in the order of names or
    members."""
    path = Path(source).expanduser()
    if path.is_dir():
        files = files_below(path)
        tell_left_out(path, files, [f".{extension}" for extension in IMAGE_EXTENSIONS])
        images = [p for p in files if p.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS]
        for file in pictures_among(images):
            yield str(file), file.read_bytes()
    elif path.is_file() and tarfile.is_tarfile(path):
        with tarfile.open(path) as tar:
            members = {member.name.lower() for member in tar}
            for member in tar:
                name = member.name.lower()
                if member.isfile() and _is_image(name, members):
                    yield f"{path}:{member.name}", tar.extractfile(member).read()
    else:
        raise FileNotFoundError(f"{source} is neither a folder of images nor a tar")


def image_batches(sources: Sequence[str], size: int | None = None, batch_size: int = 64) -> Iterator[torch.Tensor]:
    """Yields batches (B, C, H, W) in [-1, 1] from folders and tars; consecutive images of one size share a batch.

    C is set by the first file: a .npy's own number of channels, 3 for any other. size: side of the square to which each
    image is centre-cropped and resized, as in training; None: unchanged. Raises ValueError naming a file that is not an
    image, FileNotFoundError if a source does not exist or no source holds any image.
    """
    transform, waiting, channels = ImageTransform(size) if size else None, [], None
    for source in sources:
        for name, data in _files(source):
            try:
                extension = name.rpartition(".")[2].lower()
                channels = channels or (channels_of(data) if extension == "npy" else 3)
                image = decode_image(data, extension, channels)
            except (OSError, ValueError) as error:
                raise ValueError(f"{name} cannot be read as an image ({error}); repair or remove it") from error
            if transform:
                image = transform.apply(image, transform.plan(*image.shape[1:], None))
            image = to_signed_range(image)
            if waiting and (len(waiting) == batch_size or waiting[0].shape != image.shape):
                yield torch.stack(waiting)
                waiting = []
            waiting.append(image)
    if channels is None:
        raise FileNotFoundError(f"there are no images in {', '.join(sources)} ({', '.join(IMAGE_EXTENSIONS)})")
    yield torch.stack(waiting)
