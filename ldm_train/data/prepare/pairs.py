"""Photos with label maps in a second folder: landscapes, ADE20K, COCO-Stuff."""

from pathlib import Path

from PIL import Image

from ldm_train.data.files import open_image
from ldm_train.data.prepare.build import digest, in_validation
from ldm_train.data.prepare.image_folder import EXTENSIONS, encoded_png, image_bytes
from ldm_train.data.shards import DataError


class ImagesWithMaps:
    """path: folder with `images` and `maps`, the same file stem below both meaning one sample; maps are PNGs whose
    pixel value is the label. max_size: reduce the short side of both (maps by nearest neighbour).

    val_images, val_maps: folders of validation samples; without them val_fraction of all.
    Raises FileNotFoundError for a missing folder, DataError naming an image without a map.
    """

    classes: list[str] | None = None

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
        root, self.max_size = Path(path), max_size
        self.items: dict[str, list[tuple[str, Path, Path]]] = {"train": [], "val": []}
        folders = [("all" if val_images is None else "train", images, maps)]
        if val_images is not None:
            folders.append(("val", val_images, val_maps or maps))
        for part, image_folder, map_folder in folders:
            for folder in (root / image_folder, root / map_folder):
                if not folder.is_dir():
                    raise FileNotFoundError(
                        f"{folder} is no folder; set source.images and source.maps (now below {path})"
                    )
            maps_by_stem = {
                p.relative_to(root / map_folder).with_suffix(""): p for p in (root / map_folder).rglob("*.png")
            }
            for p in sorted((root / image_folder).rglob("*")):
                if p.suffix.lower() not in EXTENSIONS or p.name.startswith("."):
                    continue
                stem = p.relative_to(root / image_folder).with_suffix("")
                if stem not in maps_by_stem:
                    raise DataError(f"{p} has no label map {root / map_folder / stem}.png")
                key = "_".join(stem.parts).replace(".", "_")
                split = part if part != "all" else ("val" if in_validation(key, val_fraction) else "train")
                self.items[split].append((key, p, maps_by_stem[stem]))
        keys = [key for items in self.items.values() for key, _, _ in items]
        if len(keys) != len(set(keys)):
            twice = next(k for k in keys if keys.count(k) > 1)
            raise DataError(f"two images below {path} would both get the key {twice}; rename one of them")
        self.identity = {
            "source": "images_with_maps",
            "max_size": max_size,
            "val_fraction": val_fraction,
            "files": digest([[k, a.stat().st_size, b.stat().st_size] for i in self.items.values() for k, a, b in i]),
        }

    def splits(self) -> dict[str, int]:
        return {split: len(items) for split, items in self.items.items()}

    def sample(self, split: str, i: int) -> tuple[str, dict[str, bytes]]:
        key, path, map_path = self.items[split][i]
        extension, data = image_bytes(path, self.max_size)
        with open_image(path.read_bytes()) as image, open_image(map_path.read_bytes()) as labels:
            if labels.mode not in ("L", "P", "I;16", "I", "1"):
                raise ValueError(f"{map_path} is {labels.mode}; a label map is a grey or palette PNG")
            if image.size != labels.size:
                raise ValueError(f"{path} has {image.size} pixels, {map_path} {labels.size}")
            if self.max_size and min(labels.size) > self.max_size:
                factor = self.max_size / min(labels.size)
                size = (round(labels.width * factor), round(labels.height * factor))
                return key, {extension: data, "seg.png": encoded_png(labels.resize(size, Image.Resampling.NEAREST))}
        return key, {extension: data, "seg.png": map_path.read_bytes()}
