"""A sampling job on disk: pictures with their recipe, which can be continued if interrupted, and replayed to the same
pixels."""

import hashlib
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from ldm_train import images as pictures
from ldm_train import names, storage
from ldm_train.configuration import config_folder, differences, literal
from ldm_train.data.files import OWN_PICTURE, RECIPE, encoded_npy, read_npy
from ldm_train.errors import Refused
from ldm_train.generation.files import as_list, is_file
from ldm_train.generation.film import KINDS, film_path
from ldm_train.generation.requests import Request
from ldm_train.rng import derive_seed

SHOWN = 256  # pictures in a grid
# Options for where and how a job runs, which do not affect its pictures. batch_size is recorded as part of the machine.
PLACES = ("run", "runs_dir", "out", "recipe", "overwrite", "film", "trust", "hydra", "defaults")
WITH_REPLAY = (*PLACES, "accelerator", "devices", "engine")
NOT_DRAWN = (*WITH_REPLAY, "batch_size")
FILES = ("image", "mask", "map", "depth", "layout")  # options that name files
LISTS = ("prompts", "classes")  # options whose entries may be in a file
FIELD = "fields."  # prefix of options for fields that a model's own conditioner declares, given as a file or as text
MODELS = ("weaker_model", "guide.classifier", "guide.clip")  # options that name further models
ADAPTERS = "adapters"  # a list of them, each with a strength
# Types of options in a recipe whose default is null or that take more than one type.
OPEN: dict[str, Sequence[type]] = {
    **dict.fromkeys(("task", "negative", "image_prompt", "spacing", "compile", *MODELS), (str,)),
    **dict.fromkeys((*FILES, *LISTS, ADAPTERS), (str, list)),
    **dict.fromkeys(("num_inference_steps", "tiles.cells"), (int,)),
    **dict.fromkeys(("guidance_scale", "panorama", "guidance.threshold"), (float,)),
    **dict.fromkeys(("extend", "guidance.interval"), (list,)),
    "size": (int, list),
    "precision": (int, str),
}
GRID = "grid.png"
LONG = 64  # entries of a list; see `_Long`


def machine(device: str, batch_size: int) -> dict[str, Any]:
    """Returns the properties of the machine that pixels depend on: another one may order floating-point sums
    differently."""
    name = torch.cuda.get_device_name() if device == "cuda" else device
    threads = {} if device != "cpu" else {"threads": torch.get_num_threads()}
    return {"device": name, "batch_size": batch_size, "torch": torch.__version__} | threads


def make_recipe(
    config: DictConfig, task: str, source: Path, sha256: str, device: str, texts: Collection[str] = ()
) -> dict[str, Any]:
    """Returns the recipe: all that a job's pictures depend on. config: with the run's own sampling options filled
    in."""
    tree = OmegaConf.to_container(config, resolve=True)
    asked = {k: v for k, v in tree.items() if k not in NOT_DRAWN and v is not None}
    for option in {"prompts", "classes"} & asked.keys():
        asked[option] = as_list(config[option], option)  # the file's content, not its name
    paths = [Path(v) for option, values in _input_files(asked).items() if option not in texts for v in values]
    files = {str(p): storage.file_sha256(p) for p in paths if is_file(p)}
    recipe = {"model": str(source), "model_sha256": sha256, "task": task, "config": asked, "files": files}
    return json.loads(json.dumps(recipe | {"machine": machine(device, config.batch_size)}))


def _options(tree: dict[str, Any]) -> dict[str, Any]:
    """Returns a plain config's options, with those of `guide` and `fields` under dotted names."""
    options = dict(tree)
    for section in ("guide", "fields"):
        if isinstance(tree.get(section), dict):
            options |= {f"{section}.{name}": value for name, value in options.pop(section).items()}
    return options


def _input_files(asked: dict[str, Any]) -> dict[str, list[str]]:
    """Returns the pictures and maps that a job's options name, by option. Entries of a model's own fields may also be
    text."""
    named = {o: as_list(v, o) for o, v in _options(asked).items() if o in FILES or o.startswith(FIELD)}
    return named | {"layout": [v for v in named.get("layout", []) if v.endswith(".json")]}


def _named_files(asked: dict[str, Any]) -> dict[str, list[str]]:
    """Returns all files and models that a job's options name, by option."""
    named, options = _input_files(asked), _options(asked)
    for option in LISTS:  # a list holds the entries themselves, a string may name a file
        value = options.get(option)
        named[option] = [value] if isinstance(value, str) and Path(value).suffix in (".txt", ".jsonl") else []
    named |= {o: [str(value)] for o in MODELS if (value := options.get(o)) is not None}
    named[ADAPTERS] = as_list(options.get(ADAPTERS), ADAPTERS)
    return {option: values for option, values in named.items() if values}


def _read_recipe(path: Path, usual: dict[str, Any]) -> dict[str, Any]:
    """Reads a recipe as plain values of the expected types. Raises ValueError if it is not a recipe or sets an option
    that a recipe may not set."""
    where = f"recipe={path} is not a recipe of ldm-sample"
    try:
        if path.suffix == ".png":
            recipe = storage.plain_values(pictures.read_recipe(path), path)
            if "number" in recipe:  # a picture, not a grid
                with Image.open(path) as image:
                    pixels = hashlib.sha256(image.tobytes()).hexdigest()
                own = f"{recipe['number']:05d}_seed{recipe['seed']}.png"  # the file may have another name by now
                recipe["images"] = [{"file": own, "sha256": pixels}]
        else:
            recipe = storage.read_record(path, storage.LARGEST_RECIPE)
        asked, machine, images = recipe["config"], recipe["machine"], recipe.get("images", [])
        texts = [recipe["model"], recipe["model_sha256"], *recipe["files"].values(), *(e["file"] for e in images)]
        sizes, number = [machine["batch_size"], machine.get("threads", 1)], recipe.get("number", 0)
        well_formed = (
            all(isinstance(text, str) for text in texts)
            and all(isinstance(section, dict) for section in (asked, asked["sampler"]))
            and all(type(n) is int and 0 < n <= 65536 for n in sizes)
            and type(number) is int
            and number >= 0
        )
    except Exception as error:  # Pillow raises errors of any type on a file that is not a picture
        raise ValueError(where) from error
    if not well_formed:
        raise ValueError(where)
    recipe = names.recipe(recipe)
    asked = recipe["config"]
    known = {k: v for k, v in usual.items() if k not in NOT_DRAWN} | {"sampler": {}}
    storage.check_kinds(asked, known, where, OPEN)
    unknown = [k for k in asked if k not in known]
    adapters = asked.get(ADAPTERS) or []
    if isinstance(adapters, list) and not all(isinstance(entry, str) for entry in adapters):
        raise ValueError(f"{where}: {ADAPTERS} is not a list of texts")
    own = asked.get("fields") or {}  # only the model knows their names
    sections = [k for k in asked if isinstance(usual.get(k), dict) and k != "fields"]
    unknown += [f"{k}.{o}" for k in sections for o in asked[k] if o not in usual[k]]
    if unknown:
        raise ValueError(f"{where}: it sets {', '.join(unknown)}")
    kinds = dict.fromkeys((f"{FIELD}{k}" for k in own), (str, list))
    storage.check_kinds(own, dict.fromkeys(own, ""), where, kinds, FIELD)
    # Options that an older recipe lacks take their defaults.
    return recipe | {"config": asked | {k: {**usual[k], **asked[k]} for k in sections}}


def replayed(config: DictConfig) -> tuple[DictConfig, dict[str, Any], int | None]:
    """Reads recipe=<recipe.json, its folder or one of its pictures>; returns (the config of that job, the recipe, the
    number of the one picture to draw or None).

    A recipe is data: a sampler, numbers, texts and seeds. Files and models that it names are read only if the command
    names them too; the model is also looked for in the recipe's own folder and below runs_dir.
    Raises FileNotFoundError if there is no file, ValueError if it is not a recipe, if an input file is not named or has
    changed, or if the command sets other options.
    """
    path = Path(config.recipe)
    if path.is_dir():
        path /= RECIPE
    if not path.is_file():
        raise FileNotFoundError(f"recipe={config.recipe}: there is no such file")
    usual = yaml.safe_load((config_folder() / "sample.yaml").read_text())
    recipe = _read_recipe(path, usual)
    asked, given = recipe["config"], OmegaConf.to_container(config, resolve=True)
    needed, options, default_options = _named_files(asked), _options(given), _options(usual)
    files = (*FILES, *(o for o in options if o.startswith(FIELD)))
    said = {o: v for o in (*files, *LISTS, *MODELS, ADAPTERS) if (v := options.get(o)) is not None}
    changed = [k for k, v in options.items() if v != default_options.get(k) and k not in (*WITH_REPLAY, *needed)]
    if changed:
        raise ValueError(f"recipe= draws again what was drawn; {', '.join(changed)}= cannot change it, leave it out")
    unsaid = [f"{o}={v[0] if len(v) == 1 else '[' + ','.join(v) + ']'}" for o, v in needed.items() if o not in said]
    if config.run is None and not _nearby(recipe["model"], path, config.runs_dir):
        unsaid.insert(0, f"run={recipe['model']}")
    if unsaid:
        raise ValueError(
            f"recipe={path} was drawn from files that it cannot choose on this machine; name them in the command, where "
            f"they are right: {' '.join(unsaid)}"
        )
    for option, value in said.items():
        now = [storage.file_sha256(name) if is_file(Path(name)) else name for name in as_list(value, option)]
        if option in files and now != [recipe["files"].get(str(Path(name)), name) for name in needed[option]]:
            raise ValueError(f"recipe={path} was drawn from {needed[option]}; {option}= is no longer the same file")
        section, _, name = option.rpartition(".")
        (asked[section] if section else asked)[name] = value
    config = literal(given | asked)
    config.batch_size = recipe["machine"]["batch_size"]
    config.run = config.run or recipe["model"]
    only = recipe.get("number")
    beside = path.parent / ("replay" if only is None else f"replay-{only:05d}")
    if config.out is None:  # the folder of this picture's or job's replays: another one was of another machine
        config.out, config.overwrite = str(storage.inside(beside, path.parent)), True
    return config, recipe, only


def _nearby(model: str, recipe: Path, runs_dir: str) -> bool:
    """Returns True if the recipe lies in the folder of the model's run, or the model lies below runs_dir."""
    folder = Path(model).resolve()
    own = run_of(folder)
    return own in recipe.resolve().parents or folder.is_relative_to(Path(runs_dir).resolve())


def folder_of(config: DictConfig, source: Path, recipe: dict[str, Any]) -> Path:
    """Returns out=..., with one subfolder per job of a sweep; by default <run>/samples/<task>-<hash of the recipe>.

    Raises ValueError if a link leads out of the folder that the command names.
    """
    sweeping = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    name = f"{recipe['task']}-{derive_seed(repr({k: v for k, v in recipe.items() if k != 'machine'})) % 16**8:08x}"
    if config.out:
        return storage.inside(Path(config.out) / name, config.out) if sweeping else Path(config.out)
    own = run_of(source)
    named = next((f for f in (Path(config.run), Path(config.runs_dir, config.run)) if own.is_relative_to(f)), own)
    return storage.inside(own / "samples" / name, named)


def run_of(source: Path) -> Path:
    """Returns the run whose model is in `source` (its export/ or diffusion/model/), else `source` itself; samples go
    below it."""
    if source.name == "export":
        return source.parent
    return source.parents[1] if source.parts[-2:] == ("diffusion", "model") else source


class _Long:
    """A job's long lists of prompts and classes, for recipes of single pictures. Of these, such a recipe has the entries of
    the picture's batch, which is drawn as a whole, and keeps the number of each picture: thousands of pictures with
    thousands of entries each would fill the disk."""

    def __init__(self, config: dict[str, Any]):
        self.lists = {o: v for o in LISTS if isinstance(v := config.get(o), list) and len(v) > LONG}
        others = [config["classes"]] if isinstance(config.get("classes"), list) else []
        self.paired = any(len(values) > 1 for values in (*others, *_input_files(config).values()))
        prompts = config["prompts"] if isinstance(config.get("prompts"), list) else [""]
        entries = [entry if isinstance(entry, dict) else {} for entry in prompts]
        counts = [entry.get("n", config["n"]) for entry in entries]
        if len(counts) == 1:  # of each of the classes
            counts *= max(map(len, self.lists.values()), default=1)
        self.blank = [{"prompt": "", "n": entry["n"]} if "n" in entry else "" for entry in entries]
        self.first = np.cumsum([0, *counts])  # number of each entry's first picture, then of all pictures

    def of_batch(self, first: int, last: int) -> dict[str, list[Any]]:
        """Returns the options whose lists are long, with the entries of the pictures numbered from first to last - 1."""
        low = int(np.searchsorted(self.first, first, "right")) - 1
        high = int(np.searchsorted(self.first, last, "left"))
        made = {}
        for option, entries in self.lists.items():
            own = entries[low:high]
            if option == "classes":
                made[option] = [own[0]] * low + own + [own[0]] * (len(entries) - low - len(own))
            elif self.paired:
                made[option] = self.blank[:low] + own + self.blank[high:]
            else:
                counts = int(self.first[low]), int(self.first[-1] - self.first[min(high, len(entries))])
                before, after = ([{"prompt": "", "n": count}] if count else [] for count in counts)
                made[option] = before + own + after
        return made


class Job:
    """The folder of one job. Each picture appears under its final name when complete; recipe.json is written first and
    last.

    channels: of the pictures. If they are neither grey nor RGB, the PNG shows false colours and carries the recipe; the
    picture itself is the .npy beside it, (H, W, C) float32 in [-1, 1], written first.
    Raises Refused, naming what differs, if the folder holds pictures of another recipe and `overwrite` is False.
    """

    def __init__(
        self, folder: Path, recipe: dict[str, Any], wanted: Sequence[Request], overwrite: bool, channels: int = 3
    ):
        self.folder, self.recipe, self.wanted, self.channels = folder, recipe, list(wanted), channels
        self.digests: dict[str, str] = {}
        self._long, self._carried = _Long(recipe["config"]), dict[int, dict[str, Any]]()  # the last batch's recipe
        before = self._before()
        if before is not None and (changed := differences(self._key(before), self._key(recipe), {})):
            if not overwrite:
                listed = "\n  ".join(changed[:8] + (["..."] if len(changed) > 8 else []))
                raise Refused(
                    f"{folder} holds pictures of another job:\n  {listed}\nChoose another out=<folder>, or overwrite=true"
                )
            for entry in before["images"]:
                picture = folder / entry["file"]
                for old in (picture, picture.with_suffix(".npy"), *(film_path(picture, kind) for kind in KINDS)):
                    old.unlink(missing_ok=True)

    def _before(self) -> dict[str, Any] | None:
        """Returns the recipe of the pictures in the folder, None if there are none. Raises Refused if its recipe.json
        is not a recipe, or if files of other origin have the names of this job's pictures."""
        path = self.folder / RECIPE
        if not path.is_file():
            there = {entry.name for entry in self.folder.iterdir()} if self.folder.is_dir() else set()
            if foreign := sorted(there & {GRID, *(r.name for r in self.wanted)}):
                raise Refused(
                    f"{self.folder / foreign[0]} is there without a {RECIPE}, and this job would replace it; choose another "
                    "out=<folder>"
                )
            return None
        try:
            before = storage.read_record(path, storage.LARGEST_RECIPE)
            before["images"] = [e for e in before["images"] if OWN_PICTURE.fullmatch(e["file"])]
        except (ValueError, KeyError, TypeError) as error:
            raise Refused(f"{path} is not a recipe of ldm-sample; remove it, or choose another out=<folder>") from error
        return before if any((self.folder / e["file"]).is_file() for e in before["images"]) else None

    @staticmethod
    def _key(recipe: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in recipe.items() if k not in ("model", "images", "finished")}

    def _write(self, finished: bool) -> None:
        entries = [
            {"file": r.name, "seed": r.seed, "condition": r.text}
            | ({"sha256": self.digests[r.name]} if r.name in self.digests else {})
            for r in self.wanted
            if not finished or r.name in self.digests
        ]
        storage.write_json(self.folder / RECIPE, self.recipe | {"finished": finished, "images": entries})

    def _metadata(self, request: Request) -> dict[str, Any]:
        """Returns the recipe that a picture carries."""
        size, carried = self.recipe["machine"]["batch_size"], self.recipe
        if self._long.lists and self.recipe["task"] != "interpolate":
            batch = request.number // size
            if batch not in self._carried:
                mine = self._long.of_batch(batch * size, batch * size + size)
                self._carried = {batch: self.recipe | {"config": self.recipe["config"] | mine}}
            carried = self._carried[batch]
        return carried | {"number": request.number, "seed": request.seed, "condition": request.text}

    def done(self, part: Sequence[Request]) -> torch.Tensor | None:
        """Returns the pictures of a batch (B, C, H, W) if an earlier run of this job made all of them, else None.
        Batches are drawn as a whole, because pixels depend on the batch."""
        images = []
        for request in part:
            path = self.folder / request.name
            try:
                drawn, asked = pictures.read_recipe(path), self._metadata(request)
                if drawn | {"model": asked["model"]} != asked:  # the model is known by its checksum
                    return None
                with Image.open(path) as image:
                    array = np.atleast_3d(np.array(image))
                made = pictures.from_uint8(torch.from_numpy(array).permute(2, 0, 1))
                if not pictures.has_colours(self.channels):
                    shown, array = array, read_npy(path.with_suffix(".npy").read_bytes())
                    made = torch.from_numpy(array).permute(2, 0, 1)
                    if len(made) != self.channels or not np.array_equal(np.array(pictures.to_pil(made)), shown):
                        return None
            except Exception:  # on damaged files Pillow and numpy raise errors of any type
                return None
            self.digests[request.name] = hashlib.sha256(array.tobytes()).hexdigest()
            images.append(made)
        return torch.stack(images)

    def save(self, part: Sequence[Request], images: torch.Tensor) -> None:
        """Writes a batch of pictures with their recipe. Raises OSError, naming the picture, if the disk is full."""
        if not self.digests:
            self._write(finished=False)
        for request, image in zip(part, images):
            picture, path = pictures.to_pil(image), self.folder / request.name
            content = picture.tobytes()
            if not pictures.has_colours(self.channels):
                array = image.permute(1, 2, 0).contiguous().numpy()
                content = array.tobytes()
                storage.write_atomically(
                    path.with_suffix(".npy"), lambda file, array=array: file.write(encoded_npy(array))
                )
            pictures.save_png(picture, path, self._metadata(request))
            self.digests[request.name] = hashlib.sha256(content).hexdigest()

    def close(self, grid: Image.Image) -> Path:
        """Writes the grid and the finished recipe; returns the grid's path."""
        path = pictures.save_png(grid, self.folder / GRID, self.recipe)
        self._write(finished=True)
        return path

    @property
    def colours(self) -> str:
        """Returns a note for pictures that are neither grey nor RGB, else ""."""
        if pictures.has_colours(self.channels):
            return ""
        return (
            f"\ntheir {self.channels} channels are in the .npy files, (H, W, {self.channels}) in [-1, 1]; the PNGs show false "
            "colours, the first channel red, the last blue"
        )

    def agreement(self, recipe: dict[str, Any]) -> str:
        """Says in words how many pictures of a replay are identical to the recipe's own. Returns "" if that is not known,
        as for one picture that shows false colours."""
        if "number" in recipe and not pictures.has_colours(self.channels):
            return ""
        recorded = {e["file"]: e["sha256"] for e in recipe.get("images", []) if "sha256" in e}
        known = [name for name in self.digests if name in recorded]
        same = [name for name in known if recorded[name] == self.digests[name]]
        return f"{len(same)} of {len(known)} pictures are identical to the recipe's" if known else ""
