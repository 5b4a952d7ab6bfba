"""Sampling from a model trained with ldm_train, using only diffusers:

pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
pipeline(prompt="a red circle", num_inference_steps=20, guidance_scale=3.0).images[0].save("circle.png")
"""

import inspect
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor


def as_picture(image: Any) -> torch.Tensor:
    """Converts a PIL image, a list of them, or a tensor (B, C, H, W) in [-1, 1] to such a tensor."""
    if isinstance(image, list | tuple):
        return torch.cat([as_picture(one) for one in image])
    if isinstance(image, PIL.Image.Image):
        image = image if image.mode == "L" else image.convert("RGB")
        pixels = torch.from_numpy(np.array(image)).float() / 127.5 - 1
        return (pixels if pixels.ndim == 3 else pixels[..., None]).permute(2, 0, 1)[None]
    return image


def as_mask(mask: Any) -> torch.Tensor:
    """Converts a PIL image, white in the hole, a list of them, or a tensor (B, 1, H, W) with 1 in the hole to such a
    tensor."""
    if isinstance(mask, list | tuple):
        return torch.cat([as_mask(one) for one in mask])
    return (as_picture(mask.convert("L")) + 1) / 2 if isinstance(mask, PIL.Image.Image) else mask


class LatentDiffusionPipeline(DiffusionPipeline):
    """The sampling pipeline. latents: {"scale", "shift"} per channel, with z = latents / scale + shift. sampling: the
    usual options of this model."""

    _optional_components = ["vae", "conditioners"]

    def __init__(
        self, unet: Any, scheduler: Any, vae: Any = None, conditioners: Any = None,
        latents: Any = None, sampling: Any = None,
    ):  # fmt: skip
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, vae=vae, conditioners=conditioners)
        self.register_to_config(latents=latents, sampling=sampling)

    def statistics(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scale, shift = (torch.tensor(self.config.latents[k]).to(like).view(1, -1, 1, 1) for k in ("scale", "shift"))
        return scale, shift

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        encoded = self.vae.encode(images.to(self.vae.device, self.vae.dtype))
        z = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
        scale, shift = self.statistics(z)
        return (z - shift) * scale

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        scale, shift = self.statistics(latents)
        z = latents / scale + shift
        return (z if self.vae is None else self.vae.decode(z.to(self.vae.dtype)).sample).clamp(-1, 1)

    def given(
        self, prompt: Any, class_label: Any, image: Any, mask: Any, segmentation: torch.Tensor | None
    ) -> dict[str, Any]:
        """Returns the conditions by name. Raises ValueError for a condition that this model does not have."""
        given: dict[str, Any] = {}
        for name, value in (("prompt", prompt), ("class_label", class_label)):
            if value is not None:
                given[name] = list(value) if isinstance(value, list | tuple) else [value]
        if segmentation is not None:
            given["segmentation"] = segmentation
        if image is not None:
            picture = as_picture(image).to(self.unet.device, self.unet.dtype)
            given["low_resolution" if mask is None else "masked_image"] = (
                picture if mask is None else (picture, as_mask(mask).to(picture))
            )
        known = {} if self.conditioners is None else self.conditioners.config.parts
        if unknown := [name for name in given if name not in known]:
            raise ValueError(f"this model knows no {unknown[0].replace('_', ' ')}, only: {', '.join(known) or 'noise'}")
        return given

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        class_label: Any = None,
        image: Any = None,
        mask: Any = None,
        segmentation: torch.Tensor | None = None,
        num_images: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        eta: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Samples images under the conditions that this model has. Captions and classes may be left out, images and
        maps may not.

        prompt: caption(s). class_label: name(s) or index(es). segmentation: (B, H, W) integer labels
        image: the small image of a super-resolution model; with `mask` (1 or white in the hole) the image to inpaint.
            PIL images, or tensors (B, C, H, W) in [-1, 1]
        num_images: by default one for each entry. latents: the initial noise, (B, C, h, w)
        """
        given = self.given(prompt, class_label, image, mask, segmentation)
        count = num_images or max([1, *(len(v[0] if isinstance(v, tuple) else v) for v in given.values())])
        given = {name: repeated(value, count, name) for name, value in given.items()}
        steps = num_inference_steps or int(self.config.sampling["num_inference_steps"])
        scale = self.config.sampling["guidance_scale"] if guidance_scale is None else guidance_scale
        eta = self.config.sampling["eta"] if eta is None else eta
        size = (self.conditioners.size(given) if given else None) or self.unet.config.sample_size
        size = (size, size) if isinstance(size, int) else tuple(size)
        if latents is None:
            shape = (count, self.unet.config.out_channels, *size)
            latents = randn_tensor(shape, generator, self._execution_device, self.unet.dtype)
        self.scheduler.set_timesteps(steps, device=self._execution_device)
        latents = latents.to(self._execution_device, self.unet.dtype) * self.scheduler.init_noise_sigma
        takes_eta = "eta" in inspect.signature(self.scheduler.step).parameters
        extra: dict[str, Any] = {"generator": generator, "eta": eta} if takes_eta else {}
        conditions = [{}]
        if self.conditioners is not None:
            nulls = [True, False] if scale != 1 else [False]
            conditions = [self.conditioners(given, count, null, self.encode) for null in nulls]
        for t in self.progress_bar(self.scheduler.timesteps):
            predicted = [self.predict(latents, t, condition) for condition in conditions]
            guided = predicted[0] + scale * (predicted[1] - predicted[0]) if len(predicted) > 1 else predicted[0]
            latents = self.scheduler.step(guided, t, latents, **extra).prev_sample
        images = self.decode(latents).float() / 2 + 0.5
        if output_type != "pt":
            images = images.cpu().permute(0, 2, 3, 1).numpy()
            images = self.numpy_to_pil(images) if output_type == "pil" else images
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def predict(self, latents: torch.Tensor, t: torch.Tensor, condition: dict[str, torch.Tensor]) -> torch.Tensor:
        x = self.scheduler.scale_model_input(latents, t)
        inputs = {k: v.to(x) for k, v in condition.items()}
        if (concat := inputs.pop("concat", None)) is not None:
            x = torch.cat([x, concat], dim=1)
        return self.unet(x, t, **inputs).sample


def repeated(value: Any, count: int, name: str) -> Any:
    """Repeats a single entry `count` times. Raises ValueError for any other number of entries than 1 or `count`."""
    if isinstance(value, tuple):
        return tuple(repeated(v, count, name) for v in value)
    if len(value) not in (1, count):
        raise ValueError(f"{name} has {len(value)} entries for {count} images")
    if isinstance(value, list):
        return value * (count // len(value))
    return value.expand(count, *value.shape[1:])
