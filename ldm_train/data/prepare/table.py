"""A csv, tsv or jsonl table that names images, captions and classes."""

import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path

from ldm_train.data.prepare.build import Source, class_and_captions, digest, in_validation
from ldm_train.data.prepare.image_folder import image_bytes, stamp
from ldm_train.data.shards import DataError


def _parsed(line: str, path: str, number: int) -> dict:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}, line {number}: no JSON ({error})") from error
    if not isinstance(row, dict):
        raise DataError(f"{path}, line {number}: no JSON object")
    return row


def _rows(table: Path) -> list[tuple[int, dict]]:
    """(line number, row) of all rows of a table."""
    with open(table, newline="", encoding="utf-8-sig") as file:
        if table.suffix == ".jsonl":
            return [(n, _parsed(line, str(table), n)) for n, line in enumerate(file, start=1) if line.strip()]
        reader = csv.DictReader(file, delimiter="\t" if table.suffix == ".tsv" else ",")
        return [(reader.line_num, row) for row in reader]


def _checked_rows(table: Path, path: str, needed: Sequence[str], wanted: Sequence[str]) -> list[dict]:
    """The rows of a table that has the columns `wanted`, each row with a value in the columns `needed` and no lists
    or objects in those `wanted`. Raises DataError if it does not."""
    try:
        rows = _rows(table)
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is not UTF-8 text in rows ({error}); save it as UTF-8") from error
    if not rows:
        raise DataError(f"{path} has no rows")
    if crooked := [line for line, row in rows if None in row]:
        raise DataError(
            f"{path}, line {crooked[0]}: more cells than the first line names; quote cells with commas in them"
        )
    columns = rows[0][1]
    if missing := [c for c in wanted if c not in columns]:
        raise DataError(
            f"{path} has the columns {', '.join(columns)}, not {', '.join(missing)}; set source.image_column, "
            "source.caption_column, source.class_column (null for none)"
        )
    for line, row in rows:
        if absent := [c for c in needed if row.get(c) in (None, "")]:
            raise DataError(f"{path}, line {line}: no {' and no '.join(absent)}")
        if wrong := [c for c in wanted if not isinstance(row.get(c), str | int | float | None)]:
            raise DataError(f"{path}, line {line}: {wrong[0]} is {row[wrong[0]]!r:.60}, one text was expected")
    return [row for _, row in rows]


class Table(Source):
    """Images with the captions and classes that a table gives them.

    path: the table. Image paths are relative to it (or to `images`). Several rows with the same image give it
    several captions. split_column: a column that says "train" or something else (validation); without it,
    val_fraction is used.

    Raises DataError for a missing column, image or value (naming the line).
    """

    def __init__(
        self,
        path: str,
        image_column: str = "image",
        caption_column: str | None = "caption",
        class_column: str | None = None,
        split_column: str | None = None,
        images: str | None = None,
        val_fraction: float = 0.05,
        max_size: int | None = None,
    ):
        table = Path(path)
        if not table.is_file():
            raise FileNotFoundError(f"path={path} is not a file; give a .csv, .tsv or .jsonl table")
        self.folder, self.max_size = Path(images) if images else table.parent, max_size
        needed = [c for c in (image_column, class_column, split_column) if c]
        wanted = [c for c in (image_column, caption_column, class_column, split_column) if c]
        rows = _checked_rows(table, path, needed, wanted)
        self.classes = sorted({str(row[class_column]) for row in rows}) if class_column else None
        number = {name: k for k, name in enumerate(self.classes or [])}
        grouped: dict[str, dict] = {}
        for row in rows:
            name = os.path.normpath(str(row[image_column]))
            item = grouped.setdefault(name, {"captions": [], "split": None, "label": None})
            if caption_column and row.get(caption_column):
                item["captions"].append(str(row[caption_column]).strip())
            own = {"label": number[str(row[class_column])]} if class_column else {}
            own |= {"split": "train" if row[split_column] == "train" else "val"} if split_column else {}
            for what, value in own.items():
                if item[what] not in (None, value):
                    raise DataError(f"{path} gives {name} a {what} in one row and another in a later one; leave one")
            item |= own
        self.items, keys = {"train": [], "val": []}, dict[str, str]()
        for name, item in grouped.items():
            if not (self.folder / name).is_file():
                raise DataError(f"{path} names {name}, which is not in {self.folder}; set source.images=<folder>")
            key = name.replace("/", "_").replace(".", "_")
            if (other := keys.setdefault(key, name)) != name:
                raise DataError(f"{path}: {other} and {name} would both get the key {key}; rename one of them")
            split = item["split"] or ("val" if in_validation(key, val_fraction) else "train")
            self.items[split].append((key, name, item))
        options = {"source": "table", "columns": wanted, "val_fraction": val_fraction, "max_size": max_size}
        sizes = [stamp(self.folder / name) for rows in self.items.values() for _, name, _ in rows]
        self.identity = options | {"rows": digest([self.items, sizes])}

    def sample(self, split: str, i: int) -> tuple[str, dict[str, bytes]]:
        key, name, item = self.items[split][i]
        extension, data = image_bytes(self.folder / name, self.max_size)
        return key, {extension: data} | class_and_captions(item["label"], item["captions"])
