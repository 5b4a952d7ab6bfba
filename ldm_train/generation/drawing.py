"""Draws the pictures of a job: each task becomes a call of `LatentDiffusion.sample`, except reconstruction."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from omegaconf import DictConfig

from ldm_train.data.masks import known_colour
from ldm_train.data.samples import collate
from ldm_train.generation.guides import Guides
from ldm_train.generation.requests import Request, known_fields, latent_mask, picture_size
from ldm_train.latent_diffusion import Guidance, LatentDiffusion, Sampling, Start
from ldm_train.rng import NoiseSource, slerp
from ldm_train.samplers import Callback


@dataclass
class Drawing:
    """Draws a job's pictures. guidance: the settings that all pictures share. guides: the external guides."""

    model: LatentDiffusion
    task: str
    config: DictConfig
    sampling: Sampling
    guidance: Guidance
    guides: Guides
    autocast: Callable[[], torch.autocast]

    def __call__(
        self, part: list[Request], callback: Callback | None = None, inverting: Callback | None = None
    ) -> torch.Tensor:
        """Returns the pictures of a batch of requests (B, C, H, W), float32 on the CPU. callback: called after each
        sampling step; inverting: called after each step of the inversion of given pictures, which comes first."""
        with self.autocast(), torch.no_grad():
            return self._draw(part, callback, inverting).float().cpu()

    def _draw(self, part: list[Request], callback: Callback | None, inverting: Callback | None) -> torch.Tensor:
        model, tiles, f = self.model, self.sampling.tiles, self.model.first_stage.downsample_factor
        images = None if part[0].image is None else torch.stack([r.image for r in part])
        if self.task == "reconstruct":
            return model.decode(model.encode(images, tiles), tiles, [r.seed for r in part])
        height, width = picture_size(model, self.config.size) if images is None else images.shape[2:]
        size = (height // f, width // f)
        mask = torch.stack([r.mask for r in part]) if self.task in ("inpaint", "outpaint") else None
        guidance = replace(self.guidance, outer=self.guides.wrappers(part))
        if any(r.negative is not None for r in part):
            guidance = replace(guidance, negative={"caption": [r.negative for r in part]})
        drawn = model.sample(
            self._batch([r.fields for r in part]),
            [r.seed for r in part],
            self.sampling,
            self._start(part, images, mask, size, inverting),
            guidance,
            condition=self._mixture(part, size) if part[0].mix else None,
            latent_size=size,
            callback=callback,
        ).cpu()
        # The known pixels are pasted back: decoding does not reproduce them exactly.
        return drawn if mask is None else drawn * mask + images * (1 - mask)

    def _start(
        self,
        part: list[Request],
        images: torch.Tensor | None,
        mask: torch.Tensor | None,
        size: tuple[int, int],
        inverting: Callback | None,
    ) -> Start:
        model, config, tiles = self.model, self.config, self.sampling.tiles
        if self.task == "img2img":
            latents = model.encode(images, tiles)
            if not config.invert:
                return Start(latents=latents, strength=config.strength)
            source = self._needed([r.fields for r in part])
            if config.image_prompt is not None:
                source["caption"] = [str(config.image_prompt)] * len(part)
            return Start(noise=self._inverted(latents, source, inverting))
        if self.task == "interpolate" and part[0].walk is not None:
            return Start(noise=self._walk(part, size, inverting))
        if mask is not None and "masked_image" not in model.fields:
            # The hidden pixels are filled first, because latents beside the hole would show them. The mean colour of
            # the known pixels disturbs the encoder least.
            filled = images * (1 - mask) + known_colour(images, mask) * mask
            hole = latent_mask(mask, model.first_stage.downsample_factor).to(model.device)
            return Start(known=model.encode(filled, tiles), mask=hole)
        return Start()

    def decode(self, latents: torch.Tensor, seeds: Sequence[int]) -> torch.Tensor:
        with self.autocast():
            return self.model.decode(latents, self.sampling.tiles, seeds)

    def _inverted(self, latents: torch.Tensor, batch: dict[str, Any], inverting: Callback | None) -> torch.Tensor:
        return self.model.invert(latents, batch, self.sampling, self.config.invert_iterations, inverting)

    def _needed(self, fields: list[dict[str, Any]]) -> dict[str, Any]:
        """The conditions that training never dropped, as a batch: without them the model predicts nothing it has
        learned, and an inversion would end in noise that draws another picture."""
        needed = {c.field for c in self.model.conditioners.values() if not c.dropout}
        return {name: values for name, values in self._batch(fields).items() if name in needed}

    def _mixture(self, part: list[Request], size: tuple[int, int]) -> dict[str, torch.Tensor]:
        """Returns weighted mixtures of conditions, for interpolation and prompt arithmetic."""
        most = max(len(r.mix) for r in part)
        # Requests with fewer terms are padded with terms of weight 0.
        mixes = [(*r.mix, *[(0.0, r.mix[0][1])] * (most - len(r.mix))) for r in part]
        weighted = [(torch.tensor([w for w, _ in t]), self._batch([f for _, f in t])) for t in zip(*mixes)]
        return self.model.mixture(weighted, size)

    def _walk(self, part: list[Request], size: tuple[int, int], inverting: Callback | None) -> torch.Tensor:
        """Returns noise interpolated between two seeds or two inverted pictures."""
        if part[0].images is not None:
            # Pictures of a walk share their ends. The condition of an end is the first or the last one of the mixture.
            ends = {id(r.images[k]): (r.images[k], r.mix[k][1] if r.mix else {}) for r in part for k in (0, -1)}
            latents = self.model.encode(torch.stack([image for image, _ in ends.values()]), self.sampling.tiles)
            needed = self._needed([fields for _, fields in ends.values()])
            inverted = dict(zip(ends, self._inverted(latents, needed, inverting)))
            noise = [torch.stack([inverted[id(r.images[k])] for r in part]) for k in (0, 1)]
        else:
            shape = (self.model.first_stage.latent_channels, *size)
            noise = [NoiseSource([r.walk[k] for r in part]).normal(shape, "start") for k in (0, 1)]
        # On the CPU, since float64 is not available on every device.
        return slerp(*(z.cpu() for z in noise), torch.tensor([r.walk[2] for r in part]))

    def _batch(self, fields: list[dict[str, Any]]) -> dict[str, Any]:
        if not fields[0]:
            return {}
        batch = collate([dict(f) for f in fields], known_fields(self.model))
        batch.pop("replaced", None)
        return batch
