"""Tars of samples: scanned for offsets, or read front to back, local or remote; and which addresses are opened. Nothing goes
through a shell or another program."""

import hashlib
import http.client
import io
import itertools
import math
import os
import re
import tarfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote, urlsplit

import numpy as np

from ldm_train.data.files import DataError, sample_and_field

# Addresses that are opened, and the package that opens them where Python itself does not.
SCHEMES = {"http": None, "https": None, "s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub"}
ATTEMPTS = 4  # in a row, waiting 1, 2, 4 seconds between them
TIMEOUT = 60.0  # seconds without an answer


def is_remote(file: str) -> bool:
    """Whether `file` is an address rather than a path: it begins with a scheme (https:, s3:, pipe:, ...)."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", file) is not None


def address_fault(file: str) -> str | None:
    """Why a shard's `file` is not opened; None where it may be. Paths are those of files below the index, or absolute;
    addresses http, https, s3, gs and hf. No name can run another program."""
    if not file or not file.isprintable():
        return f"is {file!r}, no path and no address"
    if not is_remote(file):
        return f"is {file!r}, outside its folder; write its absolute path" if ".." in Path(file).parts else None
    try:
        parts = urlsplit(file)
        opened = parts.scheme in SCHEMES and bool(parts.netloc) and parts.port != 0
    except ValueError:
        opened = False
    if opened:
        return None
    return f"is {file!r}; shards are opened from paths and from {', '.join(f'{s}://' for s in SCHEMES)} addresses only"


def is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def entry_fault(entry: object) -> str | None:
    """Why parsed JSON is no index entry of a shard, in words; None where it is one."""
    entry = entry if isinstance(entry, dict) else {}
    if not all(isinstance(entry.get(name), str) for name in ("file", "sha256")):
        return 'has no "file" and "sha256"'
    fields = entry.get("fields")
    numbers = (entry.get("count"), entry.get("bytes"), *(fields.values() if isinstance(fields, dict) else (None,)))
    if not all(map(is_count, numbers)):
        return 'has no whole numbers for "count", "bytes" and "fields"'
    return address_fault(entry["file"])


def open_shard(file: str) -> BinaryIO:
    """The bytes of a shard, front to back. Raises DataError for an address that is not opened, OSError, naming it, where it
    cannot be."""
    if not is_remote(file):
        return open(file, "rb")
    if fault := address_fault(file):
        raise DataError(f"a shard {fault}")
    scheme = urlsplit(file).scheme
    if SCHEMES[scheme] is None:
        return _Web(file)
    try:
        import fsspec  # its file systems speak to these services themselves

        return fsspec.filesystem(scheme).open(file, "rb")
    except ImportError as error:
        raise DataError(f"{file} needs the package {SCHEMES[scheme]}: pip install {SCHEMES[scheme]}") from error
    except Exception as error:  # each service raises its own error types
        raise ConnectionError(f"{file} cannot be opened: {type(error).__name__}: {error}") from error


class _Web(io.RawIOBase):
    """A file behind http or https. A connection that breaks is made again, and goes on where it broke."""

    def __init__(self, address: str):
        self.address, self.position, self.total = address, 0, 0
        self.response: Any = None

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        for attempt in itertools.count(1):
            try:
                self.response = self.response or self._connected()
                data = self.response.read(size) if size >= 0 else self.response.read()
                self.position += len(data)
                if data or size == 0 or self.position >= self.total:
                    return data
                raise ConnectionError(f"the connection broke at {self.position} of {self.total} bytes")
            except (OSError, http.client.HTTPException, ValueError) as error:
                self.close_response()
                code = getattr(error, "code", 0)
                refused = isinstance(error, ValueError) or (0 < code < 500 and code not in (408, 429))
                if refused or attempt == ATTEMPTS:
                    raise ConnectionError(f"{self.address}: {error}") from error
                time.sleep(2 ** (attempt - 1))

    def _connected(self) -> Any:
        opener = urllib.request.OpenerDirector()  # without file:, ftp: and data:, also where a server redirects there
        for handler in (
            urllib.request.ProxyHandler, urllib.request.HTTPHandler, urllib.request.HTTPSHandler,
            urllib.request.HTTPRedirectHandler, urllib.request.HTTPErrorProcessor,
            urllib.request.HTTPDefaultErrorHandler, urllib.request.UnknownHandler,
        ):  # fmt: skip
            opener.add_handler(handler())
        headers = {"Range": f"bytes={self.position}-"} if self.position else {}
        address = quote(self.address, safe="%/:=&?~#+!$,;'@()*[]")
        response = opener.open(urllib.request.Request(address, headers=headers), timeout=TIMEOUT)
        done = self.position if response.status == 206 else 0
        self.total = done + int(response.headers.get("Content-Length") or 0)
        while done < self.position:  # a server without range requests begins again
            if not (skipped := response.read(min(1 << 20, self.position - done))):
                raise ConnectionError(f"the connection broke at {done} of {self.total} bytes")
            done += len(skipped)
        return response

    def close_response(self) -> None:
        if self.response is not None:
            self.response.close()
            self.response = None

    def close(self) -> None:
        self.close_response()
        super().close()


def _files(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    for member in tar:
        if member.size < 0:  # it would make the reader loop for ever
            raise tarfile.ReadError(f"{member.name!r} has a negative size")
        if member.isfile():
            yield member


def scan_tar(path: str | Path) -> tuple[list[str], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(keys, {extension: data offsets}, {extension: sizes}), -1 where a sample lacks a field. Raises DataError for a
    truncated or unreadable tar, which tar readers otherwise accept in silence."""
    length = os.path.getsize(path)
    keys: list[str] = []
    rows: list[dict[str, tuple[int, int]]] = []
    try:
        with tarfile.open(path, mode="r:") as tar:
            for member in _files(tar):
                key, extension = sample_and_field(member.name)
                if member.offset_data + member.size > length:
                    raise tarfile.ReadError("unexpected end of data")
                if not keys or keys[-1] != key:
                    keys.append(key)
                    rows.append({})
                if extension in rows[-1]:
                    raise tarfile.ReadError(f"{member.name} occurs twice; a key must not repeat or contain a dot")
                rows[-1][extension] = (member.offset_data, member.size)
            end = tar.offset
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise DataError(f"{path} is truncated or no tar ({error}); copy or prepare it again") from error
    with open(path, "rb") as file:
        file.seek(end)
        if file.read(512) != bytes(512):
            raise DataError(f"{path} is truncated (no end-of-archive marker); copy or prepare it again")
    extensions = sorted({e for row in rows for e in row})
    absent = (-1, -1)
    offsets, sizes = (
        {e: np.array([row.get(e, absent)[k] for row in rows], np.int64) for e in extensions} for k in (0, 1)
    )
    return keys, offsets, sizes


class Measured(io.RawIOBase):
    """Counts and hashes what is read from a stream or written to it, and refuses more than `limit` bytes."""

    def __init__(self, stream: BinaryIO, limit: float = math.inf):
        self.stream, self.limit, self.size, self.sha256 = stream, limit, 0, hashlib.sha256()

    def _measure(self, data: bytes) -> None:
        self.size += len(data)
        self.sha256.update(data)
        if self.size > self.limit:
            raise tarfile.ReadError(f"more than the {self.limit} bytes of its index")

    def read(self, size: int = -1) -> bytes:
        data = self.stream.read(size)
        self._measure(data)
        return data

    def write(self, data: bytes) -> int:
        self._measure(data)
        return self.stream.write(data)


class StreamedTar:
    """A tar read front to back: iterating gives its samples, (key, {extension: bytes}).

    limit: bytes that it may have. After its last sample `entry` says what was read, as the entry of an index does, without
    its "file". Raises DataError, naming it, where it is truncated, larger, or no tar; OSError where it cannot be
    read.
    """

    def __init__(self, file: str, limit: float = math.inf):
        self.file, self.limit = file, limit

    def __iter__(self) -> Iterator[tuple[str, dict[str, bytes]]]:
        count, held = 0, Counter()
        with open_shard(self.file) as raw:
            stream = Measured(raw, self.limit)
            try:
                for key, fields in self._samples(stream):
                    count += 1
                    held.update(fields.keys())
                    yield key, fields
            except (tarfile.TarError, ValueError, OverflowError) as error:
                raise DataError(f"{self.file} is truncated or no tar ({error}); copy or prepare it again") from error
        checksum = stream.sha256.hexdigest()
        self.entry = {"count": count, "bytes": stream.size, "sha256": checksum, "fields": dict(held)}

    def _samples(self, stream: Measured) -> Iterator[tuple[str, dict[str, bytes]]]:
        from webdataset.tariterators import group_by_keys  # which imports torch: preparing does without

        for sample in group_by_keys(self._members(stream), keys=sample_and_field, lcase=False):
            yield sample["__key__"], {e: data for e, data in sample.items() if not e.startswith("__")}

    def _members(self, stream: Measured) -> Iterator[dict[str, Any]]:
        """(webdataset's own iteration takes truncated archives and negative sizes in silence.)"""
        with tarfile.open(fileobj=stream, mode="r|", bufsize=1 << 18) as tar:
            for member in _files(tar):
                if member.issparse():  # a few bytes could stand for any number of zeros
                    raise tarfile.ReadError(f"{member.name} is a sparse file")
                yield {"fname": member.name, "data": tar.extractfile(member).read(), "__url__": self.file}
            whole = tar.offset + 512 <= tar.fileobj.tell()  # the end-of-archive marker was read
        while stream.read(1 << 20):
            pass
        if not whole:
            raise tarfile.ReadError("no end-of-archive marker")
