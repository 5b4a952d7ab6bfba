"""Remote shards are read like local ones, despite network faults; local copies are complete, shared between processes,
and deleted to make room."""

import hashlib
import multiprocessing
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from forked import CONTEXT, begun
from sites import Site, no_proxies

from ldm_train.data import remote
from ldm_train.data.datamodule import ShardDataModule
from ldm_train.data.order import Batching
from ldm_train.data.remote import ShardCache
from ldm_train.data.shards import DataError, IndexedShards, read_index
from ldm_train.storage import write_json

SHARD = 16384  # the size in bytes of most shards of `there`


@pytest.fixture
def there(write_data: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Site, Path]]:
    """A server with 5 training shards and one for validation, and the folder that it serves. Waits of half a second or
    more, as between attempts, take no time."""
    no_proxies(monkeypatch)
    waited = time.sleep
    monkeypatch.setattr(remote.time, "sleep", lambda s: waited(s) if s < 0.5 else None)
    remote.fetched.cache_clear()
    site = Site(write_data(tmp_path / "there"))
    yield site, tmp_path / "there"
    site.close()


def module(root: str, cache: Path, gigabytes: float = 1.0, **options) -> ShardDataModule:
    options = {"fields": ("image", "caption"), "image_size": 6, "crop": "random", "flip": True} | options
    return ShardDataModule(root, Batching(4), 24, shard_cache={"folder": cache, "gigabytes": gigabytes}, **options)


def contents(shards: IndexedShards) -> list[tuple[str, dict[str, bytes]]]:
    return [(shards.key(i), shards.members(i)) for i in range(len(shards))]


def whole(cache: Path) -> bool:
    """Returns True if every .tar in the cache has the sha256 that its name says."""
    return all(hashlib.sha256(p.read_bytes()).hexdigest() == p.stem for p in cache.glob("*.tar"))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_from_an_address_are_those_of_the_folder(there: tuple[Site, Path], tmp_path: Path, workers: int):
    """Compares training and validation batches; the index and every shard are fetched once."""
    site, folder = there
    far = module(f"{site.url}/", tmp_path / "cache", num_workers=workers)
    near = ShardDataModule(str(folder), Batching(4), 24, ("image", "caption"), 6, "random", flip=True)
    for ours, theirs in ((far.train_loader(3), near.train_loader(3)), (far.val_dataloader(), near.val_dataloader())):
        pairs = list(zip(ours, theirs, strict=True))
        assert pairs
        assert all(torch.equal(a["image"], b["image"]) and a["key"] == b["key"] for a, b in pairs)
    assert far.content_hash == near.content_hash
    assert sorted(site.asked) == ["/index.json", *(f"/train-00000{k}.tar" for k in range(5)), "/val-000000.tar"]
    again = IndexedShards(site.url, "train", cache=far.cache)
    assert contents(again) == contents(near.shards("train"))
    assert len(site.asked) == 7


def test_connections_that_break_go_on_where_they_broke(there: tuple[Site, Path], tmp_path: Path):
    site, folder = there
    site.drop_after = 5000
    cache = ShardCache(tmp_path / "cache", 1e9)
    assert contents(IndexedShards(site.url, "train", cache=cache)) == contents(IndexedShards(folder, "train"))
    assert whole(cache.folder)
    assert len(site.asked) > 12


@pytest.mark.parametrize(
    "faults",
    [[503, 503, 503], [100, 200, 250], ["other"], [429, 0], [500, "other"]],
    ids=lambda f: "-".join(map(str, f)),
)
def test_faults_that_pass_are_passed_over(there: tuple[Site, Path], tmp_path: Path, faults: list):
    site, folder = there
    read_index(site.url)
    site.faults.extend(faults)
    cache = ShardCache(tmp_path / "cache", 1e9)
    assert contents(IndexedShards(site.url, "val", cache=cache)) == contents(IndexedShards(folder, "val"))
    assert whole(cache.folder)


@pytest.mark.parametrize(
    ("length", "match"),
    [
        (lambda n: n + 1000, r"val-000000\.tar: the connection broke at \d+ of \d+ bytes"),
        (lambda n: n - 1000, r"val-000000\.tar does not match its index\.json: bytes \d+, there \d+"),
        (lambda n: 10**30, r"val-000000\.tar"),
        (lambda n: None, None),
    ],
    ids=["more", "less", "nonsense", "none"],
)
def test_a_length_that_is_a_lie_leaves_no_wrong_copy(
    there: tuple[Site, Path], tmp_path: Path, length: Callable, match: str | None
):
    """With no Content-Length, or an impossible one, what arrived is checked against the index."""
    site, folder = there
    read_index(site.url)
    site.length, cache = length, ShardCache(tmp_path / "cache", 1e9)
    try:
        shards = IndexedShards(site.url, "val", cache=cache)
        assert contents(shards) == contents(IndexedShards(folder, "val"))
    except (DataError, ConnectionError) as error:
        assert re.search(match or "no fault", str(error))  # noqa: PT017 - which of both it is differs
        assert not list(cache.folder.glob("*.tar*"))
    else:
        assert match is None or length(0) == 10**30


@pytest.mark.parametrize("status", [404, 403, 500])
def test_what_is_not_there_is_named(there: tuple[Site, Path], tmp_path: Path, status: int):
    site, _ = there
    read_index(site.url)
    site.status = status
    with pytest.raises(ConnectionError, match=rf"val-000000\.tar: HTTP Error {status}"):
        IndexedShards(site.url, "val", cache=ShardCache(tmp_path / "cache", 1e9))
    assert site.asked.count("/val-000000.tar") == (remote.ATTEMPTS if status == 500 else 1)
    remote.fetched.cache_clear()
    with pytest.raises(ConnectionError, match=rf"index\.json: HTTP Error {status}"):
        read_index(site.url)


def test_a_server_that_does_not_answer_is_given_up(
    there: tuple[Site, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    site, _ = there
    read_index(site.url)
    monkeypatch.setattr(remote, "TIMEOUT", 0.05)
    site.pause = 0.4
    with pytest.raises(ConnectionError, match=r"val-000000\.tar: .*timed out"):
        IndexedShards(site.url, "val", cache=ShardCache(tmp_path / "cache", 1e9))


def test_a_shard_that_changed_or_grew_is_named_and_not_kept(there: tuple[Site, Path], tmp_path: Path):
    site, folder = there
    path, cache = folder / "val-000000.tar", ShardCache(tmp_path / "cache", 1e9)
    data = path.read_bytes()
    for changed, match in (
        (data.replace(b"val 3 one", b"val 3 two"), "sha256"),
        (data + bytes(1_000_000), r"more than the \d+ bytes of its index"),
        (data[: len(data) // 2], "bytes"),
    ):
        path.write_bytes(changed)
        with pytest.raises(DataError, match=rf"http://.*val-000000\.tar .*{match}"):
            IndexedShards(site.url, "val", cache=cache)
    assert not list(cache.folder.glob("*.tar*"))


def test_an_index_whose_checksum_is_a_path_reaches_no_file_of_this_machine(there: tuple[Site, Path], tmp_path: Path):
    site, folder = there
    (tmp_path / "mine.tar").write_bytes(b"mine")
    index = read_index(folder)
    index["splits"]["val"]["shards"][0]["sha256"] = "../mine"
    write_json(folder / "index.json", index)
    with pytest.raises(DataError, match=r"index\.json is not a shard index .*'\.\./mine' in the place of a sha256"):
        IndexedShards(site.url, "val", cache=ShardCache(tmp_path / "cache", 1e9))
    assert (tmp_path / "mine.tar").read_bytes() == b"mine"


@pytest.mark.parametrize("file", ["/etc/passwd", "../a.tar", "file:///etc/passwd", "pipe:id", "ftp://h/a", "a\nb", ""])
def test_an_index_from_afar_names_no_file_of_this_machine(there: tuple[Site, Path], file: str):
    site, folder = there
    index = read_index(folder)
    index["splits"]["val"]["shards"][0]["file"] = file
    write_json(folder / "index.json", index)
    with pytest.raises(DataError, match=r"http://.*index\.json is not a shard index"):
        read_index(site.url)


def test_a_checksum_is_no_path(there: tuple[Site, Path], tmp_path: Path):
    site, folder = there
    index = read_index(folder)
    index["splits"]["val"]["shards"][0]["sha256"] = "../../outside"
    write_json(folder / "index.json", index)
    with pytest.raises(DataError, match="sha256"):
        IndexedShards(site.url, "val", cache=ShardCache(tmp_path / "cache", 1e9))
    assert not list(tmp_path.glob("outside*"))


# -- room --------------------------------------------------------------------------------------------------------------


def test_a_copy_that_others_delete_as_soon_as_it_is_there_is_fetched_again(
    there: tuple[Site, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    site, folder = there
    shards = IndexedShards(site.url, "train", cache=ShardCache(tmp_path / "cache", 1e9))
    for copy in (tmp_path / "cache").glob("*.tar"):
        copy.unlink()
    write, left = remote.write_atomically, [2]

    def deleted_at_once(path: Path, fill: Callable) -> None:
        write(path, fill)
        if left[0]:
            left[0] -= 1
            path.unlink()

    monkeypatch.setattr(remote, "write_atomically", deleted_at_once)
    assert shards.members(0) == IndexedShards(folder, "train").members(0)
    assert left == [0]


def test_copies_make_room_and_come_again(there: tuple[Site, Path], tmp_path: Path):
    """With room for two of five shards all samples can be read in order; at most two copies and the open one remain."""
    site, folder = there
    size = max(p.stat().st_size for p in folder.glob("*.tar"))
    cache = ShardCache(tmp_path / "cache", 2 * size)
    shards, here = IndexedShards(site.url, "train", cache=cache), IndexedShards(folder, "train")
    assert not shards.all_at_hand
    asked = len(site.asked)
    for i in range(len(here)):
        assert shards.members(i) == here.members(i)
        assert len(list(cache.folder.glob("*.tar"))) <= 3
    assert len(site.asked) - asked <= 5  # each once more, except those that the scan left there
    assert whole(cache.folder)


def test_the_oldest_use_goes_first(there: tuple[Site, Path], tmp_path: Path):
    site, folder = there
    entries = [e | {"file": f"{site.url}/{e['file']}"} for e in read_index(folder)["splits"]["train"]["shards"]]
    cache = ShardCache(tmp_path / "cache", 3 * max(e["bytes"] for e in entries))
    for k in (0, 1, 2, 0, 3):
        os.close(cache.open(entries[k]))
        time.sleep(0.01)
    assert {p.stem for p in cache.folder.glob("*.tar")} == {entries[k]["sha256"] for k in (0, 2, 3)}


def test_a_copy_that_is_read_is_not_deleted(there: tuple[Site, Path], tmp_path: Path):
    site, folder = there
    entries = [e | {"file": f"{site.url}/{e['file']}"} for e in read_index(folder)["splits"]["train"]["shards"]]
    cache = ShardCache(tmp_path / "cache", 1)
    first = cache.open(entries[0])
    for entry in entries[1:]:
        os.close(cache.open(entry))
    kept = {p.stem for p in cache.folder.glob("*.tar")}
    assert kept == {entries[0]["sha256"], entries[4]["sha256"]}
    assert hashlib.sha256(os.pread(first, 10**7, 0)).hexdigest() == entries[0]["sha256"]
    os.close(first)


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:600] + b"x" + data[601:]])
def test_a_damaged_copy_is_fetched_again(there: tuple[Site, Path], tmp_path: Path, damage: Callable[[bytes], bytes]):
    """Also one that kept its length."""
    site, folder = there
    cache = ShardCache(tmp_path / "cache", 1e9)
    IndexedShards(site.url, "val", cache=cache)
    (copy,) = cache.folder.glob("*.tar")
    copy.write_bytes(damage(copy.read_bytes()))
    assert contents(IndexedShards(site.url, "val", cache=cache)) == contents(IndexedShards(folder, "val"))
    assert whole(cache.folder)


def test_a_copy_that_was_only_touched_is_kept(there: tuple[Site, Path], tmp_path: Path):
    site, _ = there
    cache = ShardCache(tmp_path / "cache", 1e9)
    IndexedShards(site.url, "val", cache=cache)
    (copy,) = cache.folder.glob("*.tar")
    copy.touch()
    asked = len(site.asked)
    IndexedShards(site.url, "val", cache=cache)
    assert "/val-000000.tar" not in site.asked[asked:]


def test_training_in_any_order_needs_room_for_all(there: tuple[Site, Path], tmp_path: Path):
    site, _ = there
    with pytest.raises(DataError, match=r"raise data\.shard_cache\.gigabytes, or .*data\.reader=streaming"):
        module(site.url, tmp_path / "cache", gigabytes=1e-5)
    data = module(site.url, tmp_path / "cache", gigabytes=1e-5, reader="streaming")
    assert len(list(data.train_loader(20))) == 4
    assert len(list(data.val_dataloader())) == 2


def _read_all(url: str, folder: Path, limit: int, seed: int, digests: "multiprocessing.Queue[str]") -> None:
    remote.fetched.cache_clear()
    shards, digest = IndexedShards(url, "train", cache=ShardCache(folder, limit)), hashlib.sha256()
    for i in range(len(shards)):
        digest.update(shards.read((i + seed) % len(shards), "png"))
        digest.update(shards.read(i, "txt"))
    digests.put(f"{seed} {digest.hexdigest()}")


@pytest.mark.slow
@pytest.mark.parametrize("room", [1, 100])
def test_processes_share_the_copies(there: tuple[Site, Path], tmp_path: Path, room: int):
    """Four processes at once, with room for one shard or for all, read what is in the folder; with room for all, each
    shard is fetched once."""
    site, folder = there
    size = max(p.stat().st_size for p in folder.glob("*.tar"))
    here, digests = IndexedShards(folder, "train"), CONTEXT.Queue()
    arguments = (site.url, tmp_path / "cache", room * size)
    processes = [begun(_read_all, *arguments, seed, digests) for seed in range(0, 40, 10)]
    said = {digests.get(timeout=120) for _ in processes}
    for process in processes:
        process.join()
    expected = set()
    for seed in range(0, 40, 10):
        digest = hashlib.sha256()
        for i in range(40):
            digest.update(here.read((i + seed) % 40, "png") + here.read(i, "txt"))
        expected.add(f"{seed} {digest.hexdigest()}")
    assert said == expected
    assert whole(tmp_path / "cache")
    if room == 100:
        assert len(set(site.asked)) == 6
        assert sum("tar" in path for path in site.asked) == 5


def test_a_fetch_that_is_killed_leaves_nothing_and_the_next_one_works(there: tuple[Site, Path], tmp_path: Path):
    site, folder = there
    site.pause = 0.05
    digests: multiprocessing.Queue[str] = CONTEXT.Queue()
    process = begun(_read_all, site.url, tmp_path / "cache", 10**9, 0, digests)
    while not list((tmp_path / "cache").glob(".*.partial")):
        assert process.exitcode is None
        time.sleep(0.01)
    process.kill()
    process.join()
    assert whole(tmp_path / "cache")
    site.pause = 0.0
    cache = ShardCache(tmp_path / "cache", 1e9)
    assert contents(IndexedShards(site.url, "train", cache=cache)) == contents(IndexedShards(folder, "train"))
    assert not list(cache.folder.glob(".*.partial"))
