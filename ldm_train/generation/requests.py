"""The requests to ldm-sample: the task, and the conditions of every picture, read from files and texts."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch.nn import functional as F

from ldm_train.conditioning.class_label import ClassLabel
from ldm_train.data.batch import FIELDS, Field
from ldm_train.data.buckets import nearest_size
from ldm_train.data.masks import masked_image
from ldm_train.generation.files import as_list, extended, note_cuts, read_image, read_mask, require_same_shape
from ldm_train.latent_diffusion import LatentDiffusion

# task: the condition it needs, None if any model can do it
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
MOST = 1 << 20  # largest value of a count; most pictures of one job


@dataclass
class Request:
    """One picture: its seed, the fields of its condition, these as text, and the picture and mask it starts from.

    targets: of the external guides (classifier, CLIP), by field. mix: weighted fields, used instead of `fields`. walk:
    (first seed, second seed, position between them from 0 to 1). images: the two pictures at the ends of a walk.
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


def class_names(model: LatentDiffusion) -> list[str]:
    """Returns the names of the classes that the model is conditioned on, [] if there are none."""
    return next((c.names for c in model.conditioners.values() if isinstance(c, ClassLabel)), [])


def possible_tasks(model: LatentDiffusion, guided: Collection[str] = ()) -> list[str]:
    """Returns the tasks that a model can do. guided: fields that external guides read."""
    return [task for task, needed in TASKS.items() if needed is None or needed in (*model.fields, *guided)]


def chosen_task(model: LatentDiffusion, config: DictConfig, guided: Collection[str] = ()) -> str:
    """Returns the config's task, or the one that the given inputs imply. Raises ValueError if this model cannot do it,
    or if an option is missing or does not fit it."""
    task, fields = config.task, (*model.fields, *guided)
    if task is None:
        if config.mask is not None:
            task = "inpaint"
        elif config.extend is not None:
            task = "outpaint"
        elif config.image is not None:
            task = next((t for t in ("superres", "variation") if TASKS[t] in fields), "img2img")
        else:
            given = [t for t, f in TASKS.items() if f in fields and config[FIELDS[f].argument] is not None]
            task = given[-1] if given else "unconditional"
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; this model can do {', '.join(possible_tasks(model, guided))}")
    if task not in possible_tasks(model, guided):
        raise ValueError(
            f"this model has no {TASKS[task]} conditioner, so it cannot do task={task}; it can do "
            f"{', '.join(possible_tasks(model, guided))}"
        )
    needed = TASKS[task]
    if needed and (option := FIELDS[needed].argument) != "image" and config[option] is None:
        raise ValueError(f"task={task} needs {option}=...")
    for option, meant in (("mask", "inpaint"), ("extend", "outpaint")):
        if config[option] is not None and task != meant:
            raise ValueError(f"{option}= has no effect with task={task}, only with task={meant}")
    if config.image is not None and TASKS[task] not in ("lowres", "reference") and task not in FROM_IMAGE:
        raise ValueError(f"image= has no effect with task={task}; leave it or task= out")
    if config.task == "unconditional" and (
        given := [o for o in ("prompts", "classes", "map", "layout", "depth") if config[o] is not None]
    ):
        raise ValueError(f"{given[0]}= has no effect with task=unconditional; leave it or task= out")
    for option in ("invert", "image_prompt"):
        if config[option] and task != "img2img":
            raise ValueError(f"{option}= has no effect with task={task}, only with task=img2img")
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


def picture_multiple(model: LatentDiffusion) -> int:
    """Returns the number of pixels that divides the sides of a model's pictures."""
    return model.first_stage.downsample_factor * model.network.size_multiple


def picture_size(model: LatentDiffusion, size: Any, option: str = "size", hint: str = "") -> tuple[int, int]:
    """Returns (H, W) of the pictures. size: None for the training size, a side, [height, width], or a ratio
    "width:height", which gives about as many pixels as the model was trained on. Raises ValueError, its message ended by
    `hint`, if the model's downsampling does not divide the size."""
    f, least = model.first_stage.downsample_factor, picture_multiple(model)
    trained = model.latent_size[0] * f, model.latent_size[1] * f
    if size is None:
        return trained
    if isinstance(size, str):
        width, height = map(int, size.split(":"))
        return nearest_size(trained, least, height / width)
    height, width = (size, size) if isinstance(size, int) else (int(v) for v in size)
    if height < 1 or width < 1 or height % least or width % least:
        raise ValueError(
            f"{option} {height}x{width} is not divisible by {least} (downsample_factor {f}, latents in multiples of "
            f"{model.network.size_multiple}); use {max(least, round(height / least) * least)}x{max(least, round(width / least) * least)}"
            f"{hint}"
        )
    return height, width


def _by_field(model: LatentDiffusion) -> dict[str, Any]:
    """Returns the model's conditioners by the batch field that each reads."""
    return {c.field: c for c in model.conditioners.values()}


def known_fields(model: LatentDiffusion) -> dict[str, Field]:
    """Returns the built-in batch fields and those that the model's conditioners declare."""
    return FIELDS | {c.declares.name: c.declares for c in model.conditioners.values() if c.declares is not None}


@dataclass
class _Inputs:
    """The inputs of a job. given: entries by option; used: the option that fills each field of the condition; guided:
    the option that each external guide reads, by field; read: what was read already, as an entry may serve many
    pictures."""

    model: LatentDiffusion
    given: dict[str, list[Any]]
    used: dict[str, str]
    guided: dict[str, str]
    read: dict[tuple[str, str, tuple[int, int]], Any] = field(default_factory=dict)

    @classmethod
    def of(cls, model: LatentDiffusion, config: DictConfig, task: str, guides: Collection[str]) -> "_Inputs":
        """Collects the inputs from the config. Raises ValueError if the model does not take a given option."""
        by_field = _by_field(model)
        option_of = {name: field.argument for name, field in known_fields(model).items() if name != "image"}
        own = [f"fields.{name}" for name in config.fields]
        given = {o: as_list(OmegaConf.select(config, o), o) for o in (*dict.fromkeys(option_of.values()), "mask", *own)}
        used = {f: option_of[f] for f in by_field if f != "masked_image" and given[option_of[f]]}
        guided = {f: option_of[f] for f in guides if given[option_of[f]]}
        if task in FROM_IMAGE:
            used = {f: option for f, option in used.items() if option != "image"}
        filling = {*used.values(), *guided.values()}
        for option in ("prompts", "classes", "map", "layout", "depth", *own):
            if given[option] and option not in filling:
                needed = next((f for f, o in option_of.items() if o == option), option.removeprefix("fields."))
                takes = sorted({f"{option_of[f]}=" for f in (*by_field, *guides)}) or ["no condition"]
                raise ValueError(
                    f"this model has no {needed} conditioner, so {option}= has no effect; it takes {', '.join(takes)}"
                )
        options = filling | {o for o in ("image", "mask") if given[o]}
        return cls(model, {o: given[o] for o in sorted(options)}, used, guided)

    def paired(self, count: int) -> list[dict[str, Any]]:
        """Returns `count` dictionaries with one entry of each option; a single entry is repeated. Raises ValueError if
        an option has neither `count` entries nor one."""
        for option, values in self.given.items():
            if len(values) not in (1, count):
                raise ValueError(
                    f"{option} has {len(values)} entries, others {count}: they are paired, give equally many or one"
                )
        return [{o: values[j if len(values) > 1 else 0] for o, values in self.given.items()} for j in range(count)]

    def fields(self, entries: Mapping[str, Any], size: tuple[int, int]) -> dict[str, Any]:
        """Returns the condition, by field, that entries (by option) describe."""
        known, channels = known_fields(self.model), self.model.first_stage.autoencoder.in_channels
        by_field, result = _by_field(self.model), {}
        for f, o in self.used.items():
            if o in entries:
                place = (f, entries[o], size)
                if place not in self.read:
                    self.read[place] = known[f].from_words(entries[o], by_field[f], size, channels)
                result[f] = self.read[place]
        return result


def requests(model: LatentDiffusion, config: DictConfig, task: str, guides: Mapping[str, Any]) -> list[Request]:
    """Returns one request per picture, in order. task: see `chosen_task`. guides: {field: parser} of external guides,
    which also read `prompts` or `classes`.

    Raises ValueError or FileNotFoundError, naming the option, if the model does not take what is asked.
    """
    size = picture_size(model, config.size)
    inputs = _Inputs.of(model, config, task, guides)
    if task == "interpolate":
        _check_trained_without(model, task, inputs.used)
        return _walk(config, inputs, size)
    if task in (*FROM_IMAGE, "superres"):
        lowres = _by_field(model).get("lowres")
        factor, least = 1 if lowres is None else lowres.factor, picture_multiple(model)
        note_cuts(inputs.given.get("image", []), size, factor, least)
    canvas = size
    if task == "outpaint":
        top, right, bottom, left = config.extend
        whole, hint = (size[0] + top + bottom, size[1] + left + right), " in all, by other values in extend="
        canvas = picture_size(model, whole, "the extended picture's size", hint)
    all_requests: list[Request] = []
    starts: dict[tuple[Any, Any], tuple[torch.Tensor | None, ...]] = {}  # by files, which many pictures may share
    for entries in inputs.paired(max(map(len, inputs.given.values()), default=1)):
        own = entries["prompts"] if isinstance(entries.get("prompts"), dict) else {}
        if own:
            entries["prompts"] = own["prompt"]
        files = entries.get("image"), entries.get("mask")
        if files not in starts:
            image, mask = _start(model, config, task, entries, size)
            joined = mask is not None and "masked_image" in _by_field(model)
            starts[files] = image, mask, masked_image(image, mask) if joined else None
        image, mask, hidden = starts[files]
        fields = inputs.fields(entries, canvas)
        if hidden is not None:
            fields["masked_image"] = hidden
        _check_trained_without(model, task, fields)
        text = _words(entries, fields, _by_field(model))
        targets = {f: guides[f](entries[o]) for f, o in inputs.guided.items()}
        negative = own.get("negative", None if config.negative is None else str(config.negative))
        n, first = own.get("n", config.n), own.get("seed")
        if config.invert and own.get("n", 1) > 1:
            raise ValueError("a prompt's n has no effect with invert=true, which draws one picture; leave it out")
        if len(all_requests) + n > MOST:
            raise ValueError(f"these options ask for more than {MOST} pictures; make several jobs of them")
        for i in range(1 if task == "reconstruct" else n):  # one picture of each
            number = len(all_requests)
            seed = config.seed + number if first is None else first + i
            all_requests.append(Request(seed, fields, text, number, image, mask, negative, targets))
    return all_requests


def _check_trained_without(model: LatentDiffusion, task: str, fields: Mapping[str, Any]) -> None:
    """Raises ValueError if a picture would be drawn without a field that training never left out. A model without
    masked_image takes the whole picture for the hole."""
    missing = [c.field for c in model.conditioners.values() if not c.dropout and c.field not in fields]
    missing = [field for field in missing if field != "masked_image"]
    if missing and task != "reconstruct":
        if known_fields(model)[missing[0]].argument == "image" and task in FROM_IMAGE:
            raise ValueError(
                f"this model cannot do task={task}: its image= is the condition ({missing[0]}), not a picture to change; leave "
                "task=, mask= and extend= out"
            )
        raise ValueError(
            f"this model was never trained without {missing[0]}, so it cannot do task={task} without; give "
            f"{known_fields(model)[missing[0]].argument}=..."
        )


def _start(
    model: LatentDiffusion, config: DictConfig, task: str, entries: Mapping[str, Any], size: tuple[int, int]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Returns the picture and the mask that sampling starts from, None if the task has none."""
    if task not in FROM_IMAGE:
        return None, None
    image = read_image(entries["image"], size, model.first_stage.autoencoder.in_channels)
    if task == "outpaint":
        return extended(image, config.extend)
    if task == "inpaint":
        require_same_shape(entries["image"], entries["mask"])
        return image, read_mask(entries["mask"], size)
    return image, None


def _words(entries: Mapping[str, str], fields: Mapping[str, Any], by_field: Mapping[str, Any]) -> str:
    """Returns the condition as readable text."""
    words = [entries[o] if o in ("prompts", "classes") else Path(entries[o]).name for o in entries if o != "layout"]
    boxes = [by_field[f].describe([fields[f]])[0] for f in fields if f == "boxes"]
    return " / ".join(filter(None, words + boxes))


def _weighted(text: str) -> tuple[float, str]:
    """ "+0.5 a red circle" -> (0.5, "a red circle")"""
    sign, rest = (-1.0 if text[0] == "-" else 1.0), text[1:].strip()
    head, _, tail = rest.partition(" ")
    return (sign * float(head), tail.strip()) if re.fullmatch(r"\d*\.\d+", head) else (sign, rest)


def _walk(config: DictConfig, inputs: _Inputs, size: tuple[int, int]) -> list[Request]:
    """Returns the requests of task=interpolate: sums of conditions (+prompt -prompt), or n pictures, both ends
    included, from each condition, seed or picture to the next."""
    given, prompts = inputs.given, inputs.given.get("prompts", [])
    if any(isinstance(p, dict) for p in prompts):
        raise ValueError("task=interpolate takes plain prompts, without a seed or n of their own")
    negative = None if config.negative is None else str(config.negative)
    if len(prompts) > 1 and all(p[:1] in "+-" and p for p in prompts):
        if others := sorted(set(given) - {"prompts"}):
            raise ValueError(f"arithmetic takes prompts alone, not {', '.join(others)}")
        mix = tuple((w, inputs.fields({"prompts": text}, size)) for w, text in map(_weighted, prompts))
        words = " ".join(prompts)
        return [Request(config.seed + i, {}, words, i, negative=negative, mix=mix) for i in range(config.n)]
    ends = max(map(len, given.values()), default=1)
    if ends == 1 and "image" not in given:
        ends = 2  # from the noise of one seed to that of the next, under one condition
    if ends < 2:
        raise ValueError("task=interpolate needs two pictures or more: image=[a.png,b.png]")
    stops = inputs.paired(ends)
    if config.n < 2:
        raise ValueError("task=interpolate needs n of at least 2: the pictures from one end to the next, both included")
    channels = inputs.model.first_stage.autoencoder.in_channels
    pictures = [read_image(stop.pop("image"), size, channels) for stop in stops if "image" in stop]
    fields = [inputs.fields(stop, size) for stop in stops]
    all_requests: list[Request] = []
    for j in range(ends - 1):
        changes = stops[j] != stops[j + 1]
        for i in range(0 if j == 0 else 1, config.n):
            t = i / (config.n - 1)
            mix = ((1 - t, fields[j]), (t, fields[j + 1])) if changes else ((1.0, fields[j]),)
            words = " to ".join(dict.fromkeys(" / ".join(stop.values()) for stop in (stops[j], stops[j + 1])))
            request = Request(
                seed=config.seed,  # the same for the whole walk, so that stochastic samplers draw the same noise
                fields={},
                text=f"{words} {t:.2f}".strip(),
                number=len(all_requests),
                negative=negative,
                mix=mix if stops[j] else (),
                walk=(config.seed + j, config.seed + j + 1, t),
                images=(pictures[j], pictures[j + 1]) if pictures else None,
            )
            all_requests.append(request)
    return all_requests


def latent_mask(mask: torch.Tensor, factor: int) -> torch.Tensor:
    """(B, 1, H, W) -> (B, 1, h, w): a latent cell is redrawn if any of its pixels is."""
    return F.max_pool2d(mask, factor)
