"""LatentDiffusion: denoising network, frozen first stage, conditioners and noise process in one object."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import nn

from ldm_train.conditioning.base import SPATIAL, Conditioner, check_widths, keep, merge
from ldm_train.devices import to_device
from ldm_train.diffusion.denoiser import Denoiser, Network
from ldm_train.diffusion.guidance import Denoise, classifier_free, keep_known
from ldm_train.diffusion.objective import check_compatible
from ldm_train.diffusion.parameterisation import Epsilon, Parameterisation
from ldm_train.diffusion.process import NoiseProcess
from ldm_train.models import lora
from ldm_train.models.backbone import Backbone, ProjectsContext
from ldm_train.models.first_stage import FirstStage
from ldm_train.models.tiling import Tiles, Windows
from ldm_train.rng import NoiseSource
from ldm_train.samplers import Callback
from ldm_train.samplers.ddim import ddim_inversion


@dataclass(frozen=True)
class Sampling:
    """Options of sampling. None: as in the model's own run.

    sampler: a function of `samplers/` with its options bound (functools.partial). guidance_scale: 1 is off
    guidance_interval: guide only between these noise levels sigma / alpha (Kynkaanniemi et al. 2024); (0, 1e6): at all
    overlap: for larger latents, latent cells shared by neighbouring windows of the trained size (see `Panorama`)
    tiles: decode in tiles, for images too large for memory
    """

    sampler: Callable[..., torch.Tensor] | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    spacing: str | None = None
    guidance_interval: Sequence[float] | None = None
    overlap: int | None = None
    tiles: Tiles | None = None

    def over(self, usual: "Sampling") -> "Sampling":
        """These options, with None replaced by the values of `usual`."""
        return replace(usual, **{name: value for name, value in vars(self).items() if value is not None})

    def require(self, *names: str) -> None:
        """Raises ValueError if one of these options is set neither by the model's run nor by the call."""
        if missing := [n for n in names if getattr(self, n) is None]:
            raise ValueError(f"this model records no sampling options of its own; pass {' and '.join(missing)}")


@dataclass(frozen=True)
class Start:
    """The starting point of sampling; by default noise drawn from the seeds.

    noise: (B, C, h, w), used instead of the seeds' noise: for interpolation between seeds, and for inverted images
    latents: (B, C, h, w) of images to start from (img2img). strength: fraction of the steps that are done, from 1
    (starts from noise alone) to 0 (returns the decoded images)
    known, mask: latents (B, C, h, w), and (B, 1, h, w) with 1 in the hole: inpainting by any model, see `keep_known`
    """

    noise: torch.Tensor | None = None
    latents: torch.Tensor | None = None
    strength: float = 1.0
    known: torch.Tensor | None = None
    mask: torch.Tensor | None = None


@dataclass(frozen=True)
class Guidance:
    """The guidance of sampling, apart from the condition itself.

    negative: fields of a negative condition that guidance leads away from, instead of the null condition (texts may be None: null)
    weaker_model: model that guidance leads away from, under the same condition (autoguidance, Karras et al. 2024)
    rule: `classifier_free` with its options bound
    outer: further guidance, each a function from denoiser to denoiser, the first one innermost
    """

    negative: Mapping[str, Any] | None = None
    weaker_model: "LatentDiffusion | None" = None
    rule: Callable[..., Denoise] = classifier_free
    outer: Sequence[Callable[[Denoise], Denoise]] = ()


@dataclass(frozen=True)
class Panorama:
    """Applies a network to latents larger than those it was trained on: in every step it is evaluated in overlapping
    windows of the trained size, and the outputs are averaged (MultiDiffusion, Bar-Tal et al. 2023, arXiv:2302.08113),
    feathered where windows meet. All windows get the same context; spatial conditions are cropped to the window."""

    network: Network
    window: tuple[int, int]
    overlap: int

    def __call__(self, x_t: torch.Tensor, timesteps: torch.Tensor, condition: dict[str, Any]) -> torch.Tensor:
        windows = Windows(x_t.shape[-2:], self.window, self.overlap)

        def part(rows: slice, columns: slice) -> torch.Tensor:
            cut = {k: v[..., rows, columns] if k in SPATIAL else v for k, v in condition.items()}
            return self.network(x_t[..., rows, columns], timesteps, cut)

        return windows.average(part(*at) for at in windows.slices())


class Adapter(Protocol):
    """Adapts a model, its own weights frozen: `lora.LoRA`, `learned_tokens.TextualInversion`, `control.ControlNet`."""

    def attach(self, parts: nn.ModuleDict, name: str) -> nn.Module:
        """parts: "network", "conditioners" and "encoders" (see `adaptable`), now frozen. Returns what trains."""
        ...


class LatentDiffusion(nn.Module):
    """The model shared by training, evaluation, sampling and export.

    network, first_stage, schedule: the parts. conditioners: by name, in the order in which their outputs are joined.
    parameterisation: what the network predicts (default: the noise). latent_size: (h, w) of training, default of
    sampling.
    Raises ValueError if the parts do not fit each other.
    """

    def __init__(
        self,
        network: Backbone,
        first_stage: FirstStage,
        schedule: NoiseProcess,
        conditioners: Mapping[str, Conditioner] | None = None,
        parameterisation: Parameterisation | None = None,
        latent_size: Sequence[int] = (32, 32),
    ):
        super().__init__()
        self.network, self.first_stage, self.schedule = network, first_stage, schedule
        self.conditioners = nn.ModuleDict(conditioners or {})
        self.adapter: nn.Module | None = None  # the adapter that trains, see `adapt`
        self.parameterisation, self.latent_size = parameterisation or Epsilon(), tuple(latent_size)
        check_compatible(self.parameterisation, schedule)
        # Defaults of `sample`; loaded models have those of their run.
        self.sampling = Sampling(guidance_scale=1.0, spacing="trailing")
        if network.in_channels != first_stage.latent_channels:
            raise ValueError(
                f"diffusion.network.in_channels is {network.in_channels}, the first stage's latents have "
                f"{first_stage.latent_channels} channels"
            )
        for conditioner in self.conditioners.values():
            conditioner.attach(first_stage)
        check_widths(network.condition_widths, self.conditioners)

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def fields(self) -> tuple[str, ...]:
        """The batch fields that the conditioners read."""
        return tuple(c.field for c in self.conditioners.values())

    @property
    def _kept(self) -> set[str]:
        """The spatial fields that training never dropped, which guidance keeps on both sides."""
        return {c.field for c in self.conditioners.values() if {*SPATIAL} & c.widths.keys() and not c.dropout}

    def parts(self) -> nn.ModuleDict:
        """The network and the conditioners."""
        return nn.ModuleDict({"network": self.network, "conditioners": self.conditioners})

    def trainable(self) -> nn.ModuleDict:
        """What stage 2 trains and averages: network and conditioners, or only the adapter."""
        return self.parts() if self.adapter is None else nn.ModuleDict({"adapter": self.adapter})

    def adaptable(self) -> nn.ModuleDict:
        """What adapters may change: network, conditioners, and those pretrained encoders of conditioners that are
        loaded."""
        beside = {name: network for name, c in self.conditioners.items() if (network := c.frozen_encoder()) is not None}
        return nn.ModuleDict({**self.parts(), "encoders": nn.ModuleDict(beside)})

    def adapt(self, how: Adapter, name: str) -> None:
        """Attaches a new adapter; from now on only the adapter trains. Raises ValueError if it does not fit."""
        self.requires_grad_(False)
        self.adapter = how.attach(self.adaptable(), name)

    def merge_adapters(self) -> dict[str, torch.Tensor]:
        """Merges the adapters into the weights; returns the previous weights, see `lora.merge`."""
        self.adapter, before = None, lora.merge(self.adaptable())
        for conditioner in self.conditioners.values():
            conditioner.clear_cache()
        return before

    def latents_from(self, batch: Mapping[str, Any], generator: torch.Generator | None = None) -> torch.Tensor:
        """Returns scaled latents (B, C, h, w), a new posterior sample each time, from the cached batch["moments"] (see
        `Autoencoder.encode_moments`) if present, otherwise by encoding batch["image"]."""
        moments = batch["moments"] if "moments" in batch else self.first_stage.encode_moments(batch["image"])
        return self.first_stage.latents(to_device(moments, self.device), generator)

    def condition(
        self,
        batch: Mapping[str, Any],
        drop: Mapping[str, torch.Tensor] | None = None,
        latent_size: Sequence[int] | None = None,
    ) -> dict[str, torch.Tensor]:
        """The network's conditioning inputs for a batch. drop: (B,) bool per conditioner; where a field is missing, or a
        text None, it is null. latent_size: size of what is denoised, if it is not the trained one."""
        if not self.conditioners:
            return {}
        count = len(batch[next((n for n in (*self.fields, "moments", "image") if n in batch), next(iter(batch)))])
        outputs = []
        for name, conditioner in self.conditioners.items():
            if conditioner.field not in batch:
                outputs.append(conditioner.null(count, latent_size or self.latent_size))
                continue
            values, mask = batch[conditioner.field], (drop or {}).get(name, torch.zeros(count, dtype=torch.bool))
            if isinstance(values, list) and None in values:
                mask, values = mask | torch.tensor([v is None for v in values]), [v or "" for v in values]
            outputs.append(conditioner(values, mask))
        return merge(outputs)

    def mixture(
        self, terms: Sequence[tuple[torch.Tensor, Mapping[str, Any]]], latent_size: Sequence[int] | None = None
    ) -> dict[str, torch.Tensor]:
        """null + sum of w (condition - null) over terms (w (B,), batch): interpolates conditions or does arithmetic
        with them. If the weights add up to 1, null cancels out. A token is seen if any term with w != 0 has it."""
        null = self.null_condition(len(terms[0][0]), latent_size)
        mixed = {k: v.clone() for k, v in null.items()}
        if "context_mask" in mixed:
            mixed["context_mask"] &= to_device((sum(w for w, _ in terms) - 1).abs(), self.device)[:, None] > 1e-6
        for weights, batch in terms:
            for name, value in self.condition(batch, None, latent_size).items():
                w = weights.to(value.device).view(-1, *[1] * (value.ndim - 1))
                if name == "context_mask":
                    mixed[name] |= value & (w != 0)
                else:
                    mixed[name] += w.to(value.dtype) * (value - null[name])
        return mixed

    def describe(self, batch: Mapping[str, Any], count: int) -> list[str]:
        """A caption per sample: the description by the last conditioner that gives one ("" if none does)."""
        described = (c.describe(batch[c.field]) for c in reversed(self.conditioners.values()) if c.field in batch)
        return next((texts for texts in described if any(texts)), [""] * count)

    def picture(self, batch: Mapping[str, Any], size: Sequence[int]) -> torch.Tensor | None:
        """Visible conditions as images (B, C, H, W) in [-1, 1], of the first conditioner that has some, or None."""
        pictures = (c.picture(batch[c.field], size) for c in self.conditioners.values() if c.field in batch)
        return next((picture for picture in pictures if picture is not None), None)

    def random_drop(self, count: int) -> dict[str, torch.Tensor]:
        """Independent per-sample dropout masks (B,) for each conditioner, drawn from the global CPU generator."""
        return {name: torch.rand(count) < c.dropout for name, c in self.conditioners.items()}

    def null_condition(self, count: int, latent_size: Sequence[int] | None = None) -> dict[str, torch.Tensor]:
        return merge([c.null(count, latent_size or self.latent_size) for c in self.conditioners.values()])

    def predict(self, x_t: torch.Tensor, timesteps: torch.Tensor, condition: dict[str, Any]) -> torch.Tensor:
        """Evaluates the network under a condition, `prepared` or not: (B, C, h, w), (B,) -> (B, C, h, w)."""
        return self.network(x_t, timesteps, **condition)

    def prepared(self, condition: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Replaces a condition's context by the network's projections of it, if the network makes any."""
        if "context" not in condition or not isinstance(self.network, ProjectsContext):
            return condition
        return condition | {"context": self.network.projected(condition["context"])}

    def denoiser(self, condition: dict[str, torch.Tensor], overlap: int | None = None) -> Denoiser:
        """overlap: denoise larger latents in windows of the trained size that share this many cells, see `Panorama`."""
        network = self.predict if overlap is None else Panorama(self.predict, self.latent_size, overlap)
        return Denoiser(network, self.schedule, self.parameterisation, condition, self.prepared)

    def decode(
        self, latents: torch.Tensor, tiles: Tiles | None = None, seeds: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Scaled latents -> images (B, C, H, W) in [-1, 1]. tiles: for large images. seeds: for sampling decoders."""
        return self.first_stage.decode(latents, tiles=tiles, seeds=seeds)

    @torch.no_grad()
    def encode(self, images: torch.Tensor, tiles: Tiles | None = None) -> torch.Tensor:
        """Images (B, C, H, W) in [-1, 1] -> scaled latents (B, C, h, w), the mean of the posterior."""
        posterior = self.first_stage.posterior(self.first_stage.encode_moments(to_device(images, self.device), tiles))
        return self.first_stage.scaled(posterior.mean)

    @torch.no_grad()
    def sample(
        self,
        batch: Mapping[str, Any],
        seeds: Sequence[int],
        sampling: Sampling | None = None,
        start: Start | None = None,
        guidance: Guidance | None = None,
        *,
        condition: dict[str, torch.Tensor] | None = None,
        latent_size: Sequence[int] | None = None,
        callback: Callback | None = None,
    ) -> torch.Tensor:
        """Samples images (B, C, H, W) in [-1, 1], one per seed, under the fields in `batch` (each with B entries).

        sampling, start, guidance: see these classes.
        condition: an output of `condition` or `mixture`, used instead of the batch
        latent_size: (h, w) of the latents, by default that of `start`, else of training
        callback: called with (step, pred_x0 (B, C, h, w)) after each step
        Raises ValueError if the arguments do not fit each other.
        """
        how, start, guidance = (sampling or Sampling()).over(self.sampling), start or Start(), guidance or Guidance()
        how.require("sampler", "num_inference_steps")
        if not 0 <= start.strength <= 1:
            raise ValueError(f"strength is a share between 0 and 1, not {start.strength}")
        for given in (start.latents, start.noise, start.known):
            latent_size = latent_size if given is None else tuple(given.shape[2:])
        _check_lengths(len(seeds), batch, condition, start, guidance)
        noise = NoiseSource(seeds)
        denoise = self._guided(batch, len(seeds), how, guidance, condition, latent_size)
        if start.known is not None:
            known, mask = (to_device(given, self.device) for given in (start.known, start.mask))
            denoise = keep_known(denoise, known, mask)
        shape = (self.first_stage.latent_channels, *(latent_size or self.latent_size))
        x_t = noise.normal(shape, "start", self.device) if start.noise is None else to_device(start.noise, self.device)
        timesteps = self.schedule.timesteps(how.num_inference_steps, how.spacing)
        if start.latents is not None and start.strength < 1:
            timesteps = timesteps[len(timesteps) - 1 - round((len(timesteps) - 1) * start.strength) :]
            alpha, sigma = self.schedule.numbers(float(timesteps[0]))
            x_t = alpha * to_device(start.latents, self.device).to(x_t) + sigma * x_t
        if len(timesteps) > 1:
            x_t = how.sampler(denoise, x_t, timesteps, self.schedule, noise, callback=callback)
        else:
            x_t = to_device(start.latents, self.device)
        return self.decode(x_t, how.tiles, seeds)

    def _guided(
        self,
        batch: Mapping[str, Any],
        count: int,
        how: Sampling,
        guidance: Guidance,
        given: dict[str, torch.Tensor] | None,
        latent_size: Sequence[int] | None,
    ) -> Denoise:
        """The guided denoiser for `count` samples under the condition `given`, or under the fields in `batch`."""
        weaker = guidance.weaker_model
        if given is not None and weaker is not None:
            raise ValueError("a weaker model guides under the same fields; give them as batch, not as condition")
        condition = self.sampled_condition(batch, count, latent_size) if given is None else given
        denoise = self.denoiser(condition, how.overlap)
        # If there is no condition that guidance could drop, both of its sides are the same.
        conditional = guidance.negative or {*self.fields} & {*(batch if given is None else self.fields)} - self._kept
        if (scale := float(how.guidance_scale)) != 1 and (weaker is not None or conditional):
            if weaker is not None:
                other = weaker.denoiser(weaker.sampled_condition(batch, count, latent_size), how.overlap)
            else:
                away = self.sampled_condition(guidance.negative or {}, count, latent_size, batch)
                if given is not None:  # keeps what `sampled_condition` keeps of a batch
                    keep(away, given, self.conditioners.values(), self._kept)
                other = self.denoiser(away, how.overlap)
            interval = {} if how.guidance_interval is None else {"interval": tuple(how.guidance_interval)}
            denoise = guidance.rule(denoise, other, scale, **interval)
        for wrap in guidance.outer:
            denoise = wrap(denoise)
        return denoise

    @torch.no_grad()
    def invert(
        self,
        latents: torch.Tensor,
        batch: Mapping[str, Any],
        sampling: Sampling | None = None,
        iterations: int = 5,
        callback: Callback | None = None,
    ) -> torch.Tensor:
        """The noise (B, C, h, w) from which DDIM with eta 0 and without guidance samples `latents` under `batch`: use
        it as `Start.noise` to edit an image, see `ddim_inversion`."""
        how = (sampling or Sampling()).over(self.sampling)
        how.require("num_inference_steps")
        timesteps = self.schedule.timesteps(how.num_inference_steps, how.spacing)
        denoise = self.denoiser(self.sampled_condition(batch, len(latents), latents.shape[2:]), how.overlap)
        latents = to_device(latents, self.device)
        return ddim_inversion(denoise, latents, timesteps, self.schedule, iterations=iterations, callback=callback)

    def sampled_condition(
        self,
        batch: Mapping[str, Any],
        count: int,
        latent_size: Sequence[int] | None,
        spatial: Mapping[str, Any] | None = None,
    ) -> dict[str, torch.Tensor]:
        """The condition of `count` samples. spatial: a batch whose spatial fields are kept under any guidance if their
        conditioner was trained without dropout. Raises ValueError if `batch` has fields, but none that is read."""
        if batch and self.fields and not {*self.fields} & batch.keys():
            raise ValueError(f"the model reads {', '.join(self.fields)}, not {', '.join(batch)}")
        fields = {**{k: v for k, v in (spatial or {}).items() if k in self._kept}, **batch}
        return self.condition(fields, None, latent_size) if fields else self.null_condition(count, latent_size)


def _check_lengths(
    count: int, batch: Mapping[str, Any], condition: Mapping[str, torch.Tensor] | None, start: Start, guidance: Guidance
) -> None:
    """Raises ValueError if an argument does not have one entry per seed."""
    given = {"batch": batch, "negative": guidance.negative or {}, "condition": condition or {}}
    given |= {k: {k: v} for k in ("latents", "noise", "known", "mask") if (v := getattr(start, k)) is not None}
    for name, values in given.items():
        if any(len(v) != count for v in values.values()):
            raise ValueError(f"{count} seeds but {name} of lengths {[len(v) for v in values.values()]}")
    if (start.known is None) != (start.mask is None):
        raise ValueError("known latents and the mask of their hole go together")
