"""The classifier stage: trains a classifier of noisy latents, for classifier guidance."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ldm_train.diffusion.process import NoiseProcess
from ldm_train.models.classifier import NoisyClassifier
from ldm_train.models.first_stage import FirstStage
from ldm_train.rng import NoiseSource, derive_seed
from ldm_train.training.diffusion_task import BINS
from ldm_train.training.task import Task


class ClassifierTask(Task):
    """Cross-entropy on latents at uniformly drawn timesteps (Dhariwal and Nichol 2021, section 4).

    network: NoisyClassifier. first_stage, schedule: those of the diffusion model it shall guide.
    Validation: loss and accuracy at noise and timesteps that are a function of the sample, also per quarter of the
    schedule.
    """

    monitor = "loss"

    shown = ("loss", "accuracy")

    def __init__(
        self,
        network: NoisyClassifier,
        first_stage: FirstStage,
        schedule: NoiseProcess,
        *,
        seed: int,
        optimizer: partial,
        lr_factor: Callable[[int], float],
        ema_decay: float | None = None,
        clip_norm: float | None = None,
        accumulate: int = 1,
    ):
        super().__init__("classifier", seed, optimizer, lr_factor, ema_decay, clip_norm, accumulate)
        self.network, self.first_stage, self.schedule = network, first_stage, schedule

    def trained(self) -> nn.ModuleDict:
        return nn.ModuleDict({"network": self.network})

    def averaged(self) -> nn.Module:
        return self.network

    def groups(self) -> list[dict]:
        return [{"params": list(self.network.parameters()), "name": "classifier"}]

    def _moments(self, batch: dict[str, Any]) -> torch.Tensor:
        moments = batch["moments"] if "moments" in batch else self.first_stage.encode_moments(batch["image"])
        return moments.to(self.device)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        latents = self.first_stage.latents(self._moments(batch))
        labels = torch.as_tensor(batch["class_label"], device=latents.device)
        strata = torch.randint(self.schedule.num_train_timesteps, (len(latents),))
        timesteps = self.schedule.strata(strata).to(latents.device)
        noise = torch.randn(latents.shape).to(latents)
        logits = self.network(self.schedule.add_noise(latents, noise, timesteps), timesteps)
        loss = F.cross_entropy(logits.float(), labels)
        self.log_training({"loss": loss.detach(), "accuracy": (logits.argmax(1) == labels).float().mean()})
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        seeds = [derive_seed("validation", key) for key in batch["key"]]
        latents = self.first_stage.scaled(self.first_stage.posterior(self._moments(batch)).mean)
        labels = torch.as_tensor(batch["class_label"], device=latents.device)
        total = self.schedule.num_train_timesteps
        timesteps = self.schedule.strata(torch.tensor([s % total for s in seeds])).to(latents.device)
        noise = NoiseSource(seeds).normal(latents.shape[1:], "noise", latents.device)
        logits = self.network(self.schedule.add_noise(latents, noise, timesteps), timesteps).float()
        right = (logits.argmax(1) == labels).float()
        self.add("loss", F.cross_entropy(logits, labels, reduction="none"))
        self.add("accuracy", right)
        for k in range(BINS):
            self.add(f"accuracy_t{k}", right[timesteps * BINS // total == k])

    def on_validation_epoch_end(self) -> None:
        self.finish_validation()
