"""The interface of denoising networks such as `UNet` and `DiT`. Adding one needs no edit here or elsewhere."""

from typing import Any, Protocol, runtime_checkable

import torch


class Backbone(Protocol):
    """A module with these attributes and this forward, chosen by `diffusion.network._target_`.

    in_channels         channels of the latents, also of the output
    condition_widths    {"context": width of a token, "concat": channels, "vector": width}, 0 for inputs it does not
                        take; optionally "control": width of a picture's features, with `control` in `forward`, see
                        `UNet`
    size_multiple       the latents' h and w must be divisible by it
    """

    in_channels: int
    condition_widths: dict[str, int]
    size_multiple: int

    def __call__(
        self,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        context: torch.Tensor | None = None,
        context_mask: torch.Tensor | None = None,
        concat: torch.Tensor | None = None,
        vector: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """noisy_latents (B, C, h, w), timesteps (B,) up to T (`NoiseProcess.num_train_timesteps`), context (B, L, D) with mask
        (B, L), concat (B, channels, h, w), vector (B, width). Returns (B, C, h, w)."""


@runtime_checkable
class ProjectsContext(Protocol):
    """An optional part of a `Backbone`: work that depends on the context alone, which sampling does only once."""

    def projected(self, context: torch.Tensor) -> tuple[Any, ...]:
        """context (B, L, D) -> what `forward` takes instead: (nested) tuples of tensors."""
