"""Stage 2: the conditional network on latents of the frozen first stage."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm_train import images as pictures
from ldm_train import names
from ldm_train.diffusion.objective import DiffusionObjective
from ldm_train.latent_diffusion import LatentDiffusion
from ldm_train.rng import NoiseSource, derive_seed
from ldm_train.training.task import Task

BINS = 4


class DiffusionTask(Task):
    """Epsilon-MSE (or another objective) on latents; the averaged weights cover network and conditioners.

    model: LatentDiffusion, its first stage frozen. objective: DiffusionObjective.
    draw: (model, batch of conditions, seeds) -> images, for the sample grids; None draws none.
    samples: conditions shown, from the beginning of the validation set.
    Validation: the unweighted loss at noise and timesteps that are a function of the sample, also per quarter of
    the schedule.
    """

    monitor = "loss"

    def __init__(
        self,
        model: LatentDiffusion,
        objective: DiffusionObjective,
        *,
        seed: int,
        optimizer: partial,
        lr_factor: Callable[[int], float],
        ema_decay: float | None = 0.9999,
        clip_norm: float | None = None,
        accumulate: int = 1,
        draw: Callable[..., torch.Tensor] | None = None,
        samples: int = 16,
        image_folder: Path | None = None,
    ):
        super().__init__("diffusion", seed, optimizer, lr_factor, ema_decay, clip_norm, accumulate)
        self.model, self.objective = model, objective
        self.draw, self.samples, self.image_folder = draw, samples, image_folder
        self._shown: dict[str, Any] = {}

    def trained(self) -> nn.ModuleDict:
        parts = dict(self.model.trainable().items())
        if list(self.objective.parameters()):
            parts["objective"] = self.objective
        return nn.ModuleDict(parts)

    def averaged(self) -> nn.Module:
        return self.model.trainable()

    def groups(self) -> list[dict]:
        groups = [{"params": [p for p in self.model.trainable().parameters() if p.requires_grad], "name": "network"}]
        if uncertainty := list(self.objective.parameters()):
            groups.append({"params": uncertainty, "name": "uncertainty", "weight_decay": 0.0})
        return groups

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        names.rename_in_checkpoint(checkpoint)
        super().on_load_checkpoint(checkpoint)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        latents = self.model.latents_from(batch)
        count, world = len(latents), self.trainer.world_size
        # Strata over the whole global batch: this micro-batch of this rank takes its own consecutive slices.
        first = (batch_idx % self.accumulate * world + self.global_rank) * count
        timesteps = self.objective.sample_timesteps(count, first, count * world * self.accumulate).to(latents.device)
        noise = self.objective.draw_noise(latents)
        condition = self.model.condition(batch, drop=self.model.random_drop(count))
        loss = self.objective(lambda x, t: self.model.predict(x, t, condition), latents, noise, timesteps)
        weighted = self.objective.weighted(loss, timesteps)
        if "loss_weight" in batch:
            weighted = weighted * batch["loss_weight"].to(weighted.device)
        logs = {"loss": loss.detach().mean(), "weighted_loss": weighted.detach().mean(), "latent_std": latents.std()}
        bins = timesteps * BINS // self.objective.schedule.num_train_timesteps
        for k in range(BINS):
            if (inside := bins == k).any():
                logs[f"loss_t{k}"] = loss.detach()[inside].mean()
        self.log_training(logs)
        return weighted.mean()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        seeds = [derive_seed("validation", key) for key in batch["key"]]
        source = NoiseSource(seeds)
        moments = batch["moments"] if "moments" in batch else self.model.first_stage.encode_moments(batch["image"])
        posterior = self.model.first_stage.posterior(moments.to(self.device))
        z = posterior.mean + posterior.std * source.normal(posterior.mean.shape[1:], "posterior", self.device)
        latents = self.model.first_stage.scaled(z)
        noise = source.normal(latents.shape[1:], "noise", latents.device)
        total = self.objective.schedule.num_train_timesteps
        strata = torch.tensor([s % total for s in seeds])
        timesteps = self.objective.schedule.strata(strata).to(latents.device)
        condition = self.model.condition(batch)
        loss = self.objective(lambda x, t: self.model.predict(x, t, condition), latents, noise, timesteps)
        self.add("loss", loss)
        for k in range(BINS):
            self.add(f"loss_t{k}", loss[timesteps * BINS // total == k])
        if batch_idx == 0:
            for logger in self.loggers:
                logger.log_histogram("latents", latents, self.global_step)
        if batch_idx == 0 and not self._shown:
            fields = [f for f in self.model.fields if f in batch]
            self._shown = {f: batch[f][: self.samples] for f in fields}
            self._shown_count = min(self.samples, len(latents))

    def on_validation_epoch_end(self) -> None:
        if self.draw is not None and self.image_folder and self.global_rank == 0 and hasattr(self, "_shown_count"):
            drawn = self.draw(self.model, self._shown, seeds=list(range(self._shown_count)))
            captions = self.model.describe(self._shown, self._shown_count)
            shown = pictures.beside(self.model.picture(self._shown, drawn.shape[2:]), drawn)
            grid = pictures.grid(shown, captions=captions if any(captions) else None)
            path = pictures.save_png(grid, self.image_folder / f"samples_{self.global_step:07d}.png")
            for logger in self.loggers:
                logger.log_picture("samples", path, self.global_step, "fixed seeds and conditions, averaged weights")
        self.finish_validation()
