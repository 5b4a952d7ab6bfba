"""Photos with label maps in a second folder, e.g. landscapes, ADE20K, COCO-Stuff."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageOps

from ldm_train.data.files import encoded_png, open_image
from ldm_train.data.prepare.arrays import reduced_size
from ldm_train.data.prepare.build import Source, digest, in_validation
from ldm_train.data.prepare.image_folder import EXTENSIONS, image_bytes, stamp
from ldm_train.data.shards import DataError


def _pairs(images: Path, maps: Path, path: str) -> Iterator[tuple[str, Path, Path]]:
    """Yields (key, image, its label map) from two folders below `path`. Raises FileNotFoundError if a folder is
    missing, DataError if a map is."""
    for folder in (images, maps):
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not a folder; set source.images and source.maps (now below {path})")
    maps_by_stem = {p.relative_to(maps).with_suffix(""): p for p in maps.rglob("*.png")}
    for image in sorted(images.rglob("*")):
        if image.suffix.lower() not in EXTENSIONS or image.name.startswith("."):
            continue
        stem = image.relative_to(images).with_suffix("")
        if stem not in maps_by_stem:
            raise DataError(f"{image} has no label map {maps / stem}.png")
        yield "_".join(stem.parts).replace(".", "_"), image, maps_by_stem[stem]


class ImagesWithMaps(Source):
    """Images with label maps from a second folder.

    path: folder that contains the folders `images` and `maps`, in which equal file stems mean one sample; maps
    are PNGs whose pixel value is the label. max_size: reduce the short side of both (maps by nearest neighbour).

    val_images, val_maps: folders of validation samples; without them, val_fraction of all samples.
    Raises FileNotFoundError for a missing folder, DataError naming an image without a map.
    """

    def __init__(
        self,
        path: str,
        images: str = "images",
        maps: str = "segmentations",
        val_images: str | None = None,
        val_maps: str | None = None,
        val_fraction: float = 0.05,
        max_size: int | None = 512,
    ):
        self.max_size, self.items = max_size, {"train": [], "val": []}
        folders = [(None if val_images is None else "train", images, maps)]
        if val_images is not None:
            folders.append(("val", val_images, val_maps or maps))
        for split, image_folder, map_folder in folders:
            for key, *files in _pairs(Path(path, image_folder), Path(path, map_folder), path):
                own = split or ("val" if in_validation(key, val_fraction) else "train")
                self.items[own].append((key, *files))
        keys = Counter(key for items in self.items.values() for key, _, _ in items)
        if twice := [key for key, count in keys.items() if count > 1]:
            raise DataError(f"two images below {path} would both get the key {twice[0]}; rename one of them")
        options = {"source": "images_with_maps", "max_size": max_size, "val_fraction": val_fraction}
        sizes = [[k, *stamp(a), *stamp(b)] for items in self.items.values() for k, a, b in items]
        self.identity = options | {"files": digest(sizes)}

    def sample(self, split: str, i: int) -> tuple[str, dict[str, bytes]]:
        key, path, map_path = self.items[split][i]
        extension, data = image_bytes(path, self.max_size)
        with open_image(path.read_bytes()) as image, open_image(map_path.read_bytes()) as labels:
            if labels.mode not in ("L", "P", "I;16", "I", "1"):
                raise ValueError(f"{map_path} is {labels.mode}; a label map is a grey or palette PNG")
            size = ImageOps.exif_transpose(image).size  # as shown, and as training sees it
            if size != labels.size:
                raise ValueError(f"{path} shows {size} pixels, {map_path} {labels.size}")
            if size := reduced_size(labels.size, self.max_size):
                return key, {extension: data, "seg.png": encoded_png(labels.resize(size, Image.Resampling.NEAREST))}
        return key, {extension: data, "seg.png": map_path.read_bytes()}
