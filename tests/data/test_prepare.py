"""Any source gives the same shards however it is run, and errors say what is wrong with its files."""

import gzip
import hashlib
import io
import json
import os
import shutil
import struct
import tarfile
import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm_train.data.files import open_image
from ldm_train.data.loose import image_batches
from ldm_train.data.prepare import cifar10, fashion_mnist, image_folder
from ldm_train.data.prepare.build import build, in_validation
from ldm_train.data.prepare.cifar10 import CIFAR10
from ldm_train.data.prepare.download import download
from ldm_train.data.prepare.fashion_mnist import FashionMNIST
from ldm_train.data.prepare.image_folder import ImageFolder
from ldm_train.data.prepare.index import write_tar_index
from ldm_train.data.prepare.shapes import Shapes
from ldm_train.data.prepare.table import Table
from ldm_train.data.shards import DataError, IndexedShards, read_index
from ldm_train.data.transforms import decode_image


def save(path: Path, value: int = 100, size: tuple[int, int] = (40, 30), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)
    return path


def samples(root: Path, split: str) -> dict[str, dict[str, bytes]]:
    reader = IndexedShards(root, split)
    return {reader.key(i): reader.members(i) for i in range(len(reader))}


# -- arrays of any number of channels ---------------------------------------------------------------------------------


def array_folder(folder: Path, arrays: list[np.ndarray]) -> str:
    for k, array in enumerate(arrays):
        (folder / "train").mkdir(parents=True, exist_ok=True)
        np.save(folder / "train" / f"{k}.npy", array)
        (folder / "val").mkdir(exist_ok=True)
        np.save(folder / "val" / f"v{k}.npy", array)
    return str(folder)


def stored(root: Path) -> list[np.ndarray]:
    return [np.load(io.BytesIO(fields["npy"])) for _, fields in sorted(samples(root, "val").items())]


def test_arrays_of_either_order_become_channels_last(tmp_path: Path):
    last = np.random.default_rng(0).random((12, 18, 5)).astype(np.float32)
    folder = array_folder(tmp_path / "in", [last, last.transpose(2, 0, 1), (last * 255).astype(np.uint8)])
    index = build(ImageFolder(folder), tmp_path / "out")
    first, second, small = stored(tmp_path / "out")
    assert np.array_equal(first, last)
    assert np.array_equal(second, last)
    assert (small.dtype, small.shape) == (np.uint8, (12, 18, 5))
    assert index["image_size"] == {"min": [18, 12], "max": [18, 12]}
    assert [shard["channels"] for part in index["splits"].values() for shard in part["shards"]] == [[5], [5]]


def test_an_array_whose_channels_could_be_either_axis_is_refused_until_said(tmp_path: Path):
    array = np.random.default_rng(0).random((8, 9, 10)).astype(np.float32)
    folder = array_folder(tmp_path / "in", [array])
    with pytest.raises(DataError, match=r"\.npy: the shape \(8, 9, 10\).*source.layout=hwc.*chw"):
        build(ImageFolder(folder), tmp_path / "out")
    for layout, shape in (("hwc", (8, 9, 10)), ("chw", (9, 10, 8))):
        build(ImageFolder(folder, layout=layout), tmp_path / layout)
        assert stored(tmp_path / layout)[0].shape == shape
    with pytest.raises(ValueError, match=r"source\.layout is hwc or chw, not 'chwn'"):
        ImageFolder(folder, layout="chwn")


@pytest.mark.parametrize(
    ("array", "limits", "expected"),
    [
        (np.array([0, 65535], np.uint16), None, [-1, 1]),
        (np.array([0, 65535], ">u2"), None, [-1, 1]),
        (np.array([0, 4095], np.uint16), [0, 4095], [-1, 1]),
        (np.array([-2000, -1000, 0, 1000, 3000], np.int16), [-1000, 1000], [-1, -1, 0, 1, 1]),
        (np.array([0.0, 0.25, 1.0]), [0, 1], [-1, -0.5, 1]),
        (np.array([-0.5, 0.5], np.float16), None, [-0.5, 0.5]),
    ],
    ids=["uint16", "big_endian", "12_bit", "hounsfield", "unit", "half"],
)
def test_values_of_arrays_become_unit_range(tmp_path: Path, array: np.ndarray, limits: list | None, expected: list):
    folder = array_folder(tmp_path / "in", [np.broadcast_to(array[None], (20, len(array))).copy()])
    build(ImageFolder(folder, range=limits), tmp_path / "out")
    (found,) = stored(tmp_path / "out")
    assert (found.dtype, found.shape) == (np.float32, (20, len(array), 1))
    assert found[0, :, 0].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("range", [["a", "b"], [0, None], [0, [1]], [True, 2], [0, float("inf")], [1, 0], [0], 5, "ab"])
def test_a_range_is_two_numbers(tmp_path: Path, range: object):
    folder = array_folder(tmp_path / "in", [np.zeros((4, 4))])
    with pytest.raises(ValueError, match=r"source\.range is \[low,high\]"):
        ImageFolder(folder, range=range)


def test_arrays_beside_pictures_of_their_names_are_no_pictures(tmp_path: Path, capsys: pytest.CaptureFixture):
    for k in (0, 1, 2):
        for split in ("train", "val"):
            save(tmp_path / "in" / split / f"{split}{k}.png")
            np.save(tmp_path / "in" / split / f"{split}{k}.npy", np.zeros(768))
    np.save(tmp_path / "in" / "train" / "alone.npy", np.zeros((30, 40)))
    source = ImageFolder(str(tmp_path / "in"))
    assert source.splits() == {"train": 4, "val": 3}
    assert "6 files beside pictures of the same name are left out" in capsys.readouterr().out
    assert sum(len(batch) for batch in image_batches([str(tmp_path / "in" / "val")])) == 3


def test_a_samples_other_pictures_are_no_images_of_a_tar(tmp_path: Path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("x/a.b.png", "c.png", "c.edges.png", "c.mask.png", "d.seg.png"):
            tar.add(save(tmp_path / "picture.png"), name)
    assert sum(len(batch) for batch in image_batches([str(tmp_path / "a.tar")])) == 2


def test_hidden_folders_are_left_out(tmp_path: Path):
    for name in ("cat/a.png", "cat/.originals/a.png", ".thumbnails/a.png", "dog/b.png"):
        save(tmp_path / name)
    source = ImageFolder(str(tmp_path), val_fraction=0.5)
    assert source.classes == ["cat", "dog"]
    assert sum(source.splits().values()) == 2


def test_arrays_that_were_drawn_are_the_pictures_and_not_their_false_colours(tmp_path: Path):
    for k in (0, 1):
        save(tmp_path / "drawn" / f"0000{k}_seed{k}.png")
        np.save(tmp_path / "drawn" / f"0000{k}_seed{k}.npy", np.zeros((30, 40, 5), np.float32))
    save(tmp_path / "drawn" / "grid.png")
    (tmp_path / "drawn" / "recipe.json").write_text("{}")
    source = ImageFolder(str(tmp_path / "drawn"), val_fraction=0.5)
    assert {p.suffix for items in source.items.values() for _, p, _ in items} == {".npy"}
    assert next(image_batches([str(tmp_path / "drawn")])).shape == (2, 5, 30, 40)


def test_files_beside_a_train_folder_make_no_class_of_it(tmp_path: Path):
    for name in ("cat", "dog"):
        save(tmp_path / "in" / "train" / name / "a.png")
        save(tmp_path / "in" / "train" / name / "b.png")
    (tmp_path / "in" / "labels.csv").write_text("x")
    assert ImageFolder(str(tmp_path / "in")).classes == ["cat", "dog"]
    save(tmp_path / "in" / "beside.png")  # a picture is not dropped
    assert ImageFolder(str(tmp_path / "in")).classes is None


def test_a_folder_that_ldm_sample_wrote_holds_the_pictures_of_its_job(tmp_path: Path, capsys: pytest.CaptureFixture):
    """Without the grid, films and replays; a folder of other files with a recipe.json is read as it is."""
    folder = tmp_path / "samples"
    for own in (folder / "a", folder / "a" / "replay", folder / "b"):
        for name in ("00000_seed7.png", "00001_seed8.png", "00000_seed7.strip.png", "grid.png"):
            save(own / name)
        (own / "recipe.json").write_text("{}")
    save(folder / "a" / "film.gif")
    for source, count in ((folder, 4), (folder / "a", 2), (folder / "a" / "replay", 2)):
        assert sum(len(batch) for batch in image_batches([str(source)])) == count
    assert f"{folder}: left out 1 .gif; read are .jpg" in capsys.readouterr().out
    save(tmp_path / "kitchen" / "soup.png")
    (tmp_path / "kitchen" / "recipe.json").write_text("{}")
    assert sum(len(batch) for batch in image_batches([str(tmp_path / "kitchen")])) == 1


@pytest.mark.parametrize("array", [np.array([[0.0, 200.0]]), np.array([[-5, 5]])], ids=["float", "int"])
def test_values_that_need_a_range_stop_the_command_and_damaged_ones_are_listed(tmp_path: Path, array: np.ndarray):
    good = np.zeros((4, 4))
    with pytest.raises(DataError, match=r"1\.npy holds .*source\.range=\[low,high\]"):
        build(ImageFolder(array_folder(tmp_path / "in", [good, array])), tmp_path / "out")
    nan = np.full((4, 4), np.nan)
    index = build(ImageFolder(array_folder(tmp_path / "nan", [good, nan, np.zeros(3)])), tmp_path / "listed")
    assert index["splits"]["val"]["count"] == 1
    listed = (tmp_path / "listed" / "skipped.txt").read_text()
    assert "NaN" in listed
    assert "shape (3,) is not a picture" in listed


def test_a_narrow_range_of_values_is_said(tmp_path: Path, capsys: pytest.CaptureFixture):
    dark = np.linspace(0, 4095, 64).astype(np.uint16).reshape(8, 8)
    build(ImageFolder(array_folder(tmp_path / "in", [dark])), tmp_path / "out")
    assert "the arrays use -1.00 to -0.88 of [-1, 1]" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_arrays_are_reduced_channel_by_channel(tmp_path: Path, dtype: type):
    ramp = np.stack([np.tile(np.linspace(0, 1, 40), (20, 1)), np.zeros((20, 40)), np.ones((20, 40))] * 2, axis=2)
    array = (ramp * 255).astype(np.uint8) if dtype == np.uint8 else (ramp * 2 - 1).astype(np.float32)
    build(ImageFolder(array_folder(tmp_path / "in", [array]), max_size=10), tmp_path / "out")
    (found,) = stored(tmp_path / "out")
    assert (found.shape, found.dtype) == ((10, 20, 6), dtype)
    whole = (found / 127.5 - 1) if dtype == np.uint8 else found
    assert abs(whole[..., 0] - np.linspace(-1, 1, 20)).max() < 0.06
    assert np.array_equal(found[..., 0], found[..., 3])
    assert (whole[..., 1] == -1).all()
    assert (whole[..., 2] == 1).all()


def test_a_tif_of_a_viewer_stays_a_picture(tmp_path: Path):
    rgb = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    deep = np.linspace(0, 65535, 48).astype(np.uint16).reshape(6, 8)
    for split in ("train", "val"):
        (tmp_path / "in" / split).mkdir(parents=True)
        Image.fromarray(rgb).save(tmp_path / "in" / split / f"a{split}.tif", compression="tiff_lzw")
        Image.fromarray(deep).save(tmp_path / "in" / split / f"b{split}.tiff")
    build(ImageFolder(str(tmp_path / "in")), tmp_path / "out")
    found = samples(tmp_path / "out", "val")
    with Image.open(io.BytesIO(found["aval_tif"]["png"])) as image:
        assert np.array_equal(np.array(image), rgb)
    with Image.open(io.BytesIO(found["bval_tiff"]["png"])) as image:
        assert np.array_equal(np.array(image).astype(np.uint16), deep)


def test_bands_and_pages_of_a_tif_are_channels(tmp_path: Path):
    tifffile = pytest.importorskip("tifffile")
    bands = np.random.default_rng(0).integers(0, 65536, (5, 6, 8), dtype=np.uint16)
    for split in ("train", "val"):
        folder = tmp_path / "in" / split
        folder.mkdir(parents=True)
        tifffile.imwrite(folder / f"a{split}.tif", bands, planarconfig="separate", photometric="minisblack")
        tifffile.imwrite(
            folder / f"b{split}.tif", bands.transpose(1, 2, 0), planarconfig="contig", photometric="minisblack"
        )
        pages = [Image.fromarray(band) for band in bands]
        pages[0].save(folder / f"c{split}.tif", save_all=True, append_images=pages[1:])
        (folder / f"d{split}.tif").write_bytes((folder / f"a{split}.tif").read_bytes()[:300])
    build(ImageFolder(str(tmp_path / "in")), tmp_path / "out")
    expected = (bands.transpose(1, 2, 0) / 65535 * 2 - 1).astype(np.float32)
    found = stored(tmp_path / "out")
    assert len(found) == 3
    assert all(np.array_equal(array, expected) for array in found)
    assert "dval.tif" in (tmp_path / "out" / "skipped.txt").read_text()


# -- a folder of images ----------------------------------------------------------------------------------------------


def test_folders_are_classes_and_text_files_captions(tmp_path: Path):
    for name in ("dog/a.png", "cat/b.jpg", "cat/deep/c.png"):
        save(tmp_path / "in" / name)
    (tmp_path / "in" / "dog" / "a.txt").write_text("a dog, grey\n")
    save(tmp_path / "in" / ".hidden.png")
    index = build(ImageFolder(str(tmp_path / "in"), val_fraction=0.5), tmp_path / "out")
    assert index["classes"] == ["cat", "dog"]
    assert index["image_size"] == {"min": [40, 30], "max": [40, 30]}
    found = samples(tmp_path / "out", "train") | samples(tmp_path / "out", "val")
    assert {k: (set(f), f["cls"]) for k, f in found.items()} == {
        "dog_a_png": ({"png", "cls", "txt"}, b"1"),
        "cat_b_jpg": ({"jpg", "cls"}, b"0"),
        "cat_deep_c_png": ({"png", "cls"}, b"0"),
    }
    assert found["dog_a_png"]["txt"] == b"a dog, grey"
    assert found["dog_a_png"]["png"] == (tmp_path / "in" / "dog" / "a.png").read_bytes()  # untouched


@pytest.mark.parametrize("name", ["val", "validation", "test"])
def test_split_folders(tmp_path: Path, name: str):
    for k in range(4):
        save(tmp_path / "in" / "train" / "cat" / f"{k}.png")
    save(tmp_path / "in" / name / "dog" / "x.png")
    index = build(ImageFolder(str(tmp_path / "in")), tmp_path / "out")
    assert {s: p["count"] for s, p in index["splits"].items()} == {"train": 4, "val": 1}
    assert index["classes"] == ["cat", "dog"]


def test_a_train_folder_alone_is_no_class(tmp_path: Path):
    for k in range(10):
        save(tmp_path / "in" / "train" / ("cat", "dog")[k % 2] / f"{k}.png")
    source = ImageFolder(str(tmp_path / "in"), val_fraction=0.3)
    assert source.classes == ["cat", "dog"]
    assert sum(source.splits().values()) == 10


def test_trains_may_be_a_class(tmp_path: Path):
    for name in ("car", "train"):
        save(tmp_path / name / "a.png")
    assert ImageFolder(str(tmp_path)).classes == ["car", "train"]


def test_one_name_in_two_splits_is_two_samples(tmp_path: Path):
    for split in ("train", "val"):
        (tmp_path / split / "cats").mkdir(parents=True)
        for k in range(3):
            Image.new("RGB", (8, 8), (k, 0, 200 if split == "val" else 0)).save(tmp_path / split / "cats" / f"{k}.png")
    source = ImageFolder(str(tmp_path))
    keys = {split: [key for key, _, _ in items] for split, items in source.items.items()}
    assert keys == {"train": [f"cats_{k}_png" for k in range(3)], "val": [f"val_cats_{k}_png" for k in range(3)]}


def test_growing_a_folder_moves_no_picture_between_splits(tmp_path: Path):
    def split_of() -> dict[str, str]:
        source = ImageFolder(str(tmp_path), val_fraction=0.2)
        return {key: split for split, items in source.items.items() for key, _, _ in items}

    for k in range(60):
        (tmp_path / f"{k}.png").touch()
    before = split_of()
    for k in range(60, 120):
        (tmp_path / f"{k}.png").touch()
    after = split_of()
    assert before.items() <= after.items()
    assert 8 < sum(s == "val" for s in after.values()) < 40
    assert sum(in_validation(f"picture {k}", 0.05) for k in range(20_000)) == pytest.approx(1000, abs=120)


def test_unreadable_files_are_left_out_and_listed(tmp_path: Path):
    for k in range(6):
        save(tmp_path / "in" / f"{k}.png", k)
    (tmp_path / "in" / "broken.png").write_bytes(b"no picture")
    whole = save(tmp_path / "in" / "cut.jpg", size=(200, 200)).read_bytes()
    (tmp_path / "in" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    for max_size in (None, 20):
        out = tmp_path / f"out{max_size}"
        index = build(ImageFolder(str(tmp_path / "in"), 0.3, max_size), out)
        assert sum(p["count"] for p in index["splits"].values()) == 6
        listed = (out / "skipped.txt").read_text().splitlines()
        assert len(listed) == 2
        assert any("broken" in line and "no image: 10 bytes" in line for line in listed)
        assert any("cut" in line and "truncated" in line for line in listed)


def test_captions_that_cannot_be_read_are_left_out_and_listed(tmp_path: Path):
    for k in range(8):
        save(tmp_path / "in" / f"{k}.png", k)
        (tmp_path / "in" / f"{k}.txt").write_bytes(b"caf\xe9" if k == 3 else "café".encode())
    index = build(ImageFolder(str(tmp_path / "in"), 0.3), tmp_path / "out")
    assert sum(p["count"] for p in index["splits"].values()) == 7
    assert [p["shards"][0]["fields"]["txt"] for p in index["splits"].values()] == [
        p["count"] for p in index["splits"].values()
    ]
    (listed,) = (tmp_path / "out" / "skipped.txt").read_text().splitlines()
    assert "3_png: its .txt is not UTF-8" in listed


class Given:
    """A source of the given samples; the first is also the only validation sample."""

    identity = {"source": "given"}

    def __init__(self, members: list[dict[str, bytes]], classes: list[str] | None = None):
        self.members, self.classes = members, classes

    def splits(self) -> dict[str, int]:
        return {"train": len(self.members), "val": 1}

    def sample(self, split: str, i: int) -> tuple[str, dict[str, bytes]]:
        return f"{split}_{i}", self.members[i]


def test_members_that_training_could_not_use_are_left_out_and_listed(tmp_path: Path):
    def npy(array: np.ndarray) -> bytes:
        np.save(buffer := io.BytesIO(), array)
        return buffer.getvalue()

    good = {"npy": npy(np.zeros((4, 4, 5), np.float32)), "cls": b"1", "txt": b"one"}
    bad = [
        {"cls": b"-1"}, {"cls": b"2"}, {"cls": b"999999"}, {"cls": b"1" + b"0" * 30}, {"cls": b"abc"}, {"json": b"[]"},
        {"json": b'{"captions": [null]}'}, {"json": b'{"captions": "a red circle"}'}, {"txt": b"\xff"},
        {"json": b'{"boxes": [[0, 0, 1, 1, NaN]]}'}, {"json": b'{"boxes": [[0, 0, 1, 1, -3]]}'},
        {"json": b'{"boxes": [[0, 0, 1, 1, 2.5]]}'}, {"json": b'{"boxes": [[0, 0, 1, 1, 2]]}'},
        {"json": b'{"boxes": [[NaN, 0, 1, 1, 1]]}'}, {"json": b'{"boxes": [[0, 0, -1, 1, 1]]}'},
        {"npy": npy(np.full((4, 4, 5), np.nan))}, {"npy": npy(np.full((4, 4, 5), 2.0))}, {"npy": npy(np.array([{}]))},
        {"npy": npy(np.zeros((4, 4, 5), np.int64))},
    ]  # fmt: skip
    index = build(Given([good, *(good | wrong for wrong in bad)], ["a", "b"]), tmp_path)
    assert index["splits"]["train"]["count"] == 1
    listed = (tmp_path / "skipped.txt").read_text().splitlines()
    assert [line.split(":")[0] for line in listed] == [f"train train_{i + 1}" for i in range(len(bad))]


@pytest.mark.parametrize(
    "text", ["", "[]", "null", '{"sha256": 3}', '{"file": "val-000000.tar"}', "[" * 100_000, "\xff"]
)
def test_damaged_notes_are_made_again(tmp_path: Path, text: str):
    source = small_shapes()
    index = build(source, tmp_path, 5)
    for name in ("train-000000.tar.json", "val-000000.tar.json"):
        (tmp_path / ".entries" / name).write_bytes(text.encode("latin-1"))
    assert build(source, tmp_path, 5) == index
    (tmp_path / ".entries" / "source.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=r"prepared with other options.*choose another out=<folder>, or delete"):
        build(source, tmp_path, 5)


def test_a_split_without_a_readable_picture_is_refused(tmp_path: Path):
    save(tmp_path / "in" / "train" / "a.png")
    (tmp_path / "in" / "val").mkdir()
    (tmp_path / "in" / "val" / "b.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"no readable sample in val.*skipped\.txt"):
        build(ImageFolder(str(tmp_path / "in")), tmp_path / "out")
    assert not (tmp_path / "out" / "index.json").exists()


def test_max_size_reduces_the_short_side(tmp_path: Path):
    stripes = np.zeros((64, 128), np.uint8)
    stripes[:, ::2] = 1
    palette = Image.fromarray(stripes).convert("P")
    palette.putpalette([0, 0, 0, 255, 255, 255])
    pictures = {
        "jpg": Image.new("RGB", (100, 50), "red"),
        "png": Image.fromarray(stripes * 255),
        "webp": Image.new("RGBA", (30, 90)),
        "palette.png": palette,
        "deep.png": Image.fromarray(np.full((64, 128), 40_000, np.uint16)),
        "small.png": Image.new("L", (16, 9)),
    }
    for name, image in pictures.items():
        (tmp_path / "in").mkdir(exist_ok=True)
        image.save(tmp_path / "in" / f"a.{name}")
    build(ImageFolder(str(tmp_path / "in"), 0.4, max_size=16), tmp_path / "out")
    found = samples(tmp_path / "out", "train") | samples(tmp_path / "out", "val")
    images = {k: Image.open(io.BytesIO(next(iter(f.values())))) for k, f in found.items()}
    assert {k: (next(iter(found[k])), i.size) for k, i in images.items()} == {
        "a_jpg": ("jpg", (32, 16)),
        "a_png": ("png", (32, 16)),
        "a_webp": ("png", (16, 48)),
        "a_palette_png": ("png", (32, 16)),
        "a_deep_png": ("png", (32, 16)),
        "a_small_png": ("png", (16, 9)),
    }
    for name in ("a_png", "a_palette_png"):  # black and white stripes one pixel wide become grey, without moiré
        inside = np.asarray(images[name].convert("L"), float)[:, 2:-2]
        assert np.abs(inside - 127.5).max() < 8
    assert abs(np.asarray(images["a_deep_png"]).astype(int).max() - 40_000) < 300


def test_exif_rotation_survives_a_reduction(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (100, 50), "red").save(tmp_path / "in" / f"{name}.jpg", exif=exif)
    source = ImageFolder(str(tmp_path / "in"), 0.0, max_size=20)
    image = Image.open(io.BytesIO(source.sample("train", 0)[1]["jpg"]))
    assert image.size == (20, 40)
    assert image.getexif().get(0x0112, 1) == 1


def test_two_files_with_one_key_are_named(tmp_path: Path):
    save(tmp_path / "a" / "b_c.png")
    save(tmp_path / "a_b" / "c.png")
    with pytest.raises(DataError, match=r"a/b_c\.png and .*a_b/c\.png.*rename"):
        ImageFolder(str(tmp_path))


def test_no_images_and_no_folder_are_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="no images"):
        ImageFolder(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="is not a folder; give a folder of images"):
        ImageFolder(str(tmp_path / "none"))


def test_one_picture_cannot_be_split(tmp_path: Path):
    save(tmp_path / "in" / "a.png")
    with pytest.raises(DataError, match=r"both need at least one: source.val_fraction"):
        build(ImageFolder(str(tmp_path / "in")), tmp_path / "out")


# -- tables ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for k in range(6):
        save(tmp_path / f"{k}.png", k)
    return tmp_path


def write_table(folder: Path, rows: list[dict], kind: str) -> str:
    path = folder / f"table.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    else:
        comma = "\t" if kind == "tsv" else ","
        path.write_text(
            "\n".join([comma.join(rows[0])] + [comma.join(str(v) for v in r.values()) for r in rows]) + "\n"
        )
    return str(path)


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_rows_of_one_image_are_its_captions(pictures: Path, kind: str):
    rows = [
        {"image": "0.png", "caption": "zero", "kind": "even", "part": "train"},
        {"image": "1.png", "caption": "one", "kind": "odd", "part": "val"},
        {"image": "0.png", "caption": "nought", "kind": "even", "part": "train"},
    ]
    index = build(Table(write_table(pictures, rows, kind), class_column="kind", split_column="part"), pictures / "out")
    assert index["classes"] == ["even", "odd"]
    train, val = samples(pictures / "out", "train"), samples(pictures / "out", "val")
    assert (list(train), list(val)) == (["0_png"], ["1_png"])
    assert (train["0_png"]["txt"], train["0_png"]["cls"]) == (b"zero", b"0")
    assert json.loads(train["0_png"]["json"]) == {"captions": ["zero", "nought"]}
    assert (set(val["1_png"]), val["1_png"]["txt"]) == ({"png", "txt", "cls"}, b"one")


def test_a_name_that_is_no_text_belongs_to_a_split_too() -> None:
    assert in_validation("caf\udce9", 1.0)
    assert not in_validation("caf\udce9", 0.0)


def test_a_table_whose_pictures_changed_is_another_source(pictures: Path) -> None:
    path = write_table(pictures, [{"image": "0.png", "caption": "zero"}], "csv")
    before = Table(path).identity
    assert Table(path).identity == before
    Image.new("RGB", (40, 40)).save(pictures / "0.png")
    assert Table(path).identity != before


def test_rows_that_would_get_the_same_key_are_named(pictures: Path) -> None:
    (pictures / "a").mkdir()
    for name in ("a_b.png", "a/b.png"):
        Image.new("RGB", (8, 8)).save(pictures / name)
    rows = [{"image": name, "caption": "one"} for name in ("a_b.png", "a/b.png")]
    with pytest.raises(DataError, match=r"a_b\.png and a/b\.png would both get the key a_b_png; rename one"):
        Table(write_table(pictures, rows, "csv"))


def test_captions_that_were_added_or_changed_make_another_source(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    seen = [ImageFolder(tmp_path).identity]
    for words in ("a dog", "a black dog"):
        (tmp_path / "a.txt").write_text(words)
        assert ImageFolder(tmp_path).identity == ImageFolder(tmp_path).identity
        seen.append(ImageFolder(tmp_path).identity)
    assert len({json.dumps(identity) for identity in seen}) == 3


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_table_errors_name_the_line_or_column(pictures: Path, kind: str):
    def table(*rows: dict, **options) -> Table:
        return Table(write_table(pictures, list(rows), kind), **options)

    good = {"image": "0.png", "caption": "zero"}
    with pytest.raises(DataError, match=r"has the columns image, caption, not file; set source\.image_column"):
        table(good, image_column="file")
    with pytest.raises(DataError, match=r"names nine\.png, which is not in .*source\.images=<folder>"):
        table(good, {"image": "nine.png", "caption": "nine"})
    line = 3 if kind == "csv" else 2
    with pytest.raises(DataError, match=f"line {line}: no image"):
        table(good, {"image": "", "caption": "two"})
    with pytest.raises(FileNotFoundError, match=r"is not a file; give a .csv, .tsv or .jsonl table"):
        Table(str(pictures / "none.csv"))


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("t.jsonl", b"[1]\n", "line 1: no JSON object"),
        ("t.jsonl", b'{"image": "a.png", "caption": ["one", "two"]}\n', r"line 1: caption is \['one', 'two'\], one text"),
        ("t.jsonl", b'{"image": {"a": 1}, "caption": "x"}\n', "line 1: image is"),
        ("t.jsonl", b"[" * 100_000, "line 1: no JSON"),
        ("t.csv", "image,caption\na.png,café\n".encode("latin-1"), "not UTF-8 text in rows.*save it as UTF-8"),
        ("t.csv", b"image,caption\na.png," + b"x" * 200_000 + b"\n", "not UTF-8 text in rows.*field limit"),
    ],
)  # fmt: skip
def test_tables_of_another_shape_are_named(tmp_path: Path, name: str, content: bytes, match: str):
    save(tmp_path / "a.png")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=match):
        Table(str(tmp_path / name))


def test_a_jsonl_row_without_a_column_is_named(pictures: Path):
    rows = [{"image": "0.png", "caption": "zero", "kind": "a"}, {"image": "1.png", "caption": "one"}]
    with pytest.raises(DataError, match="line 2: no kind"):
        Table(write_table(pictures, rows, "jsonl"), class_column="kind")
    (pictures / "table.jsonl").write_text('{"image": "0.png", "caption": "a"}\n\n{"image": \n')
    with pytest.raises(DataError, match="line 3: no JSON"):
        Table(str(pictures / "table.jsonl"))
    (pictures / "table.jsonl").write_text("")
    with pytest.raises(DataError, match="has no rows"):
        Table(str(pictures / "table.jsonl"))


# -- data sets of others ---------------------------------------------------------------------------------------------


def cifar_archive(folder: Path) -> tuple[Path, np.ndarray]:
    """Writes CIFAR-10's archive with two records per file; returns its path and the pictures (12, 32, 32, 3) in the
    files' order."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    path = folder / "cifar-10-binary.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for f, name in enumerate(n for names in cifar10.FILES.values() for n in names):
            data = b"".join(
                bytes([(2 * f + k) % 10]) + pixels[2 * f + k].transpose(2, 0, 1).tobytes() for k in range(2)
            )
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path, pixels


def md5_of(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def test_cifar10_from_its_archive_and_its_folder(tmp_path: Path):
    archive, pixels = cifar_archive(tmp_path)
    build(CIFAR10(str(archive), md5=md5_of(archive)), tmp_path / "out")
    found = list(samples(tmp_path / "out", "train").values()) + list(samples(tmp_path / "out", "val").values())
    assert len(found) == 12
    for k, fields in enumerate(found):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(fields["png"]))), pixels[k])
        assert int(fields["cls"]) == k % 10
        assert fields["txt"].decode() == f"a photo of a {cifar10.CLASSES[k % 10]}"
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    again = build(CIFAR10(str(tmp_path / "cifar-10-batches-bin")), tmp_path / "out2")
    assert again == read_index(tmp_path / "out")
    (tmp_path / "cifar-10-batches-bin" / "test_batch.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks test_batch\.bin; give the unpacked"):
        CIFAR10(str(tmp_path / "cifar-10-batches-bin"))
    with pytest.raises(FileNotFoundError, match=r"neither cifar-10-binary\.tar\.gz nor"):
        CIFAR10(str(tmp_path / "none"))


def test_a_wrong_checksum_is_refused(tmp_path: Path):
    archive, _ = cifar_archive(tmp_path)
    with pytest.raises(ValueError, match=f"has md5 .*, expected {cifar10.MD5}; delete it and download it again"):
        CIFAR10(str(archive))


def write_idx(path: Path, array: np.ndarray, compressed: bool) -> None:
    data = b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.with_name(path.name + ".gz" * compressed).write_bytes(gzip.compress(data) if compressed else data)


@pytest.fixture(params=[True, False], ids=["gz", "plain"])
def fashion(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    for split, count in (("train", 12), ("t10k", 4)):
        pixels = np.random.default_rng(count).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        write_idx(tmp_path / f"{split}-images-idx3-ubyte", pixels, request.param)
        write_idx(tmp_path / f"{split}-labels-idx1-ubyte", np.arange(count, dtype=np.uint8) % 10, request.param)
    return tmp_path


def test_fashion_mnist(fashion: Path):
    index = build(FashionMNIST(str(fashion)), fashion / "out")
    assert {s: p["count"] for s, p in index["splits"].items()} == {"train": 12, "val": 4}
    pixels = np.random.default_rng(12).integers(0, 256, (12, 28, 28), dtype=np.uint8)
    for k, fields in enumerate(samples(fashion / "out", "train").values()):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(fields["png"]))), pixels[k])
        assert fields["txt"].decode() == f"a picture of a {fashion_mnist.CLASSES[k % 10]}"


@pytest.mark.parametrize("keep", [-100, 10, 3, 0])
def test_a_cut_idx_file_is_named(fashion: Path, keep: int):
    path = next(fashion.glob("train-images*"))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte.*(cut short|not an IDX file).*download it again"):
        FashionMNIST(str(fashion))
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks train-images-idx3-ubyte\.gz"):
        FashionMNIST(str(fashion))


# -- building --------------------------------------------------------------------------------------------------------


def small_shapes(**options) -> Shapes:
    return Shapes(**{"size": 24, "count": 20, "val_count": 5} | options)


def test_shapes_are_a_function_of_the_seed(tmp_path: Path):
    one, two = (build(small_shapes(), tmp_path / n, per_shard=8) for n in ("one", "two"))
    assert one == two
    assert build(small_shapes(seed=1), tmp_path / "three", per_shard=8) != one
    shorter = samples(tmp_path / "one", "train")
    build(small_shapes(count=30), tmp_path / "four", per_shard=8)
    assert shorter.items() <= samples(tmp_path / "four", "train").items()  # more samples do not change the first ones


@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupted_build_continues(tmp_path: Path, workers: int):
    index = build(small_shapes(), tmp_path, per_shard=8, workers=workers)
    assert index == build(small_shapes(), tmp_path / "alone", per_shard=8)
    before = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("*.tar")}
    assert len(before) == 4
    (tmp_path / "index.json").unlink()
    (tmp_path / "train-000001.tar").unlink()
    (tmp_path / "train-000002.tar").write_bytes(b"damaged")
    assert build(small_shapes(), tmp_path, per_shard=8) == index == read_index(tmp_path)
    after = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("*.tar")}
    assert {n for n in before if before[n] != after[n]} == {"train-000001.tar", "train-000002.tar"}


@pytest.mark.parametrize("options", [{"seed": 1}, {"size": 32}, {"objects": 2}, {"count": 21}])
def test_other_options_do_not_touch_finished_data(tmp_path: Path, options: dict):
    index = build(small_shapes(), tmp_path, per_shard=8)
    with pytest.raises(
        DataError,
        match="prepared with other options or from other files; choose another out=<folder>, or delete its tars",
    ):
        build(small_shapes(**options), tmp_path, per_shard=8)
    assert read_index(tmp_path) == index
    assert len(samples(tmp_path, "train")) == 20


def test_another_folder_is_another_source(tmp_path: Path):
    for folder, mode in (("one", "RGB"), ("two", "L")):
        for k in range(8):
            save(tmp_path / folder / f"{k}.png", mode=mode)
    build(ImageFolder(str(tmp_path / "one"), 0.3), tmp_path / "out")
    with pytest.raises(DataError, match="prepared with other options"):
        build(ImageFolder(str(tmp_path / "two"), 0.3), tmp_path / "out")
    shutil.move(tmp_path / "one", tmp_path / "moved")
    build(ImageFolder(str(tmp_path / "moved"), 0.3), tmp_path / "out")  # its place does not matter


def test_other_captions_are_another_source(pictures: Path):
    rows = [{"image": f"{k}.png", "caption": "old", "part": ("train", "val")[k % 2]} for k in range(4)]
    build(Table(write_table(pictures, rows, "csv"), split_column="part"), pictures / "out")
    rows[2]["caption"] = "new"
    with pytest.raises(DataError, match="prepared with other options"):
        build(Table(write_table(pictures, rows, "csv"), split_column="part"), pictures / "out")


def test_an_index_of_other_origin_is_kept(tmp_path: Path):
    (tmp_path / "index.json").write_text("{}")
    with pytest.raises(DataError, match="data of another origin; choose another out=<folder>"):
        build(small_shapes(), tmp_path)


@pytest.mark.parametrize(
    ("options", "match"), [({"objects": 3}, "source.objects is 1 or 2"), ({"size": 16}, "below 24 pixels")]
)
def test_impossible_shapes_are_refused(options: dict, match: str):
    with pytest.raises(ValueError, match=match):
        small_shapes(**options)


# -- tars that exist -------------------------------------------------------------------------------------------------


def test_real_tars_are_indexed_where_they_lie(datasets: Path, tmp_path: Path):
    index = write_tar_index(str(datasets / "clothing256"), tmp_path)
    assert {s: p["count"] for s, p in index["splits"].items()} == {"train": 1534, "val": 341}  # validation, not test
    assert len(index["classes"]) == 10
    reader = IndexedShards(tmp_path, "val")
    assert reader.files[0].path == (datasets / "clothing256" / "validation.tar").resolve()
    fields = reader.members(7)
    assert set(fields) == {"jpg", "cls", "txt"}
    assert min(Image.open(io.BytesIO(fields["jpg"])).size) == 256


def test_splits_can_be_chosen(data_root: Path, tmp_path: Path):
    index = write_tar_index(str(data_root), tmp_path, train="train-00000[0-3].tar", val="train-000004.tar")
    assert {s: p["count"] for s, p in index["splits"].items()} == {"train": 32, "val": 8}
    with pytest.raises(DataError, match=r"fits split 'val' \(patterns test\*\); set source\.val=<pattern>"):
        write_tar_index(str(data_root), tmp_path, val="test*")
    with pytest.raises(DataError, match=r"no .tar files in"):
        write_tar_index(str(tmp_path), tmp_path / "out")


def test_an_index_is_rebuilt_with_its_class_names_and_replaces_no_other(tmp_path: Path):
    for label, name in enumerate(("cat", "dog")):
        for k in range(4):
            save(tmp_path / "photos" / name / f"{k}.png", value=20 * k + label)
    made = build(ImageFolder(str(tmp_path / "photos"), val_fraction=0.4), tmp_path / "out")
    assert write_tar_index(str(tmp_path / "out"), tmp_path / "out") == made
    (tmp_path / "others").mkdir()
    for split in ("train", "val"):
        shutil.copy(tmp_path / "out" / f"{split}-000000.tar", tmp_path / "others" / f"{split}.tar")
    with pytest.raises(DataError, match=r"out holds the index of other tars \(first: train-000000\.tar\)"):
        write_tar_index(str(tmp_path / "others"), tmp_path / "out")
    assert read_index(tmp_path / "out") == made
    for damaged in ("[]", '{"splits": 5}', '{"splits": {"train": {"shards": [5]}}}', "{"):
        (tmp_path / "out" / "index.json").write_text(damaged)
        assert write_tar_index(str(tmp_path / "out"), tmp_path / "out")["splits"] == made["splits"]
    more = tmp_path / "out" / "train-000001.tar"
    shutil.copy(tmp_path / "out" / "val-000000.tar", more)
    write_tar_index(str(tmp_path / "out"), tmp_path / "out")
    more.unlink()  # a shard that its owner has deleted
    assert write_tar_index(str(tmp_path / "out"), tmp_path / "out")["splits"] == made["splits"]
    (tmp_path / "others" / "classes.txt").write_text("cat\n\ndog\n")
    with pytest.raises(DataError, match=r"classes\.txt: line 2 is empty"):
        write_tar_index(str(tmp_path / "others"), tmp_path / "index")
    (tmp_path / "others" / "classes.txt").write_text("cat\ndog\n\n")
    assert write_tar_index(str(tmp_path / "others"), tmp_path / "index")["classes"] == ["cat", "dog"]
    (tmp_path / "others" / "train.tar").rename(tmp_path / "others" / "train:0.tar")
    with pytest.raises(DataError, match=r"train:0\.tar cannot be named in an index"):
        write_tar_index(str(tmp_path / "others"), tmp_path / "others")


def test_shards_go_into_a_folder_of_their_own(tmp_path: Path):
    save(tmp_path / "photos" / "a.png")
    save(tmp_path / "photos" / "b.png", value=7)
    source = ImageFolder(str(tmp_path / "photos"), val_fraction=0)
    with pytest.raises(
        DataError, match=r"photos holds other files \(first: a\.png\); shards go into a folder of their own"
    ):
        build(source, tmp_path / "photos")
    assert sorted(p.name for p in (tmp_path / "photos").iterdir()) == ["a.png", "b.png"]
    (tmp_path / "empty").mkdir()
    build(source, tmp_path / "empty")
    build(source, tmp_path / "empty")  # again
    with pytest.raises(
        FileNotFoundError, match=r"make shards of them: ldm-prepare source=image_folder path=.*photos out="
    ):
        read_index(tmp_path / "photos")


# -- formats by content -----------------------------------------------------------------------------------------------


def picture_as(kind: str, mode: str = "RGB", size: tuple[int, int] = (12, 8), **options: object) -> bytes:
    image, buffer = Image.new(mode, size, options.pop("colour", 90)), io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_pictures_are_held_by_what_they_are_and_look_the_same_when_reduced(tmp_path: Path):
    clear = np.full((8, 8, 4), [0, 0, 0, 0], np.uint8)
    clear[:, 4:] = 255
    buffer = io.BytesIO()
    Image.fromarray(clear).save(buffer, "PNG")
    deep = io.BytesIO()
    Image.fromarray(np.full((8, 8), 20_000, np.uint16)).save(deep, "PNG")
    keyed = io.BytesIO()  # white, and black that is transparent
    grey = Image.fromarray(np.repeat(np.array([[0, 255]], np.uint8), 8, 0).repeat(4, 1))
    grey.save(keyed, "PNG", transparency=0)
    for name, data, endings in (
        ("rgba.jpg", buffer.getvalue(), ("png", "png")), ("deep.jpg", deep.getvalue(), ("png", "png")),
        ("keyed.png", keyed.getvalue(), ("png", "png")), ("a.jfif", picture_as("JPEG"), ("jpg", "jpg")),
        ("a.gif", picture_as("GIF", "P", colour=7), ("png", "png")), ("a.webp", picture_as("WEBP"), ("webp", "png")),
        ("a.jpeg", picture_as("JPEG"), ("jpeg", "jpg")), ("a.bmp", picture_as("BMP"), ("bmp", "png")),
        ("nameless", picture_as("TIFF", "CMYK", colour=(0, 99, 9, 9)), ("png", "png")),
    ):  # fmt: skip
        shown = []
        for size, ending in zip((None, 4), endings):
            extension, held = image_folder.stored(data, name.rpartition(".")[2], size, name)
            assert extension == ending, name
            shown.append(decode_image(held, extension, 3).float())
        if name not in ("rgba.jpg", "keyed.png"):
            assert (shown[0].mean((1, 2)) - shown[1].mean((1, 2))).abs().max() < 3, name
        else:  # white throughout: no fringe of the hidden black
            assert all(picture.min() > 250 for picture in shown), name


def test_no_picture_starts_a_program():
    for data in (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n",
        b"SIMPLE  =                    T",
    ):
        with pytest.raises(ValueError, match="no image"), open_image(data):
            pass


def test_changed_arrays_of_the_same_size_are_other_data(tmp_path: Path):
    folder = array_folder(tmp_path / "in", [np.full((4, 4, 3), 10, np.uint8)])
    before = ImageFolder(folder).identity
    assert ImageFolder(folder).identity == before
    path = Path(folder) / "train" / "0.npy"
    np.save(path, np.full((4, 4, 3), 200, np.uint8))
    os.utime(path, ns=(1, 1))
    assert ImageFolder(folder).identity != before


def test_linked_folders_are_read_and_left_out_formats_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for k in range(3):
        save(tmp_path / "photos" / "cats" / f"{k}.png", value=k)
        save(tmp_path / "elsewhere" / f"{k}.png", value=k)
    (tmp_path / "photos" / "dogs").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos" / "cats" / "all").symlink_to(tmp_path / "photos")  # a circle
    (tmp_path / "photos" / "cats" / "phone.heic").touch()
    source = ImageFolder(str(tmp_path / "photos"), val_fraction=0.3)
    assert source.classes == ["cats", "dogs"]
    assert sum(source.splits().values()) == 6
    assert "left out 1 .heic; read are" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (["a.png,cat,train", "./a.png,dog,train"], "a label in one row and another"),
        (["a.png,cat,train", "a.png,cat,val"], "a split in one row and another"),
    ],
)
def test_a_table_that_contradicts_itself_is_refused(rows: list[str], words: str, tmp_path: Path):
    save(tmp_path / "a.png")
    (tmp_path / "t.csv").write_text("\n".join(["image,kind,part", *rows]))
    with pytest.raises(DataError, match=words):
        Table(str(tmp_path / "t.csv"), caption_column=None, class_column="kind", split_column="part")


class Served:
    """A local server of a folder that honours Range headers. `drop_after`: closes the connection after this many bytes.
    `ranges`: the Range header of every request."""

    def __init__(self, folder: Path):
        self.drop_after: int | None = None
        self.ranges: list[str | None] = []
        served = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path = folder / self.path.lstrip("/")
                served.ranges.append(self.headers.get("Range"))
                if not path.is_file():
                    return self.send_error(404)
                data = path.read_bytes()
                start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
                if start >= len(data):
                    return self.send_error(416)
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(data) - start))
                self.end_headers()
                self.wfile.write(data[start:][: served.drop_after])
                return None

            def log_message(self, *args) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    urllib.request.install_opener(None)  # urllib keeps the proxies that were set at its first use
    site = Served(tmp_path)
    yield site
    site.server.shutdown()
    site.server.server_close()


def test_remote_tars_have_the_same_index_as_local_ones(served: Served, data_root: Path, tmp_path: Path):
    names = ["train-000000.tar", "train-000001.tar", "val-000000.tar"]
    for name in names:
        shutil.copy(data_root / name, tmp_path / name)
    remote = write_tar_index([f"{served.url}/{n}" for n in names], tmp_path / "remote")
    local = write_tar_index(str(tmp_path), tmp_path / "local")
    for split in ("train", "val"):
        ours, theirs = remote["splits"][split]["shards"], local["splits"][split]["shards"]
        assert [s["file"] for s in ours] == [f"{served.url}/{Path(s['file']).name}" for s in theirs]
        assert [{k: v for k, v in s.items() if k != "file"} for s in ours] == [
            {k: v for k, v in s.items() if k != "file"} for s in theirs
        ]


@pytest.mark.parametrize("at", ["member", "data"])
def test_a_truncated_remote_tar_is_named(served: Served, data_root: Path, tmp_path: Path, at: str):
    with tarfile.open(data_root / "train-000000.tar") as tar:
        member = tar.getmembers()[8]
    cut = member.offset if at == "member" else member.offset_data + 10
    (tmp_path / "train.tar").write_bytes((data_root / "train-000000.tar").read_bytes()[:cut])
    with pytest.raises(DataError, match=r"http://.*train\.tar is truncated"):
        write_tar_index([f"{served.url}/train.tar"], tmp_path / "out", val="train*")


def test_a_missing_remote_tar_is_named(served: Served, tmp_path: Path):
    with pytest.raises((DataError, OSError), match=r"http://.*none\.tar"):
        write_tar_index([f"{served.url}/none.tar"], tmp_path, train="none*", val="none*")


# -- downloads -------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file.bin"
    path.write_bytes(np.random.default_rng(0).bytes(300_000))
    return path


def test_a_dropped_download_continues(served: Served, file: Path, tmp_path: Path):
    target = tmp_path / "cache" / "file.bin"
    served.drop_after = 120_000
    with pytest.raises(ConnectionError, match="run the same command to continue"):
        download(f"{served.url}/file.bin", target, md5_of(file))
    assert not target.exists()
    served.drop_after = None
    assert download(f"{served.url}/file.bin", target, md5_of(file)).read_bytes() == file.read_bytes()
    assert served.ranges == [None, "bytes=120000-"]
    assert [p.name for p in target.parent.iterdir()] == ["file.bin"]
    download(f"{served.url}/file.bin", target, md5_of(file))
    assert len(served.ranges) == 2  # it is there: nothing is fetched


def test_a_download_that_was_whole_is_finished(served: Served, file: Path, tmp_path: Path):
    target = tmp_path / "cache" / "file.bin"
    target.parent.mkdir()
    shutil.copy(file, target.with_name("file.bin.partial"))
    assert download(f"{served.url}/file.bin", target, md5_of(file)).read_bytes() == file.read_bytes()


def test_a_download_with_a_wrong_checksum_gets_no_final_name(served: Served, file: Path, tmp_path: Path):
    target = tmp_path / "cache" / "file.bin"
    with pytest.raises(ValueError, match="expected 0000; delete it"):
        download(f"{served.url}/file.bin", target, "0000")
    assert not target.exists()


def test_no_network_and_no_such_file_are_told_apart(served: Served, tmp_path: Path):
    with pytest.raises(ConnectionError, match="answered 404; download it by hand to"):
        download(f"{served.url}/none", tmp_path / "none", "0000")
    with pytest.raises(
        ConnectionError, match=r"no connection to http://127\.0\.0\.1:9/.*pass path=<file> \(md5 0000\)"
    ):
        download("http://127.0.0.1:9/none", tmp_path / "none", "0000")


def test_a_folder_of_a_few_pictures_with_one_corrupt_photo_is_prepared(tmp_path: Path):
    """As for a subject: one caption for all pictures without their own, no validation split; skipped.txt names the
    picture that cannot be read."""
    (tmp_path / "photos").mkdir()
    for k in range(4):
        Image.new("RGB", (16, 16), (60 * k, 0, 0)).save(tmp_path / "photos" / f"{k}.jpg")
    (tmp_path / "photos" / "0.txt").write_text("a zqx dog that sleeps")
    whole = (tmp_path / "photos" / "3.jpg").read_bytes()
    (tmp_path / "photos" / "3.jpg").write_bytes(whole[: len(whole) // 2])
    source = ImageFolder(str(tmp_path / "photos"), val_fraction=0, caption="a zqx dog")
    index = build(source, tmp_path / "out")
    assert {split: held["count"] for split, held in index["splits"].items()} == {"train": 3}
    assert "photos/3.jpg" in (tmp_path / "out" / "skipped.txt").read_text()
    with tarfile.open(tmp_path / "out" / "train-000000.tar") as tar:
        captions = {m.name: tar.extractfile(m).read().decode() for m in tar if m.name.endswith(".txt")}
    assert sorted(captions.values()) == ["a zqx dog", "a zqx dog", "a zqx dog that sleeps"]
