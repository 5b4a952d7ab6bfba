"""The latents of all training images, encoded once, and their statistics."""

import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule

from ldm_train.checkpoints.native import meta_autoencoder
from ldm_train.configuration import differences, plain
from ldm_train.data.datamodule import ShardDataModule
from ldm_train.data.encoding import few_samples, write_cache, write_cache_index, written_entries
from ldm_train.data.foreign_latents import ForeignLatents
from ldm_train.data.latents import CachedLatents, LatentDataModule, verify_cache
from ldm_train.data.order import Batching
from ldm_train.data.shards import data_hash, read_index
from ldm_train.data.statistics import STATISTICS, latent_statistics, read_statistics
from ldm_train.devices import to_device
from ldm_train.errors import Refused
from ldm_train.models.first_stage import FirstStage
from ldm_train.pipeline import autoencoder
from ldm_train.pipeline.data import bucketing, data_key, loaded_steps, sides
from ldm_train.pipeline.resume import NOTE, read_note
from ldm_train.pipeline.run import Run
from ldm_train.pipeline.stage import Stage
from ldm_train.storage import file_sha256, link_or_copy, write_json

CONSTANT = 1e-6  # of the largest standard deviation: a channel below it holds rounding errors alone
MEASURED = 10_000  # at most this many images are used for the statistics of latents without a cache


def encoder(run: Run) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns a function images -> moments that uses the trained autoencoder on this rank's device."""
    first_stage = autoencoder.load_first_stage(run).to(run.machine.device)
    # In float32 whatever the training precision: the latents are encoded once, used for all of training, and verified later.
    return partial(encoded_on, first_stage, run.machine.device)


def encoded_on(first_stage: FirstStage, device: torch.device, images: torch.Tensor) -> torch.Tensor:
    """images (B, C, H, W) on the host -> moments on the device."""
    return first_stage.encode_moments(to_device(images, device))


def latent_data(run: Run, stage: str, fields: tuple[str, ...]) -> tuple[LightningDataModule, ShardDataModule, int]:
    """(data module of a stage that trains on latents, that of its images, number of training samples). A cache is
    verified first."""
    config, section = run.config, run.config[stage]
    images = run.data(stage, ("image", *fields))
    if images.holds("loss_weight"):
        fields = (*fields, "loss_weight")
        images = run.data(stage, ("image", *fields))
    if not config.latents.cache:
        return images, images, images.count(config.data.train_split)
    data = LatentDataModule(
        run.folder / "latents",
        images.batching,
        loaded_steps(section),
        fields,
        config.seed,
        train_split=config.data.train_split,
        val_split=config.data.val_split,
        val_images=section.val_images,
        images=images,
    )
    if config.latents.get("source") is None:  # those of others were compared, within their rounding, when cached
        verify_cache(images, config.data.train_split, data.train, encoder(run))
    return data, images, len(data.train)


def give_statistics(folder: Path, first_stage: FirstStage, per_channel: bool) -> dict[str, Any]:
    """Sets a first stage's scale and shift to those that the latents stage in `folder` has measured, and returns the
    statistics. Raises ValueError if their file does not match its recorded checksum, or if a channel to be standardised
    is constant."""
    statistics, note = read_statistics(folder), read_note(folder)
    recorded = note["result"].get("statistics_sha256") if note else None  # older runs have none
    if recorded is not None and file_sha256(folder / STATISTICS) != recorded:
        raise ValueError(
            f"{folder / STATISTICS} is damaged: its checksum is not the recorded one; rebuild it with restart=latents"
        )
    if per_channel:
        if constant := [c for c, std in enumerate(statistics["std"]) if std < CONSTANT * max(statistics["std"])]:
            raise ValueError(
                f"channel {constant[0]} of the latents in {folder} is constant, and latents.per_channel=true divides by its "
                "standard deviation; choose latents.per_channel=false, or see why the autoencoder leaves it unused"
            )
        first_stage.set_statistics(1 / torch.tensor(statistics["std"]), torch.tensor(statistics["mean"]))
    else:
        first_stage.set_statistics(statistics["scale_factor"])
    return statistics


def check_crop(run: Run) -> None:
    """Raises ValueError if crops are random and latents are cached: one cached encoding cannot represent them."""
    config = run.config
    if config.latents.cache and config.data.crop != "center":
        raise ValueError(
            f"data.crop={config.data.crop} is random, one cached encoding cannot stand for it; set latents.cache=false or "
            "data.crop=center (autoencoder.data.crop is free)"
        )


def _autoencoder(run: Run) -> str:
    """The sha256 that identifies the latents of this run's autoencoder. Raises Refused if its stage is not finished."""
    run.result("autoencoder")
    return autoencoder.latents_of(autoencoder.model_folder(run))


def earlier_cache(run: Run, key: Mapping[str, Any]) -> Path | None:
    """The folder of the latents stage of the run in autoencoder.init, if this run keeps its encoder
    (autoencoder.train=decoder) and that stage finished with the same key; else None."""
    if run.config.autoencoder.train != "decoder":
        return None
    folder = autoencoder.taken_folder(run).parent.parent / "latents"
    try:
        note = read_note(folder)
    except Refused:  # the note is damaged: its own run reports it
        return None
    same = note is not None and note["finished"] and not differences(note["key"], json.loads(json.dumps(key)), {})
    return folder if same else None


class LatentsStage(Stage):
    """Encodes the images of the diffusion stage into a cache; without a cache it computes only the statistics."""

    name, needs, identity, binding = "latents", ("autoencoder",), "content", True

    def key(self, run: Run) -> dict[str, Any]:
        key = {
            "autoencoder_weights": _autoencoder(run),
            "data": data_key(run.config, "diffusion"),
            "latents": plain(run.config.latents),
        }
        return key | {"unused": True} if self._unused(run) else key

    def _unused(self, run: Run) -> bool:
        """Returns True if no stage trains on the latents."""
        return bool(run.config.diffusion.pretrained) and "classifier" not in run.config.stages

    def check(self, run: Run) -> None:
        check_crop(run)
        autoencoder.on_meta(run)
        section = run.config.latents
        if section.source is not None:
            if not section.cache or run.config.data.flip:
                raise ValueError(
                    "latents.source fills the cache, and knows no mirror images: latents.cache=true data.flip=false"
                )
            if bucketing(run.config.data):
                raise ValueError("latents.source has latents of one size: leave data.buckets or latents.source out")
            self._known(run)

    def run(self, run: Run, folder: Path) -> dict[str, Any]:
        if self._unused(run):
            return {"content": f"{_autoencoder(run)}/unused", "scale_factor": None, "statistics_sha256": None}
        if (earlier := earlier_cache(run, self.key(run))) is not None:
            return self._taken(run, earlier, folder)
        data, encode = run.data("diffusion", ("image", *run.fields)), encoder(run)
        splits = (data.train_split, data.val_split)
        if run.config.latents.cache:
            if (known := self._known(run)) is not None:
                known.verify(few_samples(data, data.train_split), encode)
            for split in splits:
                flips = run.config.data.flip and split == data.train_split
                write_cache(data, split, encode, folder, run.config.latents.per_shard, flips, known)
            run.barrier()
        if run.machine.rank == 0:
            if run.config.latents.cache:
                entries = {split: written_entries(folder, split) for split in splits}
                statistics = self._statistics(run, folder, entries, data.index.get("classes"))
            else:
                statistics = self._measured(run, encode, folder / "scratch")
            write_json(folder / STATISTICS, statistics)
        run.barrier()
        if run.config.latents.cache:
            content = data_hash(read_index(folder), *splits)
        else:
            content = f"{_autoencoder(run)}/{data.content_hash}"
        if run.config.latents.per_channel:  # the cached latents are the same, but scaled differently in training
            content += "/per_channel"
        statistics, digest = read_statistics(folder), file_sha256(folder / STATISTICS)
        return {"content": content, "scale_factor": statistics["scale_factor"], "statistics_sha256": digest}

    def _known(self, run: Run) -> ForeignLatents | None:
        """The latents in latents.source, made by another program; None if that is not set."""
        if (source := run.config.latents.source) is None:
            return None
        network = autoencoder.on_meta(run)
        size = [side // network.downsample_factor for side in sides(run.config.data.image_size)]
        shape, stochastic = (network.latent_channels, *size), network.moments_per_latent == 2
        return ForeignLatents(source, shape, stochastic, run.config.latents.source_scale)

    def _taken(self, run: Run, earlier: Path, folder: Path) -> dict[str, Any]:
        """Links the files of an earlier cache with the same latents into `folder`. Returns that stage's result."""
        if run.machine.rank == 0:
            for path in sorted(p for p in earlier.rglob("*") if p.is_file() and p.name != NOTE):
                target = folder / path.relative_to(earlier)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.unlink(missing_ok=True)
                link_or_copy(path, target)
            print(f"latents: those of {earlier.parent}, whose encoder this run has kept", flush=True)
        run.barrier()
        return read_note(earlier)["result"]

    def _measured(self, run: Run, encode: Any, scratch: Path) -> dict[str, Any]:
        """The statistics of the latents without a cache, from a temporary one of at most MEASURED images."""
        limited = run.data("diffusion", ("image",))
        limited.transform = limited.transform.deterministic()
        limited.restrict(limited.train_split, MEASURED)
        limited.batching = Batching(run.config.diffusion.batch_size)
        entries = write_cache(limited, limited.train_split, encode, scratch)
        statistics = self._statistics(run, scratch, {limited.train_split: entries}, None)
        shutil.rmtree(scratch)
        return statistics

    def _statistics(self, run: Run, folder: Path, entries: dict[str, list[dict]], classes: Any) -> dict[str, Any]:
        """Writes a cache's index (entries: shards by split). Returns the statistics of the first split's latents."""
        stochastic = meta_autoencoder(autoencoder.model_folder(run), run.trust).moments_per_latent == 2
        bucketed = bucketing(run.config.data) is not None
        write_cache_index(folder, entries, classes, stochastic, bucketed)
        return latent_statistics(CachedLatents(folder, next(iter(entries)), (), run.config.seed))
