"""Stage 2: trains the conditional network on latents of the frozen first stage."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm_train import images as pictures
from ldm_train import names
from ldm_train.devices import to_device
from ldm_train.diffusion.objective import DiffusionObjective
from ldm_train.diffusion.process import NoiseProcess
from ldm_train.latent_diffusion import LatentDiffusion
from ldm_train.models.first_stage import FirstStage
from ldm_train.rng import NoiseSource, derive_seed
from ldm_train.training.alignment import Alignment
from ldm_train.training.task import BINS, Task


def moments_of(batch: dict[str, Any], first_stage: FirstStage) -> torch.Tensor:
    """Returns the cached moments of a batch or, if there are none, those of its encoded images."""
    return batch["moments"] if "moments" in batch else first_stage.encode_moments(batch["image"])


def validation_draws(keys: Sequence[str], schedule: NoiseProcess) -> tuple[NoiseSource, torch.Tensor]:
    """Returns validation's noise source and timesteps (B,), a function of the samples' keys."""
    seeds = [derive_seed("validation", key) for key in keys]
    strata = torch.tensor([seed % schedule.num_train_timesteps for seed in seeds])
    return NoiseSource(seeds), schedule.strata(strata)


class DiffusionTask(Task):
    """Epsilon-MSE (or another objective) on latents; the averaged weights cover network and conditioners.

    model: LatentDiffusion, its first stage frozen. objective: DiffusionObjective.
    draw: (model, batch of conditions, seeds) -> images, for the sample grids; None: no grids.
    alignment: weight of the loss that aligns the network's middle with the autoencoder's features, see `Alignment`;
        0: none.
    samples: number of conditions shown, from the start of the validation set. optimisation: other options of `Task`.
    Validation: the unweighted loss at noise and timesteps that are a function of the sample's key, also per quarter of
    the schedule.
    """

    monitor = "loss"

    def __init__(
        self,
        model: LatentDiffusion,
        objective: DiffusionObjective,
        *,
        draw: Callable[..., torch.Tensor] | None = None,
        samples: int = 16,
        image_folder: Path | None = None,
        ema_decay: float | None = 0.9999,
        alignment: float = 0.0,
        **optimisation: Any,
    ):
        super().__init__("diffusion", ema_decay=ema_decay, **optimisation)
        self.model, self.objective = model, objective
        self.draw, self.samples, self.image_folder = draw, samples, image_folder
        self.alignment = Alignment(alignment, model.network, model.first_stage) if alignment else None
        self._shown: tuple[dict[str, Any], int] | None = None  # the conditions of the sample grids, and their number

    def trained(self) -> nn.ModuleDict:
        parts = dict(self.model.trainable().items())
        if list(self.objective.parameters()):
            parts["objective"] = self.objective
        if self.alignment is not None:
            parts["alignment"] = self.alignment
        return nn.ModuleDict(parts)

    def averaged(self) -> nn.Module:
        return self.model.trainable()

    def groups(self) -> list[dict]:
        groups = [{"params": [p for p in self.model.trainable().parameters() if p.requires_grad], "name": "network"}]
        if uncertainty := list(self.objective.parameters()):
            groups.append({"params": uncertainty, "name": "uncertainty", "weight_decay": 0.0})
        if self.alignment is not None:
            groups.append({"params": list(self.alignment.parameters()), "name": "alignment"})
        return groups

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        names.rename_in_checkpoint(checkpoint)
        super().on_load_checkpoint(checkpoint)

    def transfer_batch_to_device(
        self, batch: dict[str, Any], device: torch.device, dataloader_idx: int
    ) -> dict[str, Any]:
        """Conditions stay on the host, where conditioners check them, tokenise them and upload the result."""
        kept = {field: batch[field] for field in self.model.fields if field in batch}
        moved = {name: values for name, values in batch.items() if name not in kept}
        return super().transfer_batch_to_device(moved, device, dataloader_idx) | kept

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        latents = self.model.latents_from(batch)
        count, world = len(latents), self.trainer.world_size
        # Timesteps are stratified over the global batch, of which this is a part.
        part = batch_idx % self.accumulate * world + self.global_rank
        drawn = self.objective.sample_timesteps(count, part, world * self.accumulate)
        timesteps = to_device(drawn, latents.device)
        noise = self.objective.draw_noise(latents)
        condition = self.model.condition(batch, drop=self.model.random_drop(count))
        loss = self.objective(lambda x, t: self.model.predict(x, t, condition), latents, noise, timesteps)
        weighted = self.objective.weighted(loss, timesteps)
        extra = {}
        if self.alignment is not None:
            distance = self.alignment(latents, self.model.first_stage)
            weighted, extra = weighted + distance, {"alignment": distance.detach().mean()}
        if "loss_weight" in batch:
            weighted = weighted * to_device(batch["loss_weight"], weighted.device)
        logs = extra | {
            "loss": loss.detach().mean(),
            "weighted_loss": weighted.detach().mean(),
            "latent_std": latents.std(),
        }
        # The quarter of each sample is known on the host, without waiting for the device.
        inside = (drawn * BINS // self.objective.schedule.num_train_timesteps)[:, None] == torch.arange(BINS)
        counts = inside.sum(dim=0)
        sums = torch.where(to_device(inside, loss.device), loss.detach()[:, None], 0.0).sum(dim=0)
        logs |= {f"loss_t{k}": sums[k] / number for k, number in enumerate(counts.tolist()) if number}
        self.log_training(logs)
        return weighted.mean()

    def validation_latents(self, batch: dict[str, Any], source: NoiseSource) -> torch.Tensor:
        """Returns the scaled latents (B, C, h, w) of a batch, drawn from their posterior with the noise of `source`."""
        first_stage = self.model.first_stage
        posterior = first_stage.posterior(to_device(moments_of(batch, first_stage), self.device))
        z = posterior.mean + posterior.std * source.normal(posterior.mean.shape[1:], "posterior", self.device)
        return first_stage.scaled(z)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        schedule = self.objective.schedule
        source, timesteps = validation_draws(batch["key"], schedule)
        latents = self.validation_latents(batch, source)
        timesteps, noise = (
            to_device(timesteps, latents.device),
            source.normal(latents.shape[1:], "noise", latents.device),
        )
        condition = self.model.condition(batch)
        loss = self.objective(lambda x, t: self.model.predict(x, t, condition), latents, noise, timesteps)
        self.add_by_timestep("loss", loss, timesteps * BINS // schedule.num_train_timesteps)
        if batch_idx == 0:
            self.remember(batch, latents)

    def remember(self, batch: dict[str, Any], latents: torch.Tensor) -> None:
        """Logs a histogram of the first validation batch's latents, and keeps its conditions for the sample grids."""
        for logger in self.loggers:
            logger.log_histogram("latents", latents, self.global_step)
        if self._shown is None:
            conditions = {f: batch[f][: self.samples] for f in self.model.fields if f in batch}
            self._shown = conditions, min(self.samples, len(latents))

    def on_validation_epoch_end(self) -> None:
        if self.draw is not None and self.image_folder and self.global_rank == 0 and self._shown is not None:
            conditions, count = self._shown
            drawn = self.draw(self.model, conditions, seeds=list(range(count)))
            captions = self.model.describe(conditions, count)
            shown = pictures.beside(self.model.picture(conditions, drawn.shape[2:]), drawn)
            grid = pictures.grid(shown, captions=captions if any(captions) else None)
            self.log_picture("samples", grid, self.image_folder, "fixed seeds and conditions, averaged weights")
        self.finish_validation()
