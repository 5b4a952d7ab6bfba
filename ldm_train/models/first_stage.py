"""The frozen first stage: an autoencoder, and the shift and scale that give its latents unit variance."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ldm_train.models.autoencoder import Autoencoder, AutoencoderIdentity
from ldm_train.models.posterior import Posterior
from ldm_train.models.tiling import Tiles

CODES = "quantize.embedding.weight"  # state dict key of an AutoencoderVQ's codebook


class FirstStage(nn.Module):
    """An autoencoder with scaled latents (z - shift) * scale, z ~ q(z | images). Always frozen and in eval mode.

    autoencoder: KL, VQ or identity
    scale_factor, shift: for all latent channels; `set_statistics` also takes one per channel. Saved with the weights.
    """

    def __init__(self, autoencoder: Autoencoder | AutoencoderIdentity, scale_factor: float = 1.0, shift: float = 0.0):
        super().__init__()
        self.autoencoder = autoencoder
        channels = autoencoder.latent_channels
        self.register_buffer("scale", torch.full((1, channels, 1, 1), float(scale_factor)))
        self.register_buffer("shift", torch.full((1, channels, 1, 1), float(shift)))
        self.eval().requires_grad_(False)

    @property
    def downsample_factor(self) -> int:
        return self.autoencoder.downsample_factor

    @property
    def latent_channels(self) -> int:
        return self.autoencoder.latent_channels

    @property
    def one_scale(self) -> float | None:
        """The scale if it is the same for all channels and there is no shift, else None."""
        scale = self.scale.flatten()
        return float(scale[0]) if (scale == scale[0]).all() and not self.shift.any() else None

    def train(self, mode: bool = True) -> "FirstStage":
        return super().train(False)

    def set_statistics(self, scale: torch.Tensor | float, shift: torch.Tensor | float = 0.0) -> None:
        """Sets scale and shift from a number or a (C,) tensor."""
        self.scale.copy_(torch.as_tensor(scale, dtype=torch.float32).view(1, -1, 1, 1).expand_as(self.scale))
        self.shift.copy_(torch.as_tensor(shift, dtype=torch.float32).view(1, -1, 1, 1).expand_as(self.shift))

    @torch.no_grad()
    def encode_moments(self, images: torch.Tensor, tiles: Tiles | None = None) -> torch.Tensor:
        """images (B, C, H, W) in [-1, 1] -> unscaled moments (B, 2C or C, h, w), float32; see `Autoencoder`."""
        return self.autoencoder.encode_moments(images, self._needed(tiles, images, self.downsample_factor)).float()

    def _needed(self, tiles: Tiles | None, pictures: torch.Tensor, factor: int) -> Tiles | None:
        """Returns `tiles`, or None for images that fit into one tile."""
        return tiles if tiles is not None and max(pictures.shape[-2:]) // factor > tiles.cells else None

    def posterior(self, moments: torch.Tensor) -> Posterior:
        """Returns the posterior of the unscaled latents."""
        return self.autoencoder.posterior(moments.float())

    def scaled(self, latents: torch.Tensor) -> torch.Tensor:
        """Scales the autoencoder's latents (B, C, h, w) to those that the diffusion model uses."""
        return (latents - self.shift) * self.scale

    def latents(self, moments: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Draws a new sample of the posterior, scaled: (B, C, h, w)."""
        return self.scaled(self.posterior(moments).sample(generator))

    def decoded(
        self, latents: torch.Tensor, tiles: Tiles | None = None, seeds: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Scaled latents (B, C, h, w) -> images (B, C, h*f, w*f), about [-1, 1]. Differentiable, except for an
        autoencoder whose decoder samples (its `draws` is True); only such a decoder uses the seeds."""
        own = {"seeds": seeds} if getattr(self.autoencoder, "draws", False) else {}
        unscaled = latents / self.scale + self.shift
        return self.autoencoder.decode(unscaled, self._needed(tiles, latents, 1), **own).float()

    @torch.no_grad()
    def decode(
        self, latents: torch.Tensor, chunk: int = 32, tiles: Tiles | None = None, seeds: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Scaled latents (B, C, h, w) -> images (B, C, h*f, w*f) in [-1, 1], float32. Decodes `chunk` images at a time,
        in tiles if they are larger than one tile."""
        parts = [None if seeds is None else seeds[k : k + chunk] for k in range(0, len(latents), chunk)]
        return torch.cat(
            [self.decoded(part, tiles, own).clamp(-1, 1) for part, own in zip(latents.split(chunk), parts)]
        )


def fold_statistics(
    state: Mapping[str, torch.Tensor], scale: torch.Tensor, shift: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Returns the weights of an autoencoder whose unscaled latents are (z - shift) * scale, by folding scale and shift
    into its 1x1 convolutions; for programs that support only one scale for all channels, or none.

    state: of an AutoencoderKL or AutoencoderVQ; the latter's nearest codes stay the same only if all channels have the
        same scale.
    scale, shift: C values each. Computed in float64, rounded once.
    """
    folded, (scale, shift) = dict(state), (t.double().flatten() for t in (scale, shift))
    weight, bias = (state[f"quant_conv.{leaf}"].double() for leaf in ("weight", "bias"))
    channels = len(scale)
    factor = torch.ones(len(bias), dtype=torch.float64)
    factor[:channels] = scale
    added = torch.zeros_like(factor)
    added[:channels], added[channels:] = (
        -shift * scale,
        2 * scale.log() if len(bias) > channels else 0,
    )  # added to the mean and to the log-variance
    folded["quant_conv.weight"] = weight * factor[:, None, None, None]
    folded["quant_conv.bias"] = bias * factor + added
    weight, bias = (state[f"post_quant_conv.{leaf}"].double() for leaf in ("weight", "bias"))
    folded["post_quant_conv.weight"] = weight / scale[None, :, None, None]
    folded["post_quant_conv.bias"] = bias + weight[:, :, 0, 0] @ shift
    if (codes := state.get(CODES)) is not None:
        folded[CODES] = (codes.double() - shift) * scale
    return {key: tensor.to(state[key].dtype) for key, tensor in folded.items()}
