"""Checks what a request may ask for. It comes from anyone who can reach the page: it may set the options in OFFERED and
upload pictures; the models, adapters and folders are set by the command that started the app."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ldm_train import images as pictures
from ldm_train.app.offer import Input, Offer
from ldm_train.configuration import config_folder
from ldm_train.data.files import open_image
from ldm_train.generation.adapters import STRONGEST
from ldm_train.generation.files import as_list
from ldm_train.generation.job import FIELD
from ldm_train.storage import write_atomically

LISTS = ("prompts", "classes")
TEXTS = ("negative", "image_prompt", "spacing", "task")
NUMBERS = ("strength", "invert", "n", "seed", "size", "extend", "num_inference_steps", "guidance_scale")
OFFERED = frozenset((*LISTS, *TEXTS, *NUMBERS, "layout", "sampler", "adapters"))
FILES = ("image", "mask", "map", "depth")
SUFFIXES = {
    "PNG": ".png",
    "JPEG": ".jpg",
    "WEBP": ".webp",
    "BMP": ".bmp",
}  # of accepted uploads, by Pillow's names of formats
MOST_BOXES = 100
BATCH = 16  # the default batch size of ldm-sample
PICTURES = 4  # the default number of pictures of ldm-sample
OVERLAP = 0.75  # the largest share of a window or tile that overlaps the next one, in a replayed recipe
LEAST_CELLS = 8  # the smallest side of a tile in latent cells, in a replayed recipe
REPEATS = 10  # the most repeats of a step, and inversion iterations, in a replayed recipe


@dataclass(frozen=True)
class Limits:
    """The most that a request may ask for.

    pictures: per job. steps: per picture. side: pixels. characters: per text. upload: MB per file. megapixels: per
    uploaded picture.
    """

    pictures: int = 64
    steps: int = 250
    side: int = 1024
    characters: int = 2000
    upload: float = 20
    megapixels: float = 50


def samplers() -> list[str]:
    return sorted(p.stem for p in (config_folder() / "sampler").glob("*.yaml"))


def options_of(offer: Offer, asked: Mapping[str, Any], limits: Limits) -> dict[str, Any]:
    """Returns the options of ldm-sample for a request. asked: options in OFFERED, and pictures (bytes, or paths of
    uploads) for those in FILES and for the model's own fields. Raises ValueError for anything else, and for values
    beyond the limits."""
    check = {
        **{name: lambda v, name=name: [_text(name, t, limits, True) for t in _listed(v)] for name in LISTS},
        **{name: lambda v, name=name: _text(name, v, limits) for name in TEXTS},
        "layout": lambda v: layout(v, limits),
        "adapters": lambda v: adapters(offer, v),
        "sampler": sampler_tree,
    }
    own, options = _own(offer), dict[str, Any]()
    for name, value in asked.items():
        if value is None or (value == "" and name not in LISTS):
            continue
        if name in FILES or (name in own and own[name].kind == "picture"):
            files = [keep(offer, one, name, limits) for one in _listed(value)]
            value = files if len(files) > 1 else files[0]
        elif name in own:
            value = _text(name, value, limits)
        elif name not in OFFERED:
            raise ValueError(f"{name!r:.60} is nothing that this page can be asked for")
        else:
            value = check.get(name, lambda v: v)(value)
        section, _, field = name.rpartition(".")
        (options.setdefault(section, {}) if section else options)[field] = value
    _check_numbers(offer, options, limits)
    return options


def replay_of(offer: Offer, picture: Path, limits: Limits) -> dict[str, Any]:
    """Returns the options of ldm-sample that replay a picture of this project from the recipe it carries. The pictures
    it was drawn from are looked for among the uploads. Raises ValueError if it carries no recipe, or one beyond the
    limits."""
    _check_file(picture, limits)
    _header(picture.read_bytes(), "picture", limits)
    try:
        recipe = pictures.read_recipe(picture)
        config, batch_size = dict(recipe["config"]), recipe["machine"]["batch_size"]
        fields, chosen = dict(config.get("fields") or {}), config.get("adapters")
        given = {name: _listed(config[name]) for name in FILES if config.get(name) is not None}
        repeats = dict(config.get("resample") or {}).get("repeats", 1)
        if not isinstance(config.get("sampler"), dict | None):
            raise ValueError("no sampler")
    except Exception as error:  # Pillow raises errors of any type
        raise ValueError(f"{picture.name} carries no recipe: ldm_train did not draw it") from error
    _check_numbers(offer, config, limits)
    boxes = config.get("layout")  # as JSON if it is one text
    most = limits.characters if isinstance(boxes, list) else max(limits.characters, MOST_BOXES * 200)
    others = {name: value for name, value in config.items() if name != "layout"}
    for value, allowed in ((others, limits.characters), (boxes, most)):
        if long := next((len(text) for text in _texts(value) if len(text) > allowed), 0):
            raise ValueError(f"{picture.name}: a text of {long:,} characters; at most {allowed:,} are taken here")
    if isinstance(boxes, list) and len(boxes) > MOST_BOXES:
        raise ValueError(f"{picture.name}: {len(boxes)} boxes; at most {MOST_BOXES} are drawn here")
    own, known = offer.usual["sampler"], {sampler_tree(name)["_target_"] for name in samplers()}
    sampler = config.get("sampler") or own
    known.add(own["_target_"])
    if sampler.get("_target_") not in known or any(isinstance(value, dict | list) for value in sampler.values()):
        raise ValueError(f"{picture.name}: its sampler is none of this page's; ldm-sample recipe= draws it again")
    for name, value, most in (
        ("batch_size", batch_size, max(BATCH, limits.pictures)),
        ("resample.repeats", repeats, REPEATS),
        ("invert_iterations", config.get("invert_iterations", 1), REPEATS),
        ("compile", int(config.get("compile") is not None), 0),
    ):
        if not isinstance(value, int) or not value <= most:
            raise ValueError(f"{picture.name}: {name} is more than is drawn here; ldm-sample recipe= draws it again")
    own = _own(offer)
    options: dict[str, Any] = {name: [kept(offer, path) for path in paths] for name, paths in given.items()}
    known = {name: own[FIELD + name].kind == "picture" for name in fields if FIELD + name in own}
    options["fields"] = {
        name: [kept(offer, path) for path in _listed(fields[name])] if drawn else _text(name, fields[name], limits)
        for name, drawn in known.items()
    }
    if chosen:
        options["adapters"] = adapters(offer, chosen)
    folder = offer.folder / "samples" / f"replay-{_digest(picture.read_bytes())}"
    # Other pictures in this folder are those of the same recipe on another machine.
    return options | {"recipe": str(picture), "out": str(folder), "overwrite": True}


def _own(offer: Offer) -> dict[str, Input]:
    """Returns, by option, the page's inputs that ldm-sample takes as fields.<name> instead of an option of their
    own."""
    controls = [adapter.control for adapter in offer.adapters if adapter.control is not None]
    return {one.option: one for one in (*offer.inputs, *controls) if one.option.startswith(FIELD)}


def _texts(value: Any) -> Iterator[str]:
    """Yields all texts in a recipe's values."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _check_numbers(offer: Offer, options: Mapping[str, Any], limits: Limits) -> None:
    """Raises ValueError if a number is beyond the limits; ldm-sample checks its type."""
    for name, most in (("n", limits.pictures), ("num_inference_steps", limits.steps), ("seed", 2**53)):
        _at_most(name, options.get(name), most)
    _at_most("panorama", options.get("panorama"), OVERLAP)
    tiles = options.get("tiles")
    if isinstance(tiles, dict) and isinstance(cells := tiles.get("cells"), int):
        _at_most("tiles.overlap", tiles.get("overlap"), cells * OVERLAP)
        if cells < LEAST_CELLS:
            raise ValueError(f"tiles.cells={cells} makes more tiles than are decoded here; at least {LEAST_CELLS}")
    sides = _listed(options.get("size") or list(offer.size))
    margins = _listed(options.get("extend") or [0])
    for value in (*sides, *margins):
        _at_most("size", value, limits.side)
    if all(isinstance(value, int | float) for value in (*sides, *margins)):
        top, right, bottom, left = (*margins, 0, 0, 0)[:4]
        extended = max(sides[0] + top + bottom, sides[-1] + right + left)
        _at_most("the side of the extended picture", extended, limits.side)
    given = {name: options.get(name) for name in (*LISTS, *FILES, "layout")}
    given |= {FIELD + name: value for name, value in dict(options.get("fields") or {}).items()}
    rows = max((len(as_list(value, name)) for name, value in given.items() if isinstance(value, list)), default=1)
    # In a recipe, a prompt may have its own n.
    n = PICTURES if options.get("n") is None else options["n"]
    prompts = _listed(options.get("prompts"))
    counts = [entry.get("n", n) if isinstance(entry, dict) else n for entry in prompts]
    if all(isinstance(count, int) for count in counts):
        total = sum(counts) if len(counts) == rows else rows * max(counts)
        _at_most("the number of pictures of all prompts", total, limits.pictures)


def _at_most(name: str, value: Any, most: float) -> None:
    if isinstance(value, int | float) and not value <= most:
        raise ValueError(f"{name}={value!r:.40} is more than is drawn here; at most {most:g}")


def _text(name: str, value: Any, limits: Limits, empty: bool = False) -> str:
    if not isinstance(value, str) or not (value or empty):
        raise ValueError(f"{name} is not text")
    if len(value) > limits.characters:
        raise ValueError(f"{name} has {len(value):,} characters; at most {limits.characters:,} are taken here")
    return value.encode("utf-8", "replace").decode()  # replaces lone surrogates, which no tokenizer takes


def layout(text: Any, limits: Limits) -> str:
    """Checks boxes and returns them as JSON, which names no file."""
    try:
        rows = json.loads(_text("layout", text, replace(limits, characters=MOST_BOXES * 200)))
        boxes = [[*map(float, row[:4]), _text("label", row[4], limits)] for row in rows[: MOST_BOXES + 1]]
        if not all(math.isfinite(v) for box in boxes for v in box[:4]):
            raise ValueError("a box of no finite numbers")
    except (ValueError, TypeError, IndexError, KeyError, RecursionError, OverflowError) as error:
        raise ValueError("layout is not a list of boxes [x, y, width, height, label]") from error
    if not 0 < len(boxes) <= MOST_BOXES:
        raise ValueError(f"{len(rows)} boxes: draw at least one, at most {MOST_BOXES}")
    return json.dumps(boxes)


def adapters(offer: Offer, entries: Any) -> list[str]:
    """Returns the chosen adapters as "name:strength" entries. Raises ValueError if the page does not list one, or for
    an invalid strength."""
    known, chosen = {adapter.name: adapter for adapter in offer.adapters}, []
    for entry in map(str, _listed(entries)):
        name, colon, number = entry.rpartition(":")
        name, number = (name, number) if colon and name in known else (entry, "1")
        if name not in known:
            raise ValueError(
                f"there is no adapter {name!r:.60} of this model here; there are {', '.join(known) or 'none'}"
            )
        try:
            strength = float(number)
        except ValueError:
            strength = math.nan
        if not abs(strength) <= STRONGEST:
            raise ValueError(f"the strength of {name} is a number from {-STRONGEST:g} to {STRONGEST:g}")
        chosen.append(name if known[name].word is not None or strength == 1 else f"{name}:{strength:g}")
    return chosen


def sampler_tree(name: Any) -> Any:
    """Returns the config of a sampler as ldm-sample takes it. Raises ValueError if there is none of that name."""
    if name not in (known := samplers()):
        raise ValueError(f"there is no sampler {name!r:.60}; there are {', '.join(known)}")
    return OmegaConf.to_container(OmegaConf.load(config_folder() / "sampler" / f"{name}.yaml"))


def inputs(offer: Offer) -> Path:
    """Returns the folder in which uploaded pictures are kept."""
    return offer.folder / "samples" / "inputs"


def keep(offer: Offer, given: bytes | str | Path, option: str, limits: Limits) -> str:
    """Saves an uploaded picture beside the jobs, under a hash of its content so that its recipe finds it again, and
    returns its path. Raises ValueError if it is not a picture, or too large."""
    if not isinstance(given, bytes):
        _check_file(Path(given), limits)
        given = Path(given).read_bytes()
    kind = _header(given, option.removeprefix(FIELD), limits)
    path = inputs(offer) / f"{_digest(given)}{SUFFIXES[kind]}"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: file.write(given))
    return str(path)


def _header(data: bytes, what: str, limits: Limits) -> str:
    """Returns the format of a picture, from its header. Raises ValueError if it is not a picture of an accepted format, or
    has too many pixels."""
    try:
        with open_image(data) as image:
            kind, (width, height) = image.format or "", image.size
    except (OSError, ValueError) as error:
        large = ": it claims far too many pixels" if "exceeds limit" in str(error) else ""
        raise ValueError(f"the uploaded {what} is not a picture that can be read{large}") from error
    if kind not in SUFFIXES:
        raise ValueError(f"a picture is a {', '.join(SUFFIXES)} here, not {kind or 'a file of an unknown kind'}")
    if width * height > limits.megapixels * 1e6:
        raise ValueError(
            f"the {what} has {width} x {height} pixels; at most {limits.megapixels:g} megapixels are taken here"
        )
    return kind


def _check_file(path: Path, limits: Limits) -> None:
    if not path.is_file():
        raise ValueError("the picture that was handed in is gone; hand it in again")
    if path.stat().st_size > limits.upload * 1e6:
        raise ValueError(f"{path.name} is larger than {limits.upload:g} MB, the most that is taken here")


def kept(offer: Offer, name: Any) -> str:
    """Returns the path of a picture that a recipe names, by its file name among the uploads. Raises ValueError if it is
    not there."""
    path = inputs(offer) / Path(str(name)).name
    if not path.is_file():
        raise ValueError(
            f"this was drawn from {path.name}, which was not handed in here; ldm-sample recipe= draws it again"
        )
    return str(path)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
