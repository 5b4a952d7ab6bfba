"""The backend of the pages: models in memory, and jobs that run one after the other and can be watched and
cancelled."""

import logging
import os
import queue
import re
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import DictConfig
from PIL import Image

from ldm_train import images as pictures
from ldm_train.app.asked import FILES, Limits, inputs, keep, options_of, replay_of
from ldm_train.app.offer import Offer, adapters_of, offer_of
from ldm_train.checkpoints.adapters import adapter_sha256, find_adapter
from ldm_train.checkpoints.native import model_metadata
from ldm_train.configuration import config_folder, literal
from ldm_train.data.transforms import read_image
from ldm_train.errors import Refused
from ldm_train.generation.adapters import with_strength
from ldm_train.generation.job import run_of
from ldm_train.generation.requests import Request
from ldm_train.generation.sample import Loaded, load, model_folder, sample

ERRORS = (Refused, ValueError, OSError)  # whose messages are meant for the user
KEPT = 2  # models in memory
ABSOLUTE = re.compile(r"(?<![\w.])(?:[A-Za-z]:)?(?:[/\\][^\s/\\'\",;:()]+)+[/\\]")  # the folders of an absolute path
PREVIEWED, PREVIEW = 4, 768  # pictures of a preview, and its larger side in pixels
PREVIEWS = 0.2  # share of the time that previews may take
PAUSE = 0.4  # least seconds between two, each of which the web server keeps as a file for an hour


class Cancelled(Exception):
    """Raised within a job that was cancelled or whose page was left."""


@dataclass(frozen=True)
class Progress:
    """A step of a job: `step` of `steps`, for the pictures numbered `first` to `last`. picture: a preview of them, if
    one was decoded."""

    step: int
    steps: int
    first: int
    last: int
    picture: Image.Image | None


class Studio:
    """Draws for the pages of some models. Raises one of ERRORS if a request cannot be fulfilled."""

    def __init__(self, runs_dir: str | Path, limits: Limits, accelerator: str = "auto", trust: Sequence[str] = ()):
        self.limits, self.accelerator, self.trust = limits, accelerator, list(trust)
        self.runs_dir = Path(os.path.relpath(runs_dir))  # relative: recipes must not record where this machine keeps it
        self._loaded: OrderedDict[tuple[str, ...], Loaded] = OrderedDict()
        # One thread: torch starts its own threads once for each thread that computes, and jobs take turns.
        self._worker = ThreadPoolExecutor(1, "studio")
        self._usual: dict[str, Any] = yaml.safe_load((config_folder() / "sample.yaml").read_text())

    # -- models ----------------------------------------------------------------------------------------------------

    def offer(self, run: str, names: Sequence[str] = (), title: str = "") -> Offer:
        """Loads a run's model and returns its offer. names: runs that may hold adapters for it. title: of its page, by
        default the name of its folder. Raises FileNotFoundError or ValueError if it cannot be loaded."""
        loaded = self.loaded(self.config(run, {}))
        folder, bases = run_of(loaded.source), [loaded.metadata["sha256"]]
        for model in (folder / "export", folder / "diffusion" / "model"):
            if (model / "metadata.json").is_file():
                bases.append(model_metadata(model)["sha256"])
        found = adapters_of(Path(run).name, bases, self.runs_dir, names)
        return offer_of(title or folder.name, run, folder, loaded, found)

    def config(self, run: str, options: Mapping[str, Any]) -> DictConfig:
        """Returns the config of ldm-sample with some options set."""
        tree = {k: v for k, v in self._usual.items() if k not in ("defaults", "hydra")}
        tree |= {"run": run, "runs_dir": str(self.runs_dir), "accelerator": self.accelerator, "trust": self.trust}
        return literal(tree | {"sampler": None} | dict(options))

    def loaded(self, config: DictConfig) -> Loaded:
        """Returns the model of a config, from memory if it is one of the last KEPT."""
        weights = model_metadata(model_folder(config.run, config.runs_dir))["sha256"]  # change while a run trains
        names = [with_strength(entry)[0] for entry in config.adapters or ()]
        digests = [adapter_sha256(find_adapter(name, self.runs_dir)) for name in names]
        key = (config.run, weights, *(config.adapters or ()), *digests)
        if key not in self._loaded:
            while len(self._loaded) >= KEPT:
                self._loaded.popitem(last=False)
            self._loaded[key] = load(config)
        self._loaded.move_to_end(key)
        return self._loaded[key]

    # -- jobs ------------------------------------------------------------------------------------------------------

    def draw(self, offer: Offer, asked: Mapping[str, Any], stop: threading.Event) -> Iterator[Progress | list[Path]]:
        """Draws what is asked for (see `options_of`): yields its steps, and finally the pictures. If `stop` is set, or
        the iteration is left, the job ends at its next step, as Cancelled."""
        return self._run(self.config(offer.run, options_of(offer, asked, self.limits)), stop)

    def replay(self, offer: Offer, picture: Path, stop: threading.Event) -> Iterator[Progress | list[Path]]:
        """Draws a picture again, from the recipe that it carries."""
        return self._run(self.config(offer.run, replay_of(offer, picture, self.limits)), stop)

    def cut(self, offer: Offer, path: str, size: tuple[int, int]) -> Image.Image:
        """Returns an uploaded picture as the model sees it: center-cropped and resized to (H, W)."""
        return pictures.to_pil(read_image(keep(offer, path, "picture", self.limits), size, 3))

    def _run(self, config: DictConfig, stop: threading.Event) -> Iterator[Progress | list[Path]]:
        """Yields the steps and finally the result of a job that the worker draws."""
        updates: queue.SimpleQueue[Any] = queue.SimpleQueue()
        job = self._worker.submit(self._work, config, _Watch(updates, stop, config))
        job.add_done_callback(updates.put)
        try:
            while (update := updates.get()) is not job:
                yield update
        except GeneratorExit:
            stop.set()
            raise
        yield job.result()

    def _work(self, config: DictConfig, watch: "_Watch") -> list[Path]:
        watch.check()
        threads = torch.get_num_threads()
        try:
            loaded = self.loaded(config)
            watch.decodes = not getattr(loaded.model.first_stage.autoencoder, "draws", False)
            if not watch.steps:
                watch.steps = loaded.trained["num_inference_steps"]
            return sample(config, loaded, watch)
        finally:
            torch.set_num_threads(threads)  # a replay sets the number in its recipe


class _Watch:
    """The callback of every step of a job; decodes a preview if previews then take no more than a share PREVIEWS of the
    time."""

    def __init__(self, updates: "queue.SimpleQueue[Any]", stop: threading.Event, config: DictConfig):
        self.updates, self.stop = updates, stop
        self.steps, self.next, self.decodes = config.num_inference_steps or 0, 0.0, True

    def check(self) -> None:
        if self.stop.is_set():
            raise Cancelled

    def __call__(
        self, part: list[Request], decode: Callable[[torch.Tensor], torch.Tensor], step: int, pred_x0: torch.Tensor
    ) -> None:
        self.check()
        picture, now = None, time.perf_counter()
        if self.decodes and now >= self.next:
            picture = pictures.grid(decode(pred_x0[:PREVIEWED]).float().cpu(), min(PREVIEWED, len(part)))
            picture.thumbnail((PREVIEW, PREVIEW))
            end = time.perf_counter()
            self.next = end + max(PAUSE, (end - now) * (1 / PREVIEWS - 1))
        numbers = part[0].number + 1, part[-1].number + 1
        self.updates.put(Progress(step + 1, max(self.steps, step + 1), *numbers, picture))


def words(error: Exception, offers: Sequence[Offer]) -> str:
    """Returns the message of an error for users of the page, without the folders of this machine. For errors other than
    ERRORS it says only that there was one, and the log has the details."""
    if not isinstance(error, ERRORS):
        logging.getLogger(__name__).error("a job ended with an error", exc_info=error)
        return "something went wrong in the app itself; its log has the details"
    message = str(error)
    folders = [folder for offer in offers for folder in (inputs(offer), offer.folder.parent)]
    for folder in (*folders, Path(tempfile.gettempdir()), Path.cwd(), Path.home()):
        for path in (folder.resolve(), folder):
            message = message.replace(f"{path}/", "")
    return ABSOLUTE.sub("", message)


def without_folders(recipe: dict[str, Any]) -> dict[str, Any]:
    """Returns a recipe as it is shown: files and the model by their names alone."""
    config = recipe["config"]
    named = {name: config[name] for name in FILES if name in config}
    bare = {name: [Path(v).name for v in vs] if isinstance(vs, list) else Path(vs).name for name, vs in named.items()}
    fields = {name: Path(v).name if isinstance(v, str) else v for name, v in (config.get("fields") or {}).items()}
    files = {Path(name).name: digest for name, digest in recipe["files"].items()}
    model = run_of(Path(recipe["model"])).name
    return recipe | {"config": config | bare | {"fields": fields}, "files": files, "model": model}
