"""Alignment of the denoising network's middle features with features of the clean image, as an additional loss."""

from typing import Any

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F

from ldm_train.models.autoencoder import Autoencoder, AutoencoderVQ
from ldm_train.models.first_stage import FirstStage


def check_alignment(network: nn.Module, autoencoder: nn.Module) -> None:
    """Raises ValueError if the network has no `middle` or the autoencoder (e.g. identity) no features to align."""
    if not isinstance(autoencoder, Autoencoder):
        raise ValueError(
            "diffusion.task.alignment needs a KL or VQ autoencoder, whose features it aligns with; set it to 0"
        )
    if not hasattr(network, "middle"):
        raise ValueError(
            f"diffusion.task.alignment needs a network that names its middle, and {type(network).__name__} has no `middle` "
            "(see models/unet.py); set it to 0"
        )


class Alignment(nn.Module):
    """1 - the cosine similarity of the network's middle features of the noisy latents, after a small projection, and
    the frozen decoder's first features of the clean latents: REPA (Yu et al. 2025, arXiv:2410.06940, eq. 8) with the
    autoencoder instead of an external teacher. The projection trains with the network but is not part of the model.

    weight: of the loss, a mean over positions. Raises ValueError as `check_alignment` does.
    """

    def __init__(self, weight: float, network: nn.Module, first_stage: FirstStage):
        super().__init__()
        check_alignment(network, first_stage.autoencoder)
        self.weight = weight
        middle, width = network.middle
        channels = first_stage.autoencoder.decoder.conv_in.out_channels
        self.project = nn.Sequential(nn.Conv2d(width, width, 1), nn.SiLU(), nn.Conv2d(width, channels, 1))
        self._said: torch.Tensor | None = None
        middle.register_forward_hook(self._listen)

    def _listen(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        self._said = output if self.training else None

    def forward(self, latents: torch.Tensor, first_stage: FirstStage) -> torch.Tensor:
        """Returns the weighted loss (B,), float32, of the last forward pass. latents (B, C, h, w): clean, scaled."""
        said, self._said = self._said, None
        if said.ndim == 3:  # tokens (B, N, D) on a grid with the latents' aspect ratio
            rows = round((said.shape[1] * latents.shape[2] / latents.shape[3]) ** 0.5)
            said = rearrange(said, "b (h w) d -> b d h w", h=rows)
        wanted = F.adaptive_avg_pool2d(self._features(latents, first_stage), said.shape[2:])
        return self.weight * (1 - F.cosine_similarity(self.project(said).float(), wanted, dim=1)).mean(dim=(1, 2))

    @torch.no_grad()
    def _features(self, latents: torch.Tensor, first_stage: FirstStage) -> torch.Tensor:
        autoencoder = first_stage.autoencoder
        latents = latents / first_stage.scale + first_stage.shift
        if isinstance(autoencoder, AutoencoderVQ):  # the decoder was trained on codes alone
            latents = autoencoder.quantized(latents)
        first = autoencoder.post_quant_conv(latents)
        features = autoencoder.decoder.mid(autoencoder.decoder.conv_in(first)).float()
        return features - features.mean(dim=(2, 3), keepdim=True)  # keeps only what differs between positions
