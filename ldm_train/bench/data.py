"""The data benchmark: loading pictures from our shards against two common loaders, and training both stages on our
loaders."""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningDataModule, Trainer
from torch.utils.data import DataLoader

from ldm_train.bench import train_autoencoder, train_unet
from ldm_train.bench.measuring import Clock, Row, Settings, Table, synchronised
from ldm_train.bench.pictures import loading, shards_of, write_photos
from ldm_train.bench.sizes import AUTOENCODERS, UNETS
from ldm_train.data.encoding import write_cache, write_cache_index
from ldm_train.data.latents import LatentDataModule
from ldm_train.models.autoencoder import AutoencoderKL
from ldm_train.models.first_stage import FirstStage
from ldm_train.rng import reseed
from ldm_train.training.fit import Cadence, fit
from ldm_train.training.task import Task

SIZES = {"on_cpu": ("base",), "on_gpu": ("kl_f8",)}
NETWORKS = {"tiny": "tiny", "small": "small", "base": "base", "kl_f4": "ldm4", "kl_f8": "base"}  # U-Nets of stage 2


@dataclass(frozen=True)
class Place:
    """A folder with the same pictures as files, as shards and, once `cache` was called, as latents. name: of a size."""

    folder: Path
    name: str
    images: int
    batch: int
    settings: Settings

    @property
    def side(self) -> int:
        return AUTOENCODERS[self.name].side

    @property
    def steps(self) -> int:
        return self.images // self.batch

    @property
    def latents(self) -> Path:
        return self.folder / "latents"

    def data(self, steps: int | None = None) -> Any:
        """Returns stage 1's data for this many steps; by default each picture once."""
        return loading(self.folder / "shards", self.side, self.batch, steps or self.steps, self.settings.workers)

    def first_stage(self) -> FirstStage:
        reseed("bench", "weights")
        first = FirstStage(AutoencoderKL(**AUTOENCODERS[self.name].network))
        return first.to(self.settings.device, memory_format=torch.channels_last)

    def cache(self, first: FirstStage, folder: Path | None = None) -> None:
        """Encodes all pictures as the latents stage does."""
        folder, data = folder or self.latents, self.data()

        def encode(images: torch.Tensor) -> torch.Tensor:
            return first.encode_moments(images.to(self.settings.device))

        write_cache_index(folder, {split: write_cache(data, split, encode, folder) for split in ("train", "val")}, None)

    def cached(self, steps: int | None = None) -> LatentDataModule:
        """Returns stage 2's data."""
        return LatentDataModule(self.latents, self.data().batching, steps or self.steps, (), seed=0)


@contextmanager
def place(settings: Settings, name: str) -> Iterator[Place]:
    """Yields a temporary place with pictures and shards. Raises ValueError if there are fewer pictures than a batch."""
    size = AUTOENCODERS[name]
    batch = settings.batch_size or size.batch
    if settings.images < batch:
        raise ValueError(f"images={settings.images} is less than a batch of {batch}; raise images or lower batch_size")
    with tempfile.TemporaryDirectory() as folder:
        made = Place(Path(folder), name, settings.images // batch * batch, batch, settings)
        write_photos(made.folder / "photos", made.images, made.side)
        shards_of(made.folder / "photos", made.folder / "shards", max(1, made.images // max(4, settings.workers)))
        yield made


def _scaled(image: torch.Tensor) -> torch.Tensor:
    return image * 2 - 1


def torchvision_loader(place: Place) -> DataLoader:
    """Returns shuffled batches of ([-1, 1] pictures, classes), loaded from a folder as most training scripts do."""
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    cut = [transforms.Resize(place.side), transforms.CenterCrop(place.side), transforms.ToTensor(), _scaled]
    files = ImageFolder(str(place.folder / "photos" / "train"), transforms.Compose(cut))
    return DataLoader(files, place.batch, shuffle=True, num_workers=place.settings.workers, drop_last=True)


def webdataset_loader(place: Place) -> DataLoader:
    """Returns the same batches from the shards, by webdataset's own decoder and shuffling buffer."""
    import webdataset as wds

    urls = sorted(str(path) for path in (place.folder / "shards").glob("train-*.tar"))
    stream = wds.WebDataset(urls, shardshuffle=len(urls), nodesplitter=None, empty_check=False).shuffle(200)
    pictures = stream.decode("torchrgb").to_tuple("jpg", "cls").map_tuple(_scaled, None).batched(place.batch)
    return DataLoader(pictures, batch_size=None, num_workers=place.settings.workers)


def consumed(loader: Callable[[], Iterable]) -> None:
    for _ in loader():
        pass


class Fed(Callback):
    """Sums, over the steps from the third on, the seconds they took and the seconds they waited for their batch."""

    def __init__(self, device: torch.device):
        self.device, self.waited, self.taken = device, 0.0, 0.0
        self.steps, self._end = -2, 0.0

    def on_train_start(self, trainer: Trainer, pl_module: Task) -> None:
        self._end = synchronised(self.device)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Task, batch: Any, batch_idx: int) -> None:
        if self.steps >= 0:
            self.waited += synchronised(self.device) - self._end

    def on_train_batch_end(self, trainer: Trainer, pl_module: Task, outputs: Any, batch: Any, batch_idx: int) -> None:
        now = synchronised(self.device)
        if self.steps >= 0:
            self.taken += now - self._end
        self.steps, self._end = self.steps + 1, now


def fed(who: str, task: Task, data: LightningDataModule, steps: int, place: Place) -> Row:
    """Trains for this many steps on a loader; returns the speed and the share of the time spent waiting for data."""
    machine, watch = place.settings.machine, Fed(place.settings.device)
    cadence = Cadence(10**9, 10**9, log_every=10**9, progress=False)
    with tempfile.TemporaryDirectory() as folder:
        fit(task, data, Path(folder), steps, place.batch, place.images, cadence, machine, callbacks=[watch])
    seconds = watch.taken / watch.steps
    return Row(who, seconds, images_per_second=place.batch / seconds, waits=watch.waited / watch.taken)


def training(place: Place, loaders: Mapping[str, float]) -> list[Row]:
    """Trains both stages on their loaders. loaders: images/s of each stage's loader alone."""
    autoencoder, unet = AUTOENCODERS[place.name], UNETS[NETWORKS[place.name]]
    cached, steps = place.cached(), place.settings.runs + 2
    channels, height, width = cached.train.shape
    unet = replace(unet, latents=(channels // 2, height, width))
    parts = train_autoencoder.build(autoencoder)
    adam = partial(torch.optim.Adam, fused=True, **train_autoencoder.ADAM)
    first = fed("stage 1", train_autoencoder.our_task(*parts, adam, False), place.data(steps), steps, place)
    task = train_unet.our_task(unet, train_unet.build_unet(unet))
    rows = [first, fed("stage 2, cached latents", task, place.cached(steps), steps, place)]
    for row, rate in zip(rows, loaders.values()):
        row.who += (
            f" (without the training step, its loader gives {rate / row.images_per_second:.1f} times as many images)"
        )
    return rows


def measure(settings: Settings, name: str) -> list[Table]:
    """Measures one size of pictures."""
    with place(settings, name) as there:
        there.cache(there.first_stage())
        loaders: dict[str, Callable[[], Iterable]] = {
            "ours": lambda: there.data().train_loader(0),
            "torchvision's ImageFolder": lambda: torchvision_loader(there),
            "webdataset": lambda: webdataset_loader(there),
            "ours, cached latents": lambda: there.cached().train_loader(0),
        }
        clock = Clock(settings.device, settings.runs, observe=False, waiting=True)
        clock.run({who: partial(consumed, loader) for who, loader in loaders.items()}, f"data {name}")
        rows = clock.rows(there.images)
        rates = {who: rows[k].images_per_second for who, k in (("stage 1", 0), ("stage 2", 3))}
        trained = training(there, rates)
    what = f"{there.images} JPEGs of {there.side} px, {settings.workers} workers, batch {there.batch}"
    return [
        Table("data", f"{name}: loading alone, {what}", rows),
        Table("data", f"{name}: training steps on these loaders, batch {there.batch}", trained),
    ]


def data(settings: Settings) -> list[Table]:
    """Measures loading, and training on the loaders, at each size."""
    return [table for name in settings.chosen(AUTOENCODERS, **SIZES) for table in measure(settings, name)]
