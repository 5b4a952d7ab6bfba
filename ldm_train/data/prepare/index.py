"""Writes an index for tars that already exist, local or remote; the tars themselves are not moved."""

from fnmatch import fnmatch
from pathlib import Path

from tqdm import tqdm

from ldm_train.data.files import DataError
from ldm_train.data.offsets import counted
from ldm_train.data.prepare.build import write_index
from ldm_train.data.prepare.target import Folder, target
from ldm_train.data.remote import address_fault, is_remote
from ldm_train.data.shards import INDEX, index_fault
from ldm_train.data.tars import StreamedTar, scan_tar
from ldm_train.storage import file_sha256

# File-name patterns of each split, preferred ones first.
SPLITS = {"train": ("train*",), "val": ("val*", "validation*", "valid*", "test*")}


def _entry(file: str, out: Folder) -> dict:
    """The index entry of a tar, which is read completely."""
    if fault := address_fault(file if is_remote(file) else out.file_of(Path(file))):
        raise DataError(f"{file} cannot be named in an index: it {fault}; rename it")
    if is_remote(file):
        tar = StreamedTar(file)
        for _ in tar:
            pass
        return {"file": file} | tar.entry
    path = Path(file)
    name = out.file_of(path)
    count, fields = counted(scan_tar(path))
    size, checksum = path.stat().st_size, file_sha256(path)
    return {"file": name, "count": count, "bytes": size, "sha256": checksum, "fields": fields}


def write_tar_index(
    path: str | list[str], out: str | Path, train: str | None = None, val: str | None = None, classes: str | None = None
) -> dict:
    """Reads every tar (counts, fields, checksums) and writes index.json into `out`, a folder or address. Returns the
    index.

    path: a folder of tars, or a list of files or addresses (http, https, s3, gs, hf). train, val: file-name patterns of
    the splits (default: names that begin with train, and with val, validation or test). classes: a text file with one
    class name per line (default: classes.txt beside the tars; without it, those
    of an index that is there, which is replaced if it holds no other tars).
    Raises DataError, naming the tar, if one is truncated or its address is not allowed, or if no tar matches a split.
    """
    place = target(out)
    if isinstance(path, str) and Path(path).is_dir():
        names = sorted(str(p) for p in Path(path).glob("*.tar"))
        label_file = Path(classes) if classes else Path(path) / "classes.txt"
    else:
        names = [path] if isinstance(path, str) else list(path)
        label_file = Path(classes) if classes else None
    if not names:
        raise DataError(f"no .tar files in {path}")
    shards = []
    for split, own in (("train", train), ("val", val)):
        patterns = (own,) if own else SPLITS[split]
        # Only the first pattern that matches any tar is used: with validation*.tar present, test*.tar is ignored.
        fitting = next((f for p in patterns if (f := [n for n in names if fnmatch(n.rpartition("/")[2], p)])), [])
        if not fitting:
            raise DataError(
                f"no tar in {path} fits split {split!r} (patterns {', '.join(patterns)}); set source.{split}=<pattern>"
            )
        shards += [(split, name) for name in fitting]
    known = place.note(INDEX) if place.has(INDEX) else None
    known = known if isinstance(known, dict) and not index_fault(known) else {}
    before = {e["file"] for part in known.get("splits", {}).values() for e in part["shards"]}
    entries = [(split, _entry(name, place)) for split, name in tqdm(shards, desc="indexing", unit="tar")]
    others = sorted(before - {entry["file"] for _, entry in entries})
    if others := [file for file in others if is_remote(file) or place.has(file)]:
        raise DataError(f"{out} holds the index of other tars (first: {others[0]}); choose another out=<folder>")
    return write_index(place, entries, _class_names(label_file) or known.get("classes"), known.get("image_size"))


def _class_names(file: Path | None) -> list[str]:
    """The lines of a text file; [] without one. Raises DataError for an empty line between others, which would give
    every later class another number."""
    lines = file.read_text(encoding="utf-8-sig").rstrip().split("\n") if file is not None and file.is_file() else []
    names = [line.strip() for line in lines]
    if "" in names[:-1]:
        raise DataError(
            f"{file}: line {names.index('') + 1} is empty; every line names a class, in the order of labels"
        )
    return [name for name in names if name]
