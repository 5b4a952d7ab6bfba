"""Checks that diagnose faults during training, while they can still be fixed; each fault has a name and a remedy."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import wraps
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import torch

from ldm_train.distributed import rank
from ldm_train.storage import write_json
from ldm_train.training import HEALTH
from ldm_train.training.task import Task

PATIENCE = 500  # optimiser steps that a lasting fault (e.g. of the discriminator) must persist before it is reported
WINDOW = 10  # minimum number of logged values that must agree

History = Mapping[str, Sequence[tuple[int, float]]]  # logged name -> [(step, value), ...]
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Finding:
    """A diagnosed fault. name: of the check. what: a sentence with the numbers behind it. remedy: what to change."""

    name: str
    what: str
    remedy: str


CHECKS: list[Callable[[History, Settings], Finding | None]] = []


def remedy(words: str) -> Callable[[Callable[[History, Settings], str | None]], Callable]:
    """Decorator that adds to CHECKS a function returning a description of the fault, or None if there is none."""

    def decorated(fault: Callable[[History, Settings], str | None]) -> Callable[[History, Settings], Finding | None]:
        @wraps(fault)
        def check(history: History, settings: Settings) -> Finding | None:
            what = fault(history, settings)
            return None if what is None else Finding(fault.__name__, what, words)

        CHECKS.append(check)
        return check

    return decorated


def _last(history: History, key: str) -> float | None:
    return history[key][-1][1] if history.get(key) else None


def _lasting(history: History, key: str, state: Callable[[float], bool]) -> float | None:
    """Returns the last value if `state` holds for all values logged in the last PATIENCE steps (at least WINDOW
    values), else None."""
    values = history.get(key, ())
    if len(values) < WINDOW or values[-1][0] - values[0][0] < PATIENCE:
        return None
    recent = [v for step, v in values if step > values[-1][0] - PATIENCE]
    recent = recent if len(recent) >= WINDOW else [v for _, v in values[-WINDOW:]]
    return recent[-1] if all(map(state, recent)) else None


@remedy("lower autoencoder.loss.kl_weight (published: 1e-6), or use fewer z_channels")
def posterior_collapse(history: History, settings: Settings) -> str | None:
    active = _last(history, "val/active_channels")
    if active is None or active >= 0.5:
        return None
    return f"only {active:.0%} of the latent channels vary over the data; the others carry nothing (active units)"


@remedy("raise autoencoder.loss.kl_weight (ten times at a time)")
def no_posterior(history: History, settings: Settings) -> str | None:
    ratio = _last(history, "val/posterior_std")
    if ratio is None or ratio >= 1e-5:
        return None
    return (
        f"the posterior's standard deviation is {ratio:.1e} of the latents': the decoder was never trained on nearby "
        "latents, so small errors of the diffusion model may decode badly"
    )


@remedy(
    "latents.per_channel=true gives each channel unit variance; raise autoencoder.loss.kl_weight to keep them near 1"
)
def scale_drift(history: History, settings: Settings) -> str | None:
    low, high = _last(history, "val/latent_std_min"), _last(history, "val/latent_std_max")
    if low is None or high is None or (high < 20 and high < 20 * max(low, 1e-12)):
        return None
    return f"standard deviations of the latent channels are {low:.2g} to {high:.2g}"


@remedy("lower autoencoder.disc_lr, or autoencoder.loss.discriminator.spectral_norm=true")
def discriminator_overpowering(history: History, settings: Settings) -> str | None:
    accuracy = _lasting(history, "train/disc_accuracy", lambda v: v > 0.95)
    if accuracy is None:
        return None
    return f"the discriminator has been right in {accuracy:.0%} for {PATIENCE} steps; its gradient teaches nothing any more"


@remedy(
    "raise autoencoder.disc_lr, give it a head start with autoencoder.loss.disc_warmup, or a larger "
    "autoencoder.loss.discriminator.channels; without it the reconstructions stay as blurred as L1 and LPIPS leave them"
)
def discriminator_useless(history: History, settings: Settings) -> str | None:
    accuracy = _lasting(history, "train/disc_accuracy", lambda v: abs(v - 0.5) < 0.02)
    weight = _lasting(history, "train/adaptive_weight", lambda v: True)
    if accuracy is None or weight is None:
        return None
    return f"the discriminator has told pictures from reconstructions no better than a coin ({accuracy:.0%}) for {PATIENCE} steps"


@remedy(
    "lower autoencoder.loss.max_adaptive_weight, or raise autoencoder.loss.disc_start so that it meets better pictures"
)
def adaptive_weight_at_clamp(history: History, settings: Settings) -> str | None:
    clamp = settings.get("max_adaptive_weight")
    weight = _lasting(history, "train/adaptive_weight", lambda v: v >= 0.999 * clamp) if clamp else None
    if weight is None:
        return None
    return (
        f"the adaptive weight has been at its limit ({weight:g}) for {PATIENCE} steps: the discriminator's gradient at the last "
        "layer has all but vanished, and what is left of it is multiplied"
    )


@remedy(
    "the U-Net sees other noise levels than it is told, or latents of another scale: check diffusion.schedule, that the "
    "latents have unit variance (train/latent_std) and that the loss is still falling (lower diffusion.lr)"
)
def loss_by_timestep(history: History, settings: Settings) -> str | None:
    """Predicting noise is easiest at high noise, predicting the image at low noise: reports losses in another order."""
    easier = settings.get("easier_with_noise")
    bins = [_last(history, f"val/loss_t{k}") for k in range(settings.get("bins", 0))]
    step = history["val/loss_t0"][-1][0] if history.get("val/loss_t0") else 0
    if easier is None or len(bins) < 2 or None in bins or step < settings.get("settled", 200):
        return None
    sign = 1 if easier else -1
    if not any(sign * (noisier - cleaner) > 0.1 * abs(cleaner) for cleaner, noisier in pairwise(bins)):
        return None
    shown = ", ".join(f"{b:.3g}" for b in bins)
    return f"the validation loss per quarter of the schedule is out of order: {shown} from little noise to much"


@remedy("lower ema_decay: its horizon of 1 / (1 - ema_decay) steps must be much shorter than the training")
def ema_not_moving(history: History, settings: Settings) -> str | None:
    share = _last(history, "val/ema_moved")
    if share is None or share >= 1e-3:
        return None
    return f"since the last validation the averaged weights moved {share:.1e} times as far as the trained ones"


@remedy("statistics and latents are of different autoencoders or data: restart=latents measures and encodes again")
def latents_disagree(history: History, settings: Settings) -> str | None:
    values = [v for _, v in history.get("train/latent_std", ())][-3:]
    if settings.get("other_statistics") or len(values) < 3 or all(0.7 <= v <= 1.4 for v in values):
        return None
    return f"the latents' standard deviation is {values[-1]:.2f}; by the first stage's statistics it should be 1"


@remedy("raise num_workers, keep the shards on a local disk, or prepare them at the training size")
def data_starving(history: History, settings: Settings) -> str | None:
    waits = [v for _, v in history.get("train/data_wait", ())][-5:]
    if len(waits) < 5 or min(waits) < 0.3:
        return None
    return f"{waits[-1]:.0%} of the time goes into waiting for data"


class Health(L.Callback):
    """Checks the logged metrics and reports each fault once: on the terminal, in health.json and as a logger alert.

    folder: the stage's folder. settings: the options that the checks need. Non-finite gradients are handled by `Task`,
    which skips and counts such steps; after several in a row `fit` goes back to the last checkpoint.
    """

    def __init__(self, folder: Path, settings: Settings):
        self.path, self.settings = folder / HEALTH, settings
        self.history: dict[str, list[tuple[int, float]]] = defaultdict(list)
        self.findings: dict[str, dict[str, Any]] = {}
        self._before: tuple[torch.Tensor, torch.Tensor] | None = None
        self._last_step = -1

    def state_dict(self) -> dict[str, Any]:
        return {"found": self.findings, "history": {k: list(v) for k, v in self.history.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.findings = state_dict["found"]
        self.history = defaultdict(list, {k: [tuple(p) for p in v] for k, v in state_dict["history"].items()})

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Task, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if step != self._last_step and step % trainer.log_every_n_steps == 0:
            self._last_step = step
            self._take(trainer, "train/")

    def on_validation_start(self, trainer: L.Trainer, pl_module: Task) -> None:
        if pl_module.ema is None:
            return
        name = max(pl_module.ema.live, key=lambda n: min(pl_module.ema.live[n].numel(), 10**6))
        now = tuple(t[name].detach().float().cpu().clone() for t in (pl_module.ema.live, pl_module.ema.shadow))
        if self._before is not None:
            moved = [float((a - b).norm()) for a, b in zip(now, self._before)]
            if moved[0] > 0:
                self._add("val/ema_moved", trainer.global_step, moved[1] / moved[0])
        self._before = now

    def on_validation_end(self, trainer: L.Trainer, pl_module: Task) -> None:
        self._take(trainer, "val/")

    def _add(self, key: str, step: int, value: float) -> None:
        self.history[key].append((step, value))
        values = self.history[key]
        while len(values) > 200 and values[0][0] < step - 2 * PATIENCE:
            del values[0]

    def _take(self, trainer: L.Trainer, prefix: str) -> None:
        step = trainer.global_step
        for key, value in trainer.callback_metrics.items():
            if key.startswith(prefix):
                self._add(key, step, float(value))
        for check in CHECKS:
            finding = check(self.history, self.settings)
            if finding is not None and finding.name not in self.findings:
                self.report(trainer, finding, step)

    def report(self, trainer: L.Trainer, finding: Finding, step: int) -> None:
        """Reports a finding and records its name, so that later findings of that name are not reported."""
        self.findings[finding.name] = {"step": step} | asdict(finding)
        if rank() > 0:
            return
        print(f"\nhealth: {finding.name} at step {step}: {finding.what}\n  remedy: {finding.remedy}", flush=True)
        write_json(self.path, self.findings)
        for logger in trainer.loggers:
            logger.log_alert(finding.name, f"step {step}: {finding.what}. Remedy: {finding.remedy}")
