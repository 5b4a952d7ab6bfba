"""What ldm-sample is asked for: the task, and from files and words the conditions of every picture."""

import json
from dataclasses import dataclass
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
    "img2img": None,
    "reconstruct": None,
}
FROM_IMAGE = ("inpaint", "img2img", "reconstruct")  # which begin from the picture itself
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


@dataclass
class Request:
    """One picture: its seed, the fields it is conditioned on, how people read them, and what it begins from."""

    seed: int
    fields: dict[str, Any]
    text: str
    image: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    number: int = 0


def as_list(value: Any, option: str) -> list[str]:
    """One entry or a list; prompts and classes may also be the non-empty lines of a text file."""
    if value is None:
        return []
    if isinstance(value, ListConfig | list):
        # A list of layouts, or one layout written as YAML.
        value = OmegaConf.to_container(value) if isinstance(value, ListConfig) else value
        if option == "layout" and value and isinstance(value[0], list) and not isinstance(value[0][0], list):
            return [json.dumps(value)]
        return [v if isinstance(v, str) else (json.dumps(v) if isinstance(v, list) else str(v)) for v in value]
    path = Path(str(value))
    if option in ("prompts", "classes") and path.suffix == ".txt" and " " not in path.name:
        if not path.is_file():
            raise FileNotFoundError(f"{option}={value}: there is no such file")
        return [line.strip() for line in path.read_text().splitlines() if line.strip()]
    return [str(value)]


def possible_tasks(model: LatentDiffusion) -> list[str]:
    return [task for task, needed in TASKS.items() if needed is None or needed in model.fields]


def chosen_task(model: LatentDiffusion, config: DictConfig) -> str:
    """The task asked for, or what the given inputs mean. Raises ValueError where this model cannot do it."""
    task = config.task
    if task is None:
        if config.mask is not None:
            task = "inpaint"
        elif config.image is not None:
            task = next((t for t in ("superres", "variation") if TASKS[t] in model.fields), "img2img")
        else:
            given = [t for t, f in TASKS.items() if f in model.fields and config[OPTIONS[f]] is not None]
            task = given[-1] if given else "unconditional"
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; this model can do {', '.join(possible_tasks(model))}")
    if task not in possible_tasks(model):
        raise ValueError(
            f"this model has no {TASKS[task]} conditioner, so it cannot do task={task}; it can do "
            f"{', '.join(possible_tasks(model))}"
        )
    needed = TASKS[task]
    if needed and OPTIONS[needed] != "image" and config[OPTIONS[needed]] is None:
        raise ValueError(f"task={task} needs {OPTIONS[needed]}=...")
    if config.mask is not None and task != "inpaint":
        raise ValueError(f"mask= means nothing to task={task}, only to task=inpaint")
    if config.image is not None and TASKS[task] not in ("lowres", "reference") and task not in FROM_IMAGE:
        raise ValueError(f"image= means nothing to task={task}; leave it or task= out")
    needs = ["image"] if task in (*FROM_IMAGE, "superres", "variation") else []
    needs += ["mask"] if task == "inpaint" else []
    if missing := [f"{option}=<file>" for option in needs if config[option] is None]:
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


def picture_size(model: LatentDiffusion, size: Any) -> tuple[int, int]:
    """(H, W) of the pictures. Raises ValueError for a size that the model's halvings do not divide."""
    f = model.first_stage.downsample_factor
    if size is None:
        return model.latent_size[0] * f, model.latent_size[1] * f
    height, width = (int(size), int(size)) if isinstance(size, int | str) else (int(v) for v in size)
    least = f * 2 ** (model.unet.levels - 1)
    if height < 1 or width < 1 or height % least or width % least:
        raise ValueError(
            f"size {height}x{width} is not divisible by {least} (downsample_factor {f} and {model.unet.levels - 1} halvings); "
            f"use {max(least, round(height / least) * least)}x{max(least, round(width / least) * least)}"
        )
    return height, width


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


def requests(model: LatentDiffusion, config: DictConfig) -> list[Request]:
    """One entry per picture, in order. Raises ValueError or FileNotFoundError where the model does not take what is
    asked, naming the option."""
    task, size = chosen_task(model, config), picture_size(model, config.size)
    by_field = {c.field: c for c in model.conditioners.values()}
    channels = model.first_stage.autoencoder.in_channels
    given = {o: as_list(config[o], o) for o in (*dict.fromkeys(OPTIONS.values()), "mask")}
    used = {f: OPTIONS[f] for f in by_field if f != "masked_image" and given[OPTIONS[f]]}
    if task in FROM_IMAGE:
        used = {f: option for f, option in used.items() if option != "image"}
    for option in ("prompts", "classes", "map", "layout", "depth"):
        if given[option] and option not in used.values():
            needed = next(f for f, o in OPTIONS.items() if o == option)
            known = sorted({f"{OPTIONS[f]}=" for f in by_field}) or ["no condition"]
            raise ValueError(
                f"this model has no {needed} conditioner, so {option}= means nothing to it; it takes {', '.join(known)}"
            )
    options = {*used.values()} | ({"image"} if given["image"] else set()) | ({"mask"} if given["mask"] else set())
    count = max((len(given[o]) for o in options), default=1)
    for option in options:
        if len(given[option]) not in (1, count):
            raise ValueError(
                f"{option} has {len(given[option])} entries, others {count}: they are paired, give equally many or one"
            )
    listed = {o: given[o] * count if len(given[o]) == 1 else given[o] for o in options}
    found = []
    for j in range(count):
        fields = {f: _value(by_field[f], listed[o][j], size, channels) for f, o in used.items()}
        source = {o: listed[o][j] for o in sorted(options)}
        text = " / ".join(
            source[o] if o in ("prompts", "classes") else Path(source[o]).name for o in source if o != "layout"
        )
        text = " / ".join(filter(None, [text, *(by_field[f].describe([fields[f]])[0] for f in fields if f == "boxes")]))
        image, mask = None, None
        if task in FROM_IMAGE:
            image = read_image(listed["image"][j], size, channels)
        if task == "inpaint":
            mask = read_mask(listed["mask"][j], size)
            if "masked_image" in by_field:
                fields["masked_image"] = masked_image(image, mask)
        numbers = range(j * config.n, (j + 1) * config.n)
        found += [Request(config.seed + number, fields, text, image, mask, number) for number in numbers]
    return found


def latent_mask(mask: torch.Tensor, factor: int) -> torch.Tensor:
    """(B, 1, H, W) -> (B, 1, h, w): a latent cell is drawn anew as soon as any of its pixels is."""
    return F.max_pool2d(mask, factor)
