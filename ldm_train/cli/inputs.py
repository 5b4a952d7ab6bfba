"""What ldm-sample is asked for: the task, and from files and words the conditions of every picture."""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch.nn import functional as F

from ldm_train.data.masks import masked_image
from ldm_train.data.transforms import ImageTransform, decode_image, decode_labels, to_unit_range
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
# Which begin from the picture itself.
FROM_IMAGE = ("inpaint", "outpaint", "img2img", "reconstruct", "interpolate")
# field: the option that gives it
OPTIONS = {
    "caption": "prompts",
    "class_label": "classes",
    "boxes": "layout",
    "segmentation": "map",
    "depth": "depth",
    "lowres": "image",
    "reference": "image",
    "masked_image": "image",
}


PROMPT_KEYS = ("prompt", "negative", "seed", "n")  # of a line of JSON, or an entry of a list


@dataclass
class Request:
    """One picture: its seed, the fields it is conditioned on, how people read them, and what it begins from.

    targets: what outside guides (classifier, CLIP) lead to, by field. mix: weighted fields, in the place of `fields`.
    walk: (first seed, second seed, how far between them). images: the two pictures that a walk leads between.
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


def _prompt(entry: Any, where: str) -> str | dict[str, Any]:
    """A caption, or its JSON form. Raises ValueError naming the line."""
    if isinstance(entry, str):
        return entry
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
        raise ValueError(f'{where} is no prompt; write {{"prompt": "..."}}, with any of negative, seed and n beside it')
    if unknown := sorted(set(entry) - set(PROMPT_KEYS)):
        raise ValueError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(PROMPT_KEYS)}")
    for key in ("seed", "n"):
        if key in entry and (not isinstance(entry[key], int) or entry[key] < (key == "n")):
            raise ValueError(f"{where}: {key} is {entry[key]!r}, not a count")
    return dict(entry)


def _prompt_file(path: Path, option: str) -> list[Any]:
    """The lines of a .txt or .jsonl file. Raises ValueError for a line that says nothing."""
    if not path.is_file():
        raise FileNotFoundError(f"{option}={path}: there is no such file")
    lines = path.read_text().rstrip().splitlines()
    if not lines:
        raise ValueError(f"{option}={path} is empty")
    found = []
    for number, line in enumerate(map(str.strip, lines), 1):
        where = f"{path}, line {number}"
        if not line:
            raise ValueError(f'{where} is blank; remove it, or write "" for an empty caption')
        if path.suffix == ".txt":
            found.append("" if line == '""' else line)
            continue
        try:
            found.append(_prompt(json.loads(line), where))
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is no JSON: {error}") from error
    return found


def as_list(value: Any, option: str) -> list[Any]:
    """One entry or a list; prompts and classes may also be the lines of a text file, prompts of a .jsonl file."""
    if value is None:
        return []
    value = OmegaConf.to_container(value) if isinstance(value, ListConfig) else value
    if isinstance(value, list):
        # A list of layouts, or one layout written as YAML.
        if option == "layout" and value and isinstance(value[0], list) and not isinstance(value[0][0], list):
            return [json.dumps(value)]
        if option == "prompts":
            entries = enumerate(value, 1)
            return [_prompt(v if isinstance(v, dict) else str(v), f"prompts, entry {k}") for k, v in entries]
        return [json.dumps(v) if isinstance(v, list) else str(v) for v in value]
    path = Path(str(value))
    if " " not in path.name and path.suffix in {"prompts": (".txt", ".jsonl"), "classes": (".txt",)}.get(option, ()):
        return _prompt_file(path, option)
    return [str(value)]


def possible_tasks(model: LatentDiffusion, guided: Collection[str] = ()) -> list[str]:
    """guided: fields that outside guides understand."""
    return [task for task, needed in TASKS.items() if needed is None or needed in (*model.fields, *guided)]


def chosen_task(model: LatentDiffusion, config: DictConfig, guided: Collection[str] = ()) -> str:
    """The task asked for, or what the given inputs mean. Raises ValueError where this model cannot do it."""
    task, fields = config.task, (*model.fields, *guided)
    if task is None:
        if config.mask is not None:
            task = "inpaint"
        elif config.extend is not None:
            task = "outpaint"
        elif config.image is not None:
            task = next((t for t in ("superres", "variation") if TASKS[t] in fields), "img2img")
        else:
            given = [t for t, f in TASKS.items() if f in fields and config[OPTIONS[f]] is not None]
            task = given[-1] if given else "unconditional"
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; this model can do {', '.join(possible_tasks(model, guided))}")
    if task not in possible_tasks(model, guided):
        raise ValueError(
            f"this model has no {TASKS[task]} conditioner, so it cannot do task={task}; it can do "
            f"{', '.join(possible_tasks(model, guided))}"
        )
    needed = TASKS[task]
    if needed and OPTIONS[needed] != "image" and config[OPTIONS[needed]] is None:
        raise ValueError(f"task={task} needs {OPTIONS[needed]}=...")
    for option, meant in (("mask", "inpaint"), ("extend", "outpaint")):
        if config[option] is not None and task != meant:
            raise ValueError(f"{option}= means nothing to task={task}, only to task={meant}")
    if config.image is not None and TASKS[task] not in ("lowres", "reference") and task not in FROM_IMAGE:
        raise ValueError(f"image= means nothing to task={task}; leave it or task= out")
    needs = ["image"] if task in (*FROM_IMAGE, "superres", "variation") and task != "interpolate" else []
    needs += {"inpaint": ["mask"], "outpaint": ["extend"]}.get(task, [])
    if missing := [
        f"{option}=<{'pixels' if option == 'extend' else 'file'}>" for option in needs if config[option] is None
    ]:
        raise ValueError(f"task={task} needs {' and '.join(missing)}")
    return task


def _bytes(path: str, option: str) -> bytes:
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{option}={path}: there is no such file")
    return file.read_bytes()


def read_image(path: str, size: tuple[int, int], channels: int, option: str = "image") -> torch.Tensor:
    """(C, H, W) in [-1, 1], cut to the middle and resized to `size`. Raises ValueError naming the file."""
    try:
        image = decode_image(_bytes(path, option), Path(path).suffix.lower().lstrip("."), channels)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"{option}={path}: {error}") from error
    transform = ImageTransform(size, "center")
    return to_unit_range(transform.apply(image, transform.plan(*image.shape[1:], None)))


def read_map(path: str, size: tuple[int, int]) -> torch.Tensor:
    """(H, W) int64. A map keeps its labels: it is cut and resized by nearest neighbour."""
    try:
        labels = decode_labels(_bytes(path, "map"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"map={path}: {error}") from error
    transform = ImageTransform(size, "center")
    return transform.apply(labels, transform.plan(*labels.shape[1:], None), nearest=True)[0].long()


def read_mask(path: str, size: tuple[int, int]) -> torch.Tensor:
    """(1, H, W), 1 in the hole (white in the file). Raises ValueError for a mask without a hole."""
    mask = (read_image(path, size, 1, "mask") > 0).float()
    if not mask.any():
        raise ValueError(f"mask={path} has no hole: white is what is drawn anew, and there is none")
    return mask


def picture_size(model: LatentDiffusion, size: Any, option: str = "size") -> tuple[int, int]:
    """(H, W) of the pictures. Raises ValueError for a size that the model's halvings do not divide."""
    f = model.first_stage.downsample_factor
    if size is None:
        return model.latent_size[0] * f, model.latent_size[1] * f
    height, width = (int(size), int(size)) if isinstance(size, int | str) else (int(v) for v in size)
    least = f * 2 ** (model.unet.levels - 1)
    if height < 1 or width < 1 or height % least or width % least:
        raise ValueError(
            f"{option} {height}x{width} is not divisible by {least} (downsample_factor {f} and {model.unet.levels - 1} halvings); "
            f"use {max(least, round(height / least) * least)}x{max(least, round(width / least) * least)}"
        )
    return height, width


def extended(image: torch.Tensor, extend: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """An image (C, H, W) in the middle of a larger one, and the mask (1, H', W') of what is new.

    extend: pixels added at the top, right, bottom and left. Raises ValueError where nothing is.
    """
    if len(extend) != 4 or min(extend) < 0 or not any(extend):
        raise ValueError(
            f"extend is [top, right, bottom, left] in pixels, at least one of them above 0, not {list(extend)}"
        )
    top, right, bottom, left = extend
    margins = (left, right, top, bottom)
    mask = F.pad(torch.zeros(1, *image.shape[1:]), margins, value=1.0)
    return F.pad(image, margins), mask


def _value(conditioner: Any, given: str, size: tuple[int, int], channels: int) -> Any:
    """One entry of a conditioner's field from the command line."""
    if conditioner.field == "boxes":
        if given.endswith(".json"):
            given = _bytes(given, "layout").decode()
        return conditioner.parse(given)
    if conditioner.field == "segmentation":
        labels = read_map(given, size)
        conditioner.shares(labels[None].to(conditioner.device))  # complains about labels that it does not have
        return labels
    if conditioner.field == "depth":
        return (read_image(given, size, 1, "depth") + 1) / 2
    if conditioner.field == "lowres":
        f = conditioner.factor
        return read_image(given, (size[0] // f, size[1] // f), channels)
    if conditioner.field == "reference":
        return read_image(given, size, channels)
    return conditioner.parse(given)


def requests(model: LatentDiffusion, config: DictConfig, guides: Mapping[str, Any] | None = None) -> list[Request]:
    """One entry per picture, in order. guides: {field: parser} of outside guides, which read `prompts` or `classes` too.

    Raises ValueError or FileNotFoundError where the model does not take what is asked, naming the option.
    """
    guides = guides or {}
    task, size = chosen_task(model, config, guides), picture_size(model, config.size)
    by_field = {c.field: c for c in model.conditioners.values()}
    channels = model.first_stage.autoencoder.in_channels
    given = {o: as_list(config[o], o) for o in (*dict.fromkeys(OPTIONS.values()), "mask")}
    used = {f: OPTIONS[f] for f in by_field if f != "masked_image" and given[OPTIONS[f]]}
    guided = {f: OPTIONS[f] for f in guides if given[OPTIONS[f]]}
    if task in FROM_IMAGE:
        used = {f: option for f, option in used.items() if option != "image"}
    for option in ("prompts", "classes", "map", "layout", "depth"):
        if given[option] and option not in (*used.values(), *guided.values()):
            needed = next(f for f, o in OPTIONS.items() if o == option)
            known = sorted({f"{OPTIONS[f]}=" for f in (*by_field, *guides)}) or ["no condition"]
            raise ValueError(
                f"this model has no {needed} conditioner, so {option}= means nothing to it; it takes {', '.join(known)}"
            )
    options = {*used.values(), *guided.values()} | {o for o in ("image", "mask") if given[o]}

    def fields_of(entries: dict[str, Any]) -> dict[str, Any]:
        return {f: _value(by_field[f], entries[o], size, channels) for f, o in used.items()}

    if task == "interpolate":
        return _walk(config, {o: given[o] for o in options}, fields_of, size, channels)
    count = max((len(given[o]) for o in options), default=1)
    for option in options:
        if len(given[option]) not in (1, count):
            raise ValueError(
                f"{option} has {len(given[option])} entries, others {count}: they are paired, give equally many or one"
            )
    listed = {o: given[o] * count if len(given[o]) == 1 else given[o] for o in options}
    canvas, found = size, []
    if task == "outpaint":
        top, right, bottom, left = (list(config.extend) + [0] * 4)[:4]
        canvas = picture_size(model, (size[0] + top + bottom, size[1] + left + right), "the extended picture's size")
    for j in range(count):
        entries = {o: listed[o][j] for o in sorted(options)}
        own = entries["prompts"] if isinstance(entries.get("prompts"), dict) else {}
        if own:
            entries["prompts"] = own["prompt"]
        fields = {f: _value(by_field[f], entries[o], canvas, channels) for f, o in used.items()}
        image, mask = None, None
        if task in FROM_IMAGE:
            image = read_image(entries["image"], size, channels)
        if task == "outpaint":
            image, mask = extended(image, config.extend)
        elif task == "inpaint":
            mask = read_mask(entries["mask"], size)
        if mask is not None and "masked_image" in by_field:
            fields["masked_image"] = masked_image(image, mask)
        targets = {f: guides[f](entries[o]) for f, o in guided.items()}
        negative = own.get("negative", None if config.negative is None else str(config.negative))
        n, first = own.get("n", config.n), own.get("seed")
        for i in range(n):
            number = len(found)
            seed = config.seed + number if first is None else first + i
            text = _words(entries, fields, by_field)
            found.append(Request(seed, fields, text, number, image, mask, negative, targets))
    return found


def _words(entries: Mapping[str, str], fields: Mapping[str, Any], by_field: Mapping[str, Any]) -> str:
    """How people read a condition."""
    words = [entries[o] if o in ("prompts", "classes") else Path(entries[o]).name for o in entries if o != "layout"]
    boxes = [by_field[f].describe([fields[f]])[0] for f in fields if f == "boxes"]
    return " / ".join(filter(None, words + boxes))


def _weighted(text: str) -> tuple[float, str]:
    """ "+0.5 a red circle" -> (0.5, "a red circle")"""
    sign, rest = (-1.0 if text[0] == "-" else 1.0), text[1:].strip()
    head, _, tail = rest.partition(" ")
    try:
        return sign * float(head), tail.strip()
    except ValueError:
        return sign, rest


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
    found: list[Request] = []
    for j in range(ends - 1):
        for i in range(config.n if j == 0 else config.n - 1):
            t = (i if j == 0 else i + 1) / (config.n - 1)
            mix = ((1 - t, fields[j]), (t, fields[j + 1])) if stops[j] != stops[j + 1] else ((1.0, fields[j]),)
            words = " to ".join(dict.fromkeys(" / ".join(stop.values()) for stop in (stops[j], stops[j + 1])))
            found.append(
                Request(
                    # One seed along the walk: samplers that draw noise in every step draw the same.
                    config.seed, {}, f"{words} {t:.2f}".strip(), len(found), negative=negative,
                    mix=mix if stops[j] else (), walk=(config.seed + j, config.seed + j + 1, t),
                    images=(pictures[j], pictures[j + 1]) if pictures else None,
                )
            )  # fmt: skip
    return found


def latent_mask(mask: torch.Tensor, factor: int) -> torch.Tensor:
    """(B, 1, H, W) -> (B, 1, h, w): a latent cell is drawn anew as soon as any of its pixels is."""
    return F.max_pool2d(mask, factor)
