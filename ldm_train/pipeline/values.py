"""Checks the values of a run's config, their types and ranges, before anything is built from them."""

import math
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ldm_train.configuration import config_folder

TRAINED = ("autoencoder", "diffusion", "classifier")  # the stages with a section of their own

# Parts, chosen with a slash.
PARTS = (
    "data", "autoencoder", "autoencoder.network", "autoencoder.loss", "diffusion", "diffusion.network", "diffusion.objective",
    "diffusion.conditioning", "diffusion.schedule", "sampler", "data.derived", "stage", "trainer", "callbacks",
)  # fmt: skip
SECTIONS = (
    "latents", "sampling", "evaluation", "evaluation.extractors", "evaluation.kinds", "diffusion.conditioning.conditioners",
    "autoencoder.data", "autoencoder.loss.discriminator",
    *(f"{stage}.{name}" for stage in TRAINED for name in ("optimizer", "lr_schedule")),
)  # fmt: skip
# Sections of parts that are built, each with a `_target_`.
BUILT = {
    "evaluation.extractors": "the class or function that makes images features",
    "evaluation.kinds": "the class of a metric",
    "diffusion.conditioning.conditioners": "the class of a conditioner; leave it out of another by diffusion/conditioning=",
    "stage": "the class of a stage; leave it out by stages=[...]",
    "logger": "the class of a logger; leave it out by logger=csv",
    "callbacks": "the class of a callback",
}
# Classes that are called with further arguments.
PARTIAL = ("data.module", "autoencoder.task", "diffusion.task")
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


def _loggers(names: Any) -> DictConfig:
    """The section of loggers that are named. Raises ValueError for a name that is none."""
    chosen = {}
    for name in names if OmegaConf.is_list(names) else [names]:
        path = config_folder() / "logger" / f"{name}.yaml"
        if not path.is_file():
            raise ValueError(f"logger is wandb, tensorboard, csv or a list of them, not {name!r}")
        chosen |= OmegaConf.to_container(OmegaConf.load(path))
    return OmegaConf.create(chosen)


def check_values(config: DictConfig) -> None:
    """Raises ValueError, naming the option, for a value of the wrong type or range. Turns 1e4 into 10000 where a count is
    meant, and a name of digits into text."""
    for part in (*PARTS, *SECTIONS):
        owner, _, name = part.rpartition(".")
        if part in SECTIONS and owner and name not in (OmegaConf.select(config, owner) or {}):
            continue
        value = OmegaConf.select(config, part)
        if not isinstance(value, DictConfig):
            if part in SECTIONS:
                raise ValueError(f"{part}={value}: it is a section, set the options in it: {part}.<option>=...")
            raise ValueError(f"{part}={value}: a part is chosen with a slash: {part.replace('.', '/')}={value}")
    if not OmegaConf.is_dict(config.logger):  # a list of names, as in older recipes
        config.logger = _loggers(config.logger)
    for section, meant in BUILT.items():
        for name, tree in OmegaConf.select(config, section).items():
            if not OmegaConf.is_dict(tree) or not isinstance(tree.get("_target_"), str):
                raise ValueError(f"{section}.{name} has no _target_: {meant}")
    for section in ("autoencoder.network", "diffusion.network", "diffusion.schedule", "sampler", *PARTIAL):
        if not isinstance(target := OmegaConf.select(config, f"{section}._target_"), str):
            raise ValueError(f"{section}._target_={target}: it names a class or function")
    for section in PARTIAL:
        if OmegaConf.select(config, f"{section}._partial_") is not True:
            raise ValueError(f"{section}._partial_ is true: training adds the other arguments")
    for key in ("evaluation.adherence", "evaluation.restoration", "evaluation.perceptual", "evaluation.lpips"):
        if (value := OmegaConf.select(config, key)) is not None and not OmegaConf.is_dict(value):
            raise ValueError(f"{key}={value} is neither null nor a section with options")
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
    if not isinstance(owner, DictConfig) or name not in owner:
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
