"""The place a set of shards is written to: a local folder, or an address of a storage service (s3, gs, hf)."""

import json
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ldm_train.cluster import seen
from ldm_train.data.files import DataError
from ldm_train.data.remote import bucket, is_address, persistently
from ldm_train.data.shards import ENTRIES, INDEX, finished_shard, noted, read_note, write_shard
from ldm_train.storage import write_atomically, write_json

ORIGIN = "source.json"  # in ENTRIES: what the data were prepared from, and how
Samples = Iterable[tuple[str, dict[str, bytes]]]


class Folder:
    """A folder on this machine, or on a file system that several machines share."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.name = self.path.name

    def __str__(self) -> str:
        return str(self.path)

    def note(self, name: str) -> Any:
        """The JSON in a file; None if it is missing or damaged."""
        return read_note(self.path / name)

    def has(self, name: str) -> bool:
        return (self.path / name).is_file()

    def foreign(self) -> str | None:
        """The name of a file here, if nothing here says that data were prepared in this folder; else None."""
        if self.has(INDEX) or self.has(f"{ENTRIES}/{ORIGIN}") or not self.path.is_dir():
            return None
        return min((path.name for path in self.path.iterdir() if not path.name.startswith(".")), default=None)

    def write(self, name: str, data: bytes) -> None:
        write_atomically(self.path / name, lambda file: file.write(data))

    def write_json(self, name: str, value: object) -> None:
        write_json(self.path / name, value)

    def delete(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)

    def write_shard(self, name: str, samples: Samples) -> dict:
        """See `shards.write_shard`."""
        return write_shard(self.path / name, samples)

    def finished(self, name: str) -> dict | None:
        """The entry of a shard that is finished and complete; None if it has to be made again."""
        return finished_shard(self.path, name)

    def filled(self, write: Callable[[Path], object]) -> None:
        """Calls `write` on the folder."""
        write(self.path)

    def file_of(self, tar: Path) -> str:
        """The `file` by which an index here names a local tar. Raises DataError if it cannot name one."""
        return tar.name if tar.parent.resolve() == self.path.resolve() else str(tar.resolve())

    def alone(self) -> "Folder":
        """The same folder, independent of the working directory."""
        return Folder(self.path.absolute())

    def check_seen(self, name: str) -> None:
        """Raises DataError if this machine does not see a shard that another one has written."""
        if not seen(self.path / name):
            raise DataError(
                f"{self.path / name} was written, but not here; the machines of a cluster share the folder of shards and the "
                "source's files"
            )


class Bucket(Folder):
    """An address below which whole files are uploaded. A shard is first made in a temporary local folder (TMPDIR);
    it is finished once its entry, which is uploaded last, lies beside it. Failed operations are retried, see
    `remote.persistently`."""

    def __init__(self, address: str):
        self.address = address.rstrip("/")
        self.name = self.address.rpartition("/")[2]

    def __str__(self) -> str:
        return self.address

    def _do(self, name: str, act: Callable[[Any, str], Any]) -> Any:
        """Calls act(file system, address of the file), with retries."""
        address = f"{self.address}/{name}"
        return persistently(address, lambda: act(bucket(address), address))

    def foreign(self) -> None:
        return None  # a bucket may hold anything below an address

    def note(self, name: str) -> Any:
        def read(system: Any, address: str) -> Any:
            try:
                return json.loads(system.cat_file(address))
            except (FileNotFoundError, ValueError, RecursionError):
                return None

        return self._do(name, read)

    def has(self, name: str) -> bool:
        return bool(self._do(name, lambda system, address: system.exists(address)))

    def write(self, name: str, data: bytes) -> None:
        self._do(name, lambda system, address: system.pipe_file(address, data))

    def write_json(self, name: str, value: object) -> None:
        self.write(name, (json.dumps(value, indent=1) + "\n").encode())

    def delete(self, name: str) -> None:
        self._do(name, lambda system, address: system.rm_file(address) if system.exists(address) else None)

    def write_shard(self, name: str, samples: Samples) -> dict:
        with tempfile.TemporaryDirectory(prefix="ldm_train_") as folder:
            entry = write_shard(f"{folder}/{name}", samples)
            self._do(name, lambda system, address: system.put_file(f"{folder}/{name}", address))
        return entry

    def finished(self, name: str) -> dict | None:
        """As for Folder, but only the shard's length is compared: a service keeps a completed upload unchanged."""
        entry = noted(self.note(f"{ENTRIES}/{name}.json"), name)
        whole = entry and self.has(name) and self._do(name, lambda system, at: system.size(at)) == entry["bytes"]
        return entry if whole else None

    def filled(self, write: Callable[[Path], object]) -> None:
        with tempfile.TemporaryDirectory(prefix="ldm_train_") as folder:
            write(Path(folder))
            for file in sorted(Path(folder).iterdir()):
                self.write(file.name, file.read_bytes())

    def file_of(self, tar: Path) -> str:
        raise DataError(
            f"{tar} is a file of this machine, which an index in {self} cannot name; copy it there, and give path=[its address]"
        )

    def alone(self) -> "Folder":
        return self

    def check_seen(self, name: str) -> None:
        pass


def target(out: str | os.PathLike[str] | Folder) -> Folder:
    """The Folder or Bucket for `out`. Raises DataError for an address that cannot be written to."""
    if isinstance(out, Folder):
        return out
    if not is_address(str(out)):
        return Folder(out)
    if str(out).startswith("http"):
        raise DataError(f"out={out}: shards are written to folders and to s3://, gs:// and hf:// addresses")
    return Bucket(str(out))
