"""Fashion-MNIST (Xiao et al. 2017): 28x28 grey pictures of clothes, from its IDX files."""

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np

from ldm_train.data.files import encoded_png
from ldm_train.data.prepare.build import Source, class_and_captions
from ldm_train.data.prepare.download import download

URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
MD5 = {
    "train-images-idx3-ubyte": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte": "bb300cfdad3c16e7a12a480ee83cd310",
}
CLASSES = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]


def read_idx(path: Path) -> np.ndarray:
    """Reads an IDX file of unsigned bytes, plain or gzipped. Raises ValueError if it is not one or is truncated."""
    data = path.read_bytes()
    if path.suffix == ".gz":
        try:
            data = gzip.decompress(data)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path} is cut short or damaged ({error}); download it again") from error
    if data[:3] != b"\0\0\x08" or len(data) < 4 or len(data) < 4 + 4 * data[3]:
        raise ValueError(f"{path} is not an IDX file of bytes; download it again")
    shape = struct.unpack(f">{data[3]}I", data[4 : 4 + 4 * data[3]])
    body = data[4 + 4 * data[3] :]
    if len(body) != int(np.prod(shape)):
        raise ValueError(f"{path} is cut short: {len(body)} bytes of data for shape {shape}; download it again")
    return np.frombuffer(body, np.uint8).reshape(shape)


class FashionMNIST(Source):
    """The Fashion-MNIST images with their classes as labels and captions.

    path: a folder with the four IDX files (gzipped or not); None downloads them to `cache`.
    """

    classes: list[str] | None = CLASSES

    def __init__(self, path: str | None = None, cache: str = "data/downloads/fashion_mnist"):
        files = {name: self._file(name, path, cache) for name in MD5}
        self.items, self.labels = {}, {}
        for split, prefix in (("train", "train"), ("val", "t10k")):
            self.items[split] = read_idx(files[f"{prefix}-images-idx3-ubyte"])
            self.labels[split] = read_idx(files[f"{prefix}-labels-idx1-ubyte"])
            if len(self.items[split]) != len(self.labels[split]):
                raise ValueError(f"{split}: {len(self.items[split])} images but {len(self.labels[split])} labels")
        self.identity = {"source": "fashion_mnist"}

    @staticmethod
    def _file(name: str, path: str | None, cache: str) -> Path:
        if path is None:
            return download(URL + name + ".gz", Path(cache) / f"{name}.gz", MD5[name])
        for candidate in (Path(path) / f"{name}.gz", Path(path) / name):
            if candidate.is_file():
                return candidate
        raise FileNotFoundError(
            f"{path} lacks {name}.gz; put the four IDX files there or leave path out to download them"
        )

    def sample(self, split: str, i: int) -> tuple[str, dict[str, bytes]]:
        picture, label = {"png": encoded_png(self.items[split][i])}, int(self.labels[split][i])
        return f"{split}_{i:05d}", picture | class_and_captions(label, [f"a picture of a {CLASSES[label]}"])
