"""The chain of one run: what each stage depends on, and how it is built from the config and run."""

import re
import shutil
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from ldm_train import rng
from ldm_train.checkpoints.native import CONFIG, copy_model, load_model, read_metadata, save_model
from ldm_train.checkpoints.parts import build as build_part
from ldm_train.checkpoints.parts import build_sampler
from ldm_train.data.latents import (
    STATISTICS,
    CachedLatents,
    LatentDataModule,
    latent_statistics,
    read_statistics,
    verify_cache,
    write_cache,
    write_cache_index,
    written_entries,
)
from ldm_train.data.shards import data_hash, read_index
from ldm_train.evaluation.adherence import judged_fields
from ldm_train.evaluation.instruments import Instruments, sampling_facts
from ldm_train.evaluation.report import evaluate
from ldm_train.evaluation.restoration import FIELDS as RESTORED
from ldm_train.generation.film import denoising_film, film_of_grids
from ldm_train.models.first_stage import FirstStage
from ldm_train.pipeline import apart, build
from ldm_train.pipeline import resume as stages
from ldm_train.pipeline.keys import Keys
from ldm_train.pipeline.plan import print_plan
from ldm_train.pipeline.resume import Stage
from ldm_train.pipeline.values import rehearse
from ldm_train.storage import file_sha256, read_config, write_atomically, write_json
from ldm_train.training.autoencoder_task import AutoencoderTask
from ldm_train.training.callbacks.sampling import SampleMetrics
from ldm_train.training.diffusion_task import DiffusionTask
from ldm_train.training.fit import fit
from ldm_train.training.loggers import TensorBoardLogger, WandbRun

SHOWN = 36  # samples that an evaluation without metrics draws, to be looked at


class Chain:
    """One run: its folder, its config, and the stages as functions of both.

    trust: parts outside this package's models that its folders may name (see `build.own_parts`).
    share: take stages that a sibling folder has finished under an equal key (runs of one sweep).
    """

    def __init__(self, config: DictConfig, folder: Path, machine: Any, trust: Sequence[str] = (), share: bool = False):
        self.config, self.folder, self.machine, self.trust, self.share = config, folder, machine, trust, share
        self.keys = Keys(config, folder, machine)
        self.fields = build.condition_fields(config, trust)
        self.wandb: WandbRun | None = None
        self.effort: dict[str, tuple[float, float]] = {}  # per stage: FLOPs per image, peak of the devices

    # -- stages --------------------------------------------------------------------------------------------------------

    def loggers(self, stage: str) -> list:
        found: list = [self.wandb.stage(stage, self.config[stage].batch_size)] if self.wandb else []
        if "tensorboard" in build.loggers_of(self.config) and self.machine.rank == 0:
            found.append(TensorBoardLogger(self.folder, stage))
        return found

    def data(self, stage: str, fields: tuple[str, ...]) -> Any:
        return build.data_module(self.config, stage, self.machine, fields, self.trust)

    def autoencoder(self, folder: Path) -> dict[str, Any]:
        config, section = self.config, self.config.autoencoder
        if section.pretrained:
            source = build.pretrained_folder(section.pretrained, config.runs_dir)
            if self.machine.rank == 0:
                copy_model(source, folder / "model")
            return {"sha256": read_metadata(source)["sha256"], "pretrained": str(section.pretrained)}
        rng.reseed(config.seed, "autoencoder", "weights")
        data = self.data("autoencoder", ("image",))
        network = instantiate(section.network, _convert_="all")
        tree, metadata = build.plain(section.network), {"downsample_factor": network.downsample_factor}
        if not list(network.parameters()):  # the identity
            return {"sha256": self.save(folder / "model", network, tree, metadata)}
        task = AutoencoderTask(
            network,
            instantiate(section.loss, _convert_="all"),
            **self.optimisation("autoencoder"),
            image_folder=folder / "images",
            disc_lr=section.disc_lr,
            features=instantiate(config.evaluation.extractors.tiny) if config.evaluation.metrics else None,
        )
        if section.compile:  # in place; the last convolution stays eager, its gradient is taken by hand
            network.encoder.compile()
            network.decoder.compile()
        network.to(memory_format=torch.channels_last)
        self.fit(task, data, folder, "autoencoder", data.count(data.train_split))
        return {"sha256": self.save(folder / "model", network, tree, metadata)}

    def fit(self, task: Any, data: Any, folder: Path, stage: str, dataset_size: int, callbacks: Sequence = ()) -> None:
        section = self.config[stage]
        fit(
            task, data, folder, section.max_steps, section.batch_size, dataset_size,
            build.cadence_of(section, self.machine, self.config), self.machine, self.loggers(stage),
            self.config.data.max_bad_fraction, callbacks, self.effort.get(stage, (None, None)), build.health_facts(self.config, stage),
        )  # fmt: skip
        if stage == "diffusion" and self.machine.rank == 0:
            film_of_grids(folder / "images")

    def save(self, folder: Path, module: torch.nn.Module, tree: dict, metadata: dict) -> str:
        if self.machine.rank == 0:
            save_model(folder, module, tree, metadata)
        self.barrier()
        return read_metadata(folder)["sha256"]

    def barrier(self) -> None:
        if self.machine.world_size > 1:
            dist.barrier()

    def encoder(self) -> Any:
        """images -> moments by the trained autoencoder, on this rank's device."""
        first_stage = build.load_first_stage(self.folder / "autoencoder" / "model", self.trust).to(self.machine.device)

        # In float32 whatever the training precision: encoded once, used for all of training, and verified later.
        return lambda images: first_stage.encode_moments(images.to(self.machine.device))

    def stochastic(self) -> bool:
        """Whether this run's autoencoder has a posterior with a width."""
        with torch.device("meta"):
            path = self.folder / "autoencoder" / "model" / CONFIG
            return build_part(read_config(path), path, self.trust).moments_per_latent == 2

    def latents(self, folder: Path) -> dict[str, Any]:
        config = self.config
        data, encode = self.data("diffusion", ("image", *self.fields)), self.encoder()
        splits = (config.data.train_split, config.data.val_split)
        if not config.latents.cache:
            splits = ()
            statistics = self._statistics_on_the_fly(data, encode, folder)
        for split in splits:
            flips = config.data.flip and split == config.data.train_split
            write_cache(data, split, encode, folder, config.latents.per_shard, flips)
        self.barrier()
        if self.machine.rank == 0 and splits:
            entries = {s: written_entries(folder, s) for s in splits}
            write_cache_index(folder, entries, data.index.get("classes"), self.stochastic())
            statistics = latent_statistics(CachedLatents(folder, splits[0], (), config.seed))
        if self.machine.rank == 0:
            write_json(folder / STATISTICS, statistics)
        self.barrier()
        if splits:
            content = data_hash(read_index(folder), *splits)
        else:
            content = f"{self.keys.latents()['autoencoder_weights']}/{data.content_hash}"
        statistics, digest = read_statistics(folder), file_sha256(folder / STATISTICS)
        return {"content": content, "scale_factor": statistics["scale_factor"], "statistics_sha256": digest}

    def _statistics_on_the_fly(self, data: Any, encode: Any, folder: Path) -> dict[str, Any]:
        """Without a cache: statistics of up to 10,000 images, through a small one that is thrown away."""
        if self.machine.rank > 0:
            return {}
        scratch = folder / "scratch"
        limited = self.data("diffusion", ("image",))
        limited.transform = limited.transform.deterministic()
        limited.shards(limited.train_split).keep(10_000)
        limited.batching = build.Batching(self.config.diffusion.batch_size)
        entries = write_cache(limited, limited.train_split, encode, scratch)
        write_cache_index(scratch, {"train": entries}, None, self.stochastic())
        statistics = latent_statistics(CachedLatents(scratch, "train", (), self.config.seed))
        shutil.rmtree(scratch)
        return statistics

    def latent_data(self, stage: str, fields: tuple[str, ...]) -> tuple[Any, Any, int]:
        """(what a stage on latents trains on, the images behind it, training samples); a cache is verified first."""
        config, section = self.config, self.config[stage]
        images = self.data(stage, ("image", *fields))
        if not config.latents.cache:
            return images, images, images.count(config.data.train_split)
        data = LatentDataModule(
            self.folder / "latents", images.batching, section.max_steps, fields, config.seed,
            config.data.train_split, config.data.val_split, section.val_images, images,
        )  # fmt: skip
        verify_cache(images, config.data.train_split, data.train, self.encoder())
        return data, images, len(data.train)

    def measured(self, first_stage: FirstStage) -> dict[str, Any]:
        """Gives a first stage the scale and shift of the latents; returns the statistics."""
        folder = self.folder / "latents"
        statistics, note = read_statistics(folder), stages.read_note(folder)
        recorded = note["result"].get("statistics_sha256") if note else None  # older runs have none
        if recorded is not None and file_sha256(folder / STATISTICS) != recorded:
            raise ValueError(
                f"{folder / STATISTICS} is damaged: its checksum is not the recorded one; make it anew with restart=latents"
            )
        if self.config.latents.per_channel:
            first_stage.set_statistics(1 / torch.tensor(statistics["std"]), torch.tensor(statistics["mean"]))
        else:
            first_stage.set_statistics(statistics["scale_factor"])
        return statistics

    def optimisation(self, stage: str) -> dict[str, Any]:
        section = self.config[stage]
        return {
            "seed": self.config.seed,
            "optimizer": instantiate(section.optimizer, lr=section.lr, _convert_="all"),
            "lr_factor": instantiate(section.lr_schedule, max_steps=section.max_steps),
            "ema_decay": section.ema_decay,
            "clip_norm": section.clip_norm,
            "accumulate": build.batching_of(section, self.machine).accumulate,
        }

    def diffusion(self, folder: Path) -> dict[str, Any]:
        config, section = self.config, self.config.diffusion
        data, images, size = self.latent_data("diffusion", self.fields)
        rng.reseed(config.seed, "diffusion", "weights")
        autoencoder = read_config(self.folder / "autoencoder" / "model" / CONFIG)
        tree = build.model_tree(
            config, build.first_stage_tree(autoencoder), build.conditioner_tree(config, images), config.data
        )
        model = build_part(tree, "the model's config", self.trust)
        trained = load_model(self.folder / "autoencoder" / "model", self.trust)
        model.first_stage.autoencoder.load_state_dict(trained.state_dict())
        statistics = self.measured(model.first_stage)
        model.to(memory_format=torch.channels_last)
        task = DiffusionTask(
            model,
            instantiate(section.objective, model.schedule),
            **self.optimisation("diffusion"),
            draw=self.draw(),
            samples=section.samples,
            image_folder=folder / "images",
        )
        if section.compile:
            model.network.compile()
        callbacks = []
        if section.evaluate_every:
            best_by = section.best_by or config.evaluation.metrics[0]
            callbacks.append(
                SampleMetrics(
                    section.evaluate_every, self.conditions(images, section.evaluate_images), self.draw(),
                    self.instruments.metrics, self.instruments.extractors,
                    partial(self.instruments.reference, self.evaluation_data(), config.runs_dir, False),
                    config.evaluation.batch_size, None if best_by == "loss" else best_by,
                )
            )  # fmt: skip
        self.fit(task, data, folder, "diffusion", size, callbacks)
        metadata = {"scale_factor": statistics["scale_factor"], "sampling": self.sampling()}
        return {"sha256": self.save(folder / "model", model, tree, metadata)}

    def classifier(self, folder: Path) -> dict[str, Any]:
        return apart.classifier(self, folder)

    def perceptual(self, folder: Path) -> dict[str, Any]:
        return apart.perceptual(self, folder)

    def sampling(self) -> dict[str, Any]:
        """The run's own sampling options, which travel with its model."""
        return build.plain(self.config.sampling) | {"sampler": build.plain(self.config.sampler)}

    def draw(self) -> Any:
        """(model, fields, seeds) -> images with the configured sampler."""
        sampling = self.config.sampling
        sampler = build_sampler(build.plain(self.config.sampler), "sampler", self.trust)

        def draw(model: Any, fields: dict[str, Any], seeds: list[int], callback: Any = None) -> torch.Tensor:
            with self.machine.autocast():
                return model.sample(
                    fields, seeds, sampler, sampling.num_inference_steps, sampling.guidance_scale, sampling.spacing,
                    callback=callback,
                )  # fmt: skip

        return draw

    @cached_property
    def instruments(self) -> Instruments:
        """What this run is measured with."""
        return Instruments.on_all_ranks(self.config.evaluation, self.machine.device)

    def evaluation_data(self) -> Any:
        """The images behind an evaluation, cut over ranks in batches of evaluation.batch_size."""
        data = self.data("diffusion", ("image", *self.fields))
        size, world = self.config.evaluation.batch_size, self.machine.world_size
        data.batching = build.Batching(size * world, None, world, self.machine.rank)
        return data

    def conditions(self, data: Any, count: int) -> Any:
        """Validation samples whose conditions `count` samples are drawn under, going round where there are fewer."""
        return data.fixed_loader(self.config.data.val_split, count, repeat=True)

    def evaluation(self, folder: Path) -> dict[str, Any]:
        config, tools, data = self.config, self.instruments, self.evaluation_data()
        model = load_model(self.folder / "diffusion" / "model", self.trust).to(self.machine.device)
        model.to(memory_format=torch.channels_last)
        split, count, show = config.data.val_split, config.evaluation.images, config.progress and self.machine.rank == 0
        judged, restoring = judged_fields(model.fields), any(f in model.fields for f in RESTORED)
        if config.evaluation.obedience and not judged and self.machine.rank == 0:
            print("obedience: not measured, this model has no condition that says what to draw")
        whole = self.data("diffusion", ("image", *self.fields))
        whole.batching = build.Batching(config.evaluation.batch_size)
        result = evaluate(
            model, data.fixed_loader(split, count), self.conditions(data, count if tools.metrics else SHOWN), self.draw(),
            tools.reference(data, config.runs_dir, show), tools.metrics, tools.extractors, tools.paired, tools.networks, folder,
            sampling_facts(config), config.evaluation.batch_size, config.evaluation.predictors,
            build.plain(config.evaluation.obedience) | {"fields": judged}
            if judged and config.evaluation.obedience
            else None,
            build.plain(config.evaluation.restoration) | {"loader": whole.fixed_loader(split)} if restoring else None,
            show,
        )  # fmt: skip
        if self.machine.rank == 0:
            batch = next(iter(data.fixed_loader(split, 4)))
            film = denoising_film(model, self.draw(), batch, folder / "denoising.gif")
        if self.wandb:
            self.wandb.log_evaluation(result)
            for name in ("samples", "reconstructions"):
                self.wandb.log_picture(f"evaluation/{name}", folder / f"{name}.png")
            self.wandb.log_film("evaluation/denoising", film, "from noise to pictures")
        self.barrier()
        return result

    def export(self, folder: Path) -> dict[str, Any]:
        """The native model folder: everything needed to sample, nothing needed to train."""
        if self.machine.rank == 0:
            source = self.folder / "diffusion" / "model"
            load_model(source, self.trust)  # a folder that does not load must not be exported
            copy_model(source, folder, {"sampling": self.sampling(), "run": self.config.name})
            if self.wandb and self.config.wandb_artifact:
                name = re.sub(r"[^\w.-]", "-", self.config.name)
                self.wandb.log_model(folder, name, {"sha256": read_metadata(folder)["sha256"]})
        self.barrier()
        return {"folder": "export"}

    def stages(self) -> list[stages.Stage]:
        steps = {s: self.config[s].max_steps for s in ("autoencoder", "diffusion", "classifier") if s in self.config}
        if self.config.autoencoder.pretrained or self.config.autoencoder.network._target_.endswith("Identity"):
            steps["autoencoder"] = 0
        return [
            stages.Stage(name, getattr(self.keys, name), getattr(self, name), steps.get(name, 0))
            for name in stages.check_stages(list(self.config.stages))
        ]

    def prepare(self) -> list[Stage]:
        """The stages of this run, after everything that can be known to be wrong has been looked for; nothing is touched.

        Prints the plan. Raises what a user can act on: Refused, ValueError, FileNotFoundError, DataError.
        """
        config, chain = self.config, self.stages()
        if config.restart:
            stages.check_stages([config.restart])
        rehearse(self)
        if self.machine.rank == 0:
            self.effort = print_plan(self, chain)
        stages.check_chain(chain, self.folder, build.option_defaults(config), config.restart)
        return chain

    def run(self) -> None:
        config, writer = self.config, self.machine.rank == 0
        chain, defaults = self.prepare(), build.option_defaults(config)
        self.barrier()
        if config.restart and writer:
            stages.set_aside(self.folder, config.restart)
        self.barrier()
        if writer:
            # Later stages alone leave the record of what the weights were trained with as it is.
            if "autoencoder" in config.stages or not (self.folder / "config.yaml").is_file():
                text = OmegaConf.to_yaml(config, resolve=True).encode()
                write_atomically(self.folder / "config.yaml", lambda file: file.write(text))
            if "wandb" in build.loggers_of(config):
                if config.restart:  # its steps begin again: another run
                    (self.folder / "wandb" / "run_id").unlink(missing_ok=True)
                self.wandb = WandbRun(self.folder, config.project, config.name, build.plain(config))
        try:
            for stage in chain:
                action = stages.advance(stage, self.folder, defaults, writer, self.share)
                self.barrier()
                if writer:
                    said = {"skip": "finished before, skipped", "share": "taken from another run of this sweep"}
                    print(f"{stage.name}: {said.get(action, 'done')}")
        finally:
            if self.wandb:
                self.wandb.finish()
        if writer:
            self._closing_words()

    def _closing_words(self) -> None:
        samples = self.folder / "evaluation" / "samples.png"
        if samples.is_file():
            print(f"samples: {samples}\nmetrics: {self.folder / 'evaluation' / 'metrics.json'}")
        if (self.folder / "export" / "metadata.json").is_file():
            print(f"model:   {self.folder / 'export'}   (ldm-sample run={self.folder})")
