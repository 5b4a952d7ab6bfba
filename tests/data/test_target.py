"""Shards are written to storage services as to folders: the same bytes, continued after faults and interruptions."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from ldm_train.data import remote
from ldm_train.data.files import DataError
from ldm_train.data.prepare.build import build
from ldm_train.data.prepare.index import write_tar_index
from ldm_train.data.prepare.shapes import Shapes
from ldm_train.data.remote import ShardCache
from ldm_train.data.shards import IndexedShards

OUT = "s3://bucket/folder"


class Service(MemoryFileSystem):
    """A storage service (s3://) in memory. `faults`: exceptions that the next uploads raise. `puts`: uploaded files."""

    protocol, store, pseudo_dirs, cachable = "s3", {}, [""], False
    puts: list[str] = []
    faults: list[BaseException] = []

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + str(path).removeprefix("s3://").strip("/")

    def put_file(self, lpath: str, rpath: str, **options: Any) -> None:
        if self.faults:
            raise self.faults.pop()
        self.puts.append(rpath.rpartition("/")[2])
        self.pipe_file(rpath, Path(lpath).read_bytes())


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    Service.store, Service.puts, Service.faults = {}, [], []
    made = Service(skip_instance_cache=True)
    monkeypatch.setattr(fsspec, "filesystem", {"s3": made}.get)
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)
    yield made
    remote.fetched.cache_clear()


def shapes(count: int = 20) -> Shapes:
    return Shapes(size=24, count=count, val_count=5)


def test_a_service_holds_what_a_folder_does_and_is_read_as_one(service: Service, tmp_path: Path) -> None:
    index = build(shapes(), tmp_path / "here", per_shard=8)
    assert build(shapes(), OUT, per_shard=8) == index
    files = {
        str(p.relative_to(tmp_path / "here")): p.read_bytes() for p in (tmp_path / "here").rglob("*") if p.is_file()
    }
    held = {name.removeprefix("/bucket/folder/"): file.getvalue() for name, file in service.store.items()}
    assert held == files
    assert len(service.puts) == 4
    read = IndexedShards(OUT, "train", cache=ShardCache(tmp_path / "copies", 1e9))
    assert [read.members(i) for i in range(20)] == [
        IndexedShards(tmp_path / "here", "train").members(i) for i in range(20)
    ]


def test_what_a_source_reports_lies_beside_its_shards(service: Service) -> None:
    class Reporting(Shapes):
        def report(self, out: Path) -> None:
            (out / "report.csv").write_text("all is well")

    build(Reporting(size=24, count=4, val_count=2), OUT)
    assert service.cat_file(f"{OUT}/report.csv") == b"all is well"


def test_an_interrupted_preparation_continues_with_what_is_missing(service: Service, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        put = Service.put_file

        def interrupted(self: Service, lpath: str, rpath: str, **options: Any) -> None:
            if len(self.puts) == 2:
                raise KeyboardInterrupt
            put(self, lpath, rpath, **options)

        patch.setattr(Service, "put_file", interrupted)
        with pytest.raises(KeyboardInterrupt):
            build(shapes(), OUT, per_shard=8)
    assert not any(name.endswith("index.json") for name in service.store)
    service.pipe_file(f"{OUT}/train-000001.tar", b"cut short")
    first, service.puts[:] = list(service.puts), []
    index = build(shapes(), OUT, per_shard=8)
    assert first == ["train-000000.tar", "train-000001.tar"]
    assert service.puts == ["train-000001.tar", "train-000002.tar", "val-000000.tar"]
    assert index == build(shapes(), tmp_path / "here", per_shard=8)


def test_what_fails_is_tried_again_and_what_is_refused_is_named(service: Service) -> None:
    service.faults[:] = [TimeoutError("slow down"), OSError("reset")]
    build(shapes(), OUT, per_shard=8)
    assert len(service.puts) == 4
    service.faults[:] = [PermissionError("no right to write")]
    with pytest.raises(ConnectionError, match=r"s3://bucket/other/train-000000\.tar: no right to write"):
        build(shapes(), "s3://bucket/other", per_shard=8)
    service.faults[:] = [OSError("reset")] * 9
    with pytest.raises(ConnectionError, match="reset"):
        build(shapes(), "s3://bucket/another", per_shard=8)
    assert len(service.faults) == 9 - remote.ATTEMPTS


def test_data_of_other_options_and_addresses_that_take_nothing_are_refused(service: Service, tmp_path: Path) -> None:
    build(shapes(), OUT, per_shard=8)
    with pytest.raises(DataError, match="s3://bucket/folder holds data prepared with other options"):
        build(shapes(21), OUT, per_shard=8)
    service.pipe_file("s3://bucket/strange/index.json", b"{}")
    with pytest.raises(DataError, match="holds data of another origin"):
        build(shapes(), "s3://bucket/strange")
    with pytest.raises(DataError, match="out=https://host/a: shards are written to folders and to s3://"):
        build(shapes(), "https://host/a")


def test_an_index_at_a_service_is_of_tars_that_lie_there(service: Service, tmp_path: Path) -> None:
    build(shapes(), tmp_path / "here", per_shard=8)
    build(shapes(), OUT, per_shard=8)
    with pytest.raises(DataError, match=r"train-000000\.tar is a file of this machine"):
        write_tar_index(str(tmp_path / "here"), "s3://bucket/index")
    tars = [f"{OUT}/{name}" for name in ("train-000000.tar", "val-000000.tar")]
    write_tar_index(tars, "s3://bucket/index")
    assert IndexedShards("s3://bucket/index", "val", cache=ShardCache(tmp_path / "copies", 1e9)).keys
