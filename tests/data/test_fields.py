"""The members of a sample (labels, captions, boxes) are read exactly, or refused."""

import io
import json

import numpy as np
import pytest

from ldm_train.data.fields import boxes_of, captions_of, check_fields, label_of
from ldm_train.data.files import read_npy


@pytest.mark.parametrize(("data", "label"), [(b"0", 0), (b" 7\n", 7), (b"007", 7), (b"999", 999)])
def test_class_labels(data: bytes, label: int):
    assert label_of(data) == label_of(data, 1000) == label


@pytest.mark.parametrize(
    "data", [b"", b"-1", b"+1", b"1.0", b"1_0", b"abc", b"1000", b"9" * 5000, b"\xff", "٣".encode(), b"nan"]
)
def test_what_is_no_class_label_is_refused(data: bytes):
    with pytest.raises(ValueError, match=r"class label .* is not a whole number from 0 to 999"):
        label_of(data, 1000)


@pytest.mark.parametrize(
    ("raw", "captions"),
    [
        ({"txt": b" a dog\n"}, ["a dog"]),
        ({"txt": "\ufeffa dog".encode()}, ["a dog"]),  # as Windows writes it
        ({"txt": "größe".encode(), "json": b"{}"}, ["größe"]),
        ({"txt": b"one", "json": b'{"captions": []}'}, ["one"]),
        ({"txt": b"one", "json": b'{"captions": null}'}, ["one"]),
        ({"txt": b"one", "json": b'{"captions": ["two", " three"]}'}, ["two", " three"]),
    ],
)
def test_captions(raw: dict, captions: list[str]):
    assert captions_of(raw) == captions


@pytest.mark.parametrize(
    ("raw", "match"),
    [
        ({}, "no caption"),
        ({"json": b"{}"}, "no caption"),
        ({"txt": b"\xff"}, "not UTF-8"),
        ({"txt": b"one", "json": b"[]"}, "not an object"),
        ({"txt": b"one", "json": b"{"}, "not JSON"),
        ({"txt": b"one", "json": b"1" * 5000}, "not JSON"),
        ({"txt": b"one", "json": b"[" * 100_000}, "not JSON"),
        ({"json": b'{"captions": "a red circle"}'}, "not a list of texts: 'a red circle'"),
        ({"json": b'{"captions": {"a": 1}}'}, "not a list of texts"),
        ({"json": b'{"captions": ["a", null]}'}, "not a list of texts"),
        ({"json": rb'{"captions": ["\ud800"]}'}, "surrogate"),
    ],
)
def test_what_is_no_caption_is_refused(raw: dict, match: str):
    with pytest.raises(ValueError, match=match):
        captions_of(raw)


GOOD = [0.1, 0.2, 0.3, 0.4, 2]


def test_boxes():
    assert np.array_equal(boxes_of(json.dumps({"boxes": [GOOD, GOOD]}).encode(), 3), [GOOD, GOOD])
    assert boxes_of(b'{"boxes": []}').shape == (0, 5)


@pytest.mark.parametrize(
    ("boxes", "match"),
    [
        ([[*GOOD[:4], float("nan")]], "five numbers"),
        ([[*GOOD[:4], -3]], "box label -3 is not a whole number from 0 to 2"),
        ([[*GOOD[:4], 2.5]], r"box label 2\.5 is not a whole number"),
        ([GOOD, [*GOOD[:4], 3]], "box label 3 is not a whole number"),
        ([[*GOOD[:4], True]], "five numbers"),
        ([[*GOOD[:4], "1"]], "five numbers"),
        ([[float("nan"), *GOOD[1:]]], "five numbers"),
        ([[float("inf"), *GOOD[1:]]], "five numbers"),
        ([[10**400, *GOOD[1:]]], "five numbers"),
        ([[0.5, 0.5, -0.1, 0.1, 1]], "not inside the picture"),
        ([[0.5, 0.5, 0.1, 0, 1]], "not inside the picture"),
        ([[0.5, 0.5, 0.6, 0.1, 1]], "not inside the picture"),
        ([GOOD[:4]] * 5, "five numbers"),  # twenty numbers are not four boxes
        (GOOD, "five numbers"),
        ({"a": 1}, "five numbers"),
        (None, "five numbers"),
    ],
)
def test_what_is_no_box_is_refused(boxes: object, match: str):
    raw = json.dumps({"boxes": boxes}).encode()
    with pytest.raises(ValueError, match=match):
        boxes_of(raw, 3)
    with pytest.raises(ValueError, match=match):
        check_fields({"json": raw}, 3)


@pytest.mark.parametrize(
    "record",
    [
        {"width": 0, "height": 4, "objects": []},
        {"width": 4, "height": 4, "objects": 3},
        {"width": 4, "height": 4, "objects": [{"bbox": [0, 0, 1, 1]}]},
        {"width": 4, "height": 4, "objects": [{"bbox": 3, "category_id": 1}]},
        {"width": 4, "height": 4, "objects": [{"bbox": [0, 0, 1, 1], "category_id": 0}]},
        {"width": "4", "height": 4, "objects": []},
    ],
)
def test_damaged_coco_objects_are_refused(record: dict):
    with pytest.raises(ValueError, match=r"its|box"):
        boxes_of(json.dumps(record).encode())


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def test_damaged_npy_headers_are_refused_without_reserving_what_they_claim() -> None:
    whole = npy(np.zeros((1, 1, 1), np.uint8))
    huge = (
        whole.replace(b"(1, 1, 1), }          ", b"(1, 1, 70368744177664)"),
        whole.replace(b"(1, 1, 1)", b"(9**9, 5)"),
    )
    for data in (b"", whole[:50], b"PK\x03\x04" + whole, *huge):
        assert data != whole
        with pytest.raises(ValueError, match="npy"):
            read_npy(data)


def test_arrays_of_the_other_byte_order_are_read_as_their_numbers() -> None:
    array = np.array([[1, 2], [300, 65535]], ">u2")
    read = read_npy(npy(array))
    assert read.dtype == np.dtype("u2").newbyteorder("=")
    assert read.tolist() == array.tolist()
