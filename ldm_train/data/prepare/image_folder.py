"""A folder of images, with subfolders as classes and .txt files beside the images as captions."""

import io
import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageOps

from ldm_train.data.files import ARRAYS, as_shown, encoded_png, files_below, open_image, pictures_among, tell_left_out
from ldm_train.data.prepare import arrays
from ldm_train.data.prepare.build import Source, class_and_captions, digest, in_validation
from ldm_train.data.shards import DataError

EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
# The formats that shards hold, with their endings. A camera's JPEG with several pictures is an MPO; the first is shown.
HELD = {"JPEG": ("jpg", "jpeg"), "MPO": ("jpg", "jpeg"), "PNG": ("png",), "WEBP": ("webp",), "BMP": ("bmp",)}


def image_bytes(
    path: Path, max_size: int | None, layout: str | None = None, limits: Sequence[float] | None = None
) -> tuple[str, bytes]:
    """(extension, bytes) of an image file, unchanged or with its short side reduced to `max_size` pixels; .npy and
    .tif files are converted to what shards hold (layout, limits: see `arrays`).

    Reduced JPEGs stay JPEG (quality 95), other reduced images become PNG. Raises OSError or ValueError naming the file.
    """
    data, extension = path.read_bytes(), path.suffix.lower().lstrip(".")
    if path.suffix.lower() in ARRAYS:
        try:
            extension, data = arrays.picture_of(data, extension, max_size, layout, limits, str(path))
        except DataError:
            raise
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    return (extension, data) if extension == "npy" else stored(data, extension, max_size, str(path))


def stored(data: bytes, extension: str | None, max_size: int | None, name: str) -> tuple[str, bytes]:
    """Like `image_bytes`, for an encoded image; errors call it `name`. Its format is that of its content; `extension`,
    of its name, is kept if it is one of that format. Formats that shards do not hold become PNG, as a viewer shows
    them."""
    try:
        with open_image(data) as image:
            endings = HELD.get(image.format, ())
            large = max_size is not None and min(image.size) > max_size
            if endings and not large and (endings != ("bmp",) or extension == "bmp"):
                return (extension if extension in endings else endings[0]), data
            if not endings:
                image = as_shown(image)
            if large:
                image = ImageOps.exif_transpose(image)
                if image.mode in ("1", "P") or "transparency" in image.info:  # such pixels cannot be interpolated
                    image = image.convert("RGBA" if "transparency" in image.info else "RGB")
                image = image.resize(arrays.reduced_size(image.size, max_size), Image.Resampling.LANCZOS)
            if "jpg" not in endings:
                return "png", encoded_png(image)
            buffer = io.BytesIO()
            image.convert("RGB").save(buffer, format="JPEG", quality=95)
            return "jpg", buffer.getvalue()
    except (OSError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from error


def stamp(file: Path) -> list[int]:
    """What tells a file from an earlier version of it: the size and, where that follows from the picture's shape, the
    time of its last change."""
    known = file.stat()
    return [known.st_size, *([known.st_mtime_ns] if file.suffix.lower() in ARRAYS | {".bmp"} else [])]


def check_count(where: str, count: int, expected: int | None) -> None:
    """Raises DataError if a data set of known size has another number of images."""
    if expected is not None and count != expected:
        raise DataError(
            f"{where} has {count} images, the data set as published {expected}; complete the download, or take what there "
            "is with source.expect=null"
        )


def _folders(root: Path) -> dict[str | None, Path]:
    """The folders of the splits below `root`; {None: the folder of all images} if there are no splits."""
    inner = [p for p in root.iterdir() if not p.name.startswith(".")]
    if len(inner) == 1 and (inner[0] / "train").is_dir() and (inner[0] / "val").is_dir():
        root = inner[0]  # the archive has one top folder
    train = root / "train"
    validation = [root / name for name in ("val", "validation", "valid", "test") if (root / name).is_dir()]
    if train.is_dir() and validation:
        return {"train": train, "val": validation[0]}
    pictures = any(p.suffix.lower() in EXTENSIONS | ARRAYS for p in inner)
    return {None: train if [p for p in inner if p.is_dir()] == [train] and not pictures else root}


def _files(folders: dict[str | None, Path]) -> list[tuple[str | None, Path, Path]]:
    """(split, path relative to its split's folder, path) of all images. Prints how many files beside images, and of
    formats that are not read here, are left out."""
    files, beside = [], []
    for split, folder in folders.items():
        inside = files_below(folder)
        tell_left_out(folder, inside, sorted(EXTENSIONS | ARRAYS))
        known = [p for p in inside if p.suffix.lower() in EXTENSIONS | ARRAYS]
        pictures = pictures_among(known)
        files += [(split, p.relative_to(folder), p) for p in pictures]
        beside += set(known).difference(pictures)
    if beside:
        print(f"{len(beside)} files beside pictures of the same name are left out (first: {min(beside)})")
    return files


def _classes(files: Sequence[tuple[str | None, Path, Path]]) -> list[str] | None:
    """The names of the top-level subfolders if all files lie in them; None if some do not, which is printed."""
    names = sorted({relative.parts[0] for _, relative, _ in files if len(relative.parts) > 1})
    outside = [path for _, relative, path in files if len(relative.parts) == 1]
    if names and outside:
        print(f"no classes: {len(outside)} images lie outside the class folders (first: {outside[0]})")
    return names if names and not outside else None


class ImageFolder(Source):
    """Images from a folder, with classes and captions if it has any.

    path: a folder; its subfolders are classes (nested ones belong to their topmost folder). Subfolders named
    train and val (or validation, valid, test) are splits. val_fraction: of the images, if there is no validation
    folder; 0: no val split.
    max_size: reduce the short side to so many pixels. labels: false if the subfolders are not classes.
    expect: the number of images of a data set of known size (None: any).
    layout, range: for .npy and .tif files, see `arrays.channels_last` and `arrays.in_signed_range`. Such a file beside an
    image of the same name is left out (see `pictures_among`). caption: for images without a .txt beside them.

    Raises FileNotFoundError if there is no folder or no image, DataError if two files would get one key or the number
    of images is not the expected one, ValueError for an invalid layout or range.
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
        caption: str | None = None,
    ):
        if layout is not None and layout not in arrays.LAYOUTS:
            raise ValueError(f"source.layout is hwc or chw, not {layout!r}")
        numbers = isinstance(range, list | tuple) and all(type(v) in (int, float) and math.isfinite(v) for v in range)
        if range is not None and not (numbers and len(range) == 2 and range[0] < range[1]):
            raise ValueError(f"source.range is [low,high], what black and white are, not {range}")
        self.layout, self.limits, self.max_size = layout, range, max_size
        self.caption = None if caption is None else str(caption)
        if not Path(path).is_dir():
            raise FileNotFoundError(f"path={path} is not a folder; give a folder of images")
        files = _files(_folders(Path(path)))
        if not files:
            raise FileNotFoundError(f"no images ({', '.join(sorted(EXTENSIONS | ARRAYS))}) in {path}")
        check_count(path, len(files), expect)
        self.classes = _classes(files) if labels else None
        number = {name: k for k, name in enumerate(self.classes or [])}
        self.items = {"train": [], "val": []}
        for split, relative, file in files:
            stem = "_".join(relative.with_suffix("").parts).replace(".", "_")
            key = f"{stem}_{relative.suffix.lstrip('.').lower()}"
            own = split or ("val" if in_validation(key, val_fraction) else "train")
            self.items[own].append((key, file, number.get(relative.parts[0])))
        # train/cats/0.jpg and val/cats/0.jpg, a common layout, are two samples.
        trained = {key for key, _, _ in self.items["train"]}
        self.items["val"] = [(f"val_{k}" if k in trained else k, file, label) for k, file, label in self.items["val"]]
        if val_fraction == 0 and not self.items["val"]:
            del self.items["val"]
        listed = [item for items in self.items.values() for item in items]
        files_by_key: dict[str, Path] = {}
        for key, file, _ in listed:
            if files_by_key.setdefault(key, file) != file:
                raise DataError(f"{files_by_key[key]} and {file} would both get the key {key}; rename one of them")
        options = {
            "source": "image_folder",
            "val_fraction": val_fraction,
            "max_size": max_size,
            "classes": self.classes,
        }
        self.identity = options | {"files": digest([[key, *stamp(file)] for key, file, _ in listed])}
        texts = [(key, file.with_suffix(".txt")) for key, file, _ in listed]
        if stamps := [[key, (s := text.stat()).st_size, s.st_mtime_ns] for key, text in texts if text.is_file()]:
            self.identity["captions"] = digest(stamps)
        more = {"layout": layout, "range": range, "caption": self.caption}
        self.identity |= {k: v for k, v in more.items() if v is not None}

    def sample(self, split: str, i: int) -> tuple[str, dict[str, bytes]]:
        key, path, label = self.items[split][i]
        extension, data = image_bytes(path, self.max_size, self.layout, self.limits)
        fields = {extension: data} | class_and_captions(label)
        if (caption := path.with_suffix(".txt")).is_file():
            fields["txt"] = caption.read_bytes().strip()
        elif self.caption is not None:
            fields["txt"] = self.caption.encode()
        return key, fields
