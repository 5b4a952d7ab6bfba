"""Files appear only when complete; partial files of ended processes are removed, but not those of another machine."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ldm_train import storage


@pytest.fixture
def gone() -> int:
    """The id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize("folder", [False, True])
def test_what_a_process_left_is_removed_by_its_own_machine_alone(gone: int, folder: bool, tmp_path: Path) -> None:
    left = {
        "this machine": f".a.{storage.HOST}-{gone}.partial",
        "a version before": f".a.{gone}.partial",
        "at work": f".a.{storage.HOST}-{os.getppid()}.partial",
        "another machine": f".a.other-host-{gone}.partial",
        "another file": f".ab.{storage.HOST}-{gone}.partial",
    }
    for name in left.values():
        (tmp_path / name).mkdir() if folder else (tmp_path / name).touch()
    if folder:
        storage.write_folder(tmp_path / "a", lambda made: (made / "file").touch())
    else:
        storage.write_atomically(tmp_path / "a", lambda file: file.write(b"whole"))
    kept = {name for name in left if (tmp_path / left[name]).exists()}
    assert kept == {"at work", "another machine", "another file"}
    assert {p.name for p in tmp_path.iterdir()} == {"a", *(left[name] for name in kept)}


def full(file: object) -> None:
    raise OSError(errno.ENOSPC, "no space")


def test_an_error_of_reading_what_is_written_keeps_its_words(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"No such file or directory: '.*shard\.tar'"):
        storage.write_atomically(tmp_path / "a", lambda file: file.write((tmp_path / "shard.tar").read_bytes()))
    with pytest.raises(OSError, match=r"could not write .*/a: no space"):
        storage.write_atomically(tmp_path / "a", full)
    assert not list(tmp_path.iterdir())


def test_a_link_is_a_copy_where_there_are_no_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"x")
    storage.link_or_copy(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").samefile(tmp_path / "a")

    def refused(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "link", refused)
    storage.link_or_copy(tmp_path / "a", tmp_path / "c")
    assert (tmp_path / "c").read_bytes() == b"x"
