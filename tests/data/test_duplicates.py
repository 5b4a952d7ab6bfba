"""Near duplicates, and only these, are found whatever their size, format and compression; the best of each stays."""

import csv
import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.fft
import torch
from PIL import Image, ImageFilter

from ldm_train.data.files import encoded_npy, encoded_png, open_image
from ldm_train.data.prepare import duplicates
from ldm_train.data.prepare.build import build, write_index
from ldm_train.data.prepare.duplicates import WithoutDuplicates, duplicates_among, pairs_within, perceptual_hash
from ldm_train.data.prepare.index import write_tar_index
from ldm_train.data.shards import DataError, IndexedShards, write_shard
from ldm_train.metrics.features import TinyEval


def picture(seed: int, side: int = 96) -> Image.Image:
    """Returns a picture of smooth colours that differ for every seed."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    return Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(1))


def jpeg(image: Image.Image, quality: int) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def shards_of(folder: Path, **splits: list[list[tuple[str, dict[str, bytes]]]]) -> Path:
    """Writes shards and their index to a folder from split=[shard, ...]; a shard is a list of samples."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = [
        (split, write_shard(folder / f"{split}-{number:06d}.tar", samples))
        for split, shards in splits.items()
        for number, samples in enumerate(shards)
    ]
    write_index(folder, entries, ["a", "b"])
    return folder


def sample(key: str, data: bytes, extension: str = "png") -> tuple[str, dict[str, bytes]]:
    return key, {extension: data, "txt": f"picture {key}".encode(), "cls": b"1"}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data with twenty training pictures, near duplicates of the first five, a sample without a picture and a damaged
    one; validation has one picture of its own and one of training."""
    copies = [
        sample("0-small", jpeg(picture(0, 96).resize((48, 48)), 40), "jpg"),
        sample("1-large", encoded_png(picture(1, 96).resize((192, 192)))),
        sample("2-again", encoded_png(picture(2))),
        sample("3-lighter", encoded_png(picture(3).point(lambda v: min(255, round(v * 1.04))))),
        sample("4-array", encoded_npy(np.asarray(picture(4))), "npy"),
        ("nothing", {"txt": b"no picture"}),
        sample("damaged", encoded_png(picture(50))[:200]),
    ]
    own = [sample(str(k), encoded_png(picture(k))) for k in range(20)]
    validation = [sample("7-held-out", jpeg(picture(7), 80), "jpg"), sample("60", encoded_png(picture(60)))]
    return shards_of(tmp_path_factory.mktemp("mixed") / "data", val=[validation], train=[own[:10], own[10:] + copies])


def test_the_hash_is_that_of_the_cosine_transform():
    for seed in range(20):
        grey = np.asarray(picture(seed).convert("L").resize((32, 32), Image.Resampling.LANCZOS), np.float64)
        low = scipy.fft.dctn(grey, type=2)[:8, :8]
        bits = (low > np.median(low)).ravel()
        assert perceptual_hash(picture(seed)) == sum(int(bit) << (63 - k) for k, bit in enumerate(bits))


@pytest.mark.parametrize("distance", [0, 1, 3, 6, 10])
def test_all_pairs_within_a_distance_are_found_and_no_other(distance: int):
    random = np.random.default_rng(distance)
    hashes = random.integers(0, 2**64, 150, np.uint64)
    flipped = [  # each hash with some bits flipped: at most two more than `distance`
        h ^ np.uint64(sum(1 << int(b) for b in random.choice(64, random.integers(1, distance + 3), replace=False)))
        for h in hashes
    ]
    hashes = np.unique(np.concatenate([hashes, np.array(flipped, np.uint64)]))
    apart = np.bitwise_count(hashes[:, None] ^ hashes[None])
    expected = np.argwhere(np.triu(apart <= distance, 1))
    assert np.array_equal(pairs_within(hashes, distance), expected)
    assert distance == 0 or len(expected) > 20


def test_of_those_alike_the_first_stays_and_chains_do_not_reach_over_it():
    hashes = np.array([0b0, 0b11, 0b1111, 2**40 - 1, 0b0], np.uint64)
    thumbnails = np.zeros((5, 16, 16, 3), np.uint8)
    thumbnails[4] = 200  # an equal hash, another picture
    found = duplicates_among(hashes, thumbnails.__getitem__, distance=2, difference=5)
    assert found == {1: (0, 0.0)}  # 2 is like 1, which does not stay, and not like 0
    assert duplicates_among(hashes, thumbnails.__getitem__, distance=4, difference=5) == {1: (0, 0.0), 2: (0, 0.0)}


def test_small_things_on_an_even_ground_are_told_apart_and_even_pictures_are_alike():
    thumbnails = np.full((4, 16, 16, 3), 120, np.uint8)
    thumbnails[0, 4:6, 2:12] = 60
    thumbnails[1, 6:12, 7:9] = 60
    thumbnails[2:] += np.random.default_rng(0).integers(0, 3, (2, 16, 16, 3), np.uint8)  # like the noise of compression
    found = duplicates_among(np.array([0, 0, 1, 1], np.uint64), thumbnails.__getitem__, distance=0, difference=30)
    assert found.keys() == {3}
    assert np.sqrt(np.square(thumbnails[0].astype(float) - thumbnails[1]).mean()) < 30


def test_the_largest_stays_and_training_keeps_what_both_have(mixed: Path, tmp_path: Path):
    index = build(WithoutDuplicates(str(mixed), tmp_path), tmp_path, per_shard=8)
    train, val = (IndexedShards(tmp_path, split) for split in ("train", "val"))
    expected = {*map(str, range(20)), "1-large"} - {"1"}
    assert sorted(k for k in train.keys if not k.startswith("nothing")) == sorted(expected)
    assert val.keys == ["60"]
    assert index["classes"] == ["a", "b"]
    assert train.members(0) == IndexedShards(mixed, "train").members(0)  # the bytes are unchanged
    with (tmp_path / "duplicates.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {(r["sample"].partition(":")[2], r["of_sample"].partition(":")[2]) for r in rows} == {
        ("0-small", "0"), ("1", "1-large"), ("2-again", "2"), ("3-lighter", "3"), ("4-array", "4"), ("7-held-out", "7"),
    }  # fmt: skip
    assert {r["split"] for r in rows if r["sample"].endswith("7-held-out")} == {"val"}
    differences = [float(r["thumbnail_difference"]) for r in rows]
    assert differences == sorted(differences, reverse=True)
    assert Image.open(tmp_path / "duplicates.png").width > 500
    assert "damaged" in (tmp_path / "skipped.txt").read_text()


@pytest.mark.slow
def test_several_processes_and_an_interruption_change_nothing(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    build(WithoutDuplicates(str(mixed), tmp_path / "one"), tmp_path / "one", per_shard=8)
    looked: list[str] = []
    real = duplicates._fingerprint_shard

    def look(path: str, split: str, rows: range, target: Path) -> int:
        if len(looked) == 2:
            raise KeyboardInterrupt
        looked.append(split)
        return real(path, split, rows, target)

    monkeypatch.setattr(duplicates, "_fingerprint_shard", look)
    with pytest.raises(KeyboardInterrupt):
        WithoutDuplicates(str(mixed), tmp_path / "two")
    assert not (tmp_path / "two" / "index.json").exists()
    monkeypatch.undo()
    build(WithoutDuplicates(str(mixed), tmp_path / "two", workers=2), tmp_path / "two", per_shard=8, workers=2)
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir() if p.is_file()} for n in ("one", "two"))
    assert one == two


def test_names_that_repeat_between_shards_stay_apart_and_are_plain(tmp_path: Path):
    keys = ("same", "same-2", "same", "v1.2/x")
    shards = [[sample(key if "/" not in key else "last", encoded_png(picture(k)))] for k, key in enumerate(keys)]
    folder = shards_of(tmp_path / "data", train=shards, val=[[sample("other", encoded_png(picture(9)))]])
    with tarfile.open(folder / "train-000003.tar", "w") as tar:  # with a name as other tools write it
        info, data = tarfile.TarInfo("v1.2/x.png"), encoded_png(picture(3))
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    write_tar_index(str(folder), tmp_path / "indexed")
    build(WithoutDuplicates(str(tmp_path / "indexed"), tmp_path / "out"), tmp_path / "out")
    assert IndexedShards(tmp_path / "out", "train").keys == ["same", "same-2", "same-2-2", "v1_2_x"]
    assert not (tmp_path / "out" / "duplicates.png").exists()


def test_deep_grey_transparent_and_turned_pictures_are_compared_as_they_are_shown():
    shown = picture(1)
    grey = shown.convert("L")
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    turned = shown.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees, clockwise
    file = io.BytesIO()
    turned.save(file, "PNG", exif=exif)
    see_through = shown.convert("RGBA")
    for data, like in (
        (encoded_png(deep), grey.convert("RGB")), (file.getvalue(), shown), (encoded_png(see_through), shown)
    ):  # fmt: skip
        ours, theirs = duplicates.fingerprint("png", data), duplicates.fingerprint("png", encoded_png(like))
        assert ours[0] == theirs[0]
        assert np.abs(ours[2].astype(int) - theirs[2]).max() <= 1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"distance": 11}, ValueError, r"source\.distance=11: 0 to 10 bits"),
        ({"difference": -1}, ValueError, r"source\.difference=-1: 0 to 255"),
        ({"similarity": 2}, ValueError, r"source\.similarity=2: -1 to 1"),
        ({"features": {"a": 1}}, ValueError, r"makes no features; set source\.features=\{_target_: "),
        ({"out": "s3://bucket/a"}, DataError, r"out=<folder>, not s3://bucket/a"),
    ],
)
def test_impossible_limits_are_refused(mixed: Path, tmp_path: Path, options: dict, error: type, message: str):
    with pytest.raises(error, match=message):
        WithoutDuplicates(str(mixed), **{"out": tmp_path} | options)


def test_features_are_asked_last_and_decide(mixed: Path, tmp_path: Path):
    """Features are computed only for pairs that hashes and thumbnails take for duplicates; if these differ, both
    stay."""
    asked: list[torch.Tensor] = []

    class Brightness(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            asked.append(images)
            return torch.stack([torch.ones(1), (images.mean() - dark).reshape(1) * 100], dim=1)

    pictures = (picture(3), picture(3).point(lambda v: min(255, round(v * 1.04))))
    dark = float(np.mean([np.asarray(p).mean() for p in pictures]) / 127.5 - 1)  # between 3 and its lighter copy
    source = WithoutDuplicates(str(mixed), tmp_path / "own", features=Brightness(), similarity=0.0)
    plain = WithoutDuplicates(str(mixed), tmp_path / "plain")
    stay = {IndexedShards(mixed, "train").key(i) for i in set(source.items["train"]) - set(plain.items["train"])}
    assert stay == {"3-lighter"}
    assert source.identity != plain.identity
    assert all(i.shape[:2] == (1, 3) and i.min() >= -1 and i.max() <= 1 for i in asked)
    assert len(asked) == 12  # both pictures of each of the six pairs, once

    tiny = WithoutDuplicates(str(mixed), tmp_path / "tiny", features=TinyEval())
    assert {split: rows.tolist() for split, rows in tiny.items.items()} == {
        split: rows.tolist() for split, rows in plain.items.items()
    }


def test_the_folder_that_is_read_is_not_written(mixed: Path):
    with pytest.raises(DataError, match="is the folder that is read; choose another"):
        WithoutDuplicates(str(mixed), mixed)


def test_shards_that_lie_elsewhere_are_named(tmp_path: Path):
    folder = shards_of(tmp_path, train=[[sample("a", b"x")]], val=[[sample("b", b"y")]])
    index = (folder / "index.json").read_text().replace('"train-000000.tar"', '"https://host/train-000000.tar"')
    (folder / "index.json").write_text(index)
    with pytest.raises(DataError, match=r"https://host/train-000000\.tar lies elsewhere"):
        WithoutDuplicates(str(folder), tmp_path / "out")


def test_fingerprints_that_are_none_are_named(mixed: Path, tmp_path: Path):
    WithoutDuplicates(str(mixed), tmp_path)
    kept = sorted((tmp_path / ".entries" / "fingerprints").iterdir())
    for damage in (
        b"",
        kept[0].read_bytes()[:-1],
        encoded_npy(np.zeros(3)),
        encoded_npy(np.zeros(1, duplicates.PRINT)),
    ):
        kept[0].write_bytes(damage)
        with pytest.raises(DataError, match=f"{kept[0].name} holds no fingerprints of its shard; delete it"):
            WithoutDuplicates(str(mixed), tmp_path)


def test_other_limits_leave_the_reports_of_a_finished_folder_alone(mixed: Path, tmp_path: Path):
    build(WithoutDuplicates(str(mixed), tmp_path), tmp_path)
    before = (tmp_path / "duplicates.csv").read_bytes()
    with pytest.raises(DataError, match="prepared with other options"):
        build(WithoutDuplicates(str(mixed), tmp_path, difference=1), tmp_path)
    assert (tmp_path / "duplicates.csv").read_bytes() == before


def test_photos_are_found_again_and_none_is_taken_for_another(datasets: Path, tmp_path: Path):
    write_tar_index(str(datasets / "clothing256"), tmp_path / "photos")
    photos = IndexedShards(tmp_path / "photos", "train")
    samples = [(f"{i}", photos.read(i, "jpg")) for i in range(0, len(photos), 8)]

    def changed(data: bytes, change: Callable[[Image.Image], Image.Image]) -> bytes:
        with open_image(data) as image:
            return jpeg(change(image.convert("RGB")), 50)

    again = [(f"{key}-half", changed(data, lambda i: i.resize((i.width // 2, i.height // 2)))) for key, data in samples]
    train = [(key, {"jpg": data}) for key, data in samples + again]
    folder = shards_of(tmp_path / "data", train=[train], val=[[sample("v", encoded_png(picture(0)))]])
    kept = IndexedShards(folder, "train")
    source = WithoutDuplicates(str(folder), tmp_path / "out")
    names = [kept.key(i) for i in source.items["train"]]
    assert [n for n in names if not n.endswith("half")] == [key for key, _ in samples]
    assert sum(n.endswith("half") for n in names) <= 0.01 * len(samples)
