"""The streaming reader resumes exactly, gives every rank its own samples, and checks its shards before it starts."""

import importlib.util
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import unquote

import fsspec
import pytest
import torch
from sites import Site, no_proxies
from tiers import tiered

from ldm_train.data import remote
from ldm_train.data.datamodule import ShardDataModule
from ldm_train.data.order import Batching
from ldm_train.data.prepare.index import write_tar_index
from ldm_train.data.shards import DataError, read_index
from ldm_train.storage import write_json

# 40 pictures in 5 shards, batches of 4: an epoch is 10 micro-batches.
STEPS = 24


def batches(root: Path, start: int = 0, workers: int = 0, batching: Batching | None = None, **options) -> list[dict]:
    options = {"fields": ("image", "caption"), "image_size": 6, "crop": "random", "flip": True} | options
    data = ShardDataModule(
        str(root), batching or Batching(4), STEPS, reader="streaming", num_workers=workers, shuffle_buffer=10, **options
    )
    iterator = iter(data.train_loader(start))
    try:
        return list(iterator)
    finally:
        if workers:  # otherwise, after an error, garbage collection would wait 10 s for each worker
            iterator._shutdown_workers()


def all_same(left: list[dict], right: list[dict]) -> bool:
    return len(left) == len(right) and all(
        a["key"] == b["key"]
        and a["caption"] == b["caption"]
        and a["replaced"] == b["replaced"]
        and torch.equal(a["image"], b["image"])
        for a, b in zip(left, right)
    )


def test_a_stream_continues_on_as_many_devices_as_it_began_with(write_data: Callable, tmp_path: Path):
    root = write_data(tmp_path)

    def data(devices: int, reader: str, micro: int | None = None, workers: int = 0) -> ShardDataModule:
        batching = Batching(4, micro, devices, 0)
        return ShardDataModule(str(root), batching, STEPS, ("image",), reader=reader, num_workers=workers)

    kept = data(2, "streaming").state_dict()
    data(2, "streaming").load_state_dict(kept)
    with pytest.raises(DataError, match=r"by devices=2, so training cannot continue with 1; set devices=2"):
        data(1, "streaming").load_state_dict(kept)
    data(2, "streaming", 1).load_state_dict(kept)
    data(2, "streaming", workers=2).load_state_dict({"devices": 2})  # a checkpoint of before
    with pytest.raises(DataError, match=r"by <stage>\.micro_batch_size=2, .* with 1; set <stage>\.micro_batch_size=2"):
        data(2, "streaming", 1, workers=2).load_state_dict(kept)
    assert data(2, "indexed").state_dict() == {}  # its samples do not depend on the devices


def test_a_part_of_a_stream_is_read_from_as_many_shards_as_it_needs(write_data: Callable, tmp_path: Path):
    root = write_data(tmp_path)  # five shards of eight
    part = ShardDataModule(str(root), Batching(4), STEPS, ("image",), reader="streaming").some("train", 10)
    assert len(part) == 10
    assert {part.shard(i) for i in range(10)} == {0, 1}
    assert len(list((root / ".offsets").glob("*.npz"))) == 2
    whole = ShardDataModule(str(root), Batching(4), STEPS, ("image",)).some("train", 10)
    assert {whole.shard(i) for i in range(10)} == {0, 1, 2, 3, 4}


@tiered("corrupt, workers", [((3, 4, 17, 39), 0), ((), 0), ((3, 4, 17, 39), 2), ((), 2)])
def test_any_resume_is_the_tail_of_an_undisturbed_run(
    write_data: Callable, tmp_path: Path, workers: int, corrupt: tuple
):
    root = write_data(tmp_path, corrupt=corrupt)
    whole = batches(root, workers=workers)
    assert len(whole) == STEPS
    assert bool(corrupt) == any(b["replaced"] for b in whole)
    for start in (1, 2, 7, 9, 10, 11, 13, 20, 23) if workers == 0 else (1, 9, 10, 21):
        assert all_same(batches(root, start, workers), whole[start:]), f"resumed at {start}"


@tiered("start", [13, 10, 3], fast=1)
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
    assert 5 < same < 35  # the largest crop of a square is the whole of it, so only flips differ, for about half


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


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_changed_is_named(write_data: Callable, tmp_path: Path, workers: int):
    """One bit of a caption is flipped: the tar and all its members can still be read, but the sha256 differs."""
    root = write_data(tmp_path)
    path = root / "train-000002.tar"
    data = bytearray(path.read_bytes())
    place = data.index(b"train 20 one")
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"train-000002\.tar does not match its index.json: sha256"):
        batches(root, workers=workers)


def test_an_index_that_counts_otherwise_is_named(write_data: Callable, tmp_path: Path):
    root = write_data(tmp_path)
    index = read_index(root)
    index["splits"]["train"]["shards"][3]["count"] = 7
    write_json(root / "index.json", index)
    with pytest.raises(DataError, match=r"train-000003\.tar does not match its index.json: count 8, there 7"):
        batches(root)


@pytest.fixture
def served(write_data: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Site, Path]]:
    """A server of shards, and a folder whose index has their addresses; the validation shard is local."""
    no_proxies(monkeypatch)
    monkeypatch.setattr(remote.time, "sleep", lambda _: None)
    site = Site(write_data(tmp_path / "there"))
    index = read_index(tmp_path / "there")
    for entry in index["splits"]["train"]["shards"]:
        entry["file"] = f"{site.url}/{entry['file']}"
    shutil.copy(tmp_path / "there" / "val-000000.tar", tmp_path)
    write_json(tmp_path / "index.json", index)
    yield site, tmp_path
    site.close()


@pytest.mark.parametrize(("ranges", "drop_after"), [(True, None), (True, 20_000), (False, 30_000)])
def test_remote_shards_stream_as_local_ones(served: tuple[Site, Path], ranges: bool, drop_after: int | None):
    """A broken download continues where it broke; without ranges, a server that always breaks off is an error."""
    site, root = served
    site.ranges, site.drop_after = ranges, drop_after
    if not ranges:
        with pytest.raises(
            ConnectionError, match=r"http://.*train-\d+\.tar: the connection broke at 30000 of \d+ bytes"
        ):
            batches(root)
        return
    assert all_same(batches(root), batches(root / "there"))
    assert (len(site.asked) > 15) == (drop_after is not None)


def test_a_remote_shard_that_changed_or_grew_is_named(served: tuple[Site, Path]):
    root = served[1]
    path = root / "there" / "train-000001.tar"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"train 9 one", b"train 9 two"))
    with pytest.raises(DataError, match=r"http://.*train-000001\.tar does not match its index.json: sha256"):
        batches(root)
    path.write_bytes(whole + bytes(1_000_000))
    with pytest.raises(DataError, match=r"http://.*train-000001\.tar .*more than the \d+ bytes of its index"):
        batches(root)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"http://.*train-000001\.tar is truncated"):
        batches(root)


@pytest.mark.parametrize("status", [404, 403, 500])
def test_a_remote_shard_that_is_not_there_is_named(served: tuple[Site, Path], status: int):
    site, root = served
    site.status = status
    with pytest.raises(ConnectionError, match=rf"http://.*train-\d+\.tar: HTTP Error {status}"):
        batches(root)
    assert len(site.asked) == (remote.ATTEMPTS if status == 500 else 1)


@pytest.mark.parametrize("location", ["file:///etc/passwd", "ftp://127.0.0.1/a.tar", "data:,x", "pipe:id"])
def test_a_redirect_to_anything_but_the_web_is_refused(served: tuple[Site, Path], location: str):
    site, root = served
    site.location = location
    with pytest.raises(ConnectionError, match=r"http://.*train-\d+\.tar: "):
        batches(root)


def test_odd_addresses_go_to_the_server_and_nowhere_else(served: tuple[Site, Path], tmp_path: Path):
    site, _ = served
    site.status = 404
    for name in (
        "a'; touch X; '.tar",
        "$(touch X).tar",
        "`touch X`.tar",
        "a|touch X",
        "-o X",
        "{1..9}.tar",
        'a" b.tar',
        "ü.tar",
    ):
        with pytest.raises(ConnectionError, match="404"):
            write_tar_index([f"{site.url}/{name}"], tmp_path / "index", train="*", val="*")
        assert unquote(site.asked[-1]) == f"/{name}"
    assert not list(Path().glob("*X*"))


def test_buckets_are_opened_by_their_own_package(data_root: Path, monkeypatch: pytest.MonkeyPatch):
    opened = []

    class Bucket(fsspec.AbstractFileSystem):
        protocol, cachable = "s3", False

        def open(self, path: str, mode: str = "rb", **_: object):
            opened.append(path)
            return open(data_root / path.rpartition("/")[2], mode)

    monkeypatch.setattr(fsspec, "filesystem", {"s3": Bucket()}.get)
    name = "s3://bucket/a;touch X/train-000000.tar"
    with remote.open_shard(name) as file:
        assert file.read() == (data_root / "train-000000.tar").read_bytes()
    assert opened == [name]


def test_a_missing_package_is_named():
    if importlib.util.find_spec("gcsfs"):
        pytest.skip("gcsfs is installed")
    with pytest.raises(DataError, match=r"gs://bucket/a\.tar needs the package gcsfs: pip install gcsfs"):
        remote.open_shard("gs://bucket/a.tar")


def test_a_folder_whose_name_looks_like_an_address(
    write_data: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_data(tmp_path / "pipe:touch X")
    monkeypatch.chdir(tmp_path)
    assert len(batches(Path("pipe:touch X"))) == STEPS
    assert [p.name for p in tmp_path.iterdir()] == ["pipe:touch X"]
