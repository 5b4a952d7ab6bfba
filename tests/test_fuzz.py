"""Damaged files of every kind either open with their original content or raise an error that names the damage: never
another exception, never other content.

`pytest tests/test_fuzz.py --fuzz 700` tries that many cases of each kind (by default 40). Every case is a function of
its number, which the message of a failure names.
"""

import hashlib
import io
import itertools
import json
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chains import chain
from sites import Site, no_proxies

from ldm_train.checkpoints.native import load_model
from ldm_train.cli.common import USER_ERRORS
from ldm_train.conditioning.states import KeptStates
from ldm_train.data import remote
from ldm_train.data.datamodule import ShardDataModule
from ldm_train.data.latents import CachedLatents, verify_cache
from ldm_train.data.order import Batching
from ldm_train.data.prepare.arrays import picture_of
from ldm_train.data.prepare.build import build
from ldm_train.data.prepare.image_folder import ImageFolder
from ldm_train.data.shards import DataError
from ldm_train.data.transforms import channels_of, decode_image
from ldm_train.pipeline.latents import encoder, give_statistics
from ldm_train.pipeline.resume import check_chain

FIELDS = ("image", "class_label", "caption", "boxes")
VALUES = [None, True, -1, 0, 2**63, 1e308, "", "x", "é" * 50, "../x", [], [[]], {}, {"a": 1}, "pipe:id", "9" * 400, 0.5]


# -- damage ------------------------------------------------------------------------------------------------------------


def damaged_bytes(data: bytes, rng: np.random.Generator) -> bytes:
    """Returns the data cut short, emptied, with a bit flipped, with a stretch overwritten, doubled or removed, or
    random bytes in its place."""
    kind, size = int(rng.integers(7)), max(1, len(data))
    at, length = int(rng.integers(size)), int(rng.integers(1, 64))
    if kind == 0:
        return data[:at]
    if kind == 1:
        return b""
    if kind == 2:
        turned = bytearray(data or b"\0")
        turned[at % len(turned)] ^= 1 << int(rng.integers(8))
        return bytes(turned)
    if kind == 3:
        return data[:at] + rng.bytes(length) + data[at + length :]
    if kind == 4:
        return data[:at] + data[at : at + length] * 2 + data[at + length :]
    if kind == 5:
        return data[:at] + data[at + length :]
    return rng.bytes(length)


def damaged_json(text: str, rng: np.random.Generator) -> str:
    """Returns the JSON with one value replaced, removed or copied to a new key, or that value alone."""
    tree = json.loads(text)
    node, parents = tree, []
    while isinstance(node, dict | list) and node and (not parents or rng.random() < 0.8):
        key = list(node)[int(rng.integers(len(node)))] if isinstance(node, dict) else int(rng.integers(len(node)))
        parents.append((node, key))
        node = node[key]
    if not parents:
        return json.dumps(VALUES[int(rng.integers(len(VALUES)))])
    owner, key = parents[-1]
    choice = rng.random()
    if choice < 0.2:
        del owner[key]
    elif choice < 0.3 and isinstance(owner, dict):
        owner["new"] = owner[key]
    elif choice < 0.4:
        return json.dumps(node)
    else:
        owner[key] = VALUES[int(rng.integers(len(VALUES)))]
    return json.dumps(tree)


def damage(path: Path, rng: np.random.Generator) -> None:
    if path.suffix == ".json" and rng.random() < 0.6:
        path.write_text(damaged_json(path.read_text(), rng))
    elif rng.random() < 0.05:
        path.unlink()
    else:
        path.write_bytes(damaged_bytes(path.read_bytes(), rng))


def fingerprint(*parts: Any) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.numpy().tobytes() if isinstance(part, torch.Tensor) else repr(part).encode())
    return digest.hexdigest()


def attacked(
    base: Path, files: Callable[[Path], list[Path]], opened: Callable[[Path], set[str]], tmp_path: Path, count: int
) -> tuple[int, int]:
    """Copies `base`, damages one of its files and opens the copy, `count` times. Returns how often the damage was named
    in an error and how often the copy opened without one. Fails if an error is not one of USER_ERRORS or does not name the
    file or its folder, or if a copy opens with other content.

    opened: (folder) -> what it holds, as fingerprints; samples that are counted as unreadable are left out.
    """
    whole, faults, tally = opened(base), [], {"named": 0, "as before": 0}
    for number in range(count):
        rng, folder = np.random.default_rng([number, 7]), tmp_path / "case"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(base, folder)
        choices = files(folder)
        path = choices[int(rng.integers(len(choices)))]
        damage(path, rng)
        where = f"case {number}, {path.relative_to(folder)}"
        try:
            found = opened(folder)
        except USER_ERRORS as error:
            tally["named"] += 1
            if path.name not in str(error) and folder.name not in str(error) and str(path.parent) not in str(error):
                faults.append(f"{where}: no name in: {error}")
        except Exception as error:
            faults.append(f"{where}: {type(error).__name__}: {error}")
        else:
            tally["as before"] += 1
            if not found <= whole:
                faults.append(f"{where}: opened in silence, but it holds something else")
    assert not faults, f"{len(faults)} of {count}:\n" + "\n".join(faults[:20])
    return tally["named"], tally["as before"]


# -- pictures ----------------------------------------------------------------------------------------------------------

# Values that the text of a .npy header may give for `shape` and `descr`, and fragments that are inserted into it.
SHAPES = [
    "(4, 6, 3)",
    "(4, 6)",
    "(1 << 40, 1 << 40)",
    "(70368744177664, 1)",
    "(-4, -6, 3)",
    "(True, 6)",
    "4",
    "()",
    "(4.0, 6)",
]
TYPES = ["'<f4'", "'|u1'", "'>u2'", "'|O'", "'|V0'", "'<M8[D]'", "[('a', '<f4')]", "'x'", "None", "('<f4', (2,))"]
TEXTS = ["{", "(", '"', "\\", "{'descr': ", "\n", "#", "__import__('os')", "[" * 200, "0" * 5000, "\0", "é"]


def npy_of(number: int) -> bytes:
    """Returns a .npy file with an odd header, or a valid one that is then damaged."""
    rng = np.random.default_rng([number, 3])
    if rng.random() < 0.3:
        buffer = io.BytesIO()
        np.save(buffer, np.zeros((4, 6, 3), [">u2", "<f4", "u1"][number % 3]))
        return damaged_bytes(buffer.getvalue(), rng)
    pick = lambda options: options[int(rng.integers(len(options)))]  # noqa: E731
    text = f"{{'descr': {pick(TYPES)}, 'fortran_order': {pick(['False', 'True', '2'])}, 'shape': {pick(SHAPES)}, }}"
    if rng.random() < 0.3:
        at = int(rng.integers(len(text)))
        text = text[:at] + pick(TEXTS) + text[at + int(rng.integers(3)) :]
    header = text.encode("latin1", "replace") + b"\n"
    version = pick([b"\x01\x00", b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\x09\x09"])
    length = struct.pack("<H" if version[:1] == b"\x01" else "<I", len(header) if rng.random() < 0.9 else 60_000)
    data = b"\x93NUMPY" + version + length + header + bytes(pick([0, 24, 72, 288]))
    return damaged_bytes(data, rng) if rng.random() < 0.3 else data


def tif_of(number: int) -> bytes:
    tifffile = pytest.importorskip("tifffile")
    rng = np.random.default_rng([number, 5])
    array = rng.integers(0, 255, [(8, 6), (8, 6, 3), (5, 8, 6)][number % 3]).astype(
        ["u1", "<u2", ">u2", "<f4"][number % 4]
    )
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, byteorder=">" if number % 4 == 2 else "<", compression=[None, "zlib"][number % 2])
    data = bytearray(buffer.getvalue())
    for _ in range(int(rng.integers(1, 4))):  # more often in the first 300 bytes (header and tags) than anywhere
        data[int(rng.integers(len(data)) if rng.random() < 0.3 else rng.integers(min(300, len(data))))] = rng.integers(
            256
        )
    return bytes(data)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [npy_of, tif_of])
def test_damaged_arrays_are_pictures_or_refused(make: Callable[[int], bytes], count: int):
    """Every function that reads arrays returns a picture or raises ValueError or OSError."""
    extension, faults, kinds = make.__name__[:3], [], set()
    doors = {
        "ldm-prepare": lambda data: picture_of(data, extension, None, "hwc", (0, 255), "x"),
        "a viewer's": lambda data: picture_of(data, extension, 4, None, None, "x"),
    }
    if extension == "npy":
        doors |= {"channels": channels_of, "ldm-sample": lambda data: decode_image(data, "npy", 3)}
    for number in range(count):
        for door, enter in doors.items():
            try:
                enter(make(number))
                kinds.add("read")
            except (ValueError, OSError):
                kinds.add("refused")
            except Exception as error:
                faults.append(f"case {number}, {door}: {type(error).__name__}: {error}")
    assert not faults, "\n".join(faults[:20])
    assert kinds == {"read", "refused"}


def test_a_small_file_that_claims_much_is_refused_before_it_is_read():
    data = tif_of(9)  # its tags claim 16 million rows
    with pytest.raises(ValueError, match=rf"{len(data)} bytes for the shape \(16252936, 6\)"):
        picture_of(data, "tif", 4, None, None, "x")


@pytest.mark.filterwarnings("ignore")
def test_damaged_arrays_are_left_out_of_prepared_data_and_listed(tmp_path: Path):
    for split in ("train", "val"):
        (tmp_path / "in" / split).mkdir(parents=True)
        np.save(tmp_path / "in" / split / f"{split}.npy", np.zeros((4, 6), ">u2"))
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (70368744177664, 1), }\n"
    odd = {
        "cut.npy": b"\x93NUMPY\x01\x00",
        "zip.npy": b"PK\x03\x04" + bytes(60),
        "unfinished.npy": b"\x93NUMPY\x01\x00" + struct.pack("<H", 2) + b"{(",
        "of_terabytes.npy": b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header,
        "empty.tif": b"",
        "none.tif": b"II*\0" + bytes(20),
    }
    for name, data in odd.items():
        (tmp_path / "in" / "train" / name).write_bytes(data)
    index = build(ImageFolder(str(tmp_path / "in"), labels=False), tmp_path / "out")
    assert index["splits"]["train"]["count"] == 1
    listed = (tmp_path / "out" / "skipped.txt").read_text()
    assert all(f"in/train/{name}: " in listed for name in odd)


# -- what is damaged ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(trained: Path) -> Path:
    """A folder with a finished short run, run/, and its data, data/. The tests damage copies of them."""
    return trained


def _data(run: Path) -> Path:
    return next((run / "data").iterdir())


def _module(folder: Path, reader: str = "indexed") -> ShardDataModule:
    return ShardDataModule(folder, Batching(8), 8, FIELDS, 32, reader=reader, max_bad_fraction=1.0)


def _samples(folder: Path) -> set[str]:
    return _held(_module(folder))


def _held(module: ShardDataModule) -> set[str]:
    """Returns a fingerprint of key, image, label, caption and boxes for every sample that can be read."""
    found = set()
    for split in (module.train_split, module.val_split):
        dataset = module.samples(split, FIELDS, random=False)
        for i in range(len(dataset)):
            sample = dataset[(0, i)]
            if "replaced" not in sample:
                found.add(fingerprint(*(sample[f] for f in ("key", *FIELDS))))
    return found


def test_damaged_shards_and_indexes_are_named(run: Path, tmp_path: Path, count: int):
    named, _ = attacked(_data(run), lambda f: sorted(p for p in f.rglob("*") if p.is_file()), _samples, tmp_path, count)
    assert named


def test_damaged_shards_are_named_while_they_are_streamed(run: Path, tmp_path: Path, count: int):
    def streamed(folder: Path) -> set[str]:
        found = set()
        for batch in _module(folder, "streaming").train_loader(0):
            if not batch["replaced"]:
                found |= {fingerprint(k, i) for k, i in zip(batch["key"], batch["image"])}
        return found

    named, _ = attacked(
        _data(run), lambda f: sorted(f.glob("*.tar")) + [f / "index.json"], streamed, tmp_path, count // 2
    )
    assert named


def test_damaged_shards_from_afar_and_their_copies_are_named(
    run: Path, tmp_path: Path, count: int, monkeypatch: pytest.MonkeyPatch
):
    """Damages the files on the server, the local copies of shards or what is stored about them. In every second case
    two requests fail as well, and the error may name the address; otherwise it must name what is damaged."""
    no_proxies(monkeypatch)
    waited, answers, cases = time.sleep, np.random.default_rng(11), itertools.count()
    monkeypatch.setattr(remote.time, "sleep", lambda s: waited(s) if s < 0.5 else None)
    base = tmp_path / "base"
    shutil.copytree(_data(run), base / "there", ignore=shutil.ignore_patterns(".*"))

    def far(folder: Path) -> set[str]:
        remote.fetched.cache_clear()
        site = Site(folder / "there")
        if fails := next(cases) % 2:
            site.faults += [int(fault) for fault in answers.choice([404, 503, 700, 3000], 2)]
        try:
            cache = {"folder": folder / "cache", "gigabytes": 1}
            module = ShardDataModule(
                site.url, Batching(8), 8, FIELDS, 32, max_bad_fraction=1.0, shard_cache=cache,
                buckets={"step": 8, "max_ratio": 2.0, "min_images": 1},
            )  # fmt: skip
            return _held(module)
        except USER_ERRORS as error:
            if fails and site.url in str(error):
                raise DataError(f"{folder.name}: {error}") from error
            raise
        finally:
            site.close()

    named, same = attacked(base, lambda f: sorted(p for p in f.rglob("*") if p.is_file()), far, tmp_path, count)
    assert named
    assert same


def test_damaged_hidden_states_are_asked_for_anew(tmp_path: Path, count: int):
    captions, shape = [f"caption {k}" for k in range(40)], (3, 8)
    rng = np.random.default_rng(0)
    pairs = {c: (torch.from_numpy(rng.normal(size=shape).astype(np.float32)), torch.ones(3) > 0) for c in captions}
    kept = KeptStates(tmp_path / "base", shape)
    kept.patience = 0.0
    for first in (0, 20):
        kept.put((c, pairs[c]) for c in captions[first : first + 20])

    def read(folder: Path) -> set[str]:
        store = KeptStates(folder, shape)
        return {fingerprint(c, *pair) for c in captions if (pair := store.get(c)) is not None}

    assert len(read(tmp_path / "base")) == 40
    _, same = attacked(tmp_path / "base", lambda f: sorted(f.iterdir()), read, tmp_path, count)
    assert same == count


def test_damaged_models_are_named(run: Path, tmp_path: Path, count: int):
    def loaded(folder: Path) -> set[str]:
        model = load_model(folder)
        return {fingerprint(*model.state_dict().values(), *map(str, model.children()))}

    named, _ = attacked(run / "run/diffusion/model", lambda f: sorted(f.iterdir()), loaded, tmp_path, count)
    assert named


def test_damaged_latent_caches_are_named(run: Path, tmp_path: Path, count: int):
    images = _module(_data(run))

    def read(folder: Path) -> set[str]:
        cache = CachedLatents(folder, "train", ("class_label", "caption"), 0)
        verify_cache(images, "train", cache, encode)
        batch = cache.fetch([(0, i) for i in range(len(cache))], random=False)
        return {fingerprint(m, int(c), t) for m, c, t in zip(batch["moments"], batch["class_label"], batch["caption"])}

    encode = encoder(chain(run))
    files = lambda f: sorted(p for p in f.rglob("train*") if p.is_file()) + [f / "index.json"]  # noqa: E731
    named, _ = attacked(run / "run/latents", files, read, tmp_path, count)
    assert named


@pytest.mark.slow
def test_damaged_notes_and_statistics_of_stages_are_named(run: Path, tmp_path: Path, count: int):
    """Damages the files that decide whether a stage is skipped or continued."""

    def decided(folder: Path) -> set[str]:
        again = chain(run, "stages=[autoencoder,latents,diffusion]")
        again.folder = folder
        check_chain(again.order, again.chosen(), folder, {})
        model = load_model(folder / "diffusion" / "model")
        give_statistics(folder / "latents", model.first_stage, True)
        return {fingerprint(model.first_stage.scale, model.first_stage.shift)}

    def files(folder: Path) -> list[Path]:
        return [*sorted(folder.glob("*/stage.json")), folder / "latents" / "statistics.json"]

    named, _ = attacked(run / "run", files, decided, tmp_path, count)
    assert named


def test_damaged_checkpoints_are_named(run: Path, tmp_path: Path, count: int):
    from ldm_train.training.callbacks.checkpoint import read_checkpoint

    def state(folder: Path) -> set[str]:
        checkpoint = read_checkpoint(folder / "last.ckpt")
        weights = [checkpoint["state_dict"][k] for k in sorted(checkpoint["state_dict"])]
        return {fingerprint(checkpoint["global_step"], *weights)}

    base = tmp_path / "whole"
    base.mkdir()
    shutil.copy(run / "run/autoencoder/checkpoints/last.ckpt", base)
    named, _ = attacked(base, lambda f: [f / "last.ckpt"], state, tmp_path, count)
    assert named
