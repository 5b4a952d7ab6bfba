"""A folder of images, with folders as classes and .txt files beside the images as captions."""

import io
import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageOps

from ldm_train.data.files import ARRAYS, open_image, pictures_among
from ldm_train.data.prepare import arrays
from ldm_train.data.prepare.build import digest, in_validation
from ldm_train.data.shards import DataError

EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


def image_bytes(
    path: Path, max_size: int | None, layout: str | None = None, limits: Sequence[float] | None = None
) -> tuple[str, bytes]:
    """(extension, bytes) of an image file, as it is, or with its short side reduced to `max_size` pixels; of .npy and .tif
    files as shards hold them (layout, limits: see `arrays`).

    Reduced images become JPEG (quality 95) if they were, PNG otherwise. Raises OSError or ValueError naming the file.
    """
    data, extension = path.read_bytes(), path.suffix.lower().lstrip(".")
    if path.suffix.lower() in ARRAYS:
        try:
            extension, data = arrays.picture_of(data, extension, max_size, layout, limits, str(path))
        except DataError:
            raise
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    return (extension, data) if extension == "npy" else reduced(data, extension, max_size, str(path))


def reduced(data: bytes, extension: str, max_size: int | None, name: str) -> tuple[str, bytes]:
    """As `image_bytes`, of an encoded image that errors shall call `name`."""
    if max_size is None:
        return extension, data
    try:
        return _reduced(data, extension, max_size)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from error


def encoded_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def check_count(where: str, count: int, expected: int | None) -> None:
    """Raises DataError where a data set of known size has another number of images."""
    if expected is not None and count != expected:
        raise DataError(
            f"{where} has {count} images, the data set as published {expected}; complete the download, or take what there "
            "is with source.expect=null"
        )


def _reduced(data: bytes, extension: str, max_size: int) -> tuple[str, bytes]:
    with open_image(data) as image:
        if min(image.size) <= max_size:
            return extension, data
        image = ImageOps.exif_transpose(image)
        if image.mode in ("1", "P"):  # which cannot be interpolated
            image = image.convert("RGBA" if "transparency" in image.info else "RGB")
        factor = max_size / min(image.size)
        image = image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.LANCZOS)
        if extension in ("jpg", "jpeg"):
            buffer = io.BytesIO()
            image.convert("RGB").save(buffer, format="JPEG", quality=95)
            return "jpg", buffer.getvalue()
        return "png", encoded_png(image)


class ImageFolder:
    """path: a folder; its subfolders are classes (nested ones belong to their topmost folder). Subfolders named train
    and val (or validation, test) are splits. val_fraction: of the images, where there is no validation folder.
    max_size: reduce the short side to so many pixels. labels: false for folders that mean nothing.
    expect: the number of images of a data set of known size (None: any).
    layout, range: of .npy and .tif files, see `arrays.channels_last` and `arrays.in_unit_range`. Such a file beside a picture
    of its name is left out (see `pictures_among`).

    Raises FileNotFoundError where there is no folder or no image, DataError where two files would get one key or the
    number of images is not the expected one, ValueError for a layout or range that is none.
    """

    def __init__(
        self,
        path: str,
        val_fraction: float = 0.05,
        max_size: int | None = None,
        labels: bool = True,
        expect: int | None = None,
        layout: str | None = None,
        range: Sequence[float] | None = None,
    ):
        if layout is not None and layout not in arrays.LAYOUTS:
            raise ValueError(f"source.layout is hwc or chw, not {layout!r}")
        numbers = isinstance(range, list | tuple) and all(type(v) in (int, float) and math.isfinite(v) for v in range)
        if range is not None and not (numbers and len(range) == 2 and range[0] < range[1]):
            raise ValueError(f"source.range is [low,high], what black and white are, not {range}")
        self.layout, self.limits = layout, range
        root = Path(path)
        if not root.is_dir():
            raise FileNotFoundError(f"path={path} is no folder; give a folder of images")
        inner = [p for p in root.iterdir() if not p.name.startswith(".")]
        if len(inner) == 1 and (inner[0] / "train").is_dir() and (inner[0] / "val").is_dir():
            root = inner[0]  # the archive has one top folder
        folders = {"train": root / "train"}
        for name in ("val", "validation", "valid", "test"):
            if (root / name).is_dir():
                folders["val"] = root / name
                break
        if not (folders["train"].is_dir() and "val" in folders):
            only_train = [p.name for p in root.iterdir() if not p.name.startswith(".")] == ["train"]
            folders = {"all": folders["train"] if only_train else root}
        known = EXTENSIONS | ARRAYS
        there = {
            split: sorted(p for p in folder.rglob("*") if p.suffix.lower() in known and not p.name.startswith("."))
            for split, folder in folders.items()
        }
        files = {split: pictures_among(paths) for split, paths in there.items()}
        if beside := sorted(
            {p for paths in there.values() for p in paths} - {p for paths in files.values() for p in paths}
        ):
            print(f"{len(beside)} files beside pictures of the same name are left out (first: {beside[0]})")
        if not any(files.values()):
            raise FileNotFoundError(f"no images ({', '.join(sorted(known))}) in {path}")
        check_count(path, sum(map(len, files.values())), expect)
        self.max_size = max_size
        tops = sorted(
            {
                p.relative_to(folders[s]).parts[0]
                for s, paths in files.items()
                for p in paths
                if len(p.relative_to(folders[s]).parts) > 1
            }
        )
        loose = [p for s, paths in files.items() for p in paths if len(p.relative_to(folders[s]).parts) == 1]
        self.classes = tops if tops and not loose and labels else None
        if tops and loose and labels:
            print(f"no classes: {len(loose)} images lie outside the class folders (first: {loose[0]})")
        self.items: dict[str, list[tuple[str, Path, int | None]]] = {"train": [], "val": []}
        for split, paths in files.items():
            for p in paths:
                relative = p.relative_to(folders[split])
                key = (
                    "_".join(relative.with_suffix("").parts).replace(".", "_")
                    + f"_{relative.suffix.lstrip('.').lower()}"
                )
                label = self.classes.index(relative.parts[0]) if self.classes else None
                target = split if split != "all" else ("val" if in_validation(key, val_fraction) else "train")
                self.items[target].append((key, p, label))
        files_by_key: dict[str, Path] = {}
        for key, p, _ in (item for items in self.items.values() for item in items):
            if files_by_key.setdefault(key, p) != p:
                raise DataError(f"{files_by_key[key]} and {p} would both get the key {key}; rename one of them")
        listing = [[key, p.stat().st_size] for items in self.items.values() for key, p, _ in items]
        self.identity = {
            "source": "image_folder",
            "val_fraction": val_fraction,
            "max_size": max_size,
            "classes": self.classes,
            "files": digest(listing),
        } | {name: value for name, value in (("layout", layout), ("range", range)) if value is not None}

    def splits(self) -> dict[str, int]:
        return {split: len(items) for split, items in self.items.items()}

    def sample(self, split: str, i: int) -> tuple[str, dict[str, bytes]]:
        key, path, label = self.items[split][i]
        extension, data = image_bytes(path, self.max_size, self.layout, self.limits)
        fields = {extension: data}
        if label is not None:
            fields["cls"] = str(label).encode()
        if (caption := path.with_suffix(".txt")).is_file():
            fields["txt"] = caption.read_bytes().strip()
        return key, fields
