"""Batches are a pure function of the seed and the step, independent of ranks, workers, restarts and damaged files."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ldm_train.data.datamodule import ShardDataModule
from ldm_train.data.order import Batching, StepBatches, evaluation_batches
from ldm_train.data.samples import SampleDecoder, collate, require_fields
from ldm_train.data.shards import DataError
from ldm_train.data.transforms import ImageTransform
from ldm_train.training.callbacks.monitor import Monitor

FIELDS = ("image", "class_label", "caption")


def module(root: Path, batching: Batching | None = None, max_steps: int = 6, **options: Any) -> ShardDataModule:
    options = {"fields": FIELDS, "image_size": 8} | options
    return ShardDataModule(str(root), batching or Batching(8), max_steps, **options)


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Returns True if two batches are equal in all fields."""
    assert a.keys() == b.keys()
    return all(torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a)


def all_same(left: list[dict[str, Any]], right: list[dict[str, Any]]) -> bool:
    return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right))


# -- the order -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0, 1, 7, 9, 10, 11, 29])
def test_a_resumed_order_is_the_tail_of_the_undisturbed_one(start: int):
    batching = Batching(8, micro_batch_size=4)  # 5 steps = 10 micro-batches an epoch
    whole = list(StepBatches(43, batching, seed=0, start=0, stop=30))
    assert list(StepBatches(43, batching, seed=0, start=start, stop=30)) == whole[start:]
    assert len(whole) == 30


def test_each_epoch_is_a_new_permutation():
    epochs = [[], []]
    for rows in StepBatches(43, Batching(8), seed=0, start=0, stop=10):
        for epoch, index in rows:
            epochs[epoch].append(index)
    assert [len(set(e)) for e in epochs] == [40, 40]  # no sample twice, and less than a batch left out
    assert epochs[0] != epochs[1]
    assert epochs[0] != [i for rows in StepBatches(43, Batching(8), 1, 0, 5) for _, i in rows]


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("micro", [None, 2])
def test_a_global_batch_does_not_depend_on_ranks_or_accumulation(world_size: int, micro: int | None):
    reference = list(StepBatches(43, Batching(8), 3, 0, 10))
    ranks = [Batching(8, micro, world_size, r) for r in range(world_size)]
    accumulate = ranks[0].accumulate
    parts = [list(StepBatches(43, b, 3, 0, 10 * accumulate)) for b in ranks]
    for step, expected in enumerate(reference):
        seen = [row for p in parts for rows in p[step * accumulate : (step + 1) * accumulate] for row in rows]
        assert len(seen) == len(set(seen)) == 8  # disjoint, and nothing missing
        assert set(seen) == set(expected)


def test_batching_comes_out_whole_or_complains():
    assert (Batching(32).micro, Batching(32).accumulate) == (32, 1)
    b = Batching(32, micro_batch_size=4, world_size=2)
    assert (b.micro, b.accumulate) == (4, 4)
    for wrong in ((32, 5, 1), (32, 16, 4), (3, None, 2), (1, None, 2)):
        with pytest.raises(ValueError, match=r"does not split over .* devices.*multiple of micro_batch_size x devices"):
            Batching(*wrong)


def test_a_batch_larger_than_the_data_is_refused(data_root: Path):
    with pytest.raises(DataError, match=r"batch_size 41 exceeds the 40 training images; lower .*batch_size"):
        module(data_root, Batching(41)).train_loader(0)


@pytest.mark.parametrize(
    ("count", "micro", "world_size", "limit"), [(10, 3, 1, None), (10, 3, 4, None), (10, 3, 4, 7), (2, 3, 4, 9)]
)
def test_evaluation_sees_every_sample_once(count: int, micro: int, world_size: int, limit: int | None):
    ranks = [evaluation_batches(count, micro, r, world_size, limit) for r in range(world_size)]
    rows = [index for batches in ranks for batch in batches for _, index in batch]
    assert len(rows) == len(set(rows)) == min(count, limit or count)
    assert set(rows) <= set(range(count))
    sizes = [sum(map(len, batches)) for batches in ranks]
    assert max(sizes) - min(sizes) <= 1


def test_a_limited_evaluation_sees_all_classes_of_shards_sorted_by_class():
    labels = np.repeat(np.arange(10), 100)
    for repeat in (False, True):
        batches = evaluation_batches(1000, 50, 0, 1, 200, repeat)
        share = np.bincount(labels[[index for batch in batches for _, index in batch]], minlength=10)
        assert share.sum() == 200
        assert share.min() >= 10
    more = evaluation_batches(1000, 50, 0, 1, 2500, repeat=True)
    assert sorted(row for batch in more for row in batch)[:1000] == [(0, i) for i in range(1000)]
    assert more[:4] == batches  # a longer evaluation begins with the samples of a shorter one


# -- the batches -----------------------------------------------------------------------------------------------------


def test_a_batch_holds_the_samples_own_picture_class_and_captions(data_root: Path):
    data = module(data_root)
    for batch in data.train_loader(0):
        for k, key in enumerate(batch["key"]):
            i = int(key.removeprefix("train_"))
            pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            assert torch.equal(batch["image"][k], torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1)
            assert batch["class_label"][k] == i % 3
            assert batch["caption"][k] in {f"train {i} {w}" for w in ("one", "two", "three")}
        assert batch["image"].dtype == torch.float32
        assert batch["class_label"].dtype == torch.int64


def test_captions_vary_in_training_and_are_the_first_in_validation(data_root: Path):
    data = module(data_root, max_steps=5)
    words = {c.split()[-1] for batch in data.train_loader(0) for c in batch["caption"]}
    assert words == {"one", "two", "three"}
    assert {c.split()[-1] for batch in data.val_dataloader() for c in batch["caption"]} == {"one"}


RANDOM = {"crop": "random_resized", "flip": True, "image_size": 6, "scale": (0.4, 1.0)}


def test_workers_change_nothing(data_root: Path):
    alone, helped = (list(module(data_root, num_workers=n, **RANDOM).train_loader(0)) for n in (0, 2))
    assert all_same(alone, helped)
    assert len(alone) == 6  # the sixth is in the second epoch


@pytest.mark.parametrize("num_workers", [0, 2])
def test_augmentation_continues_after_a_resume(data_root: Path, num_workers: int):
    data = module(data_root, Batching(8, 4), num_workers=num_workers, **RANDOM)
    whole = list(data.train_loader(0))
    assert all_same(list(data.train_loader(9)), whole[9:])


def test_augmentation_differs_between_epochs(data_root: Path):
    data = module(data_root, max_steps=10, **RANDOM)
    pictures: dict[str, list[torch.Tensor]] = {}
    for batch in data.train_loader(0):
        for key, image in zip(batch["key"], batch["image"]):
            pictures.setdefault(key, []).append(image)
    changed = [not torch.equal(a, b) for images in pictures.values() for a, b in pairwise(images)]
    assert np.mean(changed) > 0.8  # few crops of 8 pixels coincide


@pytest.mark.parametrize("world_size", [1, 3])
def test_validation_is_complete_over_ranks(data_root: Path, world_size: int):
    batches = [
        b
        for r in range(world_size)
        for b in module(data_root, Batching(6, None, world_size, r), **RANDOM).val_dataloader()
    ]
    assert sorted(k for b in batches for k in b["key"]) == [f"val_{i:04d}" for i in range(6)]
    some = sorted(k for b in module(data_root, val_images=4).val_dataloader() for k in b["key"])
    assert len(some) == len({*some} & {f"val_{i:04d}" for i in range(6)}) == 4
    ranks = [module(data_root, Batching(6, None, 3, r), val_images=4).val_dataloader() for r in range(3)]
    assert sorted(k for loader in ranks for b in loader for k in b["key"]) == some


# -- damaged samples -------------------------------------------------------------------------------------------------


def test_a_corrupt_picture_is_replaced_the_same_way_everywhere(write_data: Callable, tmp_path: Path):
    root = write_data(tmp_path, corrupt={3, 17})
    alone, helped = (list(module(root, num_workers=n, **RANDOM).train_loader(0)) for n in (0, 2))
    assert all_same(alone, helped)
    notes = [note for batch in alone[:5] for note in batch["replaced"]]
    assert sorted(n.split(": ")[0] for n in notes) == ["train-000000.tar:train_0003", "train-000002.tar:train_0017"]
    assert all("no image: 10 bytes" in n for n in notes)
    assert all(len(batch["key"]) == 8 for batch in alone)
    data = module(root, **RANDOM)
    assert all_same(list(data.train_loader(2)), alone[2:])


def test_a_shard_that_is_gone_ends_a_run_and_replaces_nothing(write_data: Callable, tmp_path: Path):
    data = module(write_data(tmp_path), num_workers=0)
    samples = data.samples("train", ("image",), random=False)
    (tmp_path / "train-000000.tar").unlink()
    with pytest.raises((DataError, FileNotFoundError), match=r"train-000000\.tar"):
        samples[(0, 1)]


def test_nothing_but_corrupt_pictures_stops(write_data: Callable, tmp_path: Path):
    root = write_data(tmp_path, train=8, corrupt=range(8))
    with pytest.raises(DataError, match="20 unreadable samples in a row"):
        next(iter(module(root, num_workers=0).train_loader(0)))


def test_the_monitor_tolerates_few_and_stops_at_many():
    monitor = Monitor(batch_size=10, dataset_size=100, max_bad_fraction=0.05)

    def see(*batches: list[str]) -> None:
        for replaced in batches:
            monitor.on_train_batch_start(None, None, {"key": ["k"] * 10, "replaced": replaced}, 0)

    broken = ["shard:key: broken"]
    see(*[broken, [], [], [], []] * 4)  # 2 per cent
    with pytest.raises(DataError, match=r"of \d+ samples could not be read, more than data\.max_bad_fraction=0\.05"):
        see(*[broken] * 20)


def test_the_monitor_does_not_judge_by_the_first_batches():
    monitor = Monitor(batch_size=10, dataset_size=100_000, max_bad_fraction=0.05)
    monitor.on_train_batch_start(None, None, {"key": ["k"] * 10, "replaced": ["a", "b", "c"]}, 0)
    assert (monitor.seen, monitor.bad) == (10, 3)


def test_image_and_label_map_share_one_plan(as_png: Callable):
    labels = np.random.default_rng(0).integers(0, 250, (20, 30), dtype=np.uint8)
    raw = {"png": as_png(np.repeat(labels[..., None], 3, axis=2)), "seg.png": as_png(labels)}
    decoder = SampleDecoder(ImageTransform(10, "random", flip=True), ("image", "segmentation"))
    for seed in range(4):
        sample = decoder("k", {**raw}, np.random.default_rng(seed))
        alone = SampleDecoder(decoder.transform, ("segmentation",))("k", raw, np.random.default_rng(seed))
        assert torch.equal(sample["segmentation"], alone["segmentation"])
        assert sample["segmentation"].dtype == torch.int64
    native = SampleDecoder(ImageTransform(20, "random", flip=True), ("image", "segmentation"))(
        "k", raw, np.random.default_rng(5)
    )
    assert torch.equal(((native["image"][0] + 1) * 127.5).round().long(), native["segmentation"])
    with pytest.raises(ValueError, match=r"image of .* but segmentation of"):
        decoder("k", raw | {"seg.png": as_png(labels[:10])}, np.random.default_rng(0))


def test_collate_gathers_the_notes():
    batch = collate([{"key": "a", "class_label": 1, "replaced": ["x"]}, {"key": "b", "class_label": 2}])
    assert batch["replaced"] == ["x"]
    assert batch["key"] == ["a", "b"]
    assert batch["class_label"].tolist() == [1, 2]


# -- what the data lacks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("leave_out", "match"),
    [
        (("txt", "json"), "not every sample has a caption: .*source=csv.*diffusion/conditioning=class"),
        (("cls",), "not every sample has a class_label: .*one folder per class.*diffusion/conditioning=none"),
    ],
    ids=["captions", "classes"],
)
def test_conditioners_without_their_field_are_refused(
    write_data: Callable, tmp_path: Path, leave_out: tuple, match: str
):
    root = write_data(tmp_path, leave_out=leave_out)
    with pytest.raises(DataError, match=match):
        module(root)


def test_partly_captioned_data_are_refused():
    with pytest.raises(DataError, match="not every sample has a caption: 10 samples with"):
        require_fields(["caption"], {"png": 10, "txt": 6, "json": 6}, 10, "here")
    with pytest.raises(DataError, match="unknown batch field 'sound'"):
        require_fields(["sound"], {"png": 10}, 10, "here")


def test_an_unknown_reader_is_named(data_root: Path):
    with pytest.raises(ValueError, match=r"data\.reader is 'indexed' or 'streaming', not 'stream'"):
        module(data_root, reader="stream")


def test_a_missing_folder_names_the_remedy(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="ldm-prepare source=cifar10 out="):
        module(tmp_path / "none", remedy="ldm-prepare source=cifar10 out={root}")
