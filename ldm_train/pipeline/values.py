"""Checks the values of a run's config, their types and ranges, before anything is built from them."""

import pkgutil
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ldm_train.configuration import config_folder, flatten
from ldm_train.rules import (
    Rule,
    check,
    engine,
    flag,
    list_of,
    noise_levels,
    number,
    numbers,
    one_of,
    optional,
    section,
    text,
    whole,
)
from ldm_train.training.callbacks.clock import seconds_of
from ldm_train.training.task import Task

TRAINED = ("autoencoder", "diffusion", "classifier")  # the stages that have their own config section
# Config groups of conf/, selected on the command line with a slash.
GROUPS = (
    *("data", "autoencoder", "autoencoder.network", "autoencoder.loss", "diffusion", "diffusion.network"),
    *("diffusion.objective", "diffusion.conditioning", "diffusion.schedule", "sampler", "data.derived", "stage"),
    *("trainer", "callbacks"),
)
OPTIONS = (
    *("latents", "sampling", "evaluation", "evaluation.extractors", "evaluation.kinds"),
    *("diffusion.conditioning.conditioners", "autoencoder.data"),
    *(f"{stage}.{name}" for stage in TRAINED for name in ("optimizer", "lr_schedule")),
)
# Sections whose entries are objects, each with a `_target_`.
OBJECTS = {
    "evaluation.extractors": "the class or function that makes images features",
    "evaluation.kinds": "the class of a metric",
    "diffusion.conditioning.conditioners": "the class of a conditioner; leave it out of another by diffusion/conditioning=",
    "stage": "the class of a stage; leave it out by stages=[...]",
    "logger": "the class of a logger; leave it out by logger=csv",
    "callbacks": "the class of a callback",
}
# Classes that training calls with further arguments.
PARTIAL = ("data.module", "autoencoder.task", "diffusion.task")


def _roots(value: Any) -> Any:
    if not value or not all(isinstance(root, str) for root in (value if isinstance(value, list) else [value])):
        raise ValueError("{name}={value} is neither a folder of shards nor a list of folders")
    return value


def _image_size(value: Any) -> Any:
    sides = value if isinstance(value, list) else [value, value]
    if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
        raise ValueError("{name}={value} is neither a side in pixels nor [height, width]")
    return value


def _area(value: Any) -> Any:
    low, high = numbers(2, number())(value)
    if not 0 < low <= high <= 1:
        raise ValueError("{name}={value} is not a range of the area kept; for example [0.5, 1.0]")
    return value


def _trace(value: Any) -> Any:
    folder = Path(text("the name of a file or folder")(value)).absolute().parent
    if not folder.is_dir():
        raise ValueError(f"{{name}}={{value}}: there is no folder {folder}")
    return value


def _only(value: Any) -> str:
    if value != "only":
        raise ValueError("{name}={value} is not known: plan=only prints the plan and exits; leave it out to run")
    return value


def _time(value: Any) -> str:
    try:
        seconds_of(str(value))
    except ValueError as error:
        raise ValueError("{name}={value} is not a time; write 90s, 30min or 1.5h") from error
    return str(value)


def _above_zero(value: Any) -> Any:
    if number(0)(value) == 0:
        raise ValueError("{name}=0 trains nothing; it must be above 0")
    return value


def _average(value: Any) -> Any:
    if number(0, 1)(value) == 1:
        raise ValueError("{name}=1 never takes a step into the average; it must be below 1 (null: no average)")
    return value


COUNT, POSITIVE = whole(1), number(0)
PER_STAGE: dict[str, Rule] = {
    **dict.fromkeys(("max_steps", "batch_size", "val_every", "checkpoint_every", "log_every"), COUNT),
    **dict.fromkeys(("micro_batch_size", "val_images"), optional(COUNT)),
    "lr_schedule.warmup_steps": whole(0),
    "lr": POSITIVE,
    "lr_schedule.final": optional(number(0, 1)),
    "clip_norm": optional(_above_zero),
    "ema_decay": optional(_average),
    "ema_width": optional(number(1e-6, 0.28)),
    "max_time": optional(_time),
}
LOSS_WEIGHTS = (
    "kl_weight",
    "codebook_weight",
    "perceptual_weight",
    "disc_weight",
    "disc_factor",
    "max_adaptive_weight",
)
FLAGS = (
    *("share", "progress", "deterministic", "wandb_artifact", "latents.cache", "latents.per_channel", "data.flip"),
    *("data.balance_classes", "autoencoder.compile", "diffusion.compile", "autoencoder.loss.learn_logvar"),
)
OPEN_SECTIONS = ("adherence", "restoration", "perceptual", "lpips")
RULES: dict[str, Rule] = {
    **dict.fromkeys((*GROUPS, "logger"), section(": a part is chosen with a slash: {group}={value}")),
    **dict.fromkeys(OPTIONS, section(": it is a section, set the options in it: {name}.<option>=...")),
    **{
        f"evaluation.{name}": optional(section(" is neither null nor a section with options")) for name in OPEN_SECTIONS
    },
    "autoencoder.loss.discriminator": optional(section(": it is a section, set the options in it; null: none")),
    **dict.fromkeys(("stages", "trust", "diffusion.frozen", "evaluation.metrics", "evaluation.paired"), list_of(str)),
    **dict.fromkeys(("data.weights", "autoencoder.data.weights"), optional(list_of(int, float, example="[3,1]"))),
    **{f"{stage}.{name}": rule for stage in TRAINED for name, rule in PER_STAGE.items()},
    **dict.fromkeys(("diffusion.samples", "evaluation.batch_size", "latents.per_shard", "devices"), COUNT),
    **dict.fromkeys(("data.channels", "data.shuffle_buffer", "data.per_shard", "sampling.num_inference_steps"), COUNT),
    **dict.fromkeys(("evaluation.restoration.images", "evaluation.restoration.samples"), COUNT),
    **{f"evaluation.adherence.{name}": COUNT for name in ("scenes", "held_out", "seeds")},
    **dict.fromkeys(("diffusion.evaluate_images", "evaluation.images"), whole(2)),
    "evaluation.reference_images": optional(whole(2)),
    "diffusion.evaluate_every": optional(COUNT),
    **{f"autoencoder.loss.{name}": whole(0) for name in ("disc_start", "disc_ramp", "disc_warmup")},
    **dict.fromkeys(("evaluation.predictors", "num_workers", "seed", "requeues", "max_failures"), whole(0)),
    "autoencoder.disc_lr": optional(POSITIVE),
    **{f"autoencoder.loss.{name}": POSITIVE for name in LOSS_WEIGHTS},
    "sampling.guidance_scale": POSITIVE,
    "sampling.guidance_interval": optional(noise_levels),
    "diffusion.task.alignment": optional(POSITIVE),
    "diffusion.objective.min_snr_gamma": optional(_above_zero),
    "autoencoder.task.augmentation.noise": optional(POSITIVE),
    **{f"autoencoder.task.augmentation.{name}": optional(number(0, 1)) for name in ("most", "equivariance")},
    **{f"autoencoder.loss.{name}": optional(POSITIVE) for name in ("lecam_weight", "r1_weight")},
    "data.max_bad_fraction": number(0, 1),
    "data.shard_cache.folder": text("the name of a folder"),
    "data.shard_cache.gigabytes": POSITIVE,
    **dict.fromkeys(FLAGS, optional(flag)),
    "data.crop": one_of("center", "random", "random_resized"),
    "data.reader": one_of("indexed", "streaming"),
    **dict.fromkeys(("project", "runs_dir"), text()),
    "data.root": _roots,
    **dict.fromkeys(("data.train_split", "data.val_split"), text("the name of a split")),
    **{f"autoencoder.data.{name}": optional(text("the name of a split")) for name in ("train_split", "val_split")},
    "autoencoder.data.root": optional(_roots),
    **dict.fromkeys(
        ("autoencoder.pretrained", "autoencoder.init", "diffusion.pretrained", "diffusion.init", "latents.source"),
        optional(text("the name of a file or folder")),
    ),
    "diffusion.identifier": optional(text("a word")),
    "latents.source_scale": number(1e-6, 1e6),
    "autoencoder.init_discriminator": optional(flag),
    "autoencoder.train": one_of("all", "decoder"),
    "trace": optional(_trace),
    "text_cache": optional(text("the name of a folder")),
    "data.remedy": optional(text("a sentence")),
    "trainer.benchmark": optional(flag),
    "plan": optional(_only),
    "engine": optional(engine),
    "memory": optional(number(0.001)),
    "price_per_hour": optional(POSITIVE),
    "data.image_size": _image_size,
    "autoencoder.data.image_size": optional(_image_size),
    "data.scale": _area,
    "data.buckets.max_ratio": number(1, 100),
    **dict.fromkeys(("data.buckets.step", "data.buckets.min_images"), COUNT),
    "autoencoder.data.buckets.max_ratio": optional(number(1, 100)),
    **dict.fromkeys(("autoencoder.data.buckets.step", "autoencoder.data.buckets.min_images"), optional(COUNT)),
    "autoencoder.data.scale": optional(_area),
}
REQUIRED = (
    *GROUPS,
    *("logger", "latents", "sampling", "evaluation", "evaluation.metrics", "evaluation.paired", "stages", "trust"),
    *("data.crop", "data.reader", "data.root", "project", "runs_dir"),
)


def _loggers(names: Any) -> DictConfig:
    """Returns the config section for a logger name or a list of names. Raises ValueError for an unknown name."""
    chosen = {}
    for name in names if OmegaConf.is_list(names) else [names]:
        path = config_folder() / "logger" / f"{name}.yaml"
        if not path.is_file():
            raise ValueError(f"logger is wandb, tensorboard, csv or a list of them, not {name!r}")
        chosen |= OmegaConf.to_container(OmegaConf.load(path))
    return OmegaConf.create(chosen)


def _check_target(name: str, target: str) -> None:
    """Raises ValueError for a `_target_` in the user's config that is not a class or function, or, for a task, not a
    `Task`."""
    try:
        found = pkgutil.resolve_name(target)
    except Exception as error:  # importing a module may raise any error
        raise ValueError(f"{name}={target} cannot be loaded: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise ValueError(f"{name}={target} is a {type(found).__name__}, where a class or function is meant")
    if name.endswith(".task._target_") and not (isinstance(found, type) and issubclass(found, Task)):
        raise ValueError(f"{name}={target} is not an {Task.__module__}.{Task.__name__}, which training needs")


def check_values(config: DictConfig) -> None:
    """Raises ValueError, naming the option, for a value of the wrong type or range. Converts e.g. 1e4 to 10000 for
    counts, and a list of logger names, as in older recipes, to their config section."""
    if not OmegaConf.is_dict(config.logger):
        config.logger = _loggers(config.logger)
    check(config, RULES, REQUIRED)
    for name, meant in OBJECTS.items():
        for entry, tree in OmegaConf.select(config, name).items():
            if not OmegaConf.is_dict(tree) or not isinstance(tree.get("_target_"), str):
                raise ValueError(f"{name}.{entry} has no _target_: {meant}")
    for name in ("autoencoder.network", "diffusion.network", "diffusion.schedule", "sampler", *PARTIAL):
        if not isinstance(target := OmegaConf.select(config, f"{name}._target_"), str):
            raise ValueError(f"{name}._target_={target}: it names a class or function")
    for name, value in flatten(OmegaConf.to_container(config)).items():
        if name.endswith("._target_") and not isinstance(value, str):
            raise ValueError(f"{name}={value}: it names a class or function")
    for name in PARTIAL:
        _check_target(f"{name}._target_", OmegaConf.select(config, f"{name}._target_"))
        if OmegaConf.select(config, f"{name}._partial_") is not True:
            raise ValueError(f"{name}._partial_ is true: training adds the other arguments")
