"""The streaming reader resumes exactly, feeds every rank its own samples, and looks at its shards before it starts."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ldm_train.data.datamodule import Batching, ShardDataModule
from ldm_train.data.prepare.index import write_tar_index
from ldm_train.data.shards import DataError

# 40 pictures in 5 shards, batches of 4: an epoch is 10 micro-batches.
STEPS = 24


def batches(root: Path, start: int = 0, workers: int = 0, batching: Batching | None = None, **options) -> list[dict]:
    options = {"fields": ("image", "caption"), "image_size": 6, "crop": "random", "flip": True} | options
    data = ShardDataModule(
        str(root), batching or Batching(4), STEPS, reader="streaming", num_workers=workers, shuffle_buffer=10, **options
    )
    return list(data.train_loader(start))


def all_same(left: list[dict], right: list[dict]) -> bool:
    return len(left) == len(right) and all(
        a["key"] == b["key"]
        and a["caption"] == b["caption"]
        and a["replaced"] == b["replaced"]
        and torch.equal(a["image"], b["image"])
        for a, b in zip(left, right)
    )


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("corrupt", [(), (3, 4, 17, 39)], ids=["whole", "corrupt"])
def test_any_resume_is_the_tail_of_an_undisturbed_run(
    write_data: Callable, tmp_path: Path, workers: int, corrupt: tuple
):
    root = write_data(tmp_path, corrupt=corrupt)
    whole = batches(root, workers=workers)
    assert len(whole) == STEPS
    assert bool(corrupt) == any(b["replaced"] for b in whole)
    for start in (1, 2, 7, 9, 10, 11, 13, 20, 23) if workers == 0 else (1, 9, 10, 21):
        assert all_same(batches(root, start, workers), whole[start:]), f"resumed at {start}"


@pytest.mark.parametrize("start", [3, 10, 13])
def test_resume_with_accumulation(data_root: Path, start: int):
    b = Batching(8, micro_batch_size=4)
    assert all_same(batches(data_root, start, 2, b), batches(data_root, 0, 2, b)[start:])


def test_an_epoch_holds_every_sample_once(data_root: Path):
    whole = [k for b in batches(data_root) for k in b["key"]]
    assert len(set(whole[:40])) == len(set(whole[40:80])) == 40


def test_each_epoch_has_its_own_order_and_augmentation(data_root: Path):
    whole = batches(data_root)
    keys = [k for b in whole for k in b["key"]]
    assert keys[:40] != keys[40:80]
    images = {}
    for b in whole[:20]:
        for key, image in zip(b["key"], b["image"]):
            images.setdefault(key, []).append(image)
    same = sum(torch.equal(first, second) for first, second in images.values())
    assert 5 < same < 35  # the largest crop of a square is all of it: half of the flips differ


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_see_different_samples_and_equally_many(write_data: Callable, tmp_path: Path, workers: int):
    root = write_data(tmp_path, train=64)  # 8 shards: whole ones for each rank and worker
    ranks = [batches(root, 0, workers, Batching(8, None, 2, r)) for r in range(2)]
    assert len(ranks[0]) == len(ranks[1]) == STEPS
    for epoch in range(3):
        seen = [{k for b in r[epoch * 8 : epoch * 8 + 8] for k in b["key"]} for r in ranks]
        assert [len(s) for s in seen] == [32, 32]
        assert not seen[0] & seen[1]


def test_pictures_are_those_of_the_indexed_reader(data_root: Path):
    plain = {"crop": "center", "flip": False, "image_size": 8, "fields": ("image", "caption")}
    indexed = ShardDataModule(str(data_root), Batching(4), 10, **plain)
    known = {k: i for b in indexed.train_loader(0) for k, i in zip(b["key"], b["image"])}
    streamed = {k: i for b in batches(data_root, **plain)[:10] for k, i in zip(b["key"], b["image"])}
    assert known.keys() == streamed.keys()
    assert all(torch.equal(known[k], streamed[k]) for k in known)


def test_too_few_shards_are_refused(data_root: Path):
    with pytest.raises(
        DataError, match=r"5 shards cannot feed 2 ranks x 3 workers; lower num_workers.*data.reader=indexed"
    ):
        batches(data_root, workers=3, batching=Batching(4, None, 2, 0))


def test_too_few_pictures_are_refused(data_root: Path):
    with pytest.raises(DataError, match="40 images do not fill one batch_size 32 for each of 2 workers"):
        batches(data_root, workers=2, batching=Batching(32))


def test_too_many_corrupt_pictures_in_a_row_stop(write_data: Callable, tmp_path: Path):
    with pytest.raises(DataError, match="20 unreadable samples in a row"):
        batches(write_data(tmp_path, corrupt=range(40)))


def test_truncated_and_missing_shards_are_found_before_training(write_data: Callable, tmp_path: Path):
    root = write_data(tmp_path)
    shard = root / "train-000001.tar"
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2 // 512 * 512])
    with pytest.raises(DataError, match=r"train-000001\.tar.*truncated"):
        batches(root)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"first .*train-000001\.tar"):
        batches(root)


def test_the_index_may_lie_apart_from_its_tars(data_root: Path, tmp_path: Path):
    write_tar_index(str(data_root), tmp_path / "index")
    assert all_same(batches(tmp_path / "index"), batches(data_root))
