"""Aspect-ratio buckets: which picture goes into which, batches of one shape in an order that can be resumed, and the
same from the latent cache."""

import io
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from chains import chain
from PIL import Image, PngImagePlugin

from ldm_train.data.buckets import ORIENTATION, Buckets, bucket_sizes, shown_size
from ldm_train.data.datamodule import ShardDataModule
from ldm_train.data.encoding import write_cache, write_cache_index
from ldm_train.data.latents import CachedLatents, LatentDataModule, verify_cache
from ldm_train.data.order import Batching, StepBatches
from ldm_train.data.shards import DataError, IndexedShards, write_shard
from ldm_train.data.statistics import latent_statistics
from ldm_train.data.transforms import decode_image
from ldm_train.errors import Refused
from ldm_train.models.autoencoder import AutoencoderKL
from ldm_train.models.first_stage import FirstStage
from ldm_train.pipeline.data import data_key
from ldm_train.pipeline.values import check_values
from ldm_train.storage import write_json

SHAPES = [(16, 16), (16, 32), (32, 16), (17, 15), (40, 10), (15, 30)]  # (height, width) of the pictures, in turn
BUCKETS = {"step": 8, "max_ratio": 2.0, "min_images": 4}
BASE = (32, 32)


def encoded(i: int, shape: tuple[int, int], extension: str = "png", **options: object) -> bytes:
    pixels = np.random.default_rng(i).integers(0, 256, (*shape, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, {"jpg": "JPEG"}.get(extension, extension.upper()), **options)
    return file.getvalue()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder of shards of ten with 48 training and 6 validation pictures in six shapes."""
    folder, splits = tmp_path / "shapes", {}
    for split, count in (("train", 48), ("val", 6)):
        samples = [
            (f"{split}_{i:02d}", {"png": encoded(i, SHAPES[i % 6]), "cls": str(i % 2).encode()}) for i in range(count)
        ]
        entries = [
            write_shard(folder / f"{split}-{k:06d}.tar", samples[10 * k : 10 * k + 10]) for k in range(-(-count // 10))
        ]
        splits[split] = {"count": count, "shards": entries}
    write_json(folder / "index.json", {"splits": splits, "classes": ["a", "b"]})
    return folder


def module(root: object, batch_size: int = 4, **options: object) -> ShardDataModule:
    given = {"fields": ("image", "class_label"), "image_size": BASE, "buckets": BUCKETS} | options
    return ShardDataModule(str(root), Batching(batch_size), 30, **given)


def test_sizes_keep_the_area_and_the_ratio():
    assert bucket_sizes((512, 512), 64, 2.0) == [(512, 512), (384, 640), (448, 576), (576, 448), (640, 384)]
    sizes = bucket_sizes((1024, 1024), 64, 4.0)
    assert sizes[0] == (1024, 1024)
    assert {(640, 1536), (768, 1344), (832, 1216), (896, 1152), (1152, 896)} <= set(sizes)  # some of SDXL's table
    for h, w in sizes:
        assert h % 64 == w % 64 == 0
        assert h * w <= 1024**2
        assert max(h, w) <= 4 * min(h, w)
        assert (w, h) in sizes
        assert (h + 64) * w > 1024**2 or (w + 64) * h > 1024**2 or h == w  # as large as they can be


def test_every_picture_goes_to_the_nearest_ratio_and_rare_ratios_to_their_neighbours():
    sizes, rng = bucket_sizes((64, 64), 8, 3.0), np.random.default_rng(0)
    pictures = rng.integers(20, 400, (500, 2)).astype(np.int32)
    buckets = Buckets.of(pictures, sizes, 1)
    for (h, w), number in zip(pictures.tolist(), buckets.number):
        distances = [abs(np.log(h / w) - np.log(a / b)) for a, b in buckets.sizes]
        assert distances[number] == pytest.approx(min(distances))
    merged = Buckets.of(pictures, sizes, 60)
    assert 1 < len(merged.sizes) < len(buckets.sizes)
    assert all(len(members) >= 60 for members in merged.members)
    assert sorted(np.concatenate(merged.members).tolist()) == list(range(500))
    with pytest.raises(ValueError, match=r"step=64 and max_ratio=2.0 leave no size beside 128x128"):
        bucket_sizes((128, 128), 64, 2.0)
    (only,) = Buckets.of(pictures, sizes, 501).sizes
    assert only in sizes


def test_pictures_that_cannot_be_read_join_the_largest_bucket_and_keep_none():
    """Training replaces them by others of their bucket, so a bucket of unreadable ones alone would end it."""
    pictures = np.array([[0, 0], [0, 0], [10, 20], [10, 20], [20, 20]], np.int32)
    buckets = Buckets.of(pictures, [(8, 8), (4, 8)], 1)
    assert [buckets.size(i) for i in range(5)] == [(4, 8)] * 4 + [(8, 8)]
    assert Buckets.of(pictures[:4], [(8, 8), (4, 8)], 1).sizes == [(4, 8)]


def oriented(extension: str) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    return encoded(0, (10, 30), extension, exif=exif.tobytes())


def stamped_png() -> bytes:
    """A PNG whose orientation is in a text chunk (XMP) after the pixels."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="8"/>', tkey="")
    return encoded(0, (10, 30), "png", pnginfo=info)


@pytest.mark.parametrize(
    ("data", "extension"),
    [
        (encoded(0, (10, 30)), "png"),
        (encoded(0, (10, 30), "jpg"), "jpg"),
        *((oriented(extension), extension) for extension in ("jpg", "png", "webp")),
        (stamped_png(), "png"),
    ],
    ids=["png", "jpg", "turned jpg", "turned png", "turned webp", "png turned by text"],
)
def test_the_size_is_that_of_the_decoded_picture(data: bytes, extension: str):
    assert shown_size(data, extension) == tuple(decode_image(data, extension, 3).shape[1:])


def test_the_size_of_an_array_and_of_garbage():
    file = io.BytesIO()
    np.save(file, np.zeros((5, 7, 2), np.uint8))
    assert shown_size(file.getvalue(), "npy") == (5, 7)
    assert shown_size(b"no picture", "jpg") == (0, 0)
    for shape in ((2**40, 0), (0, 7, 3)):
        file = io.BytesIO()
        np.save(file, np.zeros((1,), np.uint8))
        data = file.getvalue()[:-1].replace(b"(1,)", repr(shape).encode())
        assert shown_size(data.ljust(128), "npy") == (0, 0)


def test_sizes_are_read_once_and_again_where_the_shard_or_what_was_kept_is_another(
    root: Path, monkeypatch: pytest.MonkeyPatch
):
    expected = [SHAPES[i % 6] for i in range(48)]
    read = Counter()

    def counted(data: bytes, extension: str) -> tuple[int, int]:
        read["pictures"] += 1
        return shown_size(data, extension)

    monkeypatch.setattr("ldm_train.data.buckets.shown_size", counted)
    for pictures in (48, 0):
        read.clear()
        assert [tuple(size) for size in IndexedShards(root, "train").picture_sizes()] == expected
        assert read["pictures"] == pictures
    kept = sorted((root / ".offsets").glob("train-*.sizes.npz"))
    assert len(kept) == 5
    kept[0].write_bytes(kept[0].read_bytes()[:-50])  # damaged
    kept[1].write_bytes(kept[4].read_bytes())  # of another shard
    kept[2].unlink()
    assert [tuple(size) for size in IndexedShards(root, "train").picture_sizes()] == expected
    assert read["pictures"] == 30


@pytest.mark.parametrize("batching", [Batching(4), Batching(8, 2, 2, 1)])
def test_a_step_is_of_one_bucket_and_an_epoch_holds_no_sample_twice(batching: Batching):
    numbers = np.random.default_rng(0).choice(3, 200, p=[0.6, 0.3, 0.1])
    buckets = Buckets([(8, 8), (4, 12), (12, 4)], numbers)
    whole = StepBatches(200, Batching(batching.batch_size), 0, 0, 60, buckets=buckets)
    steps = [whole.rows(step) for step in range(whole.steps_per_epoch)]
    assert whole.steps_per_epoch == sum(len(members) // batching.batch_size for members in buckets.members)
    assert all(len({numbers[i] for _, i in step}) == 1 for step in steps)
    seen = [row for step in steps for row in step]
    assert len(set(seen)) == len(seen) == whole.steps_per_epoch * batching.batch_size
    kinds = [numbers[step[0][1]] for step in steps]
    assert kinds != sorted(kinds)  # the buckets alternate
    assert [whole.rows(step) for step in range(whole.steps_per_epoch)] == steps  # the first epoch, read again
    assert whole.rows(whole.steps_per_epoch) != steps[0]
    # The samples of a step do not depend on ranks and micro-batches.
    parts = [
        StepBatches(200, Batching(batching.batch_size, batching.micro_batch_size, batching.world_size, rank), 0, 0, 60, buckets=buckets)
        for rank in range(batching.world_size)
    ]  # fmt: skip
    for step in (0, 7, whole.steps_per_epoch + 3):
        micro = range(step * batching.accumulate, (step + 1) * batching.accumulate)
        assert sorted(row for part in parts for m in micro for row in part.rows(m)) == sorted(whole.rows(step))


def test_batches_have_the_size_of_their_bucket_and_validation_that_of_the_config(root: Path):
    data = module(root)
    shapes = Counter(tuple(batch["image"].shape[2:]) for batch in data.train_loader(0))
    assert set(shapes) == {(32, 32), (24, 40), (40, 24)}
    assert {tuple(batch["image"].shape[2:]) for batch in data.val_dataloader()} == {BASE}
    assert {tuple(batch["image"].shape[2:]) for batch in data.fixed_loader("train")} == {BASE}


def test_training_that_goes_on_has_the_batches_it_would_have_had(root: Path):
    whole, rest = list(module(root).train_loader(0)), list(module(root).train_loader(11))
    assert len(whole) == 30
    for a, b in zip(whole[11:], rest, strict=True):
        assert a["key"] == b["key"]
        assert torch.equal(a["image"], b["image"])


def test_a_damaged_picture_is_replaced_by_one_of_its_bucket(root: Path):
    good = module(root)
    wide = next(i for i in range(48) if good.buckets("train").size(i) != BASE)
    splits = json.loads((root / "index.json").read_text())["splits"]
    number, place = wide // 10, wide % 10
    samples = [
        (f"train_{i:02d}", {"png": encoded(i, SHAPES[i % 6]) if i % 10 != place else encoded(i, SHAPES[i % 6])[:60],
                            "cls": b"0"}) for i in range(10 * number, min(48, 10 * number + 10))
    ]  # fmt: skip
    splits["train"]["shards"][number] = write_shard(root / f"train-{number:06d}.tar", samples)
    write_json(root / "index.json", {"splits": splits, "classes": ["a", "b"]})
    data = module(root)
    size = data.buckets("train").size(wide)  # its header is undamaged
    sample = data.samples("train", ("image",), random=True)[(3, wide)]
    assert sample["replaced"]
    assert tuple(sample["image"].shape[1:]) == size
    other = int(sample["key"].split("_")[1])
    assert data.buckets("train").size(other) == size


def encoder() -> Callable[[torch.Tensor], torch.Tensor]:
    torch.manual_seed(0)
    return FirstStage(
        AutoencoderKL(z_channels=2, channels=8, channel_mult=(1, 2), num_res_blocks=1, mid_attention=False)
    ).encode_moments


@pytest.mark.parametrize("flip", [False, True])
def test_the_cache_gives_the_batches_that_encoding_gives(root: Path, tmp_path: Path, flip: bool):
    data, encode = module(root, flip=flip), encoder()
    entries = {s: write_cache(data, s, encode, tmp_path / "cache", 16, flip and s == "train") for s in ("train", "val")}
    write_cache_index(tmp_path / "cache", entries, ["a", "b"], bucketed=True)
    cached = LatentDataModule(tmp_path / "cache", Batching(4), 30, ("class_label",), 0, images=data)
    assert cached.train.shards.keys == [f"train_{i:02d}" for i in range(48)]
    assert verify_cache(data, "train", cached.train, encode, 48) < 1e-3
    shapes = set()
    for images, latents in zip(data.train_loader(5), cached.train_loader(5), strict=True):
        assert images["key"] == latents["key"]
        assert torch.equal(images["class_label"], latents["class_label"])
        assert torch.allclose(encode(images["image"]), latents["moments"], atol=1e-5)
        shapes.add(latents["moments"].shape[2:])
    assert len(shapes) > 1
    means = [encode(data.samples("train", ("image",), False)[(0, i)]["image"][None])[0] for i in range(48)]
    elements = torch.cat([m[:2].flatten(1) for m in means], 1).double()
    assert latent_statistics(cached.train)["mean"] == pytest.approx(elements.mean(1).tolist(), abs=1e-5)


def test_latents_of_another_size_are_found_where_the_cache_says_it_has_one(root: Path, tmp_path: Path):
    data = module(root)
    entries = {s: write_cache(data, s, encoder(), tmp_path / "cache") for s in ("train", "val")}
    write_cache_index(tmp_path / "cache", entries, None)
    with pytest.raises(DataError, match=r"not every sample has moments.npy of \d+ bytes"):
        CachedLatents(tmp_path / "cache", "train", (), 0)


def test_a_batch_of_several_sizes_is_refused(root: Path, tmp_path: Path):
    data = module(root)
    entries = {s: write_cache(data, s, encoder(), tmp_path / "cache") for s in ("train", "val")}
    write_cache_index(tmp_path / "cache", entries, None, bucketed=True)
    latents = CachedLatents(tmp_path / "cache", "train", (), 0)
    with pytest.raises(DataError, match=r"several sizes in one batch.*restart=latents"):
        latents.fetch([(0, i) for i in range(6)], random=False)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"reader": "streaming"}, "data.reader=indexed"),
        ({"balance_classes": True}, "data.balance_classes do not go together"),
        ({"val_split": "train"}, "validation split of its own"),
    ],
)
def test_what_does_not_go_with_buckets_is_refused(root: Path, options: dict, said: str):
    with pytest.raises(ValueError, match=said):
        module(root, **options)


def test_a_bucket_smaller_than_a_batch_waits_and_the_others_go_on(root: Path):
    data = module(root, batch_size=20, buckets=BUCKETS | {"min_images": 4})
    assert {len(members) for members in data.buckets("train").members} == {16}
    with pytest.raises(DataError, match="batch_size 20 exceeds"):
        data.train_loader(0)
    buckets = Buckets([(8, 8), (4, 12)], np.array([0] * 50 + [1] * 3))
    batches = StepBatches(53, Batching(20), 0, 0, 8, buckets=buckets)
    assert batches.steps_per_epoch == 2
    assert all(i < 50 for step in range(8) for _, i in batches.rows(step))


WIDE = ("diffusion/conditioning=class", "data/derived=none", "data.buckets.max_ratio=2", "data.buckets.step=8",
        "data.buckets.min_images=8", "data.image_size=32", "data.source=null", "data.adherence=null", "diffusion.samples=2")  # fmt: skip


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (
            "data.buckets.step=6",
            "data.buckets.step=6 gives sizes that these networks do not take: set it to a multiple of",
        ),
        ("diffusion.batch_size=16", "data.buckets.min_images=8 is less than diffusion.batch_size=16: .*say 16"),
        ("latents.source=somewhere", "leave data.buckets or latents.source out"),
        ("data.buckets.max_ratio=0.5", "data.buckets.max_ratio"),
    ],
)
def test_options_that_cannot_be_are_refused_before_training(root: Path, tmp_path: Path, option: str, said: str):
    run = chain(tmp_path, *WIDE, f"data.root={root}", option)
    with pytest.raises((ValueError, Refused), match=said):
        check_values(run.config) or run.execute()


@pytest.mark.chain
@pytest.mark.slow
def test_a_chain_trains_on_buckets_and_goes_on_where_it_stopped(root: Path, tmp_path: Path):
    options = (
        *WIDE,
        f"data.root={root}",
        "stages=[autoencoder,latents,diffusion]",
        "diffusion.lr_schedule.schedule=constant",
    )
    for steps, name in ((6, "whole"), (3, "parts"), (6, "parts")):
        chain(tmp_path, *options, f"diffusion.max_steps={steps}", name=name).execute()
    weights = [
        torch.load(tmp_path / name / "diffusion" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("whole", "parts")
    ]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_runs_without_buckets_keep_their_keys(tmp_path: Path):
    config = chain(tmp_path).config
    assert "buckets" not in data_key(config, "diffusion")
    config.data.buckets.max_ratio = 2.0
    assert data_key(config, "diffusion")["buckets"] == {"max_ratio": 2.0, "step": 64, "min_images": 100}
    config.autoencoder.data.buckets.max_ratio = 1.0
    assert "buckets" not in data_key(config, "autoencoder")
