"""Shards are written completely or not at all, read by offset, and refused if they do not match their index."""

import errno
import io
import os
import pickle
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds

from ldm_train import storage
from ldm_train.data import offsets, shards
from ldm_train.data.datamodule import ShardDataModule
from ldm_train.data.order import Batching
from ldm_train.data.prepare.index import write_tar_index
from ldm_train.data.remote import is_remote
from ldm_train.data.shards import DataError, IndexedShards, read_index, split_index, write_shard
from ldm_train.data.tars import StreamedTar, scan_tar
from ldm_train.storage import file_sha256, write_json

SAMPLES = [(f"k{i}", {"bin": bytes([i]) * (100 + 700 * i), "txt": f"number {i}".encode()}) for i in range(6)]


def index_of(root: Path, *entries: dict) -> Path:
    write_json(root / "index.json", {"splits": {"train": {"count": 0, "shards": list(entries)}}})
    return root


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A folder with one shard of SAMPLES and its index."""
    root = tmp_path / "small"
    return index_of(root, write_shard(root / "train-000000.tar", SAMPLES))


# -- writing ---------------------------------------------------------------------------------------------------------


def test_the_same_samples_make_the_same_bytes(tmp_path: Path):
    first, second = (write_shard(tmp_path / name / "a.tar", SAMPLES) for name in ("one", "two"))
    assert first == second
    path = tmp_path / "one" / "a.tar"
    assert (first["sha256"], first["bytes"]) == (file_sha256(path), path.stat().st_size)
    assert first["count"] == 6
    assert first["fields"] == {"bin": 6, "txt": 6}


def test_webdataset_reads_what_we_write(tmp_path: Path):
    write_shard(tmp_path / "a.tar", SAMPLES)
    read = [
        (s["__key__"], {e: s[e] for e in ("bin", "txt")})
        for s in wds.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False)
    ]
    assert read == SAMPLES


def test_long_and_foreign_keys_survive(tmp_path: Path):
    keys = ["x" * 150, "größe", "名" * 60]
    entry = write_shard(tmp_path / "a.tar", [(k, {"txt": k.encode()}) for k in keys])
    reader = IndexedShards(index_of(tmp_path, entry), "train")
    assert reader.keys == keys
    assert [reader.read(i, "txt").decode() for i in range(3)] == keys
    assert [s["__key__"] for s in wds.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False)] == keys


@pytest.mark.parametrize("key", ["a.b", "a/b", "k1"], ids=["dot", "slash", "repeat"])
def test_a_bad_key_is_refused_and_leaves_nothing(tmp_path: Path, key: str):
    with pytest.raises(ValueError, match="dot or slash or repeats"):
        write_shard(tmp_path / "a.tar", [*SAMPLES[:3], (key, {"txt": b""})])
    assert list(tmp_path.iterdir()) == []


def test_a_key_that_repeats_with_others_in_between_is_named_when_the_tar_is_indexed(tmp_path: Path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for key in ("a", "b", "c", "a"):
            info = tarfile.TarInfo(f"{key}.cls")
            info.size = 1
            tar.addfile(info, io.BytesIO(b"0"))
    with pytest.raises(DataError, match=r"a\.tar .*the key a occurs twice"):
        scan_tar(tmp_path / "a.tar")
    with pytest.raises(DataError, match=r"a\.tar .*the key a occurs twice"):
        list(StreamedTar(str(tmp_path / "a.tar")))


def test_an_exception_between_samples_leaves_nothing(tmp_path: Path):
    def samples():
        yield from SAMPLES
        raise KeyError("the source broke")

    with pytest.raises(KeyError):
        write_shard(tmp_path / "a.tar", samples())
    assert list(tmp_path.iterdir()) == []


def test_a_failed_rewrite_keeps_the_old_shard(tmp_path: Path):
    before = write_shard(tmp_path / "a.tar", SAMPLES)
    with pytest.raises(ValueError):
        write_shard(tmp_path / "a.tar", [("a.b", {})])
    assert file_sha256(tmp_path / "a.tar") == before["sha256"]


def assert_disk_full(folder: Path) -> None:
    with pytest.raises(OSError, match=r"could not write .*train-000000\.tar.*free some space.*same command") as caught:
        write_shard(folder / "train-000000.tar", ((f"k{i}", {"bin": bytes(5000)}) for i in range(100)))
    assert caught.value.errno == errno.ENOSPC
    assert list(folder.iterdir()) == []


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Full(io.BufferedWriter):
        def write(self, data) -> int:
            if self.tell() + len(data) > 100_000:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

    monkeypatch.setattr(storage, "open", lambda path, mode: Full(io.FileIO(path, mode)), raising=False)
    assert_disk_full(tmp_path)


@pytest.fixture
def tiny_disk(tmp_path: Path):
    """The folder of a file system of 128 KiB. Skips the test without the rights to mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(disk)]
    if os.getuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting takes root")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_really_full_disk(tiny_disk: Path):
    assert_disk_full(tiny_disk)


# -- reading ---------------------------------------------------------------------------------------------------------


def test_every_field_is_read_by_offset(small: Path):
    reader = IndexedShards(small, "train")
    assert [(reader.key(i), reader.members(i)) for i in range(len(reader))] == SAMPLES


def test_a_missing_field_is_none(tmp_path: Path):
    entry = write_shard(tmp_path / "a.tar", [("a", {"txt": b"x"}), ("b", {"cls": b"1"})])
    reader = IndexedShards(index_of(tmp_path, entry), "train")
    assert (reader.read(0, "cls"), reader.read(1, "txt")) == (None, None)
    assert reader.members(1) == {"cls": b"1"}


def test_an_empty_shard_does_no_harm(tmp_path: Path):
    entries = [write_shard(tmp_path / "a.tar", []), write_shard(tmp_path / "b.tar", SAMPLES)]
    reader = IndexedShards(index_of(tmp_path, *entries), "train")
    assert (len(reader), reader.members(0), reader.where(0)) == (6, SAMPLES[0][1], "b.tar:k0")


def cut_positions() -> dict[str, int]:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key, fields in SAMPLES:
            for extension, data in fields.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        end, members = tar.offset, tar.getmembers()
    last, boundary = members[-2], members[-3].offset
    return {
        "nothing_left": 0,
        "in_first_header": 100,
        "in_data": last.offset_data + 5,
        "in_padding": last.offset_data + last.size + 3,
        "at_a_member": boundary,
        "in_a_header": boundary + 300,
        "after_a_header": boundary + 512,
        "before_the_end_marker": end,
    }


@pytest.mark.parametrize("cut", cut_positions().items(), ids=lambda c: c[0])
def test_a_truncated_tar_is_named(small: Path, cut: tuple[str, int]):
    path = small / "train-000000.tar"
    path.write_bytes(path.read_bytes()[: cut[1]])
    with pytest.raises(DataError, match=r"train-000000\.tar.*truncated"):
        scan_tar(path)
    with pytest.raises(DataError, match=r"train-000000\.tar.*truncated"):
        IndexedShards(small, "train")
    with pytest.raises(DataError, match=r"train-000000\.tar.*truncated"):
        write_tar_index(str(small), small / "index", train="train*", val="train*")


def test_changed_bytes_are_refused(small: Path):
    path = small / "train-000000.tar"
    data = bytearray(path.read_bytes())
    data[3000] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"train-000000\.tar does not match the sha256"):
        IndexedShards(small, "train")


def test_a_missing_shard_is_named(small: Path):
    (small / "train-000000.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 1 shards .* missing, first .*train-000000\.tar.*prepare"):
        IndexedShards(small, "train")


def test_remote_shards_are_no_missing_files(tmp_path: Path):
    entry = {"file": "https://example.org/train-000000.tar", "count": 1, "bytes": 1, "sha256": "0" * 64, "fields": {}}
    with pytest.raises(DataError, match=r"example\.org/train-000000\.tar.*remote"):
        IndexedShards(index_of(tmp_path, entry), "train")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (None, "has no index.json; make it with: ldm-prepare"),
        ("{", "is not a shard index.*ldm-prepare"),
        ("[]", "is not a shard index"),
        ('{"splits": 3}', "is not a shard index"),
    ],
    ids=["none", "no_json", "a_list", "no_splits"],
)
def test_index_errors_name_the_command(tmp_path: Path, content: str | None, match: str):
    if content is not None:
        (tmp_path / "index.json").write_text(content)
    with pytest.raises((FileNotFoundError, DataError), match=match) as caught:
        read_index(tmp_path)
    assert f"out={tmp_path}" in str(caught.value)


def test_a_missing_folder_names_the_given_remedy(tmp_path: Path):
    with pytest.raises(
        FileNotFoundError, match=r"does not exist; make it with: ldm-prepare source=shapes out=.*/nowhere"
    ):
        read_index(tmp_path / "nowhere", "ldm-prepare source=shapes out={root}")


def test_an_unknown_split_lists_those_there_are(small: Path):
    with pytest.raises(DataError, match=r"no split 'test', only train; set data\.train_split"):
        split_index(read_index(small), "test", small)


WHOLE = {"file": "train-000000.tar", "count": 6, "bytes": 1, "sha256": "0" * 64, "fields": {"bin": 6}}


@pytest.mark.parametrize(
    "change",
    [
        {"file": None}, {"file": 3}, {"file": ""}, {"file": "a\0b"}, {"sha256": None}, {"sha256": 0}, {"count": "6"},
        {"count": -1}, {"count": 10**30}, {"count": True}, {"count": 1.5}, {"bytes": None}, {"bytes": -5}, {"fields": []},
        {"fields": {"bin": "6"}}, {"fields": {"bin": -6}}, {"fields": None},
    ],
    ids=str,
)  # fmt: skip
def test_a_damaged_entry_is_named_with_the_remedy(tmp_path: Path, change: dict):
    index_of(tmp_path, WHOLE, WHOLE | change)
    with pytest.raises(
        DataError, match=r"index\.json is not a shard index \(shard 1 of 'train' .*rebuild it with: ldm-prep"
    ):
        read_index(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "null", "3", '"splits"', '{"splits": {"train": null}}', '{"splits": {"train": []}}', "[" * 100_000, "\xff",
        '{"splits": {"train": {"shards": {}, "count": 0}}}', '{"splits": {"train": {"shards": [3], "count": 0}}}',
        '{"splits": {"train": {"shards": []}}}', '{"splits": {}, "classes": 3}', '{"splits": {}, "classes": [1]}',
        '{"splits": {}, "n": ' + "9" * 5000 + "}",
    ],
    ids=range(13),
)  # fmt: skip
def test_an_index_of_any_other_shape_is_named_with_the_remedy(tmp_path: Path, text: str):
    (tmp_path / "index.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=r"index\.json is not a shard index \(.*\); rebuild it with: ldm-prepare"):
        read_index(tmp_path)


@pytest.mark.parametrize(
    "change", [{"count": 7}, {"fields": {"bin": 6, "txt": 6, "cls": 6}}, {"fields": {"bin": 6}}], ids=str
)
def test_an_index_that_counts_otherwise_than_its_shard_is_named(small: Path, change: dict):
    entry = read_index(small)["splits"]["train"]["shards"][0]
    index_of(small, entry | change)
    for _ in range(2):  # first scanned, then from the kept offsets
        with pytest.raises(DataError, match=r"train-000000\.tar has 6 samples with .* its index.json says"):
            IndexedShards(small, "train")


FORBIDDEN = [
    "pipe:touch {out}", "PIPE:touch {out}", "pipe://touch {out}", "file:{out}", "file:///etc/passwd", "ftp://example.org/a.tar",
    "sftp://example.org/a.tar", "scp://example.org/a.tar", "ais://bucket/a.tar", "htgs://bucket/a.tar", "cmd:touch {out}",
    "data:,x", "https:touch", "http:///a.tar", "http://[::1/a.tar", "simplecache::s3://bucket/a.tar", "memory://a.tar",
    "local://etc/passwd", "http://a:99999999/x", "../outside.tar", "a/../../outside.tar", "https://a/b\n-o {out}", "a\rb",
]  # fmt: skip
HARMLESS = [
    "|touch {out}",
    "-o{out}",
    "a.tar; touch {out}",
    "$(touch {out})",
    "`touch {out}`",
    "~/a.tar",
    "/etc/passwd",
    "/dev/zero",
]


@pytest.mark.parametrize("file", FORBIDDEN)
def test_only_paths_and_known_addresses_are_opened(tmp_path: Path, file: str):
    outside = tmp_path / "out"
    file = file.format(out=outside)
    root = tmp_path / "data"
    index_of(root, WHOLE | {"file": file})
    with pytest.raises(DataError, match=re.escape(repr(file))):
        IndexedShards(root, "train")
    with pytest.raises(DataError, match=re.escape(repr(file))):
        ShardDataModule(
            str(root), Batching(1), 1, ("image",), reader="streaming", train_split="train", val_split="train"
        )
    if is_remote(file):
        for names in ([file], file):
            with pytest.raises(DataError, match=re.escape(repr(file))):
                write_tar_index(names, tmp_path / "index", train="*", val="*")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["data", "index.json"]


@pytest.mark.parametrize("file", HARMLESS)
def test_a_path_is_never_a_command(tmp_path: Path, file: str):
    file = file.format(out=tmp_path / "out")
    root = tmp_path / "data"
    index_of(root, WHOLE | {"file": file, "fields": {"png": 6}})
    with pytest.raises((DataError, FileNotFoundError), match=re.escape(file)):
        IndexedShards(root, "train")
    data = ShardDataModule(
        str(root), Batching(1), 1, ("image",), reader="streaming", train_split="train", val_split="train"
    )
    with pytest.raises((DataError, FileNotFoundError), match=re.escape(file)):
        list(data.train_loader(0))
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["data", "index.json"]


def test_an_absolute_path_must_hold_what_the_index_says(small: Path, tmp_path: Path):
    path, entry = small / "train-000000.tar", read_index(small)["splits"]["train"]["shards"][0]
    root = index_of(tmp_path / "apart", entry | {"file": str(path)})
    assert len(IndexedShards(root, "train")) == 6
    index_of(root, entry | {"file": str(path), "sha256": "0" * 64})
    with pytest.raises(DataError, match=r"train-000000\.tar does not match the sha256"):
        IndexedShards(root, "train")


def test_a_member_of_negative_size_ends_nothing_but_itself(tmp_path: Path):
    header = tarfile.TarInfo("a.txt")
    header.size, header.type = 512, tarfile.DIRTYPE
    block = bytearray(header.tobuf())
    block[124:136] = tarfile.itn(-512, 12, tarfile.GNU_FORMAT)  # so that its data would end where its header begins
    block[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(block))[0]
    (tmp_path / "a.tar").write_bytes(bytes(block) + bytes(20_000))
    with pytest.raises(DataError, match=r"a\.tar is truncated or no tar"):
        scan_tar(tmp_path / "a.tar")
    with pytest.raises(DataError, match=r"a\.tar is truncated or no tar"):
        list(StreamedTar(str(tmp_path / "a.tar")))


@pytest.mark.parametrize("name", [b"a\xff.txt", b"a.txt"])
def test_a_member_whose_name_is_no_text_is_named(tmp_path: Path, name: bytes):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo(name.decode("utf-8", "surrogateescape")))
    if name == b"a.txt":
        assert scan_tar(tmp_path / "a.tar")[0] == ["a"]
        return
    with pytest.raises(DataError, match=r"a\.tar .*name is not UTF-8"):
        scan_tar(tmp_path / "a.tar")


@pytest.mark.parametrize("entries", [(), ({**WHOLE, "count": 0},)], ids=["no_shard", "an_empty_one"])
def test_a_split_without_a_sample_is_named(tmp_path: Path, entries: tuple):
    with pytest.raises(DataError, match="has no sample in split 'train'"):
        IndexedShards(index_of(tmp_path, *entries), "train")


# -- offsets ---------------------------------------------------------------------------------------------------------


def test_offsets_of_shards_with_one_name_are_kept_apart(tmp_path: Path):
    entries = []
    for folder in ("one", "two"):
        samples = [(f"{folder}_{key}", fields) for key, fields in SAMPLES]
        entries.append(write_shard(tmp_path / folder / "a.tar", samples) | {"file": f"{folder}/a.tar"})
    root = index_of(tmp_path, *entries)
    keys = IndexedShards(root, "train").keys
    kept = {path: path.stat().st_mtime_ns for path in (root / ".offsets").iterdir()}
    assert len(kept) == 2
    assert IndexedShards(root, "train").keys == keys
    assert {path: path.stat().st_mtime_ns for path in (root / ".offsets").iterdir()} == kept


def test_offsets_are_kept_until_the_shard_changes(small: Path):
    path = small / "train-000000.tar"
    IndexedShards(small, "train")
    assert (small / ".offsets" / "train-000000.tar.npz").is_file()
    stat, data = path.stat(), bytearray(path.read_bytes())
    data[3000] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert len(IndexedShards(small, "train")) == 6  # same size and time: the bytes are not read again
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    with pytest.raises(DataError, match="sha256"):
        IndexedShards(small, "train")


def test_damaged_offsets_are_scanned_anew(small: Path):
    """The file is cut at random places, has a random byte changed or holds other arrays: the same samples are read."""
    IndexedShards(small, "train")
    kept = small / ".offsets" / "train-000000.tar.npz"
    whole, rng = kept.read_bytes(), np.random.default_rng(0)
    with np.load(kept) as saved:
        arrays = dict(saved)

    def with_arrays(**changed) -> bytes:
        buffer = io.BytesIO()
        np.savez(buffer, **arrays | changed)
        return buffer.getvalue()

    damaged = [b"", b"PK", whole[:100], whole[:-1], pickle.dumps({}), b"\x93NUMPY\x01\x00"]
    damaged += [whole[:n] for n in rng.integers(0, len(whole), 10)]
    damaged += [bytes([*whole[:n], whole[n] ^ 255, *whole[n + 1 :]]) for n in rng.integers(0, len(whole), 30).tolist()]
    for wrong in (arrays["offset.bin"][:3], arrays["offset.bin"] + 10**9, -arrays["offset.bin"], arrays["offset.bin"] * 1.0,
                  np.array([{}] * 6, object), np.array(3)):  # fmt: skip
        damaged += [with_arrays(**{name: wrong}) for name in ("offset.bin", "size.bin", "keys")]
    for data in damaged:
        kept.write_bytes(data)
        reader = IndexedShards(small, "train")
        assert [(reader.key(i), reader.members(i)) for i in range(len(reader))] == SAMPLES
        assert kept.read_bytes()[:2] == b"PK"


def test_offsets_are_not_kept_outside_the_folder(small: Path, tmp_path: Path):
    (tmp_path / "outside").mkdir()
    (small / ".offsets").symlink_to(tmp_path / "outside")
    assert len(IndexedShards(small, "train")) == 6
    assert not list((tmp_path / "outside").iterdir())


def test_a_large_table_of_offsets_is_not_written_through_a_link(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(offsets, "IN_MEMORY", 3)
    assert len(IndexedShards(small, "train")) == 6
    (table,) = [p for p in (small / ".offsets").iterdir() if p.is_dir()]
    shutil.rmtree(table)
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "thesis.txt").touch()
    table.symlink_to(tmp_path / "victim")
    assert len(IndexedShards(small, "train")) == 6
    assert [p.name for p in (tmp_path / "victim").iterdir()] == ["thesis.txt"]


def test_sparse_members_are_refused_and_notes_of_macos_left_out(tmp_path: Path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("._0.jpg", "0.jpg", "x/._1.jpg", "x/1.jpg"):
            member = tarfile.TarInfo(name)
            member.size = 3
            tar.addfile(member, io.BytesIO(b"abc"))
    assert scan_tar(path)[0] == ["0", "x/1"]
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        member = tarfile.TarInfo("0.npy")
        member.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "4096"}
        member.size = 512
        tar.addfile(member, io.BytesIO(b"0\n".ljust(512, b"\0")))
    with pytest.raises(DataError, match=r"0\.npy is a sparse file"):
        scan_tar(path)


def test_offsets_of_another_index_are_not_used(small: Path):
    IndexedShards(small, "train")
    index = read_index(small)
    index["splits"]["train"]["shards"][0]["sha256"] = "0" * 64
    write_json(small / "index.json", index)
    with pytest.raises(DataError, match="sha256"):
        IndexedShards(small, "train")


def test_a_read_only_folder_works(tiny_disk: Path):
    root = index_of(tiny_disk, write_shard(tiny_disk / "train-000000.tar", SAMPLES))
    subprocess.run(["mount", "-o", "remount,ro", str(tiny_disk)], check=True)
    reader = IndexedShards(root, "train")
    assert reader.members(5) == SAMPLES[5][1]
    assert not (root / ".offsets").exists()


@pytest.fixture
def on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps the offsets in files instead of memory, whatever the number of samples."""
    monkeypatch.setattr(offsets, "IN_MEMORY", 0)


def test_offsets_on_the_disk_are_those_in_memory(write_data: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With shards of different fields, keys that are not ASCII and an empty shard, also after `keep`. The second time
    only the table on disk is read."""
    root = tmp_path / "mixed"
    mixed = [
        write_shard(root / "train-000000.tar", SAMPLES),
        write_shard(root / "train-000001.tar", []),
        write_shard(root / "train-000002.tar", [("größer" * 20, {"png": b"1"}), ("日本", {"txt": b"", "png": b"22"})]),
    ]
    index_of(root, *mixed)
    here = IndexedShards(root, "train")
    monkeypatch.setattr(offsets, "IN_MEMORY", 0)
    for _ in range(2):
        there = IndexedShards(root, "train")
        assert not isinstance(there.table.rows, np.ndarray)
        there = pickle.loads(pickle.dumps(there))  # as a loader sends it to a spawned worker
        assert there.table.extremes == here.table.extremes
        assert [(there.key(i), there.members(i), there.where(i)) for i in range(8)] == [
            (here.key(i), here.members(i), here.where(i)) for i in range(8)
        ]
        monkeypatch.setattr(offsets, "_parts", None)  # nothing is scanned the second time
    there.keep(3)
    here.keep(3)
    assert there.keys == here.keys


@pytest.mark.usefixtures("on_disk")
def test_a_table_follows_its_shards(small: Path):
    """A changed shard is noticed; with a new index the table is written again."""
    assert IndexedShards(small, "train").members(5) == SAMPLES[5][1]
    path = small / "train-000000.tar"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match="sha256"):
        IndexedShards(small, "train")
    index_of(small, write_shard(path, SAMPLES[:4]))
    assert IndexedShards(small, "train").keys == ["k0", "k1", "k2", "k3"]


@pytest.mark.usefixtures("on_disk")
@pytest.mark.parametrize("file", ["rows", "letters", "table.json"])
def test_a_damaged_table_reads_nothing_outside_its_shard(small: Path, file: str):
    """The file is cut, overwritten or random: at worst other bytes of the same shard are read, or an error names the
    shard or its folder."""
    IndexedShards(small, "train")
    (table,) = (small / ".offsets").glob("train-*/")
    whole, rng = (table / file).read_bytes(), np.random.default_rng(0)
    shard = (small / "train-000000.tar").read_bytes()
    damaged = [b"", whole[:-1], whole + b"x", bytes(len(whole)), b"\xff" * len(whole), b"{}", b'{"extensions": 3}']
    damaged += [rng.bytes(len(whole)) for _ in range(20)]
    for data in damaged:
        (table / file).write_bytes(data)
        try:
            reader = IndexedShards(small, "train")
            read = [reader.members(i) for i in range(len(reader))]
            assert all(member in shard for fields in read for member in fields.values())
            assert [reader.key(i) for i in range(len(reader))]
        except DataError as error:
            assert str(small) in str(error) or "train-000000.tar" in str(error)  # noqa: PT017 - either way


@pytest.mark.usefixtures("on_disk")
def test_a_read_only_folder_keeps_its_offsets_in_memory(tiny_disk: Path, capsys: pytest.CaptureFixture):
    root = index_of(tiny_disk, write_shard(tiny_disk / "train-000000.tar", SAMPLES))
    subprocess.run(["mount", "-o", "remount,ro", str(tiny_disk)], check=True)
    assert IndexedShards(root, "train").members(5) == SAMPLES[5][1]
    assert "held in memory" in capsys.readouterr().out


def test_more_shards_than_files_may_be_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shards, "MOST_OPEN", 3)
    entries = [write_shard(tmp_path / f"train-{k:06d}.tar", [(f"k{k}", {"txt": str(k).encode()})]) for k in range(9)]
    reader, before = IndexedShards(index_of(tmp_path, *entries), "train"), len(os.listdir("/proc/self/fd"))
    for i in [*range(9), *np.random.default_rng(0).integers(0, 9, 50).tolist()]:
        assert reader.read(i, "txt") == str(i).encode()
    assert len(os.listdir("/proc/self/fd")) <= before + 3
