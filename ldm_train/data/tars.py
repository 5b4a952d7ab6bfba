"""Tars of samples: scanned for offsets, or read front to back, local or remote; and checks of their index entries."""

import math
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ldm_train.data.files import DataError, sample_and_field
from ldm_train.data.remote import Measured, address_fault, open_shard


def is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def entry_fault(entry: object) -> str | None:
    """Returns why parsed JSON is not a shard's index entry, or None if it is one."""
    entry = entry if isinstance(entry, dict) else {}
    if not all(isinstance(entry.get(name), str) for name in ("file", "sha256")):
        return 'has no "file" and "sha256"'
    if not re.fullmatch("[0-9a-f]{64}", entry["sha256"]):  # it becomes the name of copies and notes
        return f"has {entry['sha256']!r:.80} in the place of a sha256"
    fields = entry.get("fields")
    numbers = (entry.get("count"), entry.get("bytes"), *(fields.values() if isinstance(fields, dict) else (None,)))
    if not all(map(is_count, numbers)):
        return 'has no whole numbers for "count", "bytes" and "fields"'
    return address_fault(entry["file"])


def _files(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    for member in tar:
        if member.size < 0:  # it would make the reader loop forever
            raise tarfile.ReadError(f"{member.name!r} has a negative size")
        if (
            member.issparse()
        ):  # a few bytes could expand to any number of zeros, and readers by offset would not see them
            raise tarfile.ReadError(f"{member.name} is a sparse file")
        if member.isfile() and not member.name.rpartition("/")[2].startswith("._"):  # macOS' notes on other members
            yield member


def scan_tar(
    path: str | Path | int, name: str | None = None
) -> tuple[list[str], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(keys, {extension: data offsets}, {extension: sizes}) of a tar, -1 if a sample lacks a field. path: may be the
    descriptor of an open file, which stays open. Raises DataError, calling it `name`, for a truncated or unreadable
    tar, which tar readers would otherwise accept silently."""
    with open(path, "rb", closefd=not isinstance(path, int)) as file:
        return _scanned(file, name or str(path))


def _add_new(key: str, known: set[str]) -> None:
    """Adds a sample's key to those of its tar. Raises tarfile.ReadError for one that occurred before."""
    if key in known:
        raise tarfile.ReadError(f"the key {key} occurs twice, with others in between; a key must not repeat")
    known.add(key)


def _scanned(file: BinaryIO, name: str) -> tuple[list[str], dict[str, np.ndarray], dict[str, np.ndarray]]:
    length = os.fstat(file.fileno()).st_size
    keys: list[str] = []
    known: set[str] = set()
    rows: list[dict[str, tuple[int, int]]] = []
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in _files(tar):
                key, extension = sample_and_field(member.name)
                if member.offset_data + member.size > length:
                    raise tarfile.ReadError("unexpected end of data")
                if not keys or keys[-1] != key:
                    _add_new(key, known)
                    keys.append(key)
                    rows.append({})
                if extension in rows[-1]:
                    raise tarfile.ReadError(f"{member.name} occurs twice; a key must not repeat or contain a dot")
                rows[-1][extension] = (member.offset_data, member.size)
            end = tar.offset
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise DataError(f"{name} is truncated or no tar ({error}); copy or prepare it again") from error
    file.seek(end)
    if file.read(512) != bytes(512):
        raise DataError(f"{name} is truncated (no end-of-archive marker); copy or prepare it again")
    extensions = sorted({e for row in rows for e in row})
    absent = (-1, -1)
    offsets, sizes = (
        {e: np.array([row.get(e, absent)[k] for row in rows], np.int64) for e in extensions} for k in (0, 1)
    )
    return keys, offsets, sizes


class StreamedTar:
    """A tar read front to back; iterating yields its samples, (key, {extension: bytes}).

    limit: the most bytes it may have. After the last sample, `entry` describes what was read like an index entry,
    without "file". Raises DataError, naming the tar, if it is truncated, larger than `limit` or not a tar; OSError if
    it cannot be read.
    """

    def __init__(self, file: str, limit: float = math.inf):
        self.file, self.limit = file, limit

    def __iter__(self) -> Iterator[tuple[str, dict[str, bytes]]]:
        known, held = set[str](), Counter()
        with open_shard(self.file) as raw:
            stream = Measured(raw, self.limit)
            try:
                for key, fields in self._samples(stream):
                    _add_new(key, known)
                    held.update(fields.keys())
                    yield key, fields
            except (tarfile.TarError, ValueError, OverflowError) as error:
                raise DataError(f"{self.file} is truncated or no tar ({error}); copy or prepare it again") from error
        checksum = stream.sha256.hexdigest()
        self.entry = {"count": len(known), "bytes": stream.size, "sha256": checksum, "fields": dict(held)}

    def _samples(self, stream: Measured) -> Iterator[tuple[str, dict[str, bytes]]]:
        from webdataset.tariterators import group_by_keys  # imports torch, which preparing data does not need

        for sample in group_by_keys(self._members(stream), keys=sample_and_field, lcase=False):
            yield sample["__key__"], {e: data for e, data in sample.items() if not e.startswith("__")}

    def _members(self, stream: Measured) -> Iterator[dict[str, Any]]:
        """Yields the members in webdataset's form. (webdataset's own iteration silently accepts truncated archives
        and negative sizes.)"""
        with tarfile.open(fileobj=stream, mode="r|", bufsize=1 << 18) as tar:
            for member in _files(tar):
                yield {"fname": member.name, "data": tar.extractfile(member).read(), "__url__": self.file}
            whole = tar.offset + 512 <= tar.fileobj.tell()  # the end-of-archive marker was read
        while stream.read(1 << 20):
            pass
        if not whole:
            raise tarfile.ReadError("no end-of-archive marker")
