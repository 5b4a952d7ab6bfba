"""Guides external to the model: a classifier of its noisy latents, and CLIP."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig

from ldm_train.checkpoints.native import load_latent_diffusion, load_model, read_metadata, weights_sha256
from ldm_train.conditioning.clip_score import ClipScore
from ldm_train.devices import to_device
from ldm_train.diffusion.guidance import Denoise, classifier_guidance, score_guidance
from ldm_train.diffusion.process import NoiseProcess
from ldm_train.generation.requests import Request
from ldm_train.latent_diffusion import LatentDiffusion
from ldm_train.models.classifier import NoisyClassifier


def load_classifier(
    value: str, runs_dir: str, model: LatentDiffusion, trust: Sequence[str] = ()
) -> tuple[NoisyClassifier, str]:
    """Loads guide.classifier=<run or folder>; returns (the classifier, the sha256 of its weights). Raises
    FileNotFoundError if there is none, ValueError if it is not a `NoisyClassifier` or was trained on other latents or
    another noise schedule."""
    folders = [base / "classifier" / "model" for base in (Path(value), Path(runs_dir) / value)] + [Path(value)]
    folder = next((f for f in folders if (f / "model.safetensors").is_file()), None)
    if folder is None:
        raise FileNotFoundError(
            f"guide.classifier={value} is neither a run with a finished classifier nor a model folder; train one with "
            "experiment=classifier_..."
        )
    metadata, classifier = read_metadata(folder), load_model(folder, trust)
    if not isinstance(classifier, NoisyClassifier):
        raise ValueError(f"{folder} holds a {type(classifier).__name__}, not a classifier of noisy latents")
    if differs := _differs(model, metadata):
        raise ValueError(
            f"guide.classifier={value} was trained on {differs} than the model; train one on the model's own"
        )
    return classifier, metadata["sha256"]


def latents_of(model: LatentDiffusion) -> dict[str, Any]:
    """Returns what identifies a model's noisy latents: autoencoder, scale, shift and schedule. A classifier's metadata
    records the same."""
    first, schedule = model.first_stage, model.schedule
    return {
        "autoencoder": weights_sha256(first.autoencoder),
        "scale": first.scale.flatten().tolist(),
        "shift": first.shift.flatten().tolist(),
    } | schedule_identity(schedule)


def schedule_identity(schedule: NoiseProcess) -> dict[str, Any]:
    """Returns what identifies a noise schedule, regardless of how it draws training timesteps: alphas_cumprod at about
    ten of them, and their number."""
    total = schedule.num_train_timesteps
    alpha, _ = schedule.training_coefficients(torch.arange(0, total, max(1, total // 10)))
    return {"alphas_cumprod": alpha.square().tolist(), "num_train_timesteps": total}


def _differs(model: LatentDiffusion, recorded: dict[str, Any]) -> str | None:
    """Describes in words how another network's recorded `latents_of` differ from the model's; None if they agree."""
    ours = latents_of(model)
    if recorded.get("autoencoder") != ours["autoencoder"]:
        return "another autoencoder"
    if not all(_close(recorded.get(n), ours[n], 1e-3, 1e-4) for n in ("scale", "shift")):
        return "latents of another scale (another data set, or another latents.per_channel)"
    same = recorded.get("num_train_timesteps") == ours["num_train_timesteps"]
    if not same or not _close(recorded.get("alphas_cumprod"), ours["alphas_cumprod"], 1e-5, 1e-8):
        return "another noise schedule"
    return None


def _close(values: Any, ours: list[float], rtol: float, atol: float) -> bool:
    """Returns True if recorded values are close to ours; values from a file may be of any type."""
    numbers = isinstance(values, list) and all(isinstance(v, int | float) for v in values)
    return numbers and len(values) == len(ours) and np.allclose(values, ours, rtol, atol)


def load_weaker(folder: Path, model: LatentDiffusion, trust: Sequence[str] = ()) -> LatentDiffusion:
    """Loads a weaker model for autoguidance. Raises ValueError if it was trained on other latents or another noise
    schedule."""
    weaker = load_latent_diffusion(folder, trust)
    if differs := _differs(model, latents_of(weaker)):
        raise ValueError(
            f"weaker_model={folder} was trained on {differs} than the model; take an earlier or smaller one of its kind"
        )
    return weaker


class Guides:
    """The external guides of a job. parsers: field -> parser of the guide's targets on the command line. recipe: hashes
    of the guides' weights."""

    def __init__(self, config: DictConfig, model: LatentDiffusion, device: str):
        self.model, self.scales = model, {"classifier": config.guide.classifier_scale, "clip": config.guide.clip_scale}
        self.parsers: dict[str, Callable[[str], Any]] = {}
        self.recipe: dict[str, Any] = {}
        self.classifier: NoisyClassifier | None = None
        self.clip: ClipScore | None = None
        if config.guide.classifier is not None:
            classifier, self.recipe["classifier_sha256"] = load_classifier(
                config.guide.classifier, config.runs_dir, model, config.trust
            )
            self.classifier = classifier.to(device)
            self.parsers["class_label"] = self._class
        if config.guide.clip is not None:
            if getattr(model.first_stage.autoencoder, "draws", False):
                raise ValueError(
                    "guide.clip leads through the decoder, and a prior has none that can be led through; leave it out"
                )
            self.clip = ClipScore(config.guide.clip).to(device)
            self.recipe["clip_sha256"] = weights_sha256(self.clip)
            self.parsers["caption"] = str

    def _class(self, text: str) -> int:
        names = self.classifier.names
        if text in names:
            return names.index(text)
        if text.isdigit() and int(text) < len(names):
            return int(text)
        raise ValueError(f"unknown class {text!r}; the classifier knows {', '.join(names[:40])}")

    def wrappers(self, part: Sequence[Request]) -> list[Callable[[Denoise], Denoise]]:
        """Returns the denoiser wrappers for a batch of requests, for `LatentDiffusion.sample`."""
        wraps: list[Callable[[Denoise], Denoise]] = []
        schedule = self.model.schedule
        if self.classifier is not None and "class_label" in part[0].targets:
            labels = to_device(torch.tensor([[r.targets["class_label"]] for r in part]), self.model.device)

            def log_probability(x_t: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
                seen = schedule.network_view(x_t, timesteps)[0]  # the view that the classifier was trained on
                return self.classifier(seen, timesteps).float().log_softmax(dim=1).gather(1, labels)[:, 0]

            guide = partial(classifier_guidance, schedule=schedule, guidance_scale=self.scales["classifier"])
            wraps.append(partial(guide, log_probability=log_probability))
        if self.clip is not None and "caption" in part[0].targets:
            texts, scale = self.clip.texts([r.targets["caption"] for r in part]), self.clip.logit_scale

            def score(latents: torch.Tensor) -> torch.Tensor:
                return scale * self.clip(self.model.first_stage.decoded(latents), texts)

            wraps.append(partial(score_guidance, score=score, schedule=schedule, guidance_scale=self.scales["clip"]))
        return wraps
