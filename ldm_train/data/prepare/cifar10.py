"""CIFAR-10 from its owners' archive (Krizhevsky 2009), binary version."""

import tarfile
from pathlib import Path

import numpy as np

from ldm_train.data.files import encoded_png
from ldm_train.data.prepare.build import Source, class_and_captions
from ldm_train.data.prepare.download import check_md5, download

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
FILES = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "val": ["test_batch.bin"]}
RECORD = 1 + 3 * 32 * 32  # label, then the planes of a 32x32 image


class CIFAR10(Source):
    """The CIFAR-10 images with their classes as labels and captions.

    path: a local cifar-10-binary.tar.gz, or the folder with its .bin files; None downloads the archive to `cache`.
    """

    classes: list[str] | None = CLASSES

    def __init__(self, path: str | None = None, cache: str = "data/downloads", md5: str = MD5):
        self.items = {}
        source = Path(path) if path else download(URL, Path(cache) / Path(URL).name, md5)
        if source.is_dir():
            read = self._folder(source)
        elif source.is_file():
            check_md5(source, md5)
            read = self._archive(source)
        else:
            raise FileNotFoundError(f"path={path} is neither cifar-10-binary.tar.gz nor the folder with its .bin files")
        for split, names in FILES.items():
            joined = b"".join(read[name] for name in names)
            if len(joined) % RECORD:
                raise ValueError(
                    f"{source}: {split} files do not hold a whole number of {RECORD}-byte records; fetch them again"
                )
            self.items[split] = np.frombuffer(joined, np.uint8).reshape(-1, RECORD)
        self.identity = {"source": "cifar10"}

    @staticmethod
    def _folder(folder: Path) -> dict[str, bytes]:
        missing = [n for names in FILES.values() for n in names if not (folder / n).is_file()]
        if missing:
            raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}; give the unpacked cifar-10-binary.tar.gz")
        return {n: (folder / n).read_bytes() for names in FILES.values() for n in names}

    @staticmethod
    def _archive(path: Path) -> dict[str, bytes]:
        with tarfile.open(path) as tar:
            return {Path(m.name).name: tar.extractfile(m).read() for m in tar if m.name.endswith(".bin")}

    def sample(self, split: str, i: int) -> tuple[str, dict[str, bytes]]:
        record = self.items[split][i]
        label, pixels = int(record[0]), record[1:].reshape(3, 32, 32).transpose(1, 2, 0)
        picture = {"png": encoded_png(np.ascontiguousarray(pixels))}
        return f"{split}_{i:05d}", picture | class_and_captions(label, [f"a photo of a {CLASSES[label]}"])
