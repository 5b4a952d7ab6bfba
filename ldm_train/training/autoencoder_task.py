"""Stage 1: the autoencoder with perceptual and patch-GAN losses."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm_train import images as pictures
from ldm_train.distributed import gathered
from ldm_train.losses.autoencoder import AutoencoderLoss
from ldm_train.metrics.distribution import frechet_distance
from ldm_train.metrics.paired import psnr, ssim
from ldm_train.metrics.sets import Moments
from ldm_train.models.autoencoder import Autoencoder
from ldm_train.models.layers import full_precision
from ldm_train.models.posterior import Point
from ldm_train.models.quantizer import perplexity
from ldm_train.training.latent_augmentation import LatentAugmentation
from ldm_train.training.task import Task

ACTIVE_VARIANCE = 0.01  # a channel is active if its posterior mean varies by more over the data (Burda et al. 2016)


class AutoencoderTask(Task):
    """Trains an autoencoder: one forward pass, one LPIPS backward and one discriminator pass per batch
    (AutoencoderLoss).

    autoencoder: KL or VQ. image_folder: where reconstruction grids are saved. optimisation: other options of `Task`.
    augmentation: of the latents in training.
    disc_lr: the discriminator's own learning rate (default: the autoencoder's, as published).
    Validation decodes posterior means with the averaged weights. It logs l1, psnr (dB), ssim, perceptual, kl or
    codebook, score (perceptual + l1, the criterion of best.ckpt), the share of active latent channels, the smallest and
    largest standard deviation of a channel, the posterior's standard deviation relative to them and, with `features`
    (images -> features, has a name), the Frechet distance between images and reconstructions; for a VQ model also the
    codes' perplexity and the share in use.
    """

    monitor = "score"
    shown = ("l1", "perceptual", "kl", "codebook", "generator", "disc")

    def __init__(
        self,
        autoencoder: Autoencoder,
        loss: AutoencoderLoss,
        *,
        image_folder: Path | None = None,
        disc_lr: float | None = None,
        features: nn.Module | None = None,
        augmentation: LatentAugmentation | None = None,
        **optimisation: Any,
    ):
        super().__init__("autoencoder", **optimisation)
        self.autoencoder, self.loss, self.image_folder, self.disc_lr = autoencoder, loss, image_folder, disc_lr
        self.features, self.augmentation = features, augmentation or LatentAugmentation()

    def trained(self) -> nn.ModuleDict:
        parts = {"autoencoder": self.autoencoder, "likelihood": nn.ParameterList([self.loss.logvar])}
        if self.loss.discriminator is not None:
            parts["discriminator"] = self.loss.discriminator
        if self.loss.lecam_weight:
            parts["lecam"] = self.loss.usual_logits
        return nn.ModuleDict(parts)

    def averaged(self) -> nn.Module:
        return self.autoencoder

    def groups(self) -> list[dict]:
        generator = [p for p in self.autoencoder.parameters() if p.requires_grad]
        if self.loss.logvar.requires_grad:
            generator.append(self.loss.logvar)
        groups = [{"params": generator, "name": "autoencoder"}]
        if self.loss.discriminator is not None:
            own_lr = {} if self.disc_lr is None else {"lr": self.disc_lr}
            groups.append({"params": list(self.loss.discriminator.parameters()), "name": "discriminator"} | own_lr)
        return groups

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        change, images = self.augmentation.draw(batch["image"], self.autoencoder.downsample_factor)
        reconstructions, features, posterior = self.autoencoder(batch["image"], change=change)
        loss, logs = self.loss(
            images, reconstructions, features, posterior, self.autoencoder.last_layer, self.schedule_step
        )
        self.log_training(logs)
        return loss

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self._moments: dict[str, Moments] = {}
        self._codes: torch.Tensor | None = None  # number of uses of each code
        # Per-channel sums of posterior means, their squares and posterior variances, and the number of values.
        self._mean_moments = [0.0, 0.0, 0.0, 0]

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        images = batch["image"].float()
        reconstructions, _, posterior = self.autoencoder(images, sample=False)
        reconstructions = reconstructions.float().clamp(-1, 1)
        l1 = (images - reconstructions).abs().flatten(1).mean(dim=1)
        values = {"l1": l1, "psnr": psnr(reconstructions, images), "ssim": ssim(reconstructions, images), "score": l1}
        values |= posterior.regularisation()
        if self.loss.perceptual is not None:
            values["perceptual"] = self.loss.perceptual(reconstructions, images)
            values["score"] = l1 + values["perceptual"]
        for name, value in values.items():
            self.add(name, value)
        if self.features is not None:
            with full_precision(images.device):  # as in the evaluation stage
                for name, pictured in (("images", images), ("reconstructions", reconstructions)):
                    features = self.features(pictured)
                    self._moments.setdefault(name, Moments(features.shape[1])).add(features)
        if isinstance(posterior, Point):
            used = torch.bincount(posterior.indices.flatten(), minlength=self.autoencoder.quantize.num_codes)
            self._codes = used.cpu() if self._codes is None else self._codes + used.cpu()
        mean = posterior.mean.cpu().double()
        self._mean_moments[0] += mean.sum(dim=(0, 2, 3))
        self._mean_moments[1] += mean.square().sum(dim=(0, 2, 3))
        if not isinstance(posterior, Point):
            self._mean_moments[2] += posterior.std.cpu().double().square().sum(dim=(0, 2, 3))
        self._mean_moments[3] += mean[:, 0].numel()
        if batch_idx == 0 and self.global_rank == 0 and self.image_folder:
            grid = pictures.grid(torch.cat([images[:8], reconstructions[:8]]), columns=min(8, len(images)))
            self.log_picture("reconstructions", grid, self.image_folder, "above: images, below: reconstructions")
            for logger in self.loggers:
                logger.log_histogram("latents", posterior.mean, self.global_step)

    def on_validation_epoch_end(self) -> None:
        total, square, within, count = (sum(parts) for parts in zip(*gathered(self._mean_moments)))
        self.finish_validation()
        if count:
            variance = square / count - (total / count) ** 2
            metrics = {
                "active_channels": (variance > ACTIVE_VARIANCE).double().mean(),
                "latent_std_min": variance.clamp(min=0).sqrt().min(),
                "latent_std_max": variance.clamp(min=0).sqrt().max(),
            }
            if isinstance(within, torch.Tensor):  # a Gaussian posterior
                metrics["posterior_std"] = (within / count / variance.clamp(min=1e-12)).mean().sqrt()
            self.log_dict({f"val/{k}": v.item() for k, v in metrics.items()}, rank_zero_only=False)
        if used := [c for c in gathered(self._codes) if c is not None]:
            counts = torch.stack(used).sum(dim=0)
            self.log("val/perplexity", perplexity(counts), rank_zero_only=False)
            self.log("val/code_usage", (counts > 0).double().mean().item(), rank_zero_only=False)
        if self.features is not None:
            moments = [Moments.gathered(self._moments.get(n)) for n in ("images", "reconstructions")]
            if moments[0].count > 1:
                self.log(f"val/fid_{self.features.name}", frechet_distance(*moments), rank_zero_only=False)
