"""Data sets from the Hugging Face hub, or saved by its library."""

from pathlib import Path
from typing import Any

from ldm_train.data.files import optional_package
from ldm_train.data.prepare.build import Source, class_and_captions, digest, in_validation
from ldm_train.data.prepare.image_folder import stored
from ldm_train.data.shards import DataError
from ldm_train.errors import first_line


class HuggingFace(Source):
    """A data set from the Hugging Face hub, or saved by its library.

    path: a name on the hub, a folder written by `save_to_disk`, or anything `datasets.load_dataset` reads.

    image_column, caption_column (one text or several), class_column: the data set's column names; null for none.
    train_split, val_split: the data set's split names; without val_split, val_fraction of the training split is used.
    name: the data set's configuration. max_size: as for ImageFolder.
    Raises FileNotFoundError if it cannot be loaded, DataError naming the splits or columns there are.
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
        self.classes = list(names) if names else None
        self.by_name = bool(class_column) and not names
        if self.by_name:
            self.classes = sorted({str(v) for v in data[train_split][class_column]})
        rows = range(len(data[train_split]))
        self.parts = {"train": train_split, "val": val_split or train_split}  # splits that `items` has rows of
        if val_split:
            self.items = {"train": rows, "val": range(len(data[val_split]))}
        else:
            held_out = [in_validation(f"{i:09d}", val_fraction) for i in rows]
            self.items = {split: [i for i in rows if held_out[i] == (split == "val")] for split in self.parts}
        fingerprints = [getattr(data[split], "_fingerprint", split) for split in sorted(data)]
        options = {"source": "hugging_face", "columns": self.columns, "max_size": max_size}
        options |= {"train_split": train_split, "val_split": val_split}
        self.identity = options | {"data": digest(fingerprints)}

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_data": None}  # each process opens the data itself

    def _load(self) -> Any:
        if self._data is None:
            datasets = optional_package("datasets", "this source needs")
            try:
                if (Path(self.path) / "dataset_dict.json").is_file():
                    data = datasets.load_from_disk(self.path)
                else:
                    data = datasets.load_dataset(self.path, self.name)
            except (OSError, ValueError, ConnectionError) as error:
                raise FileNotFoundError(
                    f"path={self.path} cannot be loaded ({first_line(error)}); give a name on the hub, or a "
                    "folder written by DatasetDict.save_to_disk on a machine that has a network"
                ) from error
            column, encoded = self.columns["image"], datasets.Image(decode=False)
            for split, part in data.items():
                data[split] = part.cast_column(column, encoded) if column in part.features else part
            self._data = data
        return self._data

    def sample(self, split: str, i: int) -> tuple[str, dict[str, bytes]]:
        part, number = self.parts[split], self.items[split][i]
        row, key = self._load()[part][number], f"{part.replace('.', '_')}_{number:09d}"
        image = row[self.columns["image"]]
        if image is None or not (image["bytes"] or image["path"]):
            raise ValueError(f"row {number} has no image")
        extension, data = stored(image["bytes"] or self._file(image["path"]), None, self.max_size, key)
        fields = {extension: data}
        for name in ("caption", "class"):
            if (column := self.columns[name]) and row[column] in (None, "", []):
                raise ValueError(f"row {number} has no {column}")
        if column := self.columns["caption"]:
            captions = row[column] if isinstance(row[column], list) else [row[column]]
            if None in captions:
                raise ValueError(f"row {number} has no {column} among several")
            fields |= class_and_captions(captions=[str(caption).strip() for caption in captions])
        if column := self.columns["class"]:
            label = self.classes.index(str(row[column])) if self.by_name else int(row[column])
            fields |= class_and_captions(label)
        return key, fields

    def _file(self, path: str) -> bytes:
        """The content of a picture that the data set names. Raises ValueError for one that is neither in the data set's
        folder nor in the library's cache: a stranger's data set could name any file of this machine."""
        datasets = optional_package("datasets", "this source needs")
        hub = optional_package("huggingface_hub.constants", "this source needs")
        own = (self.path, datasets.config.HF_CACHE_HOME, datasets.config.HF_DATASETS_CACHE, hub.HF_HUB_CACHE)
        if not any(Path(path).resolve().is_relative_to(Path(folder).expanduser().resolve()) for folder in own):
            raise ValueError(f"it names {path}, which is not in the data set's folder; copy that file there")
        return Path(path).read_bytes()
