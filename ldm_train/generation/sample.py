"""ldm-sample: draws pictures from a trained model, with one seed and one recipe per picture."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from ldm_train.checkpoints.diffusers import DEFAULT_SAMPLING
from ldm_train.checkpoints.native import find_model, load_latent_diffusion, model_metadata, recorded_sampling
from ldm_train.checkpoints.parts import build_sampler, targets
from ldm_train.cluster import mapped
from ldm_train.compiling import compile_sampling, record_cuda_graphs
from ldm_train.configuration import literal, plain
from ldm_train.devices import device_of
from ldm_train.diffusion.guidance import classifier_free
from ldm_train.generation.adapters import take_adapters
from ldm_train.generation.batches import Parts, Watch, drawn_here, run_job
from ldm_train.generation.drawing import Drawing
from ldm_train.generation.files import as_list
from ldm_train.generation.guides import Guides, load_weaker
from ldm_train.generation.job import Job, folder_of, make_recipe, replayed
from ldm_train.generation.options import (
    PRECISIONS,
    check_effects,
    check_interval,
    check_types,
    check_values,
    check_wanted,
    inverts,
)
from ldm_train.generation.requests import Request, chosen_task, class_names, known_fields, picture_size, requests
from ldm_train.latent_diffusion import Guidance, LatentDiffusion, Sampling
from ldm_train.models.tiling import Tiles
from ldm_train.samplers.ddim import ddim
from ldm_train.samplers.resampling import resampled


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to draw. source: the folder with its weights. metadata: of these weights. trained: the
    sampling options that its run recorded. adapters: "sha256:strength" of each applied adapter, for recipes."""

    source: Path
    metadata: dict[str, Any]
    trained: dict[str, Any]
    model: LatentDiffusion
    adapters: list[str]


def model_folder(run: str | None, runs_dir: str, option: str = "run") -> Path:
    """Returns the folder with the weights of a run (by name or folder), a model folder or a diffusers folder.

    Raises ValueError if `run` is None, and FileNotFoundError, listing the finished runs, if there is no trained model.
    """
    if run is None:
        raise ValueError(f"set {option}=<run or model folder> to name the model")
    for base in (Path(run), Path(runs_dir) / run):
        if folder := find_model(base):
            return folder
    known = sorted(str(p.parent.parent.relative_to(runs_dir)) for p in Path(runs_dir).rglob("diffusion/model"))
    raise FileNotFoundError(
        f"{option}={run} has no trained model (export/ or diffusion/model/); finished runs in {runs_dir}: {', '.join(known) or 'none'}"
    )


def load(config: DictConfig, sampler: dict[str, Any] | None = None) -> Loaded:
    """Loads the model that `run`, `adapters` and `accelerator` specify. sampler: the user's own, if any. Raises
    FileNotFoundError if there is no such model, ValueError if it is damaged or does not take the adapters."""
    source = model_folder(config.run, config.runs_dir)
    model = load_latent_diffusion(source, trusted(config, sampler))
    adapters = take_adapters(model, as_list(config.adapters, "adapters"), config.runs_dir)
    model = model.to(device_of(config.accelerator).type, memory_format=torch.channels_last)
    return Loaded(source, model_metadata(source), DEFAULT_SAMPLING | recorded_sampling(source), model, adapters)


def trusted(config: DictConfig, sampler: dict[str, Any] | None) -> list[str]:
    """Returns the packages and parts that the user trusts: `trust` and those that the command's sampler names."""
    return [*config.trust, *(targets(sampler) if sampler else ())]


def sample(config: DictConfig, loaded: Loaded | None = None, watch: Watch | None = None) -> list[Path]:
    """Draws a job; returns its pictures' paths. loaded: the config's model, if it is already in memory.

    Raises ValueError, FileNotFoundError or Refused if the job cannot be drawn; a ValueError names the recipe if one is
    given.
    """
    if config.recipe is None:
        return _drawn_job(config, None, None, loaded, watch)
    try:
        return _drawn_job(*replayed(config), loaded, watch)
    except ValueError as error:
        raise error if "recipe=" in str(error) else ValueError(f"recipe={config.recipe}: {error}") from error


def unsaid(config: DictConfig, trained: dict[str, Any]) -> dict[str, Any]:
    """Returns the sampling options that the command leaves open, with the values that the model's run recorded."""
    options = {k: trained[k] for k in ("num_inference_steps", "guidance_scale", "spacing") if config[k] is None}
    guided = options.get("guidance_scale", config.guidance_scale) != 1
    if guided and config.guidance.interval is None and trained.get("guidance_interval"):
        options["guidance"] = plain(config.guidance) | {"interval": trained["guidance_interval"]}
    return options


def _drawn_job(
    config: DictConfig,
    recipe_before: dict[str, Any] | None,
    only: int | None,
    loaded: Loaded | None,
    watch: Watch | None,
) -> list[Path]:
    check_types(config)
    many = config.devices > 1 or config.engine is not None
    if many:
        _check_processes(config)
    with _threads_restored() as threads:
        if many:
            torch.set_num_threads(1 if config.engine else max(1, threads // config.devices))
        ready = _ready(config, recipe_before, only, loaded)
        out = folder_of(config, ready.source, ready.recipe)
        # The default folder is named after the recipe, so that other pictures in it are those of another machine.
        job = Job(out, ready.recipe, ready.wanted, config.overwrite or config.out is None, ready.channels)
        drawn = partial(drawn_here, job, ready.drawing, only, watch)
        if many:
            drawn = partial(_drawn_elsewhere, config, recipe_before, _drawn_from(ready.recipe))
        return run_job(job, ready.drawing.config, drawn, only, recipe_before)


@contextmanager
def _threads_restored() -> Iterator[int]:
    """A context that yields torch's number of threads and sets it again in the end."""
    threads = torch.get_num_threads()
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def _check_processes(config: DictConfig) -> None:
    """Raises ValueError for options that need a single process, for more processes than there are devices, and on
    mps."""
    if config.film is not None:
        raise ValueError("film= is made while pictures are drawn, in one process; leave devices= and engine= out")
    kind = device_of(config.accelerator).type
    most = torch.cuda.device_count() if kind == "cuda" else os.cpu_count() or 1
    if config.engine is None and config.devices > most:
        raise ValueError(f"devices={config.devices}, but there are {most}; use devices={most}")
    if kind == "mps":
        raise ValueError("mps is one device; use devices=1")


@dataclass(frozen=True)
class Ready:
    """A checked job: the pictures it asks for, the `Drawing` that makes them, and their recipe. source: the folder with
    the model's weights."""

    source: Path
    recipe: dict[str, Any]
    wanted: list[Request]
    drawing: Drawing

    @property
    def channels(self) -> int:
        return self.drawing.model.first_stage.autoencoder.in_channels


def _ready(config: DictConfig, recipe_before: dict[str, Any] | None, only: int | None, loaded: Loaded | None) -> Ready:
    given = OmegaConf.to_container(config.sampler) if config.get("sampler") else None
    chosen = None if recipe_before else given
    loaded = loaded or load(config, chosen)
    model, source, trust = loaded.model, loaded.source, trusted(config, chosen)
    tree, device, said = given or loaded.trained["sampler"], model.device.type, config
    config = literal(OmegaConf.to_container(config, resolve=True) | unsaid(config, loaded.trained) | {"sampler": tree})
    if recipe_before and config.compile == "cuda_graphs" and device != "cuda":
        config.compile = None  # the pictures are the same up to rounding
    if config.invert and recipe_before is None:
        config.n = 1  # the seed has no effect: begun from the picture's own noise, all would be the same
    if isinstance(config.size, str):  # a ratio; the recipe records pixels
        config.size = list(picture_size(model, config.size))
    if config.classes == "all" and (names := class_names(model)) and "all" not in names:
        config.classes = names
    guidance, guides = check_values(config, model), Guides(config, model, device)
    if loaded.adapters:
        guides.recipe["adapters"] = loaded.adapters
    task = chosen_task(model, config, guides.parsers)
    wanted = requests(model, config, task, guides.parsers)
    if only is not None and only >= len(wanted):
        raise ValueError(f"this is not a recipe of ldm-sample: it asks for picture {only} of a job with {len(wanted)}")
    check_wanted(config, task, wanted, chosen)
    if (interval := config.guidance.interval) is not None and config.guidance_scale != 1:
        own = recipe_before is None and said.guidance.interval is not None
        check_interval("guidance.interval", interval, config.num_inference_steps, config.spacing, model, own)
    if recipe_before is None:  # recipes of before may hold options without effect
        check_effects(said, model, task)
    sampler = build_sampler(tree, f"sampler of {config.recipe or source}", trust)
    if config.resample.repeats > 1:
        sampler = partial(resampled, sampler=sampler, **config.resample)
    if inverts(config, task):  # the only sampler that is inverted
        sampler = ddim
    weaker = None
    if config.weaker_model is not None:
        source_of_weaker = model_folder(config.weaker_model, config.runs_dir, "weaker_model")
        weaker = load_weaker(source_of_weaker, model, trust).to(device, memory_format=torch.channels_last)
        guides.recipe["weaker_model_sha256"] = model_metadata(source_of_weaker)["sha256"]
    sampling = Sampling(
        sampler,
        config.num_inference_steps,
        config.guidance_scale,
        config.spacing,
        config.guidance.interval,
        overlap=None if config.panorama is None else round(config.panorama * min(model.latent_size)),
        tiles=None if config.tiles.cells is None else Tiles(**config.tiles),
    )
    if config.compile:
        for drawn_from in filter(None, (model, weaker)):
            (record_cuda_graphs if config.compile == "cuda_graphs" else compile_sampling)(drawn_from.network)
    if recipe_before and device == "cpu" and (threads := recipe_before["machine"].get("threads")):
        torch.set_num_threads(min(threads, 4 * (os.cpu_count() or 1)))
    texts = {field.argument for field in known_fields(model).values() if field.input == "text"}
    recipe = make_recipe(config, task, source, loaded.metadata["sha256"], device, texts) | guides.recipe
    if recipe_before:
        _check_same_weights(recipe_before, recipe, source)
    guided = Guidance(weaker_model=weaker, rule=partial(classifier_free, **guidance))
    dtype = PRECISIONS[str(config.precision)]
    autocast = partial(torch.autocast, device, dtype, enabled=dtype is not None)
    return Ready(source, recipe, wanted, Drawing(model, task, config, sampling, guided, guides, autocast))


def _check_same_weights(before: dict[str, Any], now: dict[str, Any], source: Path) -> None:
    """Raises ValueError if a recipe was drawn with other weights; prints a note if it was drawn on another machine."""
    if before["model_sha256"] != now["model_sha256"]:
        raise ValueError(
            f"{source} does not hold the weights that drew this recipe; set run=<folder> to where they are"
        )
    guides = [k for k in now if k == "adapters" or (k.endswith("_sha256") and k != "model_sha256")]
    if changed := [k for k in guides if before.get(k) != now[k]]:
        name = changed[0].removesuffix("_sha256")
        option = f"guide.{name}" if name in ("classifier", "clip") else name
        raise ValueError(f"{option}= does not hold the weights that drew this recipe")
    if now["machine"] != before["machine"]:
        print(f"drawn on {before['machine']}, here is {now['machine']}: pixels may differ slightly")


_drawing: dict[str, Drawing] = {}  # in a worker process: the `Drawing` it has loaded, by `_drawn_from`


def _drawn_from(recipe: dict[str, Any]) -> str:
    """Returns as JSON what a recipe's pictures depend on, on any machine: options, and checksums of models and
    files."""
    return json.dumps({k: v for k, v in recipe.items() if k != "machine"}, sort_keys=True)


def _drawn(shared: tuple[dict[str, Any], dict[str, Any] | None, str, int], part: list[Request]) -> np.ndarray:
    """Draws one part of a job in a worker process. Returns an array, since torch sends tensors through shared memory, of
    which containers have little. shared: the config, the recipe that is replayed (or None), the
    `_drawn_from` of the job's own recipe, and the number of threads. Raises ValueError if this machine has other models
    or files."""
    tree, recipe_before, drawn_from, threads = shared
    torch.set_num_threads(threads)
    if drawn_from not in _drawing:
        ready = _ready(literal(tree), recipe_before, None, None)
        if _drawn_from(ready.recipe) != drawn_from:
            raise ValueError(
                f"{socket.gethostname()} has other models or pictures under these names; the machines of a cluster share them"
            )
        _drawing.clear()
        _drawing[drawn_from] = ready.drawing
    return _drawing[drawn_from](part).numpy()


def _drawn_elsewhere(
    config: DictConfig, recipe_before: dict[str, Any] | None, drawn_from: str, parts: Parts
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yields (number, pictures) of each part as it finishes, drawn by `devices` processes on this machine or a
    cluster."""
    gpus = device_of(config.accelerator).type == "cuda"
    tree = OmegaConf.to_container(config, resolve=True) | {"accelerator": "gpu" if gpus else "cpu"}
    shared = (tree, recipe_before, drawn_from, torch.get_num_threads())
    tasks = {str(k): (part,) for k, part in parts.items()}
    for name, made in mapped(_drawn, shared, tasks, config.devices, config.engine, gpus):
        yield int(name), torch.from_numpy(made)
