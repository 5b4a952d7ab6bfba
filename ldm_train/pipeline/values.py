"""What can be known to be wrong with a run before it begins: every value, and every part of every stage of it, tried without
training."""

import math
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ldm_train.checkpoints.native import CONFIG
from ldm_train.checkpoints.parts import build as build_part
from ldm_train.checkpoints.parts import build_sampler
from ldm_train.conditioning.base import Conditioner
from ldm_train.evaluation.instruments import check_reference
from ldm_train.latent_diffusion import LatentDiffusion
from ldm_train.models.first_stage import FirstStage
from ldm_train.pipeline import build
from ldm_train.rng import NoiseSource
from ldm_train.storage import read_config

TRAINED = ("autoencoder", "diffusion", "classifier")  # the stages with a section of their own

# Parts, chosen with a slash.
PARTS = (
    "data", "autoencoder", "autoencoder.network", "autoencoder.loss", "diffusion", "diffusion.network", "diffusion.objective",
    "diffusion.conditioning", "sampler",
)  # fmt: skip
SECTIONS = ("latents", "sampling", "evaluation")
# Whole numbers with the least that means something; None stands where the option may be left open.
PER_STAGE = dict.fromkeys(
    ("max_steps", "batch_size", "micro_batch_size", "val_every", "val_images", "checkpoint_every", "log_every"), 1
)
WHOLE = {
    **{f"{stage}.{name}": least for stage in TRAINED for name, least in PER_STAGE.items()},
    **dict.fromkeys(("diffusion.samples", "diffusion.evaluate_every", "evaluation.batch_size", "latents.per_shard"), 1),
    **dict.fromkeys(("devices", "data.channels", "data.shuffle_buffer", "data.per_shard"), 1),
    **dict.fromkeys(("sampling.num_inference_steps", "evaluation.restoration.images", "evaluation.restoration.samples"), 1),
    **dict.fromkeys(("diffusion.evaluate_images", "evaluation.images", "evaluation.reference_images"), 2),
    **{f"autoencoder.loss.{name}": 0 for name in ("disc_start", "disc_ramp", "disc_warmup")},
    **{f"{stage}.lr_schedule.warmup_steps": 0 for stage in TRAINED},
    **dict.fromkeys(("evaluation.predictors", "num_workers", "seed"), 0),
}  # fmt: skip
# Numbers with their range.
NUMBERS: dict[str, tuple[float, float]] = {
    **{f"{stage}.{name}": (0, math.inf) for stage in TRAINED for name in ("lr", "clip_norm")},
    **{f"{stage}.ema_decay": (0, 1) for stage in TRAINED},
    "autoencoder.disc_lr": (0, math.inf),
    **{
        f"autoencoder.loss.{name}": (0, math.inf)
        for name in ("kl_weight", "codebook_weight", "perceptual_weight", "disc_weight", "disc_factor", "max_adaptive_weight")
    },
    "sampling.guidance_scale": (0, math.inf),
    "data.max_bad_fraction": (0, 1),
}  # fmt: skip
FLAGS = (
    "share", "progress", "wandb_artifact", "latents.cache", "latents.per_channel", "data.flip", "data.balance_classes",
    "autoencoder.compile", "diffusion.compile", "autoencoder.loss.learn_logvar",
)  # fmt: skip
OPEN = (  # options that may be null
    "micro_batch_size", "val_images", "evaluate_every", "reference_images", "ema_decay", "clip_norm", "disc_lr", "restoration",
)  # fmt: skip
LISTS: dict[str, Any] = {
    **dict.fromkeys(("stages", "trust", "evaluation.metrics", "evaluation.paired"), str),
    **dict.fromkeys(("data.weights", "autoencoder.data.weights"), int | float),
}
CHOICES = {"data.crop": ("center", "random", "random_resized"), "data.reader": ("indexed", "streaming")}


def check_values(config: DictConfig) -> None:
    """Raises ValueError, naming the option, for a value of the wrong type or range. Turns 1e4 into 10000 where a count is
    meant, and a name of digits into text."""
    for part in (*PARTS, *SECTIONS):
        value = OmegaConf.select(config, part)
        if not isinstance(value, DictConfig):
            if part in SECTIONS:
                raise ValueError(f"{part}={value}: it is a section, set the options in it: {part}.<option>=...")
            raise ValueError(f"{part}={value}: a part is chosen with a slash: {part.replace('.', '/')}={value}")
    for name in config.logger if OmegaConf.is_list(config.logger) else [config.logger]:
        if name not in ("wandb", "tensorboard", "csv"):
            raise ValueError(f"logger is wandb, tensorboard, csv or a list of them, not {name!r}")
    for key, kind in LISTS.items():
        value = OmegaConf.select(config, key)
        if value is None and key.endswith("weights"):
            continue
        if not OmegaConf.is_list(value) or not all(isinstance(v, kind) and not isinstance(v, bool) for v in value):
            example = "[3,1]" if key.endswith("weights") else f"[{value}]"
            raise ValueError(f"{key} is a list: {key}={example}")
    for key, least in WHOLE.items():
        _number(config, key, least, math.inf, whole=True)
    for key, (least, most) in NUMBERS.items():
        _number(config, key, least, most, whole=False)
    for key in FLAGS:
        if (value := OmegaConf.select(config, key)) is not None and not isinstance(value, bool):
            raise ValueError(f"{key}={value!r} is neither true nor false")
    for key, known in CHOICES.items():
        if (value := OmegaConf.select(config, key)) not in known:
            raise ValueError(f"{key} is {', '.join(known)}, not {value!r}")
    for key in ("project", "runs_dir"):
        if not isinstance(config[key], str) or not config[key]:
            raise ValueError(f"{key}={config[key]} is no text")
    for key in ("data.root", "autoencoder.data.root"):
        value = OmegaConf.select(config, key)
        roots = list(value) if OmegaConf.is_list(value) else [value]
        if not roots or (not all(isinstance(r, str) for r in roots) and (key == "data.root" or value is not None)):
            raise ValueError(f"{key}={value} is no folder of shards and no list of folders")
    for key in ("autoencoder.pretrained", "trace"):
        if (value := OmegaConf.select(config, key)) is not None and not isinstance(value, str):
            raise ValueError(f"{key}={value} is no name of a file or folder")
    for key in ("evaluation.obedience", "evaluation.restoration", "evaluation.perceptual", "evaluation.lpips"):
        if (value := OmegaConf.select(config, key)) is not None and not OmegaConf.is_dict(value):
            raise ValueError(f"{key}={value} is neither null nor a section with options")
    if config.trace is not None and not Path(config.trace).absolute().parent.is_dir():
        raise ValueError(f"trace={config.trace}: there is no folder {Path(config.trace).absolute().parent}")
    for key in ("data.image_size", "autoencoder.data.image_size"):
        value = OmegaConf.select(config, key)
        sides = list(value) if OmegaConf.is_list(value) else [value, value]
        if value is not None and not (len(sides) == 2 and all(type(s) is int and s > 0 for s in sides)):
            raise ValueError(f"{key}={value} is neither a side in pixels nor [height, width]")
    for key in ("data.scale", "autoencoder.data.scale"):
        value = OmegaConf.select(config, key)
        shares = list(value) if OmegaConf.is_list(value) else []
        if value is not None and not (
            len(shares) == 2 and all(type(s) in (int, float) for s in shares) and 0 < shares[0] <= shares[1] <= 1
        ):
            raise ValueError(f"{key}={value} is no range of the area kept; for example [0.5, 1.0]")


def _number(config: DictConfig, key: str, least: float, most: float, whole: bool) -> None:
    section, _, name = key.rpartition(".")
    owner = OmegaConf.select(config, section) if section else config
    if owner is None or name not in owner:
        return
    value = owner[name]
    if value is None:
        if name in OPEN:
            return
        raise ValueError(f"{key}=null: it needs a {'whole ' * whole}number")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{key}={value!r} is no number")
    if not math.isfinite(value):
        raise ValueError(f"{key}={value} is no finite number")
    if whole and value != int(value):
        raise ValueError(f"{key}={value} is no whole number")
    if value < least:
        raise ValueError(f"{key}={value} is below {least}")
    if value > most:
        raise ValueError(f"{key}={value} is above {most}")
    if whole:
        OmegaConf.update(config, key, int(value))


# -- the parts ---------------------------------------------------------------------------------------------------------


def rehearse(chain: Any) -> None:
    """Builds what each stage of a run will build, large networks without their memory, and tries what can be tried in a
    moment. Raises ValueError, DataError or FileNotFoundError that names the option."""
    config, todo = chain.config, set(chain.config.stages)
    for stage in [s for s in TRAINED if s in todo]:
        _optimisation(config, stage)
    measuring = [config.diffusion.evaluate_images] if "diffusion" in todo and config.diffusion.evaluate_every else []
    measuring += [config.evaluation.images] if "evaluation" in todo else []
    if measuring:  # numbers of samples
        chain.instruments.check(chain.fields, measuring, config.data.image_size, config.data.channels)
        build.check_best_by(config)
    if "autoencoder" in todo and not config.autoencoder.pretrained:
        _decodes_a_sample(chain.data("autoencoder", ("image",)))
        with torch.device("meta"):  # its perceptual network is the first thing that the stage itself loads
            instantiate(build.plain(config.autoencoder.loss) | {"perceptual": None}, _convert_="all")
    on_latents = todo & {"latents", "diffusion", "evaluation", "classifier"}
    if config.latents.cache and config.data.crop != "center" and on_latents:
        raise ValueError(
            f"data.crop={config.data.crop} is random, one cached encoding cannot stand for it; set latents.cache=false or "
            "data.crop=center (autoencoder.data.crop is free)"
        )
    if not on_latents:
        return
    with torch.device("meta"):
        autoencoder = build_part(_autoencoder_tree(chain), "autoencoder.network", chain.trust)
    if (channels := getattr(autoencoder, "in_channels", config.data.channels)) != config.data.channels:
        raise ValueError(f"the autoencoder takes {channels} image channels, data.channels is {config.data.channels}")
    if "classifier" in todo:
        chain.data("classifier", ("image", "class_label")).check_conditions()
    if todo & {"diffusion", "evaluation"}:
        images = chain.data("diffusion", ("image", *chain.fields))
        _latent_diffusion(chain, autoencoder, images)
        _decodes_a_sample(images)
        images.check_conditions()
        _sampling(chain, autoencoder.latent_channels)
    if measuring:
        check_reference(str(config.evaluation.reference), images.index["splits"], images.root)


def _decodes_a_sample(images: Any) -> None:
    """One sample with all its fields. (The streaming reader's shards may be far away.)"""
    if images.reader == "indexed":
        images.samples(images.val_split, images.fields, random=False)[(0, 0)]


def _optimisation(config: DictConfig, stage: str) -> None:
    section = config[stage]
    try:
        instantiate(section.optimizer, lr=section.lr, _convert_="all")([nn.Parameter(torch.zeros(1))])
    except Exception as error:  # optimisers raise whatever they like
        raise ValueError(f"{stage}.optimizer: {error.__cause__ or error}") from error
    instantiate(section.lr_schedule, max_steps=section.max_steps)


def _autoencoder_tree(chain: Any) -> dict[str, Any]:
    """The config of the autoencoder that the run will have: its own, or that of the model it takes instead."""
    if pretrained := chain.config.autoencoder.pretrained:
        return read_config(build.pretrained_folder(pretrained, chain.config.runs_dir) / CONFIG)
    return build.plain(chain.config.autoencoder.network)


def _latent_diffusion(chain: Any, autoencoder: nn.Module, images: Any) -> None:
    """The whole model with its conditioners; only U-Net and first stage are large, and are built without memory."""
    config = chain.config
    with torch.device("meta"):
        network = build_part(build.plain(config.diffusion.network), "diffusion.network", chain.trust)
        first_stage = FirstStage(autoencoder)
    tree = build.conditioner_tree(config, images, rehearsal=True)
    conditioners = build_part(tree, "diffusion.conditioning.conditioners", chain.trust)
    schedule = build_part(build.plain(config.diffusion.schedule), "diffusion.schedule", chain.trust)
    parameterisation = build_part(
        build.plain(config.diffusion.objective.parameterisation), "diffusion.objective.parameterisation", chain.trust
    )
    LatentDiffusion(network, first_stage, schedule, conditioners, parameterisation)
    named = images.index.get("classes") or []
    for name, conditioner in conditioners.items():
        own = getattr(conditioner, "names", named)
        if conditioner.field == "class_label" and len(own) < len(named):
            raise ValueError(
                f"diffusion.conditioning.conditioners.{name} knows {len(own)} classes, the data {images.root} have "
                f"{len(named)}; set its classes={build.FROM_DATA}"
            )
    for conditioner in conditioners.values():
        if isinstance(conditioner, Conditioner):
            conditioner.require()


def _sampling(chain: Any, channels: int) -> None:
    """The sampler on latents of one cell, denoised to 0: it is there, takes its options and goes with the schedule."""
    config = chain.config
    schedule = build_part(build.plain(config.diffusion.schedule), "diffusion.schedule", chain.trust)
    sampler = build_sampler(build.plain(config.sampler), "sampler", chain.trust)
    timesteps = schedule.timesteps(config.sampling.num_inference_steps, config.sampling.spacing)
    noise, shape = NoiseSource([0]), (channels, 1, 1)
    try:
        sampler(
            lambda x, t: torch.zeros_like(x), noise.normal(shape, "start"), timesteps, schedule, noise, callback=None
        )
    except TypeError as error:
        raise ValueError(f"sampler: {config.sampler._target_} does not take its options ({error})") from error
