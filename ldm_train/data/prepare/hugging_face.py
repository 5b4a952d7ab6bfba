"""Data sets of the Hugging Face hub, or saved by its library."""

import json
from pathlib import Path
from typing import Any

from ldm_train.data.files import open_image
from ldm_train.data.prepare.build import digest, in_validation
from ldm_train.data.prepare.image_folder import encoded_png, reduced
from ldm_train.data.shards import DataError


class HuggingFace:
    """path: a name on the hub, a folder written by `save_to_disk`, or anything `datasets.load_dataset` reads.

    image_column, caption_column (one text or several), class_column: as the data set calls them; null for none.
    train_split, val_split: of the data set; without the latter val_fraction of the former. name: its configuration.
    max_size: as for ImageFolder.
    Raises FileNotFoundError where it cannot be loaded, DataError naming the columns there are.
    """

    def __init__(
        self,
        path: str,
        name: str | None = None,
        image_column: str = "image",
        caption_column: str | None = None,
        class_column: str | None = None,
        train_split: str = "train",
        val_split: str | None = None,
        val_fraction: float = 0.05,
        max_size: int | None = None,
    ):
        self.path, self.name, self.max_size = path, name, max_size
        self.columns = {"image": image_column, "caption": caption_column, "class": class_column}
        self._data: Any = None
        data = self._load()
        for split in (train_split, *([val_split] if val_split else [])):
            if split not in data:
                raise DataError(f"{path} has the splits {', '.join(data)}, not {split}; set source.train_split")
        features = data[train_split].features
        if missing := [c for c in self.columns.values() if c and c not in features]:
            raise DataError(
                f"{path} has the columns {', '.join(features)}, not {', '.join(missing)}; set source.image_column, "
                "source.caption_column, source.class_column"
            )
        names = getattr(features[class_column], "names", None) if class_column else None
        self.classes: list[str] | None = list(names) if names else None
        if class_column and not names:
            self.classes = sorted({str(v) for v in data[train_split][class_column]})
        self.by_name = bool(class_column) and not names
        count = len(data[train_split])
        if val_split:
            self.rows = {"train": (train_split, range(count)), "val": (val_split, range(len(data[val_split])))}
        else:
            held_out = [in_validation(f"{i:09d}", val_fraction) for i in range(count)]
            self.rows = {
                "train": (train_split, [i for i in range(count) if not held_out[i]]),
                "val": (train_split, [i for i in range(count) if held_out[i]]),
            }
        self.identity = {
            "source": "hugging_face",
            "columns": self.columns,
            "max_size": max_size,
            "data": digest([getattr(data[s], "_fingerprint", s) for s in sorted(data)]),
        }

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_data": None}  # each process opens the data itself

    def _load(self) -> Any:
        if self._data is None:
            try:
                import datasets
            except ImportError as error:
                raise DataError("this source needs the package datasets: pip install 'ldm-train[prepare]'") from error
            try:
                saved = Path(self.path) / "dataset_dict.json"
                if saved.is_file():
                    data = datasets.load_from_disk(self.path)
                else:
                    data = datasets.load_dataset(self.path, self.name)
            except (OSError, ValueError, ConnectionError) as error:
                raise FileNotFoundError(
                    f"path={self.path} cannot be loaded ({str(error).splitlines()[0]}); give a name on the hub, or a "
                    "folder written by DatasetDict.save_to_disk on a machine that has a network"
                ) from error
            self._data = datasets.DatasetDict(
                {
                    split: part.cast_column(self.columns["image"], datasets.Image(decode=False))
                    if self.columns["image"] in part.features
                    else part
                    for split, part in data.items()
                }
            )
        return self._data

    def splits(self) -> dict[str, int]:
        return {split: len(rows) for split, (_, rows) in self.rows.items()}

    def sample(self, split: str, i: int) -> tuple[str, dict[str, bytes]]:
        part, rows = self.rows[split]
        row = self._load()[part][rows[i]]
        key, image = f"{part}_{rows[i]:09d}", row[self.columns["image"]]
        if image is None or not (image["bytes"] or image["path"]):
            raise ValueError(f"row {rows[i]} has no image")
        fields = dict([self._encoded(image["bytes"] or Path(image["path"]).read_bytes(), key)])
        for name in ("caption", "class"):
            if (column := self.columns[name]) and row[column] in (None, "", []):
                raise ValueError(f"row {rows[i]} has no {column}")
        if column := self.columns["caption"]:
            given = row[column] if isinstance(row[column], list) else [row[column]]
            if None in given:
                raise ValueError(f"row {rows[i]} has no {column} among several")
            captions = [str(c).strip() for c in given]
            fields["txt"] = captions[0].encode()
            if len(captions) > 1:
                fields["json"] = json.dumps({"captions": captions}).encode()
        if column := self.columns["class"]:
            label = self.classes.index(str(row[column])) if self.by_name else int(row[column])
            fields["cls"] = str(label).encode()
        return key, fields

    def _encoded(self, data: bytes, key: str) -> tuple[str, bytes]:
        with open_image(data) as image:
            kind = (image.format or "").lower()
            if kind not in ("jpeg", "png", "webp"):  # TIFF and the like
                data, kind = encoded_png(image), "png"
        return reduced(data, "jpg" if kind == "jpeg" else kind, self.max_size, key)
