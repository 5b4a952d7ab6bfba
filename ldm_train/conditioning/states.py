"""Caches of captions' hidden states, which frozen encoders compute only once: the last ones in memory, optionally all
on disk."""

import hashlib
import json
import time
import weakref
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from ldm_train.data.offsets import LRUCache
from ldm_train.storage import write_atomically

Pair = tuple[torch.Tensor, torch.Tensor]  # hidden states (L, D), float32, and attention mask (L,), bool
MOST_OPEN = 64  # files open at a time
NO_MATTER = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")  # config options without effect


def identity(tokenizer: Any, encoder: nn.Module, *options: object) -> str:
    """Returns a hash of everything that an encoder's hidden states depend on: its vocabulary, config and weights, and
    the options with which it is called."""
    if getattr(tokenizer, "is_fast", False):
        words = json.loads(tokenizer.backend_tokenizer.to_str())
        words |= {"padding": None, "truncation": None}  # set by its last use; `options` contains them
    else:
        words = tokenizer.get_vocab()
    config = {k: v for k, v in encoder.config.to_dict().items() if k not in NO_MATTER}
    sides = tokenizer.pad_token_id, tokenizer.padding_side, tokenizer.truncation_side
    told = [type(encoder).__name__, config, words, sides, options]
    digest = hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:24]


def _hash(caption: str) -> bytes:
    return hashlib.sha256(caption.encode("utf-8", "surrogatepass")).digest()


def _sum(caption: bytes, pair: Pair) -> int:
    """Returns the checksum of a caption's states. caption: its hash."""
    return zlib.crc32(pair[1].numpy().tobytes(), zlib.crc32(pair[0].numpy().tobytes(), zlib.crc32(caption)))


class KeptStates:
    """The hidden states of one encoder on disk, in a folder that any number of processes may read and write. The files,
    of about `together` captions each, are written atomically. Damaged files are reported and ignored, and their
    captions are encoded again.

    shape: (L, D) of a caption's states.
    """

    together, patience = 256, 10.0  # write after so many captions, or seconds after the first of them

    def __init__(self, folder: Path, shape: tuple[int, int]):
        self.folder, self.shape, self.files, self._seen = folder, shape, list[Path](), set[Path]()
        self._open = LRUCache(self._opened, MOST_OPEN)
        self._damaged: set[int] = set()  # files that have already been reported
        self._added: dict[bytes, list[tuple[int, int]]] = {}  # by caption's hash: (file, row) in files found later
        parts = list(self._unseen())
        self._file = np.repeat([number for number, _ in parts], [len(hashes) for _, hashes in parts]).astype(int)
        self._row = np.concatenate([np.empty(0, int), *(np.arange(len(hashes)) for _, hashes in parts)])
        self._hash_of = np.concatenate([np.empty((0, 32), np.uint8), *(hashes for _, hashes in parts)])
        starts = self._hash_of[:, :8].copy().view(np.uint64)[:, 0]
        self._order = np.argsort(starts, kind="stable")
        self._starts = starts[self._order]
        self._new: dict[str, Pair] = {}  # made by this process, not yet written
        self._since, self._looked = 0.0, time.monotonic()
        weakref.finalize(self, _write, folder, self._new)  # writes the rest when the process ends

    def _unseen(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (number, hashes of its captions) for each file that has not been seen before."""
        for path in sorted({*self.folder.glob("*.safetensors")} - self._seen):
            self._seen.add(path)
            if (hashes := self._hashes(path)) is not None:
                self.files.append(path)
                yield len(self.files) - 1, hashes

    def look(self) -> None:
        """Looks for files that other processes have written, at most once every `patience` seconds."""
        if time.monotonic() > self._looked + self.patience:
            self._looked = time.monotonic()
            for number, hashes in self._unseen():
                for row, key in enumerate(hashes):
                    self._added.setdefault(key.tobytes(), []).append((number, row))

    def _opened(self, number: int) -> Any:
        return safe_open(self.files[number], "pt")

    def _hashes(self, path: Path) -> np.ndarray | None:
        """Returns the hashes (N, 32) of the captions in a file, or None if it holds no states of this shape or cannot
        be read."""
        try:
            with safe_open(path, "pt") as file:
                captions = file.get_tensor("captions").numpy()
                slices = [file.get_slice(name) for name in ("states", "seen", "sums")]
            n = len(captions)
            held = (captions.shape, captions.dtype, *((s.get_shape(), s.get_dtype()) for s in slices))
            if held != (
                (n, 32), np.uint8, ([n, *self.shape], "F32"), ([n, self.shape[0]], "BOOL"), ([n], "I64")
            ):  # fmt: skip
                raise ValueError(f"holds no hidden states of shape {self.shape}")
        except (SafetensorError, OSError, ValueError) as error:
            print(f"{path} is left out ({error}); delete it", flush=True)
            return None
        return captions

    def _places(self, key: bytes) -> Iterator[tuple[int, int]]:
        """Yields (file, row) of every copy of a caption's states."""
        yield from self._added.get(key, ())
        k = int(np.searchsorted(self._starts, np.frombuffer(key[:8], np.uint64)[0]))
        while k < len(self._order) and self._starts[k].tobytes() == key[:8]:
            if self._hash_of[i := self._order[k]].tobytes() == key:
                yield int(self._file[i]), int(self._row[i])
            k += 1

    def get(self, caption: str) -> Pair | None:
        if (pair := self._new.get(caption)) is not None:
            return pair
        for number, row in self._places(key := _hash(caption)):
            try:
                states, seen, known = (self._open(number).get_slice(n)[row] for n in ("states", "seen", "sums"))
                if _sum(key, (states, seen)) == int(known):
                    return states, seen
                said = "a checksum is wrong"
            except (SafetensorError, OSError, ValueError) as error:
                said = str(error)
            if number not in self._damaged:
                self._damaged.add(number)
                print(f"{self.files[number]} is damaged ({said}); delete it", flush=True)
        return None

    def put(self, pairs: Iterable[tuple[str, Pair]]) -> None:
        self._since = self._since if self._new else time.monotonic()
        self._new.update(pairs)
        self.write_some()

    def write_some(self) -> None:
        """Writes new states once there are enough of them or some time has passed. If writing fails, they stay only in
        the memory of `States`."""
        if not self._new or (len(self._new) < self.together and time.monotonic() < self._since + self.patience):
            return
        if (path := _write(self.folder, self._new)) is not None:
            self._seen.add(path)
            for row, caption in enumerate(self._new):
                self._added.setdefault(_hash(caption), []).append((len(self.files), row))
            self.files.append(path)
        self._new.clear()


def _write(folder: Path, pairs: dict[str, Pair]) -> Path | None:
    """Writes states to a file and returns its path; None if there is nothing to write or it cannot be written."""
    if not pairs:
        return None
    hashes = [_hash(caption) for caption in pairs]
    captions = np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, 32).copy()
    sums = torch.tensor([_sum(key, pair) for key, pair in zip(hashes, pairs.values())])
    states, seen = (torch.stack(part).contiguous() for part in zip(*pairs.values()))
    data = save({"captions": torch.from_numpy(captions), "states": states, "seen": seen, "sums": sums})
    path = folder / f"{hashlib.sha256(captions.tobytes()).hexdigest()[:24]}.safetensors"
    try:
        write_atomically(path, lambda file: file.write(data))
    except OSError as error:
        print(f"hidden states of {len(pairs)} captions are not kept: {error}", flush=True)
        return None
    return path


class States:
    """Hidden states by caption. size: how many are held in memory; others are encoded again, or read from disk."""

    def __init__(self, size: int):
        self.size, self.memory = size, OrderedDict[str, Pair]()
        self._kept: Callable[[], KeptStates] | None = None
        self._folders: dict[Path, KeptStates] = {}

    def cache_states_in(self, folder: Path, shape: tuple[int, int], device: Callable[[], torch.device]) -> None:
        """From now on also keeps states on disk, separately for each device type and precision. folder: of one encoder.
        shape: (L, D) of a caption's states."""

        def kept() -> KeptStates:
            kind = device().type
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
            own = folder / f"{kind}-{str(dtype).removeprefix('torch.')}"
            if own not in self._folders:
                self._folders[own] = KeptStates(own, shape)
            return self._folders[own]

        self._kept = kept

    def clear_cache(self) -> None:
        """To be called when the encoder has changed: drops the states in memory, and stops using the disk."""
        self.memory.clear()
        self._kept = None

    def of(self, captions: Sequence[str], encode: Callable[[Sequence[str]], Pair]) -> dict[str, Pair]:
        """Returns the states of captions. encode: captions -> hidden states (B, L, D) and attention mask (B, L)."""
        kept = self._kept() if self._kept else None
        missing = sorted({*captions} - self.memory.keys())
        if kept is not None:
            kept.write_some()
            if missing:
                kept.look()
            self.memory |= {c: pair for c in missing if (pair := kept.get(c)) is not None}
            missing = [c for c in missing if c not in self.memory]
        if missing:
            made = dict(zip(missing, zip(*encode(missing))))
            self.memory |= made
            if kept is not None:
                kept.put(made.items())
        for caption in captions:
            self.memory.move_to_end(caption)
        pairs = {caption: self.memory[caption] for caption in captions}
        while len(self.memory) > self.size:
            self.memory.popitem(last=False)
        return pairs
