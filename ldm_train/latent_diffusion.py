"""LatentDiffusion: U-Net, frozen first stage, conditioners and noise schedule as one object."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ldm_train.conditioning.base import Conditioner, merge
from ldm_train.diffusion.denoiser import Denoiser
from ldm_train.diffusion.guidance import Denoise, classifier_free, keep_known
from ldm_train.diffusion.schedule import NoiseSchedule
from ldm_train.models.first_stage import FirstStage
from ldm_train.models.unet import UNet
from ldm_train.rng import NoiseSource


class LatentDiffusion(nn.Module):
    """What training, evaluation, sampling and export all hold.

    unet, first_stage, schedule: the parts. conditioners: by name, in the order in which their outputs are joined.
    prediction_type: what the U-Net predicts. latent_size: (h, w) it was trained at, the default when sampling.
    Raises ValueError where the conditioners' widths do not fit the U-Net.
    """

    def __init__(
        self,
        unet: UNet,
        first_stage: FirstStage,
        schedule: NoiseSchedule,
        conditioners: Mapping[str, Conditioner] | None = None,
        prediction_type: str = "epsilon",
        latent_size: Sequence[int] = (32, 32),
    ):
        super().__init__()
        self.unet, self.first_stage, self.schedule = unet, first_stage, schedule
        self.conditioners = nn.ModuleDict(conditioners or {})
        self.prediction_type, self.latent_size = prediction_type, tuple(latent_size)
        self.sampling: dict[str, Any] = {}  # what `sample` does by default; loaded models bring their run's choice
        if unet.in_channels != first_stage.latent_channels:
            raise ValueError(
                f"diffusion.unet.in_channels is {unet.in_channels}, the first stage's latents have "
                f"{first_stage.latent_channels} channels"
            )
        widths: dict[str, set[int]] = {}
        total = {"vector": 0, "concat": 0}
        for conditioner in self.conditioners.values():
            conditioner.attach(first_stage)
            for slot, width in conditioner.widths.items():
                widths.setdefault(slot, set()).add(width)
                if slot in total:
                    total[slot] += width
        context = sorted(widths.get("context", {0}))
        for name, width, got in (
            ("context_dim", unet.context_dim or 0, context[0] if len(context) == 1 else context),
            ("vector_dim", unet.vector_dim or 0, total["vector"]),
            ("concat_channels", unet.concat_channels, total["concat"]),
        ):
            if width != got:
                raise ValueError(
                    f"diffusion.unet.{name} is {width}, the conditioners {list(self.conditioners)} give {got}; set "
                    f"diffusion.conditioning.{name}"
                )

    @classmethod
    def from_pretrained(cls, path: str) -> "LatentDiffusion":
        """A trained model with its run's sampling options: path is a run, its export/ folder, or any model folder.

        Raises FileNotFoundError where there is none, ValueError for damaged weights.
        """
        from ldm_train.checkpoints.native import load_latent_diffusion  # which imports this module

        return load_latent_diffusion(path)

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    @property
    def fields(self) -> tuple[str, ...]:
        """The batch fields its conditioners read."""
        return tuple(c.field for c in self.conditioners.values())

    def trainable(self) -> nn.ModuleDict:
        """The parts that stage 2 trains and averages: U-Net and conditioners."""
        return nn.ModuleDict({"unet": self.unet, "conditioners": self.conditioners})

    def latents_from(self, batch: Mapping[str, Any], generator: torch.Generator | None = None) -> torch.Tensor:
        """batch["moments"] (see `Autoencoder.encode_moments`) where cached, else batch["image"] is encoded; a fresh posterior sample each
        time. Returns scaled latents (B, C, h, w)."""
        moments = batch["moments"] if "moments" in batch else self.first_stage.encode_moments(batch["image"])
        return self.first_stage.latents(moments.to(self.device), generator)

    def condition(
        self,
        batch: Mapping[str, Any],
        drop: Mapping[str, torch.Tensor] | None = None,
        latent_size: Sequence[int] | None = None,
    ) -> dict[str, torch.Tensor]:
        """The U-Net's inputs for a batch. drop: per conditioner (B,) bool; a conditioner whose field the batch lacks
        is null. latent_size: of what is denoised, where it is not the trained one."""
        if not self.conditioners:
            return {}
        known = [name for name in (*self.fields, "moments", "image") if name in batch]
        count = len(batch[(known or list(batch))[0]])
        outputs = []
        for name, conditioner in self.conditioners.items():
            if conditioner.field not in batch:
                outputs.append(conditioner.null(count, latent_size or self.latent_size))
                continue
            mask = (drop or {}).get(name, torch.zeros(count, dtype=torch.bool)).to(self.device)
            outputs.append(conditioner(batch[conditioner.field], mask))
        return merge(outputs)

    def describe(self, batch: Mapping[str, Any], count: int) -> list[str]:
        """A caption per sample for pictures: what the last conditioner found in the batch ("" where none did)."""
        for conditioner in reversed(self.conditioners.values()):
            if conditioner.field in batch and any(texts := conditioner.describe(batch[conditioner.field])):
                return texts
        return [""] * count

    def picture(self, batch: Mapping[str, Any], size: Sequence[int]) -> torch.Tensor | None:
        """The conditions that can be seen, as pictures (B, C, H, W) in [-1, 1] of the first conditioner that has some."""
        for conditioner in self.conditioners.values():
            if conditioner.field in batch:
                picture = conditioner.picture(batch[conditioner.field], size)
                if picture is not None:
                    return picture
        return None

    def random_drop(self, count: int) -> dict[str, torch.Tensor]:
        """Independent per-sample dropout masks (B,) for each conditioner, from the global CPU generator."""
        return {name: torch.rand(count) < c.dropout for name, c in self.conditioners.items()}

    def null_condition(self, count: int, latent_size: Sequence[int] | None = None) -> dict[str, torch.Tensor]:
        return merge([c.null(count, latent_size or self.latent_size) for c in self.conditioners.values()])

    def network(self, x_t: torch.Tensor, timesteps: torch.Tensor, condition: dict[str, torch.Tensor]) -> torch.Tensor:
        """The U-Net under a condition: (B, C, h, w), (B,) -> (B, C, h, w)."""
        return self.unet(x_t, timesteps, **condition)

    def denoiser(self, condition: dict[str, torch.Tensor]) -> Denoiser:
        return Denoiser(self.network, self.schedule, self.prediction_type, condition)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Scaled latents -> images (B, C, H, W) in [-1, 1]."""
        return self.first_stage.decode(latents)

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """images (B, C, H, W) in [-1, 1] -> scaled latents (B, C, h, w), the posterior's mean."""
        posterior = self.first_stage.posterior(self.first_stage.encode_moments(images.to(self.device)))
        return self.first_stage.scaled(posterior.mean)

    @torch.no_grad()
    def sample(
        self,
        batch: Mapping[str, Any],
        seeds: Sequence[int],
        sampler: Callable[..., torch.Tensor] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        spacing: str | None = None,
        latent_size: Sequence[int] | None = None,
        callback: Callable[[int, torch.Tensor], None] | None = None,
        *,
        negative: Mapping[str, Any] | None = None,
        guidance: Callable[..., Denoise] = classifier_free,
        weak: "LatentDiffusion | None" = None,
        start: torch.Tensor | None = None,
        strength: float = 1.0,
        known: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Images (B, C, H, W) in [-1, 1], one per seed, under the fields in `batch` (each with B entries).

        sampler: a function of `samplers/`, its options bound (functools.partial). It, the steps, the guidance scale and
            the spacing default to what the model's run chose (`sampling`).
        latent_size: (h, w) of the latents, default those it was trained at
        negative: fields that guidance leads away from, in the place of the null condition. weak: a weaker model that it
            leads away from, under the same condition (autoguidance). guidance: `classifier_free`, options bound.
        start: latents (B, C, h, w) to begin from (img2img). strength: how much of the way is done again: 1 begins with
            noise alone, 0 returns `start` decoded
        known: (latents (B, C, h, w), mask (B, 1, h, w), 1 in the hole): inpainting by any model, see `keep_known`
        Raises ValueError where these do not fit each other.
        """
        options = self.sampling | {
            name: value
            for name, value in (
                ("sampler", sampler),
                ("num_inference_steps", num_inference_steps),
                ("guidance_scale", guidance_scale),
                ("spacing", spacing),
            )
            if value is not None
        }
        if missing := [n for n in ("sampler", "num_inference_steps") if n not in options]:
            raise ValueError(f"this model brings no sampling options of its own; say {' and '.join(missing)}")
        if not 0 <= strength <= 1:
            raise ValueError(f"strength is a share between 0 and 1, not {strength}")
        if start is not None:
            latent_size = tuple(start.shape[2:])
        noise, count = NoiseSource(seeds), len(seeds)
        fields = {"batch": batch, "negative": negative or {}, "start": {} if start is None else {"start": start}}
        for name, values in fields.items():
            if any(len(v) != count for v in values.values()):
                raise ValueError(f"{count} seeds but {name} of lengths {[len(v) for v in values.values()]}")
        denoise = self.denoiser(self._sampled(batch, count, latent_size))
        scale = float(options.get("guidance_scale", 1.0))
        if scale != 1:
            if weak is not None:
                other = weak.denoiser(weak._sampled(batch, count, latent_size))
            else:
                other = self.denoiser(self._sampled(negative or {}, count, latent_size, batch))
            denoise = guidance(denoise, other, scale)
        if known is not None:
            denoise = keep_known(denoise, *known)
        shape = (self.first_stage.latent_channels, *(latent_size or self.latent_size))
        x_t = noise.normal(shape, "start", self.device)
        timesteps = self.schedule.timesteps(options["num_inference_steps"], options.get("spacing", "trailing"))
        if start is not None and strength < 1:
            timesteps = timesteps[len(timesteps) - 1 - round((len(timesteps) - 1) * strength) :]
            alpha, sigma, _ = (v.item() for v in self.schedule.at(timesteps[0]))
            x_t = alpha * start.to(x_t) + sigma * x_t
        if len(timesteps) == 1:
            return self.decode(start.to(self.device))
        return self.decode(options["sampler"](denoise, x_t, timesteps, self.schedule, noise, callback=callback))

    def _sampled(
        self,
        batch: Mapping[str, Any],
        count: int,
        latent_size: Sequence[int] | None,
        spatial: Mapping[str, Any] | None = None,
    ) -> dict[str, torch.Tensor]:
        """The condition of `count` samples. spatial: a batch whose pictures and maps stay, whatever guidance does: they
        say where things are, and models are seldom trained without them."""
        kept = {c.field for c in self.conditioners.values() if "concat" in c.widths and not c.dropout}
        fields = {**{k: v for k, v in (spatial or {}).items() if k in kept}, **batch}
        return self.condition(fields, None, latent_size) if fields else self.null_condition(count, latent_size)
