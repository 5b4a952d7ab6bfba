"""The classifier stage: trains a classifier of noisy latents, for classifier guidance."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ldm_train.devices import to_device
from ldm_train.diffusion.process import NoiseProcess
from ldm_train.models.classifier import NoisyClassifier
from ldm_train.models.first_stage import FirstStage
from ldm_train.training.diffusion_task import moments_of, validation_draws
from ldm_train.training.task import BINS, Task


class ClassifierTask(Task):
    """Cross-entropy on noisy latents (Dhariwal and Nichol 2021, section 4), at timesteps drawn as the denoising network's
    training draws them: uniformly, unless the noise process says otherwise.

    first_stage, schedule: those of the diffusion model to be guided. optimisation: the other options of `Task`.
    Validation: loss and accuracy at noise and timesteps that are a function of the sample's key; accuracy also per
    quarter of the schedule.
    """

    monitor, shown = "loss", ("loss", "accuracy")

    def __init__(self, network: NoisyClassifier, first_stage: FirstStage, schedule: NoiseProcess, **optimisation: Any):
        super().__init__("classifier", **optimisation)
        self.network, self.first_stage, self.schedule = network, first_stage, schedule

    def trained(self) -> nn.ModuleDict:
        return nn.ModuleDict({"network": self.network})

    def averaged(self) -> nn.Module:
        return self.network

    def groups(self) -> list[dict]:
        return [{"params": list(self.network.parameters()), "name": "classifier"}]

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        latents = self.first_stage.latents(to_device(moments_of(batch, self.first_stage), self.device))
        labels = to_device(torch.as_tensor(batch["class_label"]), latents.device)
        strata = torch.randint(self.schedule.num_train_timesteps, (len(latents),))
        timesteps = to_device(self.schedule.strata(strata), latents.device)
        noise = to_device(torch.randn(latents.shape), latents.device).to(latents)
        logits = self.network(self.schedule.add_noise(latents, noise, timesteps), timesteps)
        loss = F.cross_entropy(logits.float(), labels)
        self.log_training({"loss": loss.detach(), "accuracy": (logits.argmax(1) == labels).float().mean()})
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        moments = to_device(moments_of(batch, self.first_stage), self.device)
        latents = self.first_stage.scaled(self.first_stage.posterior(moments).mean)
        labels = to_device(torch.as_tensor(batch["class_label"]), latents.device)
        source, timesteps = validation_draws(batch["key"], self.schedule)
        timesteps, noise = (
            to_device(timesteps, latents.device),
            source.normal(latents.shape[1:], "noise", latents.device),
        )
        logits = self.network(self.schedule.add_noise(latents, noise, timesteps), timesteps).float()
        right = (logits.argmax(1) == labels).float()
        self.add("loss", F.cross_entropy(logits, labels, reduction="none"))
        self.add_by_timestep("accuracy", right, timesteps * BINS // self.schedule.num_train_timesteps)

    def on_validation_epoch_end(self) -> None:
        self.finish_validation()
