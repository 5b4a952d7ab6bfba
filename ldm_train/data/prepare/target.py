"""Where a set of shards is written: a folder of this machine, or one of a storage service (s3, gs, hf)."""

import json
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ldm_train.cluster import seen
from ldm_train.data.files import DataError
from ldm_train.data.remote import bucket, is_address, persistently
from ldm_train.data.shards import ENTRIES, finished_shard, noted, read_note, write_shard
from ldm_train.storage import write_atomically, write_json

Samples = Iterable[tuple[str, dict[str, bytes]]]


class Folder:
    """Of this machine, or of a file system that several share."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.name = self.path.name

    def __str__(self) -> str:
        return str(self.path)

    def note(self, name: str) -> Any:
        """The JSON of a file; None where there is none or it is damaged."""
        return read_note(self.path / name)

    def has(self, name: str) -> bool:
        return (self.path / name).is_file()

    def write(self, name: str, data: bytes) -> None:
        write_atomically(self.path / name, lambda file: file.write(data))

    def write_json(self, name: str, value: object) -> None:
        write_json(self.path / name, value)

    def delete(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)

    def write_shard(self, name: str, samples: Samples) -> dict:
        """As `shards.write_shard`."""
        return write_shard(self.path / name, samples)

    def finished(self, name: str) -> dict | None:
        """The entry of a shard that is finished and complete, else None: it is then made again."""
        return finished_shard(self.path, name)

    def filled(self, write: Callable[[Path], object]) -> None:
        """Calls `write` on the folder."""
        write(self.path)

    def file_of(self, tar: Path) -> str:
        """The `file` by which an index here names a tar of this machine. Raises DataError where it cannot."""
        return tar.name if tar.parent.resolve() == self.path.resolve() else str(tar.resolve())

    def alone(self) -> "Folder":
        """The same from any working directory."""
        return Folder(self.path.absolute())

    def check_seen(self, name: str) -> None:
        """Raises DataError where this machine does not see a shard that another one has written."""
        if not seen(self.path / name):
            raise DataError(
                f"{self.path / name} was written, but not here; the machines of a cluster share the folder of shards and the "
                "source's files"
            )


class Bucket(Folder):
    """An address below which files are put whole. A shard is made in a temporary folder of this machine (TMPDIR) first, and is
    finished once its entry, which is put last, lies beside it. What fails is tried again, see `remote.persistently`."""

    def __init__(self, address: str):
        self.address = address.rstrip("/")
        self.name = self.address.rpartition("/")[2]

    def __str__(self) -> str:
        return self.address

    def _do(self, name: str, act: Callable[[Any, str], Any]) -> Any:
        """act(file system, address of a file)."""
        address = f"{self.address}/{name}"
        return persistently(address, lambda: act(bucket(address), address))

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
        """By its length: what a service has taken whole it keeps as it is."""
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
    """Raises DataError for an address to which nothing is written."""
    if isinstance(out, Folder):
        return out
    if not is_address(str(out)):
        return Folder(out)
    if str(out).startswith("http"):
        raise DataError(f"out={out}: shards are written to folders and to s3://, gs:// and hf:// addresses")
    return Bucket(str(out))
