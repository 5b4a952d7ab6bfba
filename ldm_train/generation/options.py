"""The options of ldm-sample: their types, and whether they are valid and have an effect for a model and a task."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from ldm_train.compiling import check_compiler
from ldm_train.configuration import config_folder, plain
from ldm_train.devices import device_of
from ldm_train.diffusion.guidance import HIGHEST, classifier_free
from ldm_train.generation.film import Film
from ldm_train.generation.requests import MOST, Request
from ldm_train.latent_diffusion import LatentDiffusion
from ldm_train.rules import (
    Rule,
    check,
    either,
    engine,
    flag,
    list_of,
    noise_levels,
    number,
    numbers,
    one_of,
    optional,
    scalar,
    section,
    text,
    whole,
)

PRECISIONS = {
    "32": None,
    "bf16-mixed": torch.bfloat16,
    "bf16": torch.bfloat16,
    "16-mixed": torch.float16,
    "16": torch.float16,
}
COMPILE = ("default", "cuda_graphs")
COUNT = whole(1, MOST)
PIXELS = whole(-MOST, MOST)
SECTIONS = {"guidance": "rescale", "guide": "classifier", "resample": "repeats", "tiles": "cells", "fields": "<name>"}
TEXTS = (
    "task",
    "spacing",
    "negative",
    "image_prompt",
    "compile",
    "film",
    "weaker_model",
    "guide.classifier",
    "guide.clip",
)


def _size(value: Any) -> Any:
    """Checks a size: one side, [height, width], or a ratio "width:height". Raises ValueError if it is anything else."""
    if not isinstance(value, str):
        return either(whole(-MOST, MOST), numbers(2, PIXELS, "whole numbers"))(value)
    if not re.fullmatch(r"[1-9]\d{0,3}:[1-9]\d{0,3}", value):
        raise ValueError("{name}={value} is not a ratio of width to height such as 16:9; [height, width] are pixels")
    return value


def _folder(value: Any) -> str:
    """Returns a folder's name, which may look like a number."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError("{name}={value} is not a folder")
    return str(value)


RULES: dict[str, Rule] = {
    **{name: section(f" is not a section with options; set {{name}}.{option}=") for name, option in SECTIONS.items()},
    "seed": whole(0),
    **dict.fromkeys(("n", "batch_size", "invert_iterations", "resample.jump_length", "resample.repeats"), COUNT),
    "tiles.cells": optional(COUNT),
    "num_inference_steps": optional(whole(0, MOST)),
    "tiles.overlap": whole(0, MOST),
    **dict.fromkeys(("strength", "guidance.rescale", "guide.classifier_scale", "guide.clip_scale"), number()),
    **dict.fromkeys(("guidance_scale", "panorama", "guidance.threshold"), optional(number())),
    "runs_dir": _folder,
    "out": optional(_folder),
    "trust": list_of(str),
    "size": optional(_size),
    "extend": optional(numbers(4, PIXELS, "whole numbers")),
    "guidance.interval": optional(noise_levels),
    **dict.fromkeys(TEXTS, scalar),
    "adapters": optional(either(text("a run, folder or file"), list_of(str))),
    **dict.fromkeys(("invert", "overwrite"), flag),
    "devices": whole(1),
    "engine": optional(engine),
    "accelerator": one_of("auto", "cpu", "gpu", "mps"),
}


def check_types(config: DictConfig) -> None:
    """Raises ValueError, naming the option, if a value has the wrong type or `out` is a file."""
    check(config, RULES)
    device_of(config.accelerator)
    if config.out is not None and Path(config.out).is_file():
        raise ValueError(f"out={config.out} is a file; name a folder")


def check_values(config: DictConfig, model: LatentDiffusion) -> dict[str, Any]:
    """Checks the config and returns the options of classifier_free. Raises ValueError for invalid values, before any
    work is done."""
    model.schedule.timesteps(config.num_inference_steps, config.spacing)
    guidance = {k: v for k, v in plain(config.guidance).items() if v is not None and (k, v) != ("rescale", 0)}
    captions = [option for option in ("negative", "image_prompt") if config[option] is not None]
    if captions and "caption" not in model.fields:
        raise ValueError(f"this model takes no captions, so {captions[0]}= has no effect; leave it out")
    if guidance and not model.conditioners and config.weaker_model is None:
        raise ValueError(
            f"this model takes no condition that guidance could strengthen; leave guidance.{next(iter(guidance))} out"
        )
    named = [option for option in ("negative", "weaker_model") if config[option] is not None]
    named += [f"guidance.{option}" for option in guidance]
    if config.guidance_scale == 1 and named:
        raise ValueError(f"{', '.join(named)}: without effect at guidance_scale=1; set it to another value")
    if config.guidance_scale != 1:
        classifier_free(model.denoiser({}), model.denoiser({}), config.guidance_scale, **guidance)
    if not 0 <= config.strength <= 1:
        raise ValueError(f"strength is a share between 0 and 1, not {config.strength}")
    if config.panorama is not None and not 0 <= config.panorama < 1:
        raise ValueError(
            f"panorama is the share of a window that neighbours have in common, 0 to below 1, not {config.panorama}"
        )
    if config.compile is not None and config.compile not in COMPILE:
        raise ValueError(f"compile is one of {', '.join(COMPILE)}, not {config.compile!r}")
    if config.compile == "cuda_graphs" and model.device.type != "cuda":
        raise ValueError(
            "compile=cuda_graphs needs an NVIDIA or AMD GPU, and none is used here; set compile=default or leave it out"
        )
    if config.compile:
        check_compiler(f"compile={config.compile}", model.device)
    if str(config.precision) not in PRECISIONS:
        raise ValueError(f"precision is one of {', '.join(PRECISIONS)}, not {config.precision!r}")
    if config.film is not None:
        Film(model.decode, config.film)
    if config.image_prompt is not None and not config.invert:
        raise ValueError("image_prompt= describes the picture to be inverted; it needs invert=true")
    if config.invert and config.strength != 0.7:
        raise ValueError("invert=true begins from the picture's own noise, so strength= has no effect; leave it out")
    for guide, option in (("classifier", "classes"), ("clip", "prompts")):
        if config.guide[guide] is not None and config[option] is None:
            raise ValueError(f"guide.{guide} needs {option}= as its target")
    return guidance


def check_interval(
    option: str,
    interval: Sequence[float],
    num_inference_steps: int,
    spacing: str,
    model: LatentDiffusion,
    chosen: bool = True,
) -> None:
    """Raises ValueError, naming the option, if no step begins at a noise level within the interval of guidance; only
    prints it if the command did not choose the interval."""
    low, high = interval
    timesteps = model.schedule.timesteps(num_inference_steps, spacing)
    pairs = zip(*model.schedule.coefficients(timesteps[:-1]))
    levels = [min(sigma / alpha, HIGHEST) if alpha else HIGHEST for alpha, sigma in pairs]
    if any(low <= level <= high for level in levels):
        return
    said = (
        f"{option}=[{low},{high}] holds none of the noise levels {levels[0]:.3g} ... {levels[-1]:.3g} of these "
        f"{len(levels)} steps, so nothing is guided; set num_inference_steps to more, or {option}=[0,1000000] to guide "
        "every step"
    )
    if chosen:
        raise ValueError(said)
    print(said, flush=True)


def inverts(config: DictConfig, task: str) -> bool:
    """Returns True if pictures are drawn from the inverted noise of given pictures."""
    return config.invert or (task == "interpolate" and config.image is not None)


def check_wanted(config: DictConfig, task: str, wanted: list[Request], chosen: Any) -> None:
    """Raises ValueError if an option does not fit the task. chosen: the sampler that the command names, if any."""
    if any(r.negative is not None for r in wanted):
        if config.guidance_scale == 1:
            raise ValueError("negative= needs guidance: set guidance_scale to a value other than 1")
        if config.weaker_model is not None:
            raise ValueError("weaker_model= and negative= both say what guidance leads away from; leave one out")
    steps = round(config.num_inference_steps * config.strength) if task == "img2img" and not config.invert else None
    still = task == "reconstruct" or steps == 0
    if steps == 0 and config.strength > 0:
        raise ValueError(
            f"strength={config.strength} of num_inference_steps={config.num_inference_steps} is less than one step; set it to "
            f"{1 / config.num_inference_steps:.2g} or more, or to 0 for the picture as the autoencoder decodes it"
        )
    if config.film is not None and still:
        raise ValueError(f"film= shows how a picture is drawn, and nothing is drawn by task={task} here")
    if inverts(config, task):
        if chosen is not None and (not chosen["_target_"].endswith(".ddim") or chosen.get("eta")):
            raise ValueError(
                "an inverted picture is drawn by the sampler that is inverted; leave sampler= out (it is ddim, eta 0)"
            )
        if config.resample.repeats > 1:
            raise ValueError("resample.repeats adds noise, which inversion has just taken out; leave one of them out")


def check_effects(said: DictConfig, model: LatentDiffusion, task: str) -> None:
    """Raises ValueError for an option of the command that has no effect on its job."""
    usual = OmegaConf.load(config_folder() / "sample.yaml")
    draws, conditional = task != "reconstruct", bool(model.conditioners) or said.weaker_model is not None
    drawn = (draws, "where something is drawn, not with task=reconstruct")
    of_drawing = ("num_inference_steps", "sampler", "spacing", "panorama", "resample.repeats")
    of_guidance = ("guidance_scale", *(f"guidance.{name}" for name in said.guidance))
    only = {
        **dict.fromkeys(("prompts", "classes", "negative", *of_drawing), drawn),
        "strength": (task == "img2img", "with task=img2img"),
        "guidance_scale": (conditional or said.guidance_scale == 1, "for a model that takes a condition"),
        **({} if draws else dict.fromkeys(of_guidance, drawn)),
        "invert_iterations": (inverts(said, task), "with invert=true"),
        "resample.jump_length": (said.resample.repeats > 1, "with resample.repeats=2 or more"),
        "tiles.overlap": (said.tiles.cells is not None, "with tiles.cells="),
        "guide.classifier_scale": (said.guide.classifier is not None, "with guide.classifier="),
        "guide.clip_scale": (said.guide.clip is not None, "with guide.clip="),
    }
    for option, (effective, where) in only.items():
        if not effective and OmegaConf.select(said, option) != OmegaConf.select(usual, option):
            raise ValueError(f"{option}= has an effect only {where}; leave it out")
