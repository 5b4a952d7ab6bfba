"""A folder of JPEGs, and the same pictures as shards, for the benchmarks that read data."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from ldm_train.data.datamodule import ShardDataModule
from ldm_train.data.order import Batching
from ldm_train.data.prepare.build import build
from ldm_train.data.prepare.image_folder import ImageFolder

VALIDATION = 8  # pictures


def write_photos(folder: Path, count: int, side: int) -> None:
    """Writes smooth random pictures with some grain, about as large in bytes as photographs, into train/<class>/ and
    val/<class>/."""
    noise = torch.Generator().manual_seed(0)
    for split, number in (("train", count), ("val", VALIDATION)):
        for i in range(number):
            coarse = torch.rand(1, 3, 6, 6, generator=noise)
            smooth = F.interpolate(coarse, (side, side), mode="bicubic", align_corners=False)[0]
            grainy = smooth + 0.04 * torch.randn(3, side, side, generator=noise)
            pixels = (grainy.clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()
            target = folder / split / f"class{i % 4}" / f"{split}{i:06d}.jpg"
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.ascontiguousarray(pixels)).save(target, quality=92)


def shards_of(photos: Path, out: Path, per_shard: int) -> None:
    build(ImageFolder(str(photos)), out, per_shard)


def loading(shards: Path, side: int, batch: int, steps: int, workers: int) -> ShardDataModule:
    """Returns stage 1's data."""
    return ShardDataModule(shards, Batching(batch), steps, ("image",), image_size=side, num_workers=workers)
