"""ImageNet-1k (ILSVRC 2012) from its owners' archives, through torchvision."""

import shutil
from collections import Counter
from pathlib import Path

from ldm_train.data.prepare.image_folder import ImageFolder, check_count
from ldm_train.data.shards import DataError

DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
ARCHIVES = {"train": "ILSVRC2012_img_train.tar", "val": "ILSVRC2012_img_val.tar"}
EXPECTED = {"train": 1_281_167, "val": 50_000}


class ImageNet(ImageFolder):
    """The ImageNet-1k images with their classes.

    path: folder with ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz, which are
    unpacked there once (torchvision checks the checksums), or with the unpacked train/ and val/, one folder per synset.

    Class i is the i-th synset in alphabetical order, as is usual. max_size: as for ImageFolder. expect: {split: number
    of images}, None for no check. Raises FileNotFoundError if an archive is missing, DataError for an unexpected number
    of images.
    """

    def __init__(self, path: str, max_size: int | None = 256, expect: dict[str, int] | str | None = "published"):
        root = Path(path)
        for split in ARCHIVES:
            if not (root / split).is_dir():
                self._unpack(root, split)
        super().__init__(path, 0.0, max_size)
        expected = EXPECTED if expect == "published" else expect or {}
        for split, count in expected.items():
            check_count(str(root / split), len(self.items[split]), count)
        self.identity["source"] = "imagenet"
        if (root / "meta.bin").is_file():  # the synsets' names, written by torchvision
            from torchvision.datasets.imagenet import load_meta_file

            names = load_meta_file(str(root))[0]
            first = {s: names[s][0] if s in names else s for s in self.classes}
            counts = Counter(first.values())  # crane and maillot each name two synsets
            self.classes = [n if counts[n] == 1 else f"{n} ({s})" for s, n in first.items()]

    @staticmethod
    def _unpack(root: Path, split: str) -> None:
        from torchvision.datasets import imagenet

        missing = [n for n in (ARCHIVES[split], DEVKIT) if not (root / n).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{root} has no folder {split}/ and lacks {', '.join(missing)}; download them from image-net.org "
                "(ILSVRC 2012, free registration) into it"
            )
        print(f"unpacking {ARCHIVES[split]} (once)", flush=True)
        try:
            if not (root / "meta.bin").is_file():
                imagenet.parse_devkit_archive(str(root))
            unpack = imagenet.parse_train_archive if split == "train" else imagenet.parse_val_archive
            shutil.rmtree(root / f".{split}.partial", ignore_errors=True)
            unpack(str(root), folder=f".{split}.partial")
            (root / f".{split}.partial").rename(root / split)
        except ImportError as error:
            raise DataError("ImageNet's devkit needs the package scipy: pip install 'ldm-train[prepare]'") from error
