"""Files on other machines: which addresses are allowed, reading them despite network faults, and copies of shards on
the local disk. Nothing goes through a shell or another program."""

import fcntl
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
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import quote, urlsplit

from ldm_train.data.files import DataError
from ldm_train.storage import file_sha256, locked, write_atomically

Result = TypeVar("Result")

# The schemes of allowed addresses, and the package that opens each (None: Python itself).
SCHEMES = {"http": None, "https": None, "s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub"}
ATTEMPTS = 4  # in a row, with waits of 1, 2 and 4 seconds between them
TIMEOUT = 60.0  # seconds without an answer
COMPARED = 10**18  # modification time (ns) of copies whose checksum was compared
ROOM = ".room.lock"  # locked by the process that deletes copies
BLOCK = 1 << 20  # bytes read at a time


def is_remote(file: str) -> bool:
    """Returns True if `file` is an address rather than a path: it begins with a scheme (https:, s3:, pipe:, ...)."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", file) is not None


def is_address(root: str | Path) -> bool:
    """Returns True if a folder of shards is an address with an allowed scheme."""
    return any(str(root).startswith(f"{scheme}://") for scheme in SCHEMES)


def remote_bytes(shards: Iterable[dict]) -> int:
    """The total size in bytes of the remote ones among some shards (given by their index entries)."""
    return sum(shard["bytes"] for shard in shards if is_remote(shard["file"]))


def address_fault(file: str) -> str | None:
    """Returns why a shard's `file` is refused, or None if it is allowed. Paths must be below the index or absolute;
    addresses must be http, https, s3, gs or hf. No name can run another program."""
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


def bucket(address: str) -> Any:
    """The fsspec file system for an address that is not http or https. Raises DataError, naming the package, if the
    package it needs is not installed."""
    scheme = urlsplit(address).scheme
    try:
        import fsspec  # its file systems speak to these services themselves

        return fsspec.filesystem(scheme)
    except ImportError as error:
        raise DataError(f"{address} needs the package {SCHEMES[scheme]}: pip install {SCHEMES[scheme]}") from error


def persistently(address: str, act: Callable[[], Result], failed: Callable[[], object] = lambda: None) -> Result:
    """Returns act(), tried again if the network or the service fails; `failed` is called after each failure. Raises
    ConnectionError, naming the address, if it keeps failing or is refused."""
    for attempt in itertools.count(1):
        try:
            return act()
        except DataError:
            raise
        except Exception as error:  # each service raises its own error types
            failed()
            code = getattr(error, "code", 0)
            code = code if isinstance(code, int) else 0
            refused = isinstance(error, ValueError | FileNotFoundError | PermissionError)
            refused = refused or (0 < code < 500 and code not in (408, 429))
            if refused or attempt == ATTEMPTS:
                raise ConnectionError(f"{address}: {str(error) or type(error).__name__}") from error
            time.sleep(2 ** (attempt - 1))


@lru_cache(8)
def fetched(address: str, limit: int = 1 << 30) -> bytes:
    """The content of a remote file of at most `limit` bytes, cached in the process. Raises ConnectionError, naming
    it, if it cannot be read, DataError if it is longer."""
    with open_shard(address) as raw:
        blocks, size = [], 0
        while block := raw.read(BLOCK):
            blocks.append(block)
            if (size := size + len(block)) > limit:
                raise DataError(f"{address} has more than {limit} bytes; no index of shards has")
    return b"".join(blocks)


def open_shard(file: str) -> BinaryIO:
    """Opens a shard to be read front to back. Raises DataError for an address that is not allowed, OSError, naming
    it, if it cannot be opened."""
    if not is_remote(file):
        return open(file, "rb")
    if fault := address_fault(file):
        raise DataError(f"a shard {fault}")
    return _Web(file) if SCHEMES[urlsplit(file).scheme] is None else _Bucket(file)


class _Remote(io.RawIOBase):
    """A remote file. A broken connection is made again, and reading continues where it broke."""

    def __init__(self, address: str):
        self.address, self.position, self.total = address, 0, 0
        self.response: Any = None

    def _connected(self) -> Any:
        """Opens a stream of the bytes from `position` on; also sets `total`, the file's length, if it is known."""
        raise NotImplementedError

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        def once() -> bytes:
            self.response = self.response or self._connected()
            data = self.response.read(size) if size >= 0 else self.response.read()
            self.position += len(data)
            if data or size == 0 or self.position >= self.total:
                return data
            raise ConnectionError(f"the connection broke at {self.position} of {self.total} bytes")

        return persistently(self.address, once, self.close_response)

    def close_response(self) -> None:
        if self.response is not None:
            self.response.close()
            self.response = None

    def close(self) -> None:
        self.close_response()
        super().close()


class _Web(_Remote):
    """A file behind an http or https address."""

    def _connected(self) -> Any:
        opener = urllib.request.OpenerDirector()  # without file:, ftp: and data:, even if a server redirects there
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
        self.total = done + _length(response)
        while done < self.position:  # a server without range requests starts from the beginning
            if not (skipped := response.read(min(BLOCK, self.position - done))):
                raise http.client.IncompleteRead(b"", self.total - done)
            done += len(skipped)
        return response


def _length(response: Any) -> int:
    """The Content-Length of a response; 0 if it is missing or invalid."""
    said = response.headers.get("Content-Length") or ""
    return int(said) if said.isdecimal() and len(said) < 19 else 0


class _Bucket(_Remote):
    """A file of a storage service, read through an fsspec file system."""

    def __init__(self, address: str):
        super().__init__(address)
        self.system = bucket(address)

    def _connected(self) -> Any:
        file = self.system.open(self.address, "rb")
        self.total = getattr(file, "size", None) or 0
        if self.position:
            file.seek(self.position)
        return file


class Measured(io.RawIOBase):
    """Counts and hashes what is read from or written to a stream. Raises tarfile.ReadError after more than `limit`
    bytes."""

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


class ShardCache:
    """Copies of remote shards in a local folder, named by their checksums; processes share it.

    folder: created if missing. limit: total bytes of the copies, not counting those that are being read or fetched at
    the time; the least recently used ones are deleted to make room.
    """

    def __init__(self, folder: str | Path, limit: float):
        self.folder, self.limit = Path(folder).expanduser(), limit

    def open(self, entry: dict) -> int:
        """Returns a descriptor, for os.pread, of the copy of the shard with this index entry; the caller closes it.
        The copy is not deleted while it is open. Raises DataError if the shard does not match its entry,
        ConnectionError if it cannot be fetched, OSError if the disk is full, naming the shard."""
        path, fetched = self.folder / f"{entry['sha256']}.tar", False
        while True:
            try:
                file = os.open(path, os.O_RDONLY)
            except FileNotFoundError:
                self._fetch(entry, path)
                fetched = True
                continue
            fcntl.flock(file, fcntl.LOCK_SH)  # from here on no process deletes it
            there = os.fstat(file)
            if there.st_nlink and there.st_size == entry["bytes"] and _is_unchanged(path, there, entry):
                _mark(file)
                if fetched:  # others may have fetched at the same time
                    self._make_room(0)
                return file
            os.close(file)
            if there.st_nlink:  # changed by another program
                with locked(self.folder / ROOM):
                    path.unlink(missing_ok=True)

    def _fetch(self, entry: dict, path: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder / f".{entry['sha256'][:2]}.lock"):  # one process fetches it, the others wait
            if path.exists():
                return
            self._make_room(entry["bytes"])
            for attempt in itertools.count(1):
                try:
                    write_atomically(path, lambda file: _download(entry, file))
                    _mark(path)
                    return
                except DataError:  # damaged in transit or at the source? A second copy tells
                    if attempt == 2:
                        raise

    def _make_room(self, needed: int) -> None:
        with locked(self.folder / ROOM):
            copies = sorted((p.stat().st_atime_ns, p.stat().st_size, p) for p in self.folder.glob("*.tar"))
            held = sum(size for _, size, _ in copies)
            for _, size, copy in copies:
                if held + needed <= self.limit:
                    return
                with open(copy, "rb") as file, suppress(BlockingIOError):  # error: it is being read
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    copy.unlink()
                    held -= size


def _mark(copy: int | Path) -> None:
    """Marks a copy (its descriptor or path) as compared with its checksum and as just used: a program that writes to it
    changes its modification time."""
    with suppress(PermissionError, FileNotFoundError):  # another user's copy; or deleted since to make room
        os.utime(copy, ns=(time.time_ns(), COMPARED))


def _is_unchanged(path: Path, there: os.stat_result, entry: dict) -> bool:
    """Returns True if a copy is as it was when it was compared with its checksum, or if it still has that checksum."""
    return there.st_mtime_ns == COMPARED or file_sha256(path) == entry["sha256"]


def _download(entry: dict, file: BinaryIO) -> None:
    """Writes the shard with this entry into `file`. Raises DataError if its size or checksum differs."""
    with open_shard(entry["file"]) as raw:
        stream = Measured(raw, entry["bytes"])
        try:
            while block := stream.read(BLOCK):
                file.write(block)
        except tarfile.ReadError as error:
            raise DataError(f"{entry['file']} has {error}; rebuild the index with: ldm-prepare source=index") from error
    for what, actual in (("bytes", stream.size), ("sha256", stream.sha256.hexdigest())):
        if actual != entry[what]:
            raise DataError(
                f"{entry['file']} does not match its index.json: {what} {actual}, there {entry[what]}; copy it again, or "
                "rebuild the index with: ldm-prepare source=index"
            )
