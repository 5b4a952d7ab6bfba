"""A sampling job on disk: pictures with their recipe, continued where it stopped, replayed to the same pixels."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from ldm_train import images as pictures
from ldm_train.checkpoints.native import check_targets
from ldm_train.cli.common import config_folder
from ldm_train.cli.files import as_list
from ldm_train.cli.inputs import Request
from ldm_train.data.shards import file_sha256, write_json
from ldm_train.training.stages import Refused, differences

RECIPE = "recipe.json"
SHOWN = 256  # pictures in a grid
# What says where and how a job runs, not what it draws. batch_size enters the recipe as part of the machine.
NOT_DRAWN = ("run", "runs_dir", "out", "recipe", "overwrite", "film", "accelerator", "batch_size", "hydra")
FILES = ("image", "mask", "map", "depth", "layout")  # options that name files
WITH_REPLAY = ("run", "runs_dir", "out", "recipe", "overwrite", "film", "accelerator", "hydra")


def machine(device: str, batch_size: int) -> dict[str, Any]:
    """What pixels depend on beside the recipe: float sums run in another order on another machine."""
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    threads = {} if device == "cuda" else {"threads": torch.get_num_threads()}
    return {"device": name, "batch_size": batch_size, "torch": torch.__version__} | threads


def make_recipe(config: DictConfig, task: str, source: Path, sha256: str, device: str) -> dict[str, Any]:
    """All that a job's pictures follow from. config: with the run's own sampling options filled in."""
    tree = OmegaConf.to_container(config, resolve=True)
    asked = {k: v for k, v in tree.items() if k not in NOT_DRAWN and v is not None}
    if "prompts" in asked:
        asked["prompts"] = as_list(config.prompts, "prompts")  # the file's content, not its name
    files = {}
    for option in FILES:
        values = [v for v in as_list(config[option], option) if option != "layout" or v.endswith(".json")]
        paths = [Path(v) for v in values]
        files |= {str(p): file_sha256(p) for p in paths if p.is_file()}
    recipe = {"model": str(source), "model_sha256": sha256, "task": task, "config": asked, "files": files}
    return json.loads(json.dumps(recipe | {"machine": machine(device, config.batch_size)}))


def replayed(config: DictConfig) -> tuple[DictConfig, dict[str, Any], int | None]:
    """recipe=<recipe.json or one of its pictures> -> (the config it was made with, the recipe, which picture alone).

    Raises FileNotFoundError or ValueError where it is none, where its input files changed, and for other options.
    """
    path = Path(config.recipe)
    if path.is_dir():
        path /= RECIPE
    if not path.is_file():
        raise FileNotFoundError(f"recipe={config.recipe}: there is no such file")
    try:
        recipe = pictures.read_recipe(path) if path.suffix == ".png" else json.loads(path.read_text())
        asked, files = recipe["config"], recipe["files"]
        check_targets(asked["sampler"], path)
        recipe["machine"]["batch_size"], recipe["model_sha256"]
    except (KeyError, AttributeError, TypeError, json.JSONDecodeError, OSError) as error:
        raise ValueError(f"recipe={path} is no recipe of ldm-sample") from error
    usual = yaml.safe_load((config_folder() / "sample.yaml").read_text())
    changed = [k for k, v in OmegaConf.to_container(config).items() if k not in WITH_REPLAY and v != usual.get(k)]
    if changed:
        raise ValueError(f"recipe= draws again what was drawn; {', '.join(changed)}= cannot change it, leave it out")
    for name, digest in files.items():
        if not Path(name).is_file() or file_sha256(name) != digest:
            raise ValueError(f"recipe={path} was drawn from {name}, which is no longer the same file")
    config = literal(OmegaConf.to_container(config) | asked)
    config.batch_size = recipe["machine"]["batch_size"]
    config.run = config.run or recipe["model"]
    only = recipe.get("number")
    config.out = config.out or str(path.parent / ("replay" if only is None else f"replay-{only:05d}"))
    return config, recipe, only


def literal(tree: dict[str, Any]) -> DictConfig:
    """A config whose strings mean what they say: `${` in a caption asks for no other option."""

    def escaped(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: escaped(v) for k, v in value.items()}
        if isinstance(value, list):
            return [escaped(v) for v in value]
        return value.replace("${", "\\${") if isinstance(value, str) else value

    return OmegaConf.create(escaped(tree))


class Job:
    """The folder of one job. Pictures appear under their final name when complete, recipe.json first and last.

    Raises Refused where the folder holds pictures of another recipe, naming what differs.
    """

    def __init__(self, folder: Path, recipe: dict[str, Any], wanted: Sequence[Request], overwrite: bool):
        self.folder, self.recipe, self.wanted = folder, recipe, list(wanted)
        self.digests: dict[str, str] = {}
        before = self._before()
        if before is not None and not any((folder / Path(e["file"]).name).is_file() for e in before["images"]):
            before = None  # nothing was drawn
        if before is not None and (changed := differences(self._key(before), self._key(recipe), {})):
            if not overwrite:
                listed = "\n  ".join(changed[:8] + (["..."] if len(changed) > 8 else []))
                raise Refused(
                    f"{folder} holds pictures of another job:\n  {listed}\nChoose another out=<folder>, or overwrite=true"
                )
            for entry in before["images"]:
                for old in folder.glob(f"{Path(entry['file']).stem}.*"):  # its films, too
                    old.unlink()

    def _before(self) -> dict[str, Any] | None:
        path = self.folder / RECIPE
        return json.loads(path.read_text()) if path.is_file() else None

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
        write_json(self.folder / RECIPE, self.recipe | {"finished": finished, "images": entries})

    def _metadata(self, request: Request) -> dict[str, Any]:
        return self.recipe | {"number": request.number, "seed": request.seed, "condition": request.text}

    def done(self, part: Sequence[Request]) -> torch.Tensor | None:
        """The pictures of a whole batch that an earlier run of this job made, else None. A batch is drawn as a whole: its
        pixels follow from its company."""
        found = []
        for request in part:
            path = self.folder / request.name
            try:
                if pictures.read_recipe(path) != self._metadata(request):
                    return None
                with Image.open(path) as image:
                    array = np.atleast_3d(np.array(image))
            except (OSError, KeyError, AttributeError, ValueError, SyntaxError):
                return None
            self.digests[request.name] = hashlib.sha256(array.tobytes()).hexdigest()
            found.append(pictures.from_uint8(torch.from_numpy(array).permute(2, 0, 1)))
        return torch.stack(found)

    def save(self, part: Sequence[Request], images: torch.Tensor) -> None:
        """Raises OSError, saying what stays, where the disk takes no more."""
        if not self.digests:
            self._write(finished=False)
        for request, image in zip(part, images):
            picture, path = pictures.to_pil(image), self.folder / request.name
            try:
                pictures.save_png(picture, path, self._metadata(request))
            except OSError as error:
                raise OSError(
                    f"cannot write {path}: {error.strerror or error}; the pictures before it are complete, make room and give "
                    "the same command again to continue"
                ) from error
            self.digests[request.name] = hashlib.sha256(picture.tobytes()).hexdigest()

    def close(self, grid: Image.Image) -> Path:
        """Writes the grid and the finished recipe; returns the grid's path."""
        path = pictures.save_png(grid, self.folder / "grid.png", self.recipe)
        self._write(finished=True)
        return path

    def agreement(self, recipe: dict[str, Any]) -> str:
        """How many pictures of a replay equal the recipe's own, in words."""
        recorded = {e["file"]: e["sha256"] for e in recipe.get("images", []) if "sha256" in e}
        same = [name for name, digest in self.digests.items() if recorded.get(name) == digest]
        known = [name for name in self.digests if name in recorded]
        return f"{len(same)} of {len(known)} pictures are identical to the recipe's" if known else ""
