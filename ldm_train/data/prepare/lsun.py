"""LSUN scenes from the LMDB exports their owners distribute (Yu et al. 2015)."""

from functools import cache
from pathlib import Path
from typing import Any

from ldm_train.data.files import optional_package
from ldm_train.data.prepare.build import Source, digest
from ldm_train.data.prepare.image_folder import check_count, stored

EXPECTED = {"bedroom": {"train": 3_033_042, "val": 300}, "church_outdoor": {"train": 126_227, "val": 300}}


@cache  # LMDB must not be opened twice in one process
def _database(folder: str) -> Any:
    return optional_package("lmdb", "LSUN's databases need").open(folder, readonly=True, lock=False, readahead=False)


class LSUN(Source):
    """The images of one LSUN scene.

    path: folder with `<scene>_train_lmdb` and `<scene>_val_lmdb`, unpacked from the owners' zips.

    scene: bedroom, church_outdoor, or another scene, whose number of images is not checked. max_size: as for
    ImageFolder.
    limit: use only the first so many training images (None: all), unchecked. expect: {split: number of images}, None
    for no check. Raises FileNotFoundError if a database is missing, DataError for an unexpected number of images.
    """

    def __init__(
        self,
        path: str,
        scene: str = "bedroom",
        max_size: int | None = 256,
        limit: int | None = None,
        expect: dict[str, int] | str | None = "published",
    ):
        self.folders = {split: Path(path) / f"{scene}_{split}_lmdb" for split in ("train", "val")}
        for folder in self.folders.values():
            if not (folder / "data.mdb").is_file():
                raise FileNotFoundError(
                    f"{folder} is not an LMDB folder; unpack {folder.name}.zip of LSUN (github.com/fyu/lsun) into {path}"
                )
        self.max_size = max_size
        self.items = {split: self._keys(split, limit if split == "train" else None) for split in self.folders}
        expected = EXPECTED.get(scene) if expect == "published" else expect
        if expected and limit is None:
            for split, count in expected.items():
                check_count(str(self.folders[split]), len(self.items[split]), count)
        options = {"source": "lsun", "scene": scene, "max_size": max_size}
        self.identity = options | {"keys": {s: digest([k.hex() for k in keys]) for s, keys in self.items.items()}}

    def _keys(self, split: str, limit: int | None) -> list[bytes]:
        with _database(str(self.folders[split])).begin() as transaction:
            cursor = transaction.cursor().iternext(keys=True, values=False)
            return [bytes(k) for k, _ in zip(cursor, range(limit))] if limit else [bytes(k) for k in cursor]

    def sample(self, split: str, i: int) -> tuple[str, dict[str, bytes]]:
        key = self.items[split][i]
        with _database(str(self.folders[split])).begin() as transaction:
            data = bytes(transaction.get(key))
        if data[:3] == b"\xff\xd8\xff":
            extension = "jpg"
        else:
            extension = "webp" if data[8:12] == b"WEBP" else "png"
        extension, data = stored(data, extension, self.max_size, f"{self.folders[split]} {key!r}")
        return f"{split}_{key.decode('ascii', 'replace')}".replace(".", "_"), {extension: data}
