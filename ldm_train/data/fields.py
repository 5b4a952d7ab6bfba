"""Reads and checks the members of a sample: captions, class, boxes, arrays. Does not import torch, so that the
processes that prepare data start fast. The readers raise ValueError for an invalid member."""

import json
from collections.abc import Mapping

import numpy as np

from ldm_train.data.files import has_surrogates, read_npy

MOST_WEIGHT = 1000
MOST_LABELS = 2**24  # boxes and their labels are passed as float32, which is exact for integers up to here


def record_of(data: bytes) -> dict:
    """The object in a sample's .json."""
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its .json is not JSON ({error})") from error
    if not isinstance(record, dict):
        raise ValueError(f"its .json is not an object: {data[:40]!r}")
    return record


def captions_of(raw: Mapping[str, bytes]) -> list[str]:
    """A sample's captions: "captions" in its .json if there are any, else its .txt."""
    if "json" in raw and (captions := record_of(raw["json"]).get("captions")):
        if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
            raise ValueError(f'"captions" in its .json is not a list of texts: {captions!r:.80}')
        if any(has_surrogates(caption) for caption in captions):
            raise ValueError('half a surrogate pair in its "captions", which JSON allows, but which is not text')
        return captions
    if "txt" not in raw:
        raise ValueError('no caption: neither a .txt nor "captions" in its .json')
    try:
        return [raw["txt"].decode("utf-8-sig").strip()]  # Windows programs begin files with a mark
    except UnicodeDecodeError as error:
        raise ValueError(f"its .txt is not UTF-8 ({error.reason} at byte {error.start})") from error


def label_of(data: bytes, classes: int | None = None) -> int:
    """The class index in a sample's .cls. classes: the number of classes."""
    text, count = data.strip(), classes or MOST_LABELS
    if not text.isdigit() or len(text) > 9 or int(text) >= count:
        raise ValueError(f"class label {data[:40]!r} is not a whole number from 0 to {count - 1}")
    return int(text)


def weight_of(data: bytes) -> float:
    """The loss weight in a sample's .loss_weight.txt, from 0 to MOST_WEIGHT."""
    try:
        weight = float(data)
    except ValueError as error:
        raise ValueError(f"loss weight {data[:40]!r} is not a number") from error
    if not 0 <= weight <= MOST_WEIGHT:
        raise ValueError(f"loss weight {weight:g} is not between 0 and {MOST_WEIGHT}")
    return weight


def boxes_of(raw: bytes, labels: int | None = None) -> np.ndarray:
    """The boxes in a sample's .json: (N, 5) float64: x, y (top left), width, height in unit coordinates, and the
    label.

    Reads this package's `boxes`, and COCO's `objects` with pixel `bbox`, `category_id` (labels start at 1 there, at 0
    here) and the image's `width` and `height`. labels: the number of labels. A box must lie inside the image and have
    an area.
    """
    record = record_of(raw)
    if "boxes" in record:
        rows = _rows(record["boxes"])
    elif "objects" in record:
        try:
            scale = _rows([[record["width"], record["height"]] * 2 + [1]])[0]
            rows = _rows([[*o["bbox"], o["category_id"] - 1] for o in record["objects"]])
        except (KeyError, TypeError) as error:
            raise ValueError(f"its objects lack width, height, bbox or category_id ({error})") from error
        if (scale <= 0).any():
            raise ValueError(f"its picture has width {scale[0]:g} and height {scale[1]:g}")
        rows = rows / scale
    else:
        raise ValueError('no boxes: its .json has neither "boxes" nor "objects"')
    x, y, w, h, label = rows.T
    tolerance = 0.01  # annotations are rounded to pixels
    inside = (x >= -tolerance) & (y >= -tolerance) & (x + w <= 1 + tolerance) & (y + h <= 1 + tolerance)
    if not (good := inside & (w > 0) & (h > 0)).all():
        raise ValueError(f"box {rows[~good][0, :4].round(3).tolist()} (x, y, w, h) is not inside the picture")
    count = labels or MOST_LABELS
    if not (known := (label >= 0) & (label < count) & (label == label.round())).all():
        raise ValueError(f"box label {label[~known][0]:g} is not a whole number from 0 to {count - 1}")
    return rows


def _rows(boxes: object) -> np.ndarray:
    """Converts a list of lists of five finite numbers to (N, 5) float64."""
    if not isinstance(boxes, list):
        raise ValueError(f"{boxes!r:.80} in its .json is not a box of five numbers")
    for row in boxes:
        numbers = isinstance(row, list) and all(type(v) in (int, float) and abs(v) < 1e9 for v in row)  # no NaN either
        if not (numbers and len(row) == 5):
            raise ValueError(f"{row!r:.80} in its .json is not a box of five numbers")
    return np.array(boxes, float).reshape(-1, 5)


def array_of(data: bytes) -> np.ndarray:
    """The image in a sample's .npy: (H, W, C), uint8, or float32 in [-1, 1]; never a pickle."""
    array = read_npy(data)
    if array.dtype != np.uint8 and array.dtype.kind != "f":
        raise ValueError(f"npy image of {array.dtype}, expected uint8 or float in [-1, 1]")
    if array.ndim not in (2, 3) or min(array.shape) < 1:
        raise ValueError(f"npy image of shape {array.shape}, expected (H, W, C)")
    array = array[..., None] if array.ndim == 2 else array
    if array.dtype == np.uint8:
        return array
    if not (np.abs(array) <= 1 + 1e-3).all():  # also false for NaN; allows for float16 rounding
        raise ValueError("npy image with values that are not numbers, or outside [-1, 1]")
    return array.astype(np.float32, copy=False)


def relabelled(data: bytes, relabel: list[int]) -> bytes:
    """Converts a class label of one root to the label among the class names of all roots; an unknown one stays
    invalid."""
    try:
        return str(relabel[label_of(data, len(relabel))]).encode()
    except ValueError:
        return b"unnamed " + data


def relabelled_boxes(data: bytes, relabel: list[int]) -> bytes:
    """The same for boxes. Invalid JSON is returned unchanged, and invalid boxes become the error's text, for the
    reader to refuse."""
    try:
        record = record_of(data)
    except ValueError:
        return data
    if "boxes" not in record and "objects" not in record:
        return data
    try:
        boxes = [[*box[:4].tolist(), relabel[int(box[4])]] for box in boxes_of(data, len(relabel))]
    except ValueError as error:
        boxes = str(error)
    return json.dumps(record | {"boxes": boxes}).encode()


def check_fields(fields: Mapping[str, bytes], classes: int | None) -> None:
    """Raises ValueError if training could not use a member of a sample; encoded images are not read. classes: the
    number of classes."""
    if "npy" in fields:
        array_of(fields["npy"])
    if "cls" in fields:
        label_of(fields["cls"], classes)
    if "txt" in fields:
        captions_of({"txt": fields["txt"]})
    if "loss_weight.txt" in fields:
        weight_of(fields["loss_weight.txt"])
    if "json" in fields:
        record = record_of(fields["json"])
        if record.get("captions"):
            captions_of(fields)
        if "boxes" in record or "objects" in record:
            boxes_of(fields["json"], classes)
