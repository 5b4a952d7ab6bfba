"""A source of training data: pictures of a class that a model draws itself. They preserve what the model knows of the
class while it learns a subject of that class (prior preservation: DreamBooth, Ruiz et al. 2022, arXiv:2208.12242,
section 3.2)."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch

from ldm_train.checkpoints.native import load_latent_diffusion, model_metadata
from ldm_train.data.files import DataError, encoded_png
from ldm_train.data.prepare.build import Source, class_and_captions
from ldm_train.devices import device_of
from ldm_train.generation.sample import model_folder
from ldm_train.images import to_uint8
from ldm_train.latent_diffusion import LatentDiffusion, Sampling
from ldm_train.rng import derive_seed

SHOWN = ("caption", "class_label")  # the fields that such pictures can have


class ClassPictures(Source):
    """Pictures of classes or prompts, drawn by a model. run, runs_dir: the model. prompts, classes: what it draws, in
    turn; the model must read captions or classes, respectively. count, val_count: numbers of training and validation
    pictures. loss_weight: the weight of each picture in the loss, relative to a subject's picture, which has 1.
    guidance_scale, num_inference_steps: None uses the model's own. seed: picture i is a function of it.
    Raises ValueError, FileNotFoundError or DataError if the model cannot draw such pictures.
    """

    def __init__(
        self,
        run: str,
        runs_dir: str = "runs",
        prompts: str | Sequence[str] | None = None,
        classes: str | int | Sequence[str | int] | None = None,
        count: int = 100,
        val_count: int = 8,
        loss_weight: float = 1.0,
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        batch_size: int = 16,
        seed: int = 0,
        accelerator: str = "auto",
        trust: Sequence[str] = (),
    ):
        if not run:
            raise DataError("set source.run=<run or model folder> to the model that draws them")
        self.folder = model_folder(run, runs_dir, "source.run")
        self.prompts = [str(p) for p in (prompts if isinstance(prompts, list | tuple) else [prompts]) if p is not None]
        self.labels = [str(c) for c in (classes if isinstance(classes, list | tuple) else [classes]) if c is not None]
        if not self.prompts and not self.labels:
            raise DataError("set what it draws: source.prompts='a dog', or source.classes=dog")
        if not isinstance(loss_weight, int | float) or not 0 < loss_weight <= 1000:
            raise DataError(f"source.loss_weight={loss_weight} is not a number above 0 and at most 1000")
        if type(batch_size) is not int or batch_size < 1:
            raise DataError(f"source.batch_size={batch_size} is not a whole number above 0")
        self.loss_weight, self.batch_size, self.seed = loss_weight, batch_size, seed
        self.sampling = {"guidance_scale": guidance_scale, "num_inference_steps": num_inference_steps}
        self.accelerator, self.trust = accelerator, list(trust)
        self.items = {"train": range(count), "val": range(val_count)}
        self.identity = {
            "source": "dreambooth_prior", "model_sha256": model_metadata(self.folder)["sha256"], "prompts": self.prompts,
            "classes": self.labels, "loss_weight": loss_weight, "seed": seed, "batch_size": batch_size, **self.sampling,
        }  # fmt: skip
        names = [getattr(c, "names", None) for c in self.model.conditioners.values() if c.field == "class_label"]
        self.classes = names[0] if names else None
        try:
            for i in range(len(self.labels)):
                self._words("train", i)
            self._sampling().require("sampler", "num_inference_steps")
        except ValueError as error:
            raise DataError(f"source: {error}") from error

    @cached_property
    def model(self) -> LatentDiffusion:
        model = load_latent_diffusion(self.folder, self.trust)
        known = {"caption": self.prompts, "class_label": self.labels}
        if missing := sorted({*model.fields} - {*SHOWN}):
            raise DataError(f"{self.folder} draws under {', '.join(missing)}, and such pictures have none")
        if unused := [name for name in SHOWN if known[name] and name not in model.fields]:
            takes = ", ".join(model.fields) or "no condition"
            raise DataError(f"{self.folder} knows no {unused[0]}; it takes {takes}")
        channels = model.first_stage.autoencoder.in_channels
        if channels not in (1, 3):
            raise DataError(f"{self.folder} draws pictures of {channels} channels; 1 or 3 can be prepared so")
        return model.to(device_of(self.accelerator).type, memory_format=torch.channels_last)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "model"}  # each process loads it itself

    def _words(self, split: str, i: int) -> tuple[str | None, int | None]:
        """Returns the caption and the class index of picture i, each None if it has none."""
        caption = self.prompts[i % len(self.prompts)] if self.prompts else None
        if not self.labels:
            return caption, None
        (conditioner,) = (c for c in self.model.conditioners.values() if c.field == "class_label")
        return caption, conditioner.parse(str(self.labels[i % len(self.labels)]))

    def _sampling(self) -> Sampling:
        return replace(self.model.sampling, **{k: v for k, v in self.sampling.items() if v is not None})

    def samples(self, split: str, chunk: range) -> Iterator[tuple[str, dict[str, bytes]]]:
        """Yields (key, files) of the pictures in `chunk`. Batches start at multiples of the batch size, so that
        pictures do not depend on where a shard begins."""
        sampling, size = self._sampling(), self.batch_size
        for begin in range(chunk.start - chunk.start % size, chunk.stop, size):
            numbers = range(begin, begin + size)
            words = [self._words(split, i) for i in numbers]
            batch = {"caption": [caption for caption, _ in words]} if self.prompts else {}
            if self.labels:
                batch["class_label"] = torch.tensor([label for _, label in words])
            seeds = [derive_seed("dreambooth_prior", self.seed, split, i) for i in numbers]
            drawn = to_uint8(self.model.sample(batch, seeds, sampling)).permute(0, 2, 3, 1).cpu().numpy()
            for i, picture, (caption, label) in zip(numbers, drawn, words):
                if i in chunk:
                    members = class_and_captions(label, [] if caption is None else [caption])
                    weight = {"loss_weight.txt": f"{self.loss_weight:g}".encode()}
                    yield (f"prior_{split}_{i:07d}", {"png": encoded_png(picture)} | members | weight)

    def sample(self, split: str, i: int) -> tuple[str, dict[str, bytes]]:
        return next(self.samples(split, range(i, i + 1)))
