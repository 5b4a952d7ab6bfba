"""Photos with labelled boxes: COCO and Open Images, from the files their owners distribute."""

import csv
import hashlib
import json
from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path

from tqdm import tqdm

from ldm_train.data.prepare.build import Source
from ldm_train.data.prepare.image_folder import image_bytes
from ldm_train.data.shards import DataError

OPENIMAGES_CSV = {"train": "oidv6-train-annotations-bbox.csv", "val": "validation-annotations-bbox.csv"}
OPENIMAGES_FOLDERS = {"train": "train", "val": "validation"}


def _existing(path: Path, origin: str) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there; {origin}")
    return path


def _inside(x: float, y: float, w: float, h: float) -> list[float]:
    """A box in unit coordinates, clipped to the image's edges (annotations overshoot because of rounding)."""
    left, top = min(max(x, 0.0), 1.0), min(max(y, 0.0), 1.0)
    return [left, top, min(x + w, 1.0) - left, min(y + h, 1.0) - top]


class _Boxes(Source):
    """What COCO and Open Images share: `items[split]` holds (key, path below `root`, record). The record is the
    content of the .json, already encoded: a million of them as objects would take gigabytes in every process."""

    def __init__(self, root: Path, max_size: int | None, min_objects: int, max_objects: int, min_area: float):
        self.root, self.max_size, self.min_objects, self.max_objects = root, max_size, min_objects, max_objects
        self.min_area = min_area
        self.items = {"train": [], "val": []}

    def _add(self, split: str, key: str, path: Path, boxes: list[list[float]], captions: Sequence[str] = ()) -> None:
        """Adds an image with those of its boxes that are large enough, unless these are too few or too many."""
        large = [b for b in boxes if b[2] > 0 and b[3] > 0 and b[2] * b[3] >= self.min_area]
        if self.min_objects <= len(large) <= self.max_objects:
            record = {"boxes": large} | ({"captions": captions} if captions else {})
            self.items[split].append((key, str(path.relative_to(self.root)), json.dumps(record).encode()))

    def _settle(self, name: str, path: str) -> None:
        """Sorts what was added and sets `identity`. Raises DataError if a split is empty."""
        for split, items in self.items.items():
            items.sort(key=lambda item: item[0])
            if not items:
                raise DataError(f"no picture of {path} is left in {split}; relax source.min_objects or source.min_area")
        records = hashlib.sha256()
        for key, _, record in (item for items in self.items.values() for item in items):
            records.update(f"{key} {len(record)} ".encode() + record)
        options = {"source": name, "max_size": self.max_size, "classes": self.classes}
        self.identity = options | {"records": records.hexdigest()[:16]}

    def sample(self, split: str, i: int) -> tuple[str, dict[str, bytes]]:
        key, path, record = self.items[split][i]
        extension, data = image_bytes(self.root / path, self.max_size)
        fields = {extension: data, "json": record}
        if captions := json.loads(record).get("captions"):
            fields["txt"] = captions[0].encode()
        return key, fields


class COCO(_Boxes):
    """COCO images with labelled boxes and captions.

    path: folder with train2017/, val2017/ and annotations/ (instances, stuff unless `stuff` is false, captions if
    present).

    A box's label is its category id - 1, of 183 labels: things 0..90, stuff 91..181, "other" 182. crowds: also use
    boxes of crowds. Raises FileNotFoundError naming what to download.
    """

    def __init__(
        self,
        path: str,
        max_size: int | None = 256,
        stuff: bool = True,
        crowds: bool = False,
        min_objects: int = 1,
        max_objects: int = 1000,
        min_area: float = 0.0,
    ):
        super().__init__(Path(path), max_size, min_objects, max_objects, min_area)
        origin = (
            "download it from cocodataset.org (2017 train and val images, train/val annotations, stuff annotations)"
        )
        notes, names = self.root / "annotations", {}
        for split, year in (("train", "train2017"), ("val", "val2017")):
            kinds = ("instances", "stuff") if stuff else ("instances",)
            files = [_existing(notes / f"{kind}_{year}.json", origin) for kind in kinds]
            records: dict[int, dict] = {}
            for file in files:
                tree = json.loads(file.read_text())
                names |= {c["id"]: c["name"] for c in tree["categories"]}
                for image in tree["images"]:
                    records.setdefault(image["id"], image | {"boxes": [], "captions": []})
                for note in tree["annotations"]:
                    image = records[note["image_id"]]
                    if crowds or not note.get("iscrowd"):
                        x, y, w, h = note["bbox"]
                        width, height = image["width"], image["height"]
                        unit = _inside(x / width, y / height, w / width, h / height)
                        image["boxes"].append([*unit, note["category_id"] - 1])
            captions = notes / f"captions_{year}.json"
            if captions.is_file():
                for note in json.loads(captions.read_text())["annotations"]:
                    if note["image_id"] in records:
                        records[note["image_id"]]["captions"].append(note["caption"].strip())
            folder = _existing(self.root / year, origin)
            for number, image in tqdm(records.items(), desc=f"COCO {split}", unit="img"):
                self._add(split, f"{number:012d}", folder / image["file_name"], image["boxes"], image["captions"])
        self.classes = [names.get(i + 1, f"unused {i + 1}") for i in range(183)]
        self._settle("coco", path)


class OpenImagesBoxes(_Boxes):
    """Open Images with labelled boxes.

    path: folder with the images in train/ and validation/, the box tables of Open Images V7
    (oidv6-train-annotations-bbox.csv, validation-annotations-bbox.csv) and class-descriptions-boxable.csv.

    A label is the row number in the class descriptions. groups, depictions: also use boxes around groups, and of
    drawings.
    The default limits follow the layout models of VQGAN: 2 to 30 objects of at least 1e-5 of the image's area each.
    """

    def __init__(
        self,
        path: str,
        max_size: int | None = 256,
        groups: bool = True,
        depictions: bool = True,
        min_objects: int = 2,
        max_objects: int = 30,
        min_area: float = 1e-5,
    ):
        super().__init__(Path(path), max_size, min_objects, max_objects, min_area)
        root = self.root
        origin = (
            "download it from storage.googleapis.com/openimages/web (V7: boxes, class names; images from its S3 bucket)"
        )
        with open(_existing(root / "class-descriptions-boxable.csv", origin), newline="", encoding="utf-8") as file:
            described = [row for row in csv.reader(file) if row and row[0] != "LabelName"]
        self.classes = [name for _, name in described]
        label_of = {code: i for i, (code, _) in enumerate(described)}
        for split, name in OPENIMAGES_CSV.items():
            folder = _existing(root / OPENIMAGES_FOLDERS[split], origin)
            present = {p.stem: str(p.relative_to(folder)) for p in folder.rglob("*.jpg")}
            absent = 0
            for number, rows in tqdm(self._by_image(_existing(root / name, origin)), desc=f"boxes {split}", unit="img"):
                if number not in present:
                    absent += 1
                    continue
                boxes = []
                for row in rows:
                    if row["LabelName"] not in label_of:
                        raise DataError(f"{root / name}: {number} has the unknown label {row['LabelName']}")
                    if (row["IsGroupOf"] == "1" and not groups) or (row["IsDepiction"] == "1" and not depictions):
                        continue
                    left, right, top, bottom = (float(row[c]) for c in ("XMin", "XMax", "YMin", "YMax"))
                    boxes.append([*_inside(left, top, right - left, bottom - top), label_of[row["LabelName"]]])
                self._add(split, number, folder / present[number], boxes)
            if absent:
                print(f"{absent} pictures of {name} are not in {folder}; taken without them")
        self._settle("openimages_boxes", path)

    @staticmethod
    def _by_image(path: Path) -> Iterator[tuple[str, list[dict[str, str]]]]:
        """Yields (image id, its rows): the tables are sorted by image, and too long to hold in memory. Raises
        DataError if not sorted."""
        with open(path, newline="", encoding="utf-8") as file:
            seen: set[str] = set()
            for number, rows in groupby(csv.DictReader(file), itemgetter("ImageID")):
                if number in seen:
                    raise DataError(f"{path} is not sorted by ImageID ({number} comes twice); sort it")
                seen.add(number)
                yield number, list(rows)
