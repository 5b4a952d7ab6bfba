"""Published data sets, reduced in size but in their owners' file formats, become shards with the right contents."""

import csv
import gzip
import io
import json
import re
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_train.data.datamodule import ShardDataModule
from ldm_train.data.order import Batching
from ldm_train.data.prepare import urls
from ldm_train.data.prepare.boxes import COCO, OpenImagesBoxes
from ldm_train.data.prepare.build import build
from ldm_train.data.prepare.hugging_face import HuggingFace
from ldm_train.data.prepare.image_folder import ImageFolder
from ldm_train.data.prepare.imagenet import ARCHIVES, DEVKIT, ImageNet
from ldm_train.data.prepare.lsun import LSUN
from ldm_train.data.prepare.pairs import ImagesWithMaps
from ldm_train.data.shards import DataError


def encoded(seed: int, size: tuple[int, int] = (40, 32), kind: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), np.uint8)
    buffer = io.BytesIO()
    several = {"save_all": True, "append_images": [Image.new("RGB", size)]} if kind == "MPO" else {}
    Image.fromarray(pixels).resize(size).save(buffer, format=kind, **several)
    return buffer.getvalue()


def write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def samples(out: Path, fields: tuple[str, ...], split: str = "train", size: int = 16) -> list[dict]:
    """Returns every sample of prepared shards as training would read it."""
    data = ShardDataModule(str(out), Batching(1), 1, fields, size)
    dataset = data.samples(split, fields, random=False)
    return [dataset[(0, i)] for i in range(len(dataset))]


# -- folders of known size ---------------------------------------------------------------------------------------------


def test_a_data_set_of_known_size_is_counted(tmp_path: Path):
    for i in range(6):
        write(tmp_path / f"raw/0000{i % 2}/{i:05d}.png", encoded(i, kind="PNG"))
    with pytest.raises(DataError, match=r"has 6 images, the data set as published 30000.*source\.expect=null"):
        ImageFolder(str(tmp_path / "raw"), 0.5, labels=False, expect=30000)
    index = build(ImageFolder(str(tmp_path / "raw"), 0.5, labels=False, expect=6), tmp_path / "out")
    assert "classes" not in index  # FFHQ's folders of a thousand are not classes
    assert sum(part["count"] for part in index["splits"].values()) == 6


# -- LSUN --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def lsun(tmp_path: Path) -> Path:
    lmdb = pytest.importorskip("lmdb")
    for split, count in (("train", 7), ("val", 3)):
        folder = tmp_path / f"lsun/church_outdoor_{split}_lmdb"
        folder.mkdir(parents=True)
        with lmdb.open(str(folder), map_size=1 << 24) as database, database.begin(write=True) as transaction:
            for i in range(count):
                transaction.put(f"{split}key{i}".encode(), encoded(i, (64, 48), "WEBP"))
    return tmp_path / "lsun"


def test_lsun_databases(lsun: Path, tmp_path: Path):
    with pytest.raises(DataError, match="has 7 images, the data set as published 126227"):
        LSUN(str(lsun), "church_outdoor")
    source = LSUN(str(lsun), "church_outdoor", max_size=32, expect=None)
    index = build(source, tmp_path / "out", per_shard=3, workers=2)
    assert {s: p["count"] for s, p in index["splits"].items()} == {"train": 7, "val": 3}
    assert index["image_size"]["max"] == [43, 32]
    assert LSUN(str(lsun), "church_outdoor", limit=2).splits()["train"] == 2
    with pytest.raises(
        FileNotFoundError, match=r"bedroom_train_lmdb is not an LMDB folder; unpack bedroom_train_lmdb\.zip"
    ):
        LSUN(str(lsun), "bedroom")


# -- ImageNet ----------------------------------------------------------------------------------------------------------


def tar_of(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def test_imagenet_from_its_archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    scipy_io = pytest.importorskip("scipy.io")
    from torchvision.datasets import imagenet

    monkeypatch.setattr(imagenet, "ARCHIVE_META", {k: (v[0], None) for k, v in imagenet.ARCHIVE_META.items()})
    synsets = ["n02", "n01"]  # ILSVRC's own numbers are not in alphabetical order
    root = tmp_path / "imagenet"
    with pytest.raises(FileNotFoundError, match=rf"lacks {ARCHIVES['train']}, {DEVKIT}; download them from image-net"):
        ImageNet(str(root))
    inner = {
        f"{s}.tar": tar_of({f"{s}_{i}.JPEG": encoded(10 * k + i) for i in range(3)}) for k, s in enumerate(synsets)
    }
    write(root / ARCHIVES["train"], tar_of(inner))
    write(root / ARCHIVES["val"], tar_of({f"ILSVRC2012_val_{i:08d}.JPEG": encoded(90 + i) for i in range(1, 5)}))
    row = np.dtype([(n, object) for n in ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children")])
    table = np.array([(1, "n02", "dog, hound", "-", 0), (2, "n01", "cat", "-", 0)], dtype=row)
    meta = io.BytesIO()
    scipy_io.savemat(meta, {"synsets": table})
    kit = tar_of(
        {
            "ILSVRC2012_devkit_t12/data/meta.mat": meta.getvalue(),
            "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": b"1\n2\n2\n1\n",
        }
    )
    write(root / DEVKIT, gzip.compress(kit))
    with pytest.raises(DataError, match="has 6 images, the data set as published 1281167"):
        ImageNet(str(root))
    source = ImageNet(str(root), expect={"train": 6, "val": 4})
    assert source.classes == ["cat", "dog"]  # sorted by synset
    build(source, tmp_path / "out")
    assert Counter(s["class_label"] for s in samples(tmp_path / "out", ("class_label",))) == {0: 3, 1: 3}
    labels = {s["key"]: s["class_label"] for s in samples(tmp_path / "out", ("class_label",), "val")}
    assert [labels[k] for k in sorted(labels)] == [0, 0, 1, 1]


# -- boxes -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    root = tmp_path / "coco"
    for year, numbers in (("train2017", (5, 6)), ("val2017", (7,))):
        for n in numbers:
            write(root / year / f"{n:012d}.jpg", encoded(n, (40, 20)))
        images = [{"id": n, "file_name": f"{n:012d}.jpg", "width": 40, "height": 20} for n in numbers]
        things = [
            {"image_id": numbers[0], "category_id": 3, "bbox": [10, 5, 20, 10], "iscrowd": 0},
            {"image_id": numbers[0], "category_id": 1, "bbox": [0, 0, 40, 20], "iscrowd": 1},
        ]
        stuff = [{"image_id": n, "category_id": 183, "bbox": [20, 10, 20.4, 10], "iscrowd": 0} for n in numbers]
        texts = [{"image_id": numbers[0], "caption": t} for t in ("a car ", "one car")]
        for kind, notes, categories in (
            ("instances", things, [{"id": 1, "name": "person"}, {"id": 3, "name": "car"}]),
            ("stuff", stuff, [{"id": 183, "name": "other"}]),
            ("captions", texts, []),
        ):
            tree = {"images": images, "annotations": notes, "categories": categories}
            write(root / f"annotations/{kind}_{year}.json", json.dumps(tree).encode())
    return root


def test_coco_boxes_captions_and_labels(coco: Path, tmp_path: Path):
    source = COCO(str(coco), max_size=16)
    assert len(source.classes) == 183
    assert (source.classes[0], source.classes[2], source.classes[182]) == ("person", "car", "other")
    build(source, tmp_path / "out")
    first, second = sorted(samples(tmp_path / "out", ("image", "boxes")), key=lambda s: s["key"])
    assert first["key"] == "000000000005"
    # The 40x20 picture is cropped to its middle 20x20; the car fills it except for 5 pixels above and below.
    assert first["boxes"][0].tolist() == pytest.approx([0, 0.25, 1, 0.5, 2], abs=1e-6)
    assert second["boxes"].tolist() == [pytest.approx([0.5, 0.5, 0.5, 0.5, 182], abs=1e-6)]
    assert samples(tmp_path / "out", ("boxes",), "val")[0]["boxes"].shape == (2, 5)
    with tarfile.open(tmp_path / "out/train-000000.tar") as tar:
        record = json.loads(tar.extractfile("000000000005.json").read())
    assert record["captions"] == ["a car", "one car"]
    assert len(json.loads(COCO(str(coco), crowds=True).items["train"][0][2])["boxes"]) == 3
    with pytest.raises(DataError, match=r"no picture of .* is left in train; relax source\.min_objects"):
        COCO(str(coco), min_objects=5)
    with pytest.raises(
        FileNotFoundError, match=r"instances_train2017\.json is not there; download it from cocodataset"
    ):
        COCO(str(tmp_path / "nothing"))


@pytest.fixture
def openimages(tmp_path: Path) -> Path:
    root = tmp_path / "openimages"
    write(root / "class-descriptions-boxable.csv", b'/m/1,Cat\n/m/2,"Dog, big"\n')
    columns = (
        "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside"
    )
    for table, folder in (("oidv6-train-annotations-bbox", "train"), ("validation-annotations-bbox", "validation")):
        with io.StringIO(newline="") as text:
            writer = csv.writer(text)
            writer.writerow(columns.split(","))
            for image in ("aa", "bb", "cc"):
                writer.writerow([image, "x", "/m/2", 1, 0.1, 0.5, 0.2, 0.6, 0, 0, 0, 0, 0])
                writer.writerow([image, "x", "/m/1", 1, 0.6, 0.9, 0.2, 0.6, 0, 0, int(image == "bb"), 0, 0])
            write(root / f"{table}.csv", text.getvalue().encode())
        for image in ("aa", "bb"):
            write(root / folder / f"{image}.jpg", encoded(len(folder), (32, 32)))
    return root


def test_openimages_boxes(openimages: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    source = OpenImagesBoxes(str(openimages))
    assert source.classes == ["Cat", "Dog, big"]
    assert "1 pictures of oidv6-train-annotations-bbox.csv are not in" in capsys.readouterr().out
    build(source, tmp_path / "out")
    boxes = samples(tmp_path / "out", ("boxes", "image"))[0]["boxes"]
    assert boxes.tolist() == [
        pytest.approx([0.1, 0.2, 0.4, 0.4, 1], abs=1e-6),
        pytest.approx([0.6, 0.2, 0.3, 0.4, 0], abs=1e-6),
    ]
    assert [k for k, _, _ in OpenImagesBoxes(str(openimages), groups=False).items["train"]] == ["aa"]
    table = openimages / "validation-annotations-bbox.csv"
    lines = table.read_text().splitlines()
    table.write_text("\n".join([*lines, lines[1]]))
    with pytest.raises(DataError, match=r"is not sorted by ImageID \(aa comes twice\)"):
        OpenImagesBoxes(str(openimages))


# -- maps --------------------------------------------------------------------------------------------------------------


def test_images_with_maps(tmp_path: Path):
    for i in range(8):
        write(tmp_path / f"raw/images/a/{i}.jpg", encoded(i, (64, 48)))
        labels = Image.fromarray(np.full((48, 64), i, np.uint8))
        (tmp_path / "raw/segmentations/a").mkdir(parents=True, exist_ok=True)
        labels.save(tmp_path / f"raw/segmentations/a/{i}.png")
    build(ImagesWithMaps(str(tmp_path / "raw"), val_fraction=0.3, max_size=24), tmp_path / "out")
    for sample in samples(tmp_path / "out", ("image", "segmentation")):
        assert sample["segmentation"].unique().tolist() == [int(sample["key"][-1])]
    with Image.open(tmp_path / "raw/segmentations/a/3.png") as labels:
        labels.resize((32, 24)).save(tmp_path / "raw/segmentations/a/3.png")
    source = ImagesWithMaps(str(tmp_path / "raw"), val_fraction=0.0)
    with pytest.raises(ValueError, match=r"3\.jpg shows \(64, 48\) pixels, .*3\.png \(32, 24\)"):
        source.sample("train", 3)
    turned = Image.Exif()
    turned[274] = 6  # turned by 90 degrees: the map belongs to what is shown
    with Image.open(tmp_path / "raw/images/a/4.jpg") as image:
        image.save(tmp_path / "raw/images/a/4.jpg", exif=turned)
    with pytest.raises(ValueError, match=r"4\.jpg shows \(48, 64\) pixels"):
        source.sample("train", 4)
    Image.fromarray(np.full((64, 48), 4, np.uint8)).save(tmp_path / "raw/segmentations/a/4.png")
    assert source.sample("train", 4)[0].endswith("4")
    (tmp_path / "raw/segmentations/a/5.png").unlink()
    with pytest.raises(DataError, match=r"5\.jpg has no label map .*segmentations/a/5\.png"):
        ImagesWithMaps(str(tmp_path / "raw"))


# -- the hub -----------------------------------------------------------------------------------------------------------


def test_a_saved_hugging_face_data_set(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    pictures = [Image.open(io.BytesIO(encoded(i, kind="PNG"))) for i in range(10)]
    table = datasets.Dataset.from_dict(
        {"picture": pictures, "text": [f"number {i}" for i in range(10)], "kind": [i % 2 for i in range(10)]},
        features=datasets.Features(
            {
                "picture": datasets.Image(),
                "text": datasets.Value("string"),
                "kind": datasets.ClassLabel(names=["even", "odd"]),
            }
        ),
    )
    datasets.DatasetDict({"train": table, "test": table.select(range(3))}).save_to_disk(tmp_path / "saved")
    source = HuggingFace(
        str(tmp_path / "saved"),
        image_column="picture",
        caption_column="text",
        class_column="kind",
        val_split="test",
        max_size=16,
    )
    assert source.classes == ["even", "odd"]
    index = build(source, tmp_path / "out", per_shard=4, workers=2)
    assert {s: p["count"] for s, p in index["splits"].items()} == {"train": 10, "val": 3}
    for sample in samples(tmp_path / "out", ("image", "caption", "class_label")):
        number = int(sample["key"].rsplit("_", 1)[1])
        assert sample["caption"] == f"number {number}"
        assert sample["class_label"] == number % 2
    with pytest.raises(DataError, match=r"has the columns picture, text, kind, not image; set source\.image_column"):
        HuggingFace(str(tmp_path / "saved"))
    with pytest.raises(DataError, match="has the splits train, test, not validation"):
        HuggingFace(str(tmp_path / "saved"), image_column="picture", val_split="validation")


# -- addresses ---------------------------------------------------------------------------------------------------------


class _Site(BaseHTTPRequestHandler):
    """A server with the faults of real ones: the path chooses the fault."""

    asked: Counter = Counter()

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        _Site.asked[self.path] += 1
        name = self.path.strip("/")
        body, status, headers = encoded(hash(name) % 100, (64, 48)), 200, {}
        if name == "gone":
            status = 404
        elif name == "busy" and _Site.asked[self.path] < 2:
            status = 503
        elif name == "moved":
            status, headers["Location"] = 302, "/ok1"
        elif name == "file":
            status, headers["Location"] = 302, "file:///etc/hostname"
        elif name == "ftp":
            status, headers["Location"] = 302, "ftp://127.0.0.1/x.png"
        elif name == "optout":
            headers["X-Robots-Tag"] = "noai, nofollow"
        elif name == "text":
            body = b"<html>not a picture</html>"
        elif name == "small":
            body = encoded(1, (10, 10))
        elif name == "huge":
            headers["Content-Length"] = "900000000"
        elif name == "endless":
            body = b"x" * 300_000
            headers["Transfer"] = "unsaid"
        elif name == "broken":
            headers["Content-Length"] = str(len(body) + 100)
        elif name == "loop":
            status, headers["Location"] = 302, "/loop"
        elif name == "eps":
            body = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
        elif name == "drip":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX-")
            for _ in range(60):
                time.sleep(0.1)
                try:
                    self.wfile.write(b"a")
                    self.wfile.flush()
                except OSError:
                    return
            return
        elif name == "tiff":
            body = encoded(3, (64, 48), "TIFF")
        elif name == "mpo":  # what many phones call a .jpg
            body = encoded(4, (64, 48), "MPO")
        self.send_response(status)
        if name != "endless":
            headers.setdefault("Content-Length", str(len(body)))
        for header, value in headers.items():
            self.send_header(header, value)
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def site() -> Iterator[str]:
    _Site.asked = Counter()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Site)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


FINE = ["ok1", "ok2", "busy", "moved", "tiff", "mpo"]
BAD = {
    "gone": "answered 404",
    "file": "only http and https",
    "ftp": "only http and https",
    "optout": r"opts out \(noai\)",
    "text": "cannot identify|no image",
    "small": "10 pixels, less than min_size=16",
    "huge": "900000000 bytes, more than max_bytes",
    "endless": "more than max_bytes=200000",
    "broken": "the connection broke|IncompleteRead",
}


def address_list(site: str, path: Path, names: list[str]) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    table = pyarrow.table({"URL": [f"{site}/{n}" for n in names], "TEXT": [f" a {n}" for n in names]})
    parquet.write_table(table, path, row_group_size=4)
    return path


def test_a_list_of_addresses(site: str, tmp_path: Path):
    names = [*FINE, *BAD, "ok3", "ok4"]
    path = address_list(site, tmp_path / "list.parquet", names)
    source = urls.URLList(
        str(path),
        min_size=16,
        max_size=32,
        val_fraction=0.5,
        retries=1,
        timeout=5,
        max_bytes=200_000,
        allow_private=True,
    )
    rows = sorted(source.row(split, i) for split, n in source.splits().items() for i in range(n))
    assert rows == list(range(len(names)))  # every row once
    index = build(source, tmp_path / "out", per_shard=4)
    made = [s for split in ("train", "val") for s in samples(tmp_path / "out", ("image", "caption"), split)]
    assert {s["caption"] for s in made} == {f"a {n}" for n in [*FINE, "ok3", "ok4"]}
    assert {s["key"] for s in made} == {f"{names.index(n):012d}" for n in [*FINE, "ok3", "ok4"]}
    assert index["image_size"]["max"] == [43, 32]
    reasons = (tmp_path / "out/skipped.txt").read_text().splitlines()
    assert len(reasons) == len(BAD)
    for name, reason in BAD.items():
        line = next(r for r in reasons if f"/{name}:" in r)
        assert re.search(reason, line), line
    assert _Site.asked["/busy"] == 2  # retried
    assert _Site.asked["/gone"] == 1  # not retried
    before = _Site.asked.copy()
    build(source, tmp_path / "out", per_shard=4)
    assert _Site.asked == before  # finished shards are not fetched again


def test_an_outage_writes_no_shard_and_loses_nothing(site: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    names = [f"ok{i}" for i in range(12)]
    path = address_list(site, tmp_path / "list.parquet", names)
    source = urls.URLList(str(path), max_size=None, val_fraction=0.25, retries=0, allow_private=True)
    real, down = urls.fetch, {f"{site}/ok{i}" for i in range(6, 12)}

    def broken(url: str, **options: object) -> bytes:
        if url in down:
            raise urls.Unfetchable("no connection: unreachable", transient=True)
        return real(url, **options)

    monkeypatch.setattr(urls, "fetch", broken)
    with pytest.raises(DataError, match=r"failed with possibly transient errors.*run the same command to continue"):
        build(source, tmp_path / "out", per_shard=4)
    assert not (tmp_path / "out/index.json").exists()
    before = _Site.asked.copy()
    monkeypatch.setattr(urls, "fetch", real)
    index = build(source, tmp_path / "out", per_shard=4)
    assert sum(p["count"] for p in index["splits"].values()) == 12
    assert _Site.asked["/ok1"] == before["/ok1"] == 1


def test_slow_and_redirecting_servers_are_cut_off(site: str):
    begin = time.monotonic()
    with pytest.raises(urls.Unfetchable):
        urls.fetch(f"{site}/drip", timeout=0.3, retries=0, allow_private=True)
    assert time.monotonic() - begin < 4
    with pytest.raises(urls.Unfetchable, match="more than 5 redirects"):
        urls.fetch(f"{site}/loop", retries=0, allow_private=True)
    assert _Site.asked["/loop"] == 6
    assert urls.fetch(f"{site}/a b/ü", retries=0, allow_private=True)
    assert urls.checked_url("http://a.org/ü x?q=ß&b=%20") == "http://a.org/%C3%BC%20x?q=%C3%9F&b=%20"


def test_bombs_and_foreign_formats_are_not_decoded(site: str, tmp_path: Path):
    path = address_list(site, tmp_path / "list.parquet", ["eps", "ok1", "ok2"])
    source = urls.URLList(str(path), max_pixels=3000, val_fraction=0.5, retries=0, allow_private=True)
    reasons = [str(s) for split in ("train", "val") for s in source.samples(split, range(source.splits()[split]))]
    assert sum("cannot identify" in r for r in reasons) == 1
    assert sum("64x48 pixels, more than max_pixels=3000" in r for r in reasons) == 2


def test_private_addresses_are_refused(site: str, tmp_path: Path):
    with pytest.raises(urls.Unfetchable, match=r"is 127\.0\.0\.1, a private address; allow it with"):
        urls.fetch(f"{site}/ok1", retries=0)
    assert not _Site.asked
    for host in ("localhost", "10.0.0.1", "169.254.169.254", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0", "224.0.0.1"):
        with pytest.raises(urls.Unfetchable, match=r"private address|Name or service|No address|Address family"):
            urls.fetch(f"http://{host}/x", retries=0)
    for address in ("file:///etc/passwd", "ftp://example.org/x", "http:///x", "//example.org/x", "http://a:99999/"):
        with pytest.raises(urls.Unfetchable, match=r"only http and https|Port|port"):
            urls.fetch(address)


NOT_PUBLIC = """
0.0.0.0 0.1.2.3 10.0.0.1 10.255.255.255 100.64.0.1 100.127.255.254 127.0.0.1 127.9.9.9 169.254.169.254 172.16.0.1
172.31.255.255 192.0.0.1 192.0.0.9 192.0.0.170 192.0.2.1 192.88.99.1 192.168.1.1 198.18.0.1 198.19.255.255 198.51.100.7
203.0.113.7 224.0.0.1 239.1.1.1 240.0.0.1 255.255.255.255
:: ::1 ::7f00:1 ::808:808 ::ffff:127.0.0.1 ::ffff:10.0.0.1 ::ffff:100.64.0.1 ::ffff:0:7f00:1 64:ff9b::7f00:1
64:ff9b::a00:1 64:ff9b::a9fe:a9fe 64:ff9b:1::1 64:ff9b:1::808:808 100::1 2001::1 2001:0:808:808::f7f7:f7f7 2001:2::1
2001:10::1 2001:20::1 2001:db8::1 2002:7f00:1:: 2002:808:808:: 3fff::1 4000::1 5f00::1 fc00::1 fd12:3456::1 fe80::1
fe80::1%eth0 fec0::1 feff::1 ff02::1 ff0e::1
"""
PUBLIC = """
1.1.1.1 8.8.8.8 100.63.255.255 100.128.0.1 172.15.0.1 172.32.0.1 192.0.1.1 192.88.98.1 192.167.0.1 198.17.0.1 223.255.255.254
2001:200::1 2001:4860:4860::8888 2003::1 2606:4700::1111 2a00:1450::1 ::ffff:8.8.8.8 64:ff9b::808:808
"""


@pytest.mark.parametrize(
    ("address", "public"),
    [(a, False) for a in NOT_PUBLIC.split()] + [(a, True) for a in PUBLIC.split()],
    ids=lambda v: str(v),
)
def test_only_global_unicast_addresses_are_public(address: str, public: bool):
    """IANA's registries of special addresses, and IPv4 addresses inside IPv6 ones (mapped, NAT64, 6to4, Teredo, ...)."""
    assert urls.is_public(address) == public


def test_a_redirect_to_a_private_address_is_refused(monkeypatch: pytest.MonkeyPatch, site: str):
    """Each redirect is checked: a public server may redirect to an address inside the user's network."""
    real = urls.public_addresses
    allowed = []

    def only_the_first(host: str, port: int, allow_private: bool = False) -> list[str]:
        allowed.append(host)
        return real(host, port, allow_private or len(allowed) == 1)

    monkeypatch.setattr(urls, "public_addresses", only_the_first)
    with pytest.raises(urls.Unfetchable, match="private address"):
        urls.fetch(f"{site}/moved", retries=0)
    assert _Site.asked == {"/moved": 1}


def test_a_list_without_the_named_columns(tmp_path: Path):
    path = address_list("http://x", tmp_path / "list.parquet", ["a"])
    with pytest.raises(DataError, match=r"has the columns URL, TEXT, not url; set source\.url_column"):
        urls.URLList(str(path), url_column="url")
    with pytest.raises(FileNotFoundError, match=r"neither a \.parquet file nor a folder"):
        urls.URLList(str(tmp_path / "nothing"))
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match=r"bad\.parquet"):
        urls.URLList(str(tmp_path / "bad.parquet"))
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"URL": ["http://x/a"], "TEXT": ["a"], "WIDTH": ["64"]})
    pyarrow.parquet.write_table(table, tmp_path / "words.parquet")
    with pytest.raises(DataError, match=r"WIDTH holds string, not numbers; set source\.width_column=null"):
        urls.URLList(str(tmp_path / "words.parquet"))
    urls.URLList(str(tmp_path / "words.parquet"), width_column=None)


def test_boxes_reach_the_model_as_tensors(coco: Path, tmp_path: Path):
    build(COCO(str(coco)), tmp_path / "out")
    boxes = samples(tmp_path / "out", ("boxes", "image"))[0]["boxes"]
    assert boxes.dtype == torch.float32
    assert (boxes[:, :2] >= 0).all()
