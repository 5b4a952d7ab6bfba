"""Small shards for the data tests. All pictures differ, so that pixels show which sample they come from."""

import io
import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm_train.data.shards import write_shard
from ldm_train.storage import write_json


def picture(i: int, size: int) -> np.ndarray:
    return np.random.default_rng(i).integers(0, 256, (size, size, 3), dtype=np.uint8)


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG")
    return buffer.getvalue()


def make_data(
    root: Path,
    train: int = 40,
    val: int = 6,
    per_shard: int = 8,
    size: int = 8,
    leave_out: Collection[str] = (),
    corrupt: Collection[int] = (),
    changed: Mapping[int, dict[str, bytes]] | None = None,
) -> Path:
    """Writes shards to `root`: sample i of train is "train_<i>" with a picture of its own, class i % 3 and three
    captions.

    leave_out: extensions without members. corrupt: training samples whose picture is garbage. changed: members that
    replace those of a training sample, by its number.
    """
    splits = {}
    for split, count in (("train", train), ("val", val)):

        def samples(chunk: range, split: str = split):
            for i in chunk:
                data = (
                    b"no picture"
                    if split == "train" and i in corrupt
                    else png(picture(i + 1000 * (split == "val"), size))
                )
                captions = [f"{split} {i} {word}" for word in ("one", "two", "three")]
                fields = {
                    "png": data, "cls": str(i % 3).encode(), "txt": captions[0].encode(),
                    "json": json.dumps({"captions": captions}).encode(),
                }  # fmt: skip
                fields |= (changed or {}).get(i, {}) if split == "train" else {}
                yield f"{split}_{i:04d}", {e: d for e, d in fields.items() if e not in leave_out}

        entries = [
            write_shard(root / f"{split}-{k:06d}.tar", samples(range(first, min(first + per_shard, count))))
            for k, first in enumerate(range(0, count, per_shard))
        ]
        splits[split] = {"count": count, "shards": entries}
    write_json(root / "index.json", {"splits": splits, "classes": ["a", "b", "c"]})
    return root


@pytest.fixture
def write_data() -> Callable[..., Path]:
    return make_data


@pytest.fixture(scope="session")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of shards of 8 with 40 training and 6 validation pictures, 8x8 pixels. Tests must not change it."""
    return make_data(tmp_path_factory.mktemp("pictures"))


@pytest.fixture
def as_png() -> Callable[[np.ndarray], bytes]:
    return png
