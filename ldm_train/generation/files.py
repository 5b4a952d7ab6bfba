"""The files that ldm-sample reads: prompts, pictures, masks and maps."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import ListConfig, OmegaConf
from torch.nn import functional as F

from ldm_train.data.fields import array_of
from ldm_train.data.files import as_shown, open_image
from ldm_train.data.transforms import read_bytes, read_image

PROMPT_KEYS = ("prompt", "negative", "seed", "n")  # keys of a JSON line, or of an entry in a list


def is_file(path: Path) -> bool:
    """Returns True if there is such a file, and False for a text that no file can be called by."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # longer than a name may be; with a null character
        return False


def _prompt(entry: Any, where: str) -> str | dict[str, Any]:
    """Checks a prompt: a caption, or a dictionary with PROMPT_KEYS. Raises ValueError, naming the line, if it is
    invalid."""
    if isinstance(entry, str):
        return entry
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
        raise ValueError(
            f'{where} is not a prompt; write {{"prompt": "..."}}, with any of negative, seed and n beside it'
        )
    if unknown := sorted(set(entry) - set(PROMPT_KEYS)):
        raise ValueError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(PROMPT_KEYS)}")
    for key in ("seed", "n"):
        if key in entry and (not isinstance(entry[key], int) or entry[key] < (key == "n")):
            raise ValueError(f"{where}: {key} is {entry[key]!r}, not a count")
    if not isinstance(entry.get("negative", ""), str):
        raise ValueError(f"{where}: negative is {entry['negative']!r}, not a caption")
    return dict(entry)


def _prompt_file(path: Path, option: str) -> list[Any]:
    """Returns the prompts in a .txt or .jsonl file, one per line. Raises FileNotFoundError if there is no file,
    ValueError if it is empty, is not UTF-8, or has a blank or invalid line."""
    if not path.is_file():
        raise FileNotFoundError(f"{option}={path}: there is no such file")
    try:
        lines = path.read_text(encoding="utf-8-sig").rstrip().split("\n")  # not at the separators within a caption
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from error
    if lines == [""]:
        raise ValueError(f"{option}={path} is empty")
    prompts = []
    for number, line in enumerate(map(str.strip, lines), 1):
        where = f"{path}, line {number}"
        if not line:
            raise ValueError(f'{where} is blank; remove it, or write "" for an empty caption')
        if path.suffix == ".txt":
            prompts.append("" if line == '""' else line)
            continue
        try:
            prompts.append(_prompt(json.loads(line), where))
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is not JSON: {error}") from error
    return prompts


def as_list(value: Any, option: str) -> list[Any]:
    """Returns an option's value, one entry or a list, as a list. prompts and classes may also name a .txt file, prompts
    a .jsonl file, with an entry per line. Raises ValueError for an empty list."""
    if value is None:
        return []
    value = OmegaConf.to_container(value, resolve=True) if isinstance(value, ListConfig) else value
    if value == []:
        raise ValueError(f"{option}=[] is an empty list; leave it out")
    if isinstance(value, list):
        # A list of layouts, or one layout written as YAML.
        if option == "layout" and isinstance(value[0], list) and not any(isinstance(v, list) for v in value[0]):
            return [json.dumps(value)]
        if option == "prompts":
            entries = enumerate(value, 1)
            return [_prompt(v if isinstance(v, dict) else str(v), f"prompts, entry {k}") for k, v in entries]
        return [json.dumps(v) if isinstance(v, list) else str(v) for v in value]
    path = Path(str(value))
    kinds = {"prompts": (".txt", ".jsonl"), "classes": (".txt",)}.get(option, ())
    if path.suffix in kinds and (" " not in path.name or is_file(path)):
        return _prompt_file(path, option)
    return [str(value)]


def read_mask(path: str, size: tuple[int, int]) -> torch.Tensor:
    """Reads a mask (1, H, W) that is 1 in the hole (white in the file). Raises ValueError if it has no hole."""
    mask = (read_image(path, size, 1, "mask") > 0).float()
    if not mask.any():
        raise ValueError(f"mask={path} has no hole: white marks what is redrawn, and there is none")
    return mask


def size_of(path: str, option: str) -> tuple[int, int]:
    """Returns (width, height) of a picture file. Raises ValueError, naming it, if it cannot be read."""
    data = read_bytes(path, option)
    try:
        if path.lower().endswith(".npy"):
            height, width = array_of(data).shape[:2]
            return width, height
        with open_image(data) as image:
            return as_shown(image).size
    except (OSError, ValueError) as error:
        raise ValueError(f"{option}={path}: {error}") from error


def note_cuts(paths: Sequence[str], size: tuple[int, int], factor: int, least: int) -> None:
    """Prints which pictures are cropped or reduced for a model that draws `size` (H, W), `factor` times as large as they
    are, and the size, in multiples of `least`, that would keep the first."""
    cut = []
    for path in dict.fromkeys(paths):
        width, height = size_of(path, "image")
        if abs(width * size[0] - height * size[1]) > 0.01 * width * size[0] or height * factor > size[0]:
            cut.append((path, width, height))
    if cut:
        path, width, height = cut[0]
        whole = ",".join(str(max(least, round(side * factor / least) * least)) for side in (height, width))
        others = f" (and {len(cut) - 1} more)" if len(cut) > 1 else ""
        print(
            f"{path}{others}: {width}x{height} pixels are cropped and resized to {size[1] // factor}x{size[0] // factor}; "
            f"size=[{whole}] keeps them",
            flush=True,
        )


def require_same_shape(image: str, mask: str) -> None:
    """Raises ValueError if picture and mask have different proportions, so that they would be cropped differently."""
    (w, h), (v, g) = size_of(image, "image"), size_of(mask, "mask")
    if abs(w * g - v * h) > 0.02 * w * g:
        raise ValueError(
            f"mask={mask} is {v}x{g}, image={image} is {w}x{h}: give a mask of the picture's own proportions"
        )


def extended(image: torch.Tensor, extend: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns an image (C, H, W) inside a larger one (C, H', W'), and the mask (1, H', W') of the added pixels.

    extend: pixels added at the top, right, bottom and left. Raises ValueError if none are, or one is negative.
    """
    if len(extend) != 4 or min(extend) < 0 or not any(extend):
        raise ValueError(
            f"extend is [top, right, bottom, left] in pixels, at least one of them above 0, not {list(extend)}"
        )
    top, right, bottom, left = extend
    margins = (left, right, top, bottom)
    mask = F.pad(torch.zeros(1, *image.shape[1:]), margins, value=1.0)
    return F.pad(image, margins), mask
