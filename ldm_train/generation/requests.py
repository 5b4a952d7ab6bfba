"""The requests to ldm-sample: the task, and the conditions of every picture, read from files and texts."""

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch.nn import functional as F

from ldm_train.data.batch import FIELDS, Field
from ldm_train.data.masks import masked_image
from ldm_train.generation.files import (
    as_list,
    extended,
    read_image,
    read_mask,
    require_same_shape,
)
from ldm_train.latent_diffusion import LatentDiffusion

# task: the condition it needs, None where any model can do it
TASKS = {
    "unconditional": None,
    "class": "class_label",
    "txt2img": "caption",
    "layout": "boxes",
    "semantic": "segmentation",
    "superres": "lowres",
    "variation": "reference",
    "depth": "depth",
    "inpaint": None,
    "outpaint": None,
    "img2img": None,
    "interpolate": None,
    "reconstruct": None,
}
# Tasks that start from a picture.
FROM_IMAGE = ("inpaint", "outpaint", "img2img", "reconstruct", "interpolate")
WHOLE = (
    "n", "seed", "batch_size", "num_inference_steps", "invert_iterations", "resample.jump_length", "resample.repeats",
    "tiles.cells", "tiles.overlap",
)  # fmt: skip
MOST = 1 << 20  # largest value of any of them but the seed; most pictures of one job
LEAST = {"seed": 0, "num_inference_steps": 0, "tiles.overlap": 0}  # others 1; the schedule has its own limits
NUMBERS = (
    "guidance_scale",
    "strength",
    "panorama",
    "guidance.rescale",
    "guidance.threshold",
    "guide.classifier_scale",
    "guide.clip_scale",
)

# Sections of options, each with one of its options as an example.
SECTIONS = {"guidance": "rescale", "guide": "classifier", "resample": "repeats", "tiles": "cells", "fields": "<name>"}


def check_types(config: DictConfig) -> None:
    """Raises ValueError, naming the option, for a value of the wrong type."""

    def number(value: Any, whole: bool) -> bool:
        return (isinstance(value, int) and not isinstance(value, bool)) or (not whole and isinstance(value, float))

    for section, option in SECTIONS.items():
        if not OmegaConf.is_dict(config[section]):
            raise ValueError(f"{section}={config[section]!r} is no section with options; say {section}.{option}=")
    for key in (*WHOLE, *NUMBERS):
        value = OmegaConf.select(config, key)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{key}={value} is no finite number")
        if value is not None and not number(value, key in WHOLE):
            raise ValueError(f"{key}={value!r} is no {'whole ' if key in WHOLE else ''}number")
        if value is not None and key in WHOLE and value < LEAST.get(key, 1):
            raise ValueError(f"{key}={value} is below {LEAST.get(key, 1)}; it must be at least that")
        if value is not None and key in WHOLE and key != "seed" and value > MOST:
            raise ValueError(f"{key}={value} is above {MOST}; it must be at most that")
    for key, count, whole in (("size", 2, True), ("extend", 4, True), ("guidance.interval", 2, False)):
        value = OmegaConf.select(config, key)
        values = list(value) if isinstance(value, ListConfig) else value
        if value is None or (key == "size" and number(value, True) and value <= MOST):
            continue
        fits = isinstance(values, list) and len(values) == count and all(number(v, whole) for v in values)
        if not fits or any(abs(v) > MOST for v in values):
            raise ValueError(f"{key}={values!r} is no list of {count} {'whole ' * whole}numbers")
    for key in (
        "task",
        "spacing",
        "negative",
        "image_prompt",
        "compile",
        "film",
        "weaker_model",
        "guide.classifier",
        "guide.clip",
    ):
        value = OmegaConf.select(config, key)
        if OmegaConf.is_config(value):
            raise ValueError(f"{key}={OmegaConf.to_container(value)!r} is no text")
    for key in ("invert", "overwrite"):
        if not isinstance(config[key], bool):
            raise ValueError(f"{key}={config[key]!r} is neither true nor false")
    if config.accelerator not in ("auto", "cpu", "gpu"):
        raise ValueError(f"accelerator is auto, cpu or gpu, not {config.accelerator!r}")
    if config.accelerator == "gpu" and not torch.cuda.is_available():
        raise ValueError("accelerator=gpu, but no GPU is visible; use accelerator=cpu")
    if config.out is not None and Path(config.out).is_file():
        raise ValueError(f"out={config.out} is a file; name a folder")


@dataclass
class Request:
    """One picture: its seed, the fields of its condition, these as text, and the picture and mask it starts from.

    targets: of outside guides (classifier, CLIP), by field. mix: weighted fields, in the place of `fields`.
    walk: (first seed, second seed, how far between them). images: the two pictures at the ends of a walk.
    """

    seed: int
    fields: dict[str, Any]
    text: str
    number: int
    image: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    negative: str | None = None
    targets: dict[str, Any] = field(default_factory=dict)
    mix: tuple[tuple[float, dict[str, Any]], ...] = ()
    walk: tuple[int, int, float] | None = None
    images: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def name(self) -> str:
        return f"{self.number:05d}_seed{self.seed}.png"


def possible_tasks(model: LatentDiffusion, guided: Collection[str] = ()) -> list[str]:
    """The tasks that a model can do. guided: fields that outside guides read."""
    return [task for task, needed in TASKS.items() if needed is None or needed in (*model.fields, *guided)]


def chosen_task(model: LatentDiffusion, config: DictConfig, guided: Collection[str] = ()) -> str:
    """The task of the config, or the one that the given inputs imply. Raises ValueError where this model cannot do it."""
    task, fields = config.task, (*model.fields, *guided)
    if task is None:
        if config.mask is not None:
            task = "inpaint"
        elif config.extend is not None:
            task = "outpaint"
        elif config.image is not None:
            task = next((t for t in ("superres", "variation") if TASKS[t] in fields), "img2img")
        else:
            given = [t for t, f in TASKS.items() if f in fields and config[_option(FIELDS[f])] is not None]
            task = given[-1] if given else "unconditional"
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; this model can do {', '.join(possible_tasks(model, guided))}")
    if task not in possible_tasks(model, guided):
        raise ValueError(
            f"this model has no {TASKS[task]} conditioner, so it cannot do task={task}; it can do "
            f"{', '.join(possible_tasks(model, guided))}"
        )
    needed = TASKS[task]
    if needed and (option := _option(FIELDS[needed])) != "image" and config[option] is None:
        raise ValueError(f"task={task} needs {option}=...")
    for option, meant in (("mask", "inpaint"), ("extend", "outpaint")):
        if config[option] is not None and task != meant:
            raise ValueError(f"{option}= means nothing to task={task}, only to task={meant}")
    if config.image is not None and TASKS[task] not in ("lowres", "reference") and task not in FROM_IMAGE:
        raise ValueError(f"image= means nothing to task={task}; leave it or task= out")
    if config.task == "unconditional" and (
        given := [o for o in ("prompts", "classes", "map", "layout", "depth") if config[o] is not None]
    ):
        raise ValueError(f"{given[0]}= means nothing to task=unconditional; leave it or task= out")
    for option in ("invert", "image_prompt"):
        if config[option] and task != "img2img":
            raise ValueError(f"{option}= means nothing to task={task}, only to task=img2img")
    if task == "interpolate" and guided:
        raise ValueError("guide.* leads to one class or caption, task=interpolate from one to the next; leave one out")
    if task == "interpolate" and config.weaker_model is not None:
        raise ValueError(
            "weaker_model= and task=interpolate do not go together: the weaker model knows no mixtures of conditions"
        )
    needs = ["image"] if task in (*FROM_IMAGE, "superres", "variation") and task != "interpolate" else []
    needs += {"inpaint": ["mask"], "outpaint": ["extend"]}.get(task, [])
    if missing := [
        f"{option}=<{'pixels' if option == 'extend' else 'file'}>" for option in needs if config[option] is None
    ]:
        raise ValueError(f"task={task} needs {' and '.join(missing)}")
    return task


def picture_size(model: LatentDiffusion, size: Any, option: str = "size") -> tuple[int, int]:
    """(H, W) of the pictures. Raises ValueError for a size that the model's halvings do not divide."""
    f = model.first_stage.downsample_factor
    if size is None:
        return model.latent_size[0] * f, model.latent_size[1] * f
    height, width = (int(size), int(size)) if isinstance(size, int | str) else (int(v) for v in size)
    least = f * model.network.size_multiple
    if height < 1 or width < 1 or height % least or width % least:
        raise ValueError(
            f"{option} {height}x{width} is not divisible by {least} (downsample_factor {f}, latents in multiples of "
            f"{model.network.size_multiple}); use {max(least, round(height / least) * least)}x{max(least, round(width / least) * least)}"
        )
    return height, width


def _option(field: Field) -> str:
    """The option that gives a field."""
    return field.option or f"fields.{field.name}"


def known_fields(model: LatentDiffusion) -> dict[str, Field]:
    """The fields there are, with those that the model's conditioners declare."""
    return FIELDS | {c.declares.name: c.declares for c in model.conditioners.values() if c.declares is not None}


def requests(model: LatentDiffusion, config: DictConfig, guides: Mapping[str, Any] | None = None) -> list[Request]:
    """One entry per picture, in order. guides: {field: parser} of outside guides, which read `prompts` or `classes` too.

    Raises ValueError or FileNotFoundError where the model does not take what is asked, naming the option.
    """
    guides = guides or {}
    task, size = chosen_task(model, config, guides), picture_size(model, config.size)
    by_field = {c.field: c for c in model.conditioners.values()}
    channels = model.first_stage.autoencoder.in_channels
    known = known_fields(model)
    option_of = {name: _option(field) for name, field in known.items() if name != "image"}
    own = [f"fields.{name}" for name in config.fields]
    given = {o: as_list(OmegaConf.select(config, o), o) for o in (*dict.fromkeys(option_of.values()), "mask", *own)}
    used = {f: option_of[f] for f in by_field if f != "masked_image" and given[option_of[f]]}
    guided = {f: option_of[f] for f in guides if given[option_of[f]]}
    if task in FROM_IMAGE:
        used = {f: option for f, option in used.items() if option != "image"}
    for option in ("prompts", "classes", "map", "layout", "depth", *own):
        if given[option] and option not in (*used.values(), *guided.values()):
            needed = next((f for f, o in option_of.items() if o == option), option.removeprefix("fields."))
            takes = sorted({f"{option_of[f]}=" for f in (*by_field, *guides)}) or ["no condition"]
            raise ValueError(
                f"this model has no {needed} conditioner, so {option}= means nothing to it; it takes {', '.join(takes)}"
            )
    options = {*used.values(), *guided.values()} | {o for o in ("image", "mask") if given[o]}

    def fields_of(entries: dict[str, Any]) -> dict[str, Any]:
        return {f: known[f].from_words(entries[o], by_field[f], size, channels) for f, o in used.items()}

    if task == "interpolate":
        return _walk(config, {o: given[o] for o in options}, fields_of, size, channels)
    count = max((len(given[o]) for o in options), default=1)
    for option in options:
        if len(given[option]) not in (1, count):
            raise ValueError(
                f"{option} has {len(given[option])} entries, others {count}: they are paired, give equally many or one"
            )
    listed = {o: given[o] * count if len(given[o]) == 1 else given[o] for o in options}
    canvas, all_requests = size, []
    if task == "outpaint":
        top, right, bottom, left = (list(config.extend) + [0] * 4)[:4]
        canvas = picture_size(model, (size[0] + top + bottom, size[1] + left + right), "the extended picture's size")
    for j in range(count):
        entries = {o: listed[o][j] for o in sorted(options)}
        own = entries["prompts"] if isinstance(entries.get("prompts"), dict) else {}
        if own:
            entries["prompts"] = own["prompt"]
        fields = {f: known[f].from_words(entries[o], by_field[f], canvas, channels) for f, o in used.items()}
        image, mask = None, None
        if task in FROM_IMAGE:
            image = read_image(entries["image"], size, channels)
        if task == "outpaint":
            image, mask = extended(image, config.extend)
        elif task == "inpaint":
            require_same_shape(entries["image"], entries["mask"])
            mask = read_mask(entries["mask"], size)
        if mask is not None and "masked_image" in by_field:
            fields["masked_image"] = masked_image(image, mask)
        targets = {f: guides[f](entries[o]) for f, o in guided.items()}
        negative = own.get("negative", None if config.negative is None else str(config.negative))
        n, first = own.get("n", config.n), own.get("seed")
        if len(all_requests) + n > MOST:
            raise ValueError(f"prompts asks for more than {MOST} pictures; make several jobs of them")
        for i in range(1 if task == "reconstruct" else n):  # which has no randomness
            number = len(all_requests)
            seed = config.seed + number if first is None else first + i
            text = _words(entries, fields, by_field)
            all_requests.append(Request(seed, fields, text, number, image, mask, negative, targets))
    return all_requests


def _words(entries: Mapping[str, str], fields: Mapping[str, Any], by_field: Mapping[str, Any]) -> str:
    """The condition as readable text."""
    words = [entries[o] if o in ("prompts", "classes") else Path(entries[o]).name for o in entries if o != "layout"]
    boxes = [by_field[f].describe([fields[f]])[0] for f in fields if f == "boxes"]
    return " / ".join(filter(None, words + boxes))


def _weighted(text: str) -> tuple[float, str]:
    """ "+0.5 a red circle" -> (0.5, "a red circle")"""
    sign, rest = (-1.0 if text[0] == "-" else 1.0), text[1:].strip()
    head, _, tail = rest.partition(" ")
    return (sign * float(head), tail.strip()) if re.fullmatch(r"\d+\.\d+", head) else (sign, rest)


def _walk(
    config: DictConfig,
    given: dict[str, list[Any]],
    fields_of: Callable[[dict[str, Any]], dict[str, Any]],
    size: tuple[int, int],
    channels: int,
) -> list[Request]:
    """task=interpolate: sums of conditions (+prompt -prompt), or n steps from each condition, seed or picture to the next."""
    prompts = given.get("prompts", [])
    if any(isinstance(p, dict) for p in prompts):
        raise ValueError("task=interpolate takes plain prompts, without a seed or n of their own")
    negative = None if config.negative is None else str(config.negative)
    if len(prompts) > 1 and all(p[:1] in "+-" and p for p in prompts):
        if set(given) != {"prompts"}:
            raise ValueError(f"arithmetic takes prompts alone, not {', '.join(sorted(set(given) - {'prompts'}))}")
        mix = tuple((w, fields_of({"prompts": text})) for w, text in map(_weighted, prompts))
        words = " ".join(prompts)
        return [Request(config.seed + i, {}, words, i, negative=negative, mix=mix) for i in range(config.n)]
    ends = max((len(v) for v in given.values()), default=1)
    if ends == 1 and not given.get("image"):
        ends = 2  # from the noise of one seed to that of the next, under one condition
    if ends < 2:
        raise ValueError("task=interpolate needs two pictures or more: image=[a.png,b.png]")
    for option, values in given.items():
        if len(values) not in (1, ends):
            raise ValueError(f"{option} has {len(values)} entries, others {ends}: give equally many or one")
    listed = {o: v * ends if len(v) == 1 else v for o, v in given.items()}
    if config.n < 2:
        raise ValueError("task=interpolate needs n of at least 2: the pictures from one end to the next, both included")
    stops = [{o: listed[o][j] for o in sorted(listed) if o != "image"} for j in range(ends)]
    fields = [fields_of(stop) for stop in stops]
    pictures = [read_image(path, size, channels) for path in listed.get("image", [])]
    all_requests: list[Request] = []
    for j in range(ends - 1):
        for i in range(config.n if j == 0 else config.n - 1):
            t = (i if j == 0 else i + 1) / (config.n - 1)
            mix = ((1 - t, fields[j]), (t, fields[j + 1])) if stops[j] != stops[j + 1] else ((1.0, fields[j]),)
            words = " to ".join(dict.fromkeys(" / ".join(stop.values()) for stop in (stops[j], stops[j + 1])))
            all_requests.append(
                Request(
                    # One seed along the walk: samplers that draw noise in every step draw the same.
                    config.seed, {}, f"{words} {t:.2f}".strip(), len(all_requests), negative=negative,
                    mix=mix if stops[j] else (), walk=(config.seed + j, config.seed + j + 1, t),
                    images=(pictures[j], pictures[j + 1]) if pictures else None,
                )
            )  # fmt: skip
    return all_requests


def latent_mask(mask: torch.Tensor, factor: int) -> torch.Tensor:
    """(B, 1, H, W) -> (B, 1, h, w): a latent cell is drawn anew as soon as any of its pixels is."""
    return F.max_pool2d(mask, factor)
