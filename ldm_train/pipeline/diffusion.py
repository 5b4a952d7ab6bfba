"""Stage 2: the conditional denoising network, trained on latents of the frozen first stage."""

from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig
from torch import nn

from ldm_train import rng
from ldm_train.checkpoints.native import CONFIG, load_latent_diffusion, load_model, read_metadata, read_tree
from ldm_train.checkpoints.parts import build, build_sampler, find_part
from ldm_train.compiling import compile_training
from ldm_train.conditioning.base import Conditioner
from ldm_train.configuration import plain
from ldm_train.data.datamodule import ShardDataModule
from ldm_train.devices import shapes_only
from ldm_train.diffusion.objective import DiffusionObjective
from ldm_train.generation.film import film_of_grids
from ldm_train.latent_diffusion import LatentDiffusion, Sampling
from ldm_train.models.autoencoder import Autoencoder
from ldm_train.models.first_stage import FirstStage
from ldm_train.pipeline import adapter, autoencoder, latents, training
from ldm_train.pipeline.begin import begin_from, model_folder, read_otherwise, tokenizers_of, what_grows
from ldm_train.pipeline.conditioners import conditioner_tree, conditioners_of, with_whole_vocabularies
from ldm_train.pipeline.data import CONDITIONERS, FROM_DATA, check_bucket_step, mixture_key, sides
from ldm_train.pipeline.memory import Rehearsal
from ldm_train.pipeline.run import Run
from ldm_train.pipeline.stage import Plan, Stage
from ldm_train.rng import NoiseSource
from ldm_train.storage import read_config
from ldm_train.training.alignment import check_alignment
from ldm_train.training.callbacks.sampling import SampleMetrics
from ldm_train.training.diffusion_task import BINS
from ldm_train.training.task import Task


def latent_size(config: DictConfig, first_stage: Any) -> list[int]:
    """[h, w] of the training images' latents. first_stage: a first stage or its autoencoder."""
    return [s // first_stage.downsample_factor for s in sides(config.data.image_size)]


def first_stage_tree(autoencoder_config: dict[str, Any]) -> dict[str, Any]:
    return {"_target_": "ldm_train.models.first_stage.FirstStage", "autoencoder": autoencoder_config}


def model_tree(
    config: DictConfig, first_stage: dict[str, Any], conditioners: dict[str, Any], size: list[int]
) -> dict[str, Any]:
    """The config that builds the whole LatentDiffusion. size: (h, w) of the latents."""
    return {
        "_target_": "ldm_train.latent_diffusion.LatentDiffusion",
        "network": plain(config.diffusion.network),
        "first_stage": first_stage,
        "schedule": plain(config.diffusion.schedule),
        "conditioners": conditioners,
        "parameterisation": plain(config.diffusion.objective.parameterisation),
        "latent_size": size,
    }


def network_on_meta(run: Run) -> nn.Module:
    with shapes_only():
        return run.part("diffusion.network")


def sampler_of(run: Run) -> Callable[..., torch.Tensor]:
    return build_sampler(plain(run.config.sampler), "sampler", run.trust)


def sampling_of(run: Run) -> dict[str, Any]:
    """The sampling options that the run sets, with its sampler, as they are stored with its model."""
    said = {name: value for name, value in plain(run.config.sampling).items() if value is not None}
    if not run.fields:  # without conditions there is no guidance
        said.pop("guidance_interval", None)
    return said | {"sampler": plain(run.config.sampler)}


def drawer(run: Run) -> Callable[..., torch.Tensor]:
    """A function (model, fields, seeds) -> images that uses the configured sampler, in the training precision."""
    sampling = Sampling(sampler_of(run), **plain(run.config.sampling))

    def draw(model: LatentDiffusion, fields: dict[str, Any], seeds: list[int], callback: Any = None) -> torch.Tensor:
        with run.machine.autocast():
            return model.sample(fields, seeds, sampling, callback=callback)

    return draw


def check_best_by(config: DictConfig) -> None:
    """Raises ValueError if diffusion.best_by is not a metric that is measured during training, or for evaluate_every
    without metrics."""
    by, measured = config.diffusion.best_by, list(config.evaluation.metrics)
    if config.diffusion.evaluate_every and not measured:
        raise ValueError(
            "diffusion.evaluate_every measures evaluation.metrics, and there are none; leave one of them out"
        )
    if by in (None, "loss"):
        return
    if not config.diffusion.evaluate_every:
        raise ValueError(f"diffusion.best_by={by} is measured only with diffusion.evaluate_every=<steps>")
    if by not in measured:
        raise ValueError(f"diffusion.best_by={by} is not measured; choose loss or one of {', '.join(measured)}")


def check_teacher(run: Run, begun: Path | None) -> None:
    """Raises ValueError if a task that learns from a trained model (`begun`) has none, if this run reads its weights
    differently, or if the run samples differently than the task trains for."""
    section = run.config.diffusion
    if begun is None:
        raise ValueError(
            f"diffusion.task={section.task._target_} learns from a trained model; set diffusion.init=<run or model>"
        )
    if differing := read_otherwise(run, begun, network_on_meta(run), conditioners_of(run, begun)):
        raise ValueError(
            f"diffusion.task={section.task._target_} learns from {section.init}, and this run reads its weights differently; choose "
            "the same:\n  " + "\n  ".join(differing)
        )
    if check := getattr(get_object(section.task._target_), "check_sampling", None):
        check(plain(section.task), plain(run.config.sampling), plain(run.config.sampler))


def check_sampler(run: Run, channels: int) -> None:
    """Runs the sampler on 1 x 1 latents with a denoiser that returns zeros, to check that it can be imported, takes its
    options and fits the schedule. Raises ValueError for options that it or `Sampling` does not take."""
    config, schedule, sampler = run.config, run.part("diffusion.schedule"), sampler_of(run)
    if unknown := sorted({*config.sampling} - {f.name for f in fields(Sampling)}):
        raise ValueError(f"sampling.{unknown[0]} is not an option of sampling; those of a sampler are sampler.<option>")
    timesteps = schedule.timesteps(config.sampling.num_inference_steps, config.sampling.spacing)
    noise = NoiseSource([0])
    start = noise.normal((channels, 1, 1), "start")
    try:
        sampler(lambda x, t: torch.zeros_like(x), start, timesteps, schedule, noise, callback=None)
    except TypeError as error:
        raise ValueError(f"sampler: {config.sampler._target_} does not take its options ({error})") from error


def check_model(run: Run, images: ShardDataModule) -> None:
    """Builds the whole model with its conditioners, and checks the sampler and the conditions in the images. The
    network and the first stage, the only large parts, are built on the meta device. Raises ValueError if the data have
    more classes than a class conditioner knows."""
    first_stage = FirstStage(autoencoder.on_meta(run))
    tree = conditioner_tree(run.config, images, rehearsal=True)
    conditioners = build(tree, CONDITIONERS, run.trust)
    schedule, parameterisation = run.part("diffusion.schedule"), run.part("diffusion.objective.parameterisation")
    LatentDiffusion(network_on_meta(run), first_stage, schedule, conditioners, parameterisation)
    named = images.index.get("classes") or []
    for name, conditioner in conditioners.items():
        own = getattr(conditioner, "names", named)
        if conditioner.field == "class_label" and len(own) < len(named):
            raise ValueError(
                f"{CONDITIONERS}.{name} knows {len(own)} classes, the data {images.root} have {len(named)}; set its "
                f"classes={FROM_DATA}"
            )
    for conditioner in conditioners.values():
        if isinstance(conditioner, Conditioner):
            conditioner.require()
    check_sampler(run, first_stage.latent_channels)
    run.decode_one(images)
    images.check_conditions()


def taken_model(run: Run, option: str) -> Path | None:
    """The model folder that diffusion.<option> names, "pretrained" or "init"; None if that is not set. Raises
    FileNotFoundError if there is no such folder."""
    if not (value := run.config.diffusion[option]):
        return None
    return model_folder(value, run.config.runs_dir, f"diffusion.{option}")


def check_fields(run: Run, source: Path) -> None:
    """Raises ValueError if a trained model is conditioned on other fields than this run."""
    conditioners = (read_tree(source).get("conditioners") or {}).values()
    theirs = [find_part(tree["_target_"], source, run.trust).field for tree in conditioners]
    if sorted(theirs) != sorted(run.fields):
        raise ValueError(
            f"diffusion.pretrained={source} is conditioned on {', '.join(theirs) or 'nothing'}, this run on "
            f"{', '.join(run.fields) or 'nothing'}; choose the same diffusion/conditioning="
        )


def same_latents(theirs: nn.Module, ours: nn.Module) -> bool:
    """Returns True if two autoencoders have the same latents: the same class, and equal encoding parts."""
    first, second = (
        {f"{name}.{k}": v for name, part in a.encoding_parts().items() for k, v in part.state_dict().items()}
        if isinstance(a, Autoencoder)
        else a.state_dict()  # empty for the identity; the whole state for the user's own class
        for a in (theirs, ours)
    )
    equal = first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    return type(theirs) is type(ours) and equal


def with_decoder(model: LatentDiffusion, network: nn.Module, where: Path) -> None:
    """Loads the weights of an autoencoder with the same latents (`network`) into a trained model. Raises ValueError if
    the latents differ. where: the model's folder, for messages."""
    if not same_latents(model.first_stage.autoencoder, network):
        raise ValueError(
            f"diffusion.pretrained={where} was trained on the latents of another autoencoder than this run's; take that one too "
            "(autoencoder.pretrained=), or train its decoder on (autoencoder.init=, autoencoder.train=decoder)"
        )
    model.first_stage.autoencoder.load_state_dict(network.state_dict())


class DiffusionStage(Stage):
    """Trains the denoising network on latents. Meanwhile draws sample images and, if configured, measures samples."""

    name, needs = "diffusion", ("latents",)

    def steps(self, run: Run) -> int:
        return 0 if run.config.diffusion.pretrained else run.config.diffusion.max_steps

    def key(self, run: Run) -> dict[str, Any]:
        if (taken := taken_model(run, "pretrained")) is not None:
            return {"pretrained": read_metadata(taken)["sha256"], "autoencoder": run.result("autoencoder")}
        key = training.training_key(run, "diffusion")
        if (begun := taken_model(run, "init")) is not None:  # identified by its content
            key["diffusion"] = key["diffusion"] | {"init": read_metadata(begun)["sha256"]}
        if run.config.autoencoder.train == "decoder":  # the latents do not depend on the decoder, but the model does
            key["autoencoder"] = run.result("autoencoder")
        return key | {
            "latents": run.result("latents"),
            "derived": plain(run.config.data.derived),
            "data": mixture_key(run.config, "diffusion"),
        }

    def check(self, run: Run) -> None:
        config, section = run.config, run.config.diffusion
        adapter.check_start(section)
        if taken_model(run, "pretrained") is not None:
            check_sampler(run, autoencoder.on_meta(run).latent_channels)
            check_fields(run, taken_model(run, "pretrained"))
            return
        training.check_optimisation(run, "diffusion")
        begun = taken_model(run, "init")
        adapter.check_frozen(run, begun)
        adapter.check_identifier(run, partial(conditioners_of, run, begun))
        adapter.check_adapter(run, partial(network_on_meta, run), partial(conditioners_of, run, begun), begun)
        if getattr(get_object(section.task._target_), "needs_init", False):
            check_teacher(run, begun)
        if section.evaluate_every:
            run.check_metrics(section.evaluate_images)
        check_best_by(config)
        latents.check_crop(run)
        if section.task.get("alignment"):
            check_alignment(network_on_meta(run), autoencoder.on_meta(run))
        images = run.data("diffusion", ("image", *run.fields))
        check_model(run, images)
        if section.evaluate_every:
            run.check_reference(images)

    def plan(self, run: Run) -> Plan | None:
        if not self.steps(run):
            return None
        network, f = network_on_meta(run), autoencoder.on_meta(run).downsample_factor
        objective = instantiate(run.config.diffusion.objective, run.part("diffusion.schedule"))
        height, width = sides(run.config.data.image_size)
        h, w, multiple = height // f, width // f, f * network.size_multiple
        if height % multiple or width % multiple:
            raise ValueError(
                f"data.image_size {height}x{width} gives latents of {h}x{w}, and this network takes multiples of "
                f"{network.size_multiple}; use {max(multiple, height // multiple * multiple)}x"
                f"{max(multiple, width // multiple * multiple)} or another diffusion/network"
            )
        check_bucket_step(run.config.data, multiple)
        widths = network.condition_widths
        shapes = {"context": (77, widths["context"]), "concat": (widths["concat"], h, w), "vector": (widths["vector"],)}
        shapes |= {"control": (widths["control"], h, w)} if "control" in widths else {}
        with torch.device("meta"):
            given = {slot: torch.empty(1, *shape) for slot, shape in shapes.items() if widths[slot]}
            noisy = torch.empty(1, network.in_channels, h, w)
            flops = training.forward_flops(
                "diffusion.network", plain(run.config.diffusion.network), network, noisy, torch.empty(1), **given
            )
        begins = ""
        if (begun := taken_model(run, "init")) is not None:
            begins = ", ".join(
                [
                    f"begins from {run.config.diffusion.init}",
                    *what_grows(network, begun),
                    *adapter.in_words(run, network),
                ]
            )
        images = run.enough_images("diffusion", ("image", *run.fields))
        warning = objective.warning() if isinstance(objective, DiffusionObjective) else ""
        return Plan(network, flops, images, begins, warning=warning)

    def task(self, run: Run, model: LatentDiffusion, folder: Path) -> Task:
        """The LightningModule that trains the model."""
        section = run.config.diffusion
        return instantiate(section.task)(
            model,
            instantiate(section.objective, model.schedule),
            **training.optimisation(run, "diffusion"),
            draw=drawer(run),
            samples=section.samples,
            image_folder=folder / "images",
        )

    def rehearsal(self, run: Run) -> Rehearsal | None:
        if not self.steps(run):
            return None
        first_stage = FirstStage(autoencoder.on_meta(run))
        tree = conditioner_tree(run.config, run.index("diffusion"), rehearsal=True)
        conditioners = build(with_whole_vocabularies(tree, run.config), CONDITIONERS, run.trust)
        beside, unknown = [], []
        for conditioner in conditioners.values():
            try:
                beside += conditioner.prepare_for_plan()
            except FileNotFoundError as error:
                unknown.append(str(error))
        schedule, parameterisation = run.part("diffusion.schedule"), run.part("diffusion.objective.parameterisation")
        size = latent_size(run.config, first_stage)
        model = LatentDiffusion(
            network_on_meta(run), first_stage, schedule, conditioners, parameterisation, size
        ).to(memory_format=torch.channels_last)  # fmt: skip
        if run.config.latents.cache:
            moments = first_stage.autoencoder.moments_per_latent * first_stage.latent_channels
            shapes = {"moments": (moments, *size)}
        else:
            shapes = {"image": (run.config.data.channels, *sides(run.config.data.image_size))}

        unknown += adapter.rehearse(run, model)

        def conditions(count: int) -> dict[str, Any]:
            return {c.field: c.null_values(count, size) for c in conditioners.values()}

        task = self.task(run, model, run.folder / "diffusion")
        return Rehearsal(task, shapes, conditions, beside, unknown)

    def run(self, run: Run, folder: Path) -> dict[str, Any]:
        config, section = run.config, run.config.diffusion
        if (taken := taken_model(run, "pretrained")) is not None:
            return self._taken(run, taken, folder)
        data, images, count = latents.latent_data(run, "diffusion", run.fields)
        rng.reseed(config.seed, "diffusion", "weights")
        source = autoencoder.model_folder(run)
        first_stage = first_stage_tree(read_config(source / CONFIG))
        size = latent_size(config, autoencoder.on_meta(run))
        conditioners, begun = conditioner_tree(config, images), taken_model(run, "init")
        if begun is not None:
            conditioners = tokenizers_of(begun, conditioners)
        tree = model_tree(config, first_stage, conditioners, size)
        model = build(tree, "the model's config", run.trust)
        model.first_stage.autoencoder.load_state_dict(load_model(source, run.trust).state_dict())
        per_channel = config.latents.per_channel
        statistics, taken = latents.give_statistics(run.folder / "latents", model.first_stage, per_channel), False
        if begun is not None:
            if run.machine.rank == 0:
                for line in read_otherwise(run, begun, model.network, model.conditioners):
                    print(f"  unlike diffusion.init: {line}", flush=True)
            other = begin_from(model, begun, list(run.trust), run.machine.rank == 0).first_stage
            taken = same_latents(other.autoencoder, model.first_stage.autoencoder)
            adapter.check_latents(run, taken)
            if taken:  # scaled as in the network's earlier training
                model.first_stage.set_statistics(other.scale.flatten(), other.shift.flatten())
        model.to(memory_format=torch.channels_last)
        adapter.adapt(run, model)
        run.keep_states(model)
        task = self.task(run, model, folder)
        if section.compile:
            compile_training(model.network)
        callbacks = [self._sample_metrics(run, images)] if section.evaluate_every else []
        easier = model.parameterisation.easier_with_noise
        health = {"easier_with_noise": easier, "bins": BINS, "settled": max(200, section.max_steps // 20)}
        health["other_statistics"] = taken  # those of the data that diffusion.init was trained on
        training.train(run, "diffusion", task, data, folder, images=count, callbacks=callbacks, health=health)
        adapter.finish(run, model, begun, folder / "adapter", tree)
        one = model.first_stage.one_scale
        metadata = {"scale_factor": statistics["scale_factor"] if one is None else one, "sampling": sampling_of(run)}
        sha256 = training.save(run, folder / "model", model, tree, metadata)
        if run.machine.rank == 0:
            film_of_grids(folder / "images")
        return {"sha256": sha256}

    def _taken(self, run: Run, source: Path, folder: Path) -> dict[str, Any]:
        """Saves a trained model (diffusion.pretrained) with this run's decoder. Returns the stage's result."""
        model = load_latent_diffusion(source, run.trust)
        with_decoder(model, load_model(autoencoder.model_folder(run), run.trust), source)
        tree, metadata = read_tree(source), read_metadata(source)
        metadata = {k: v for k, v in metadata.items() if "sha256" not in k} | {"sampling": sampling_of(run)}
        return {"sha256": training.save(run, folder / "model", model, tree, metadata), "pretrained": str(source)}

    def _sample_metrics(self, run: Run, images: ShardDataModule) -> SampleMetrics:
        config, section = run.config, run.config.diffusion
        best_by = section.best_by or config.evaluation.metrics[0]
        return SampleMetrics(
            section.evaluate_every,
            run.conditions(images, section.evaluate_images),
            drawer(run),
            run.evaluator,
            partial(run.evaluator.reference, run.evaluation_data(), config.runs_dir, False),
            config.evaluation.batch_size,
            None if best_by == "loss" else best_by,
        )
