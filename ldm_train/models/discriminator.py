"""The patch discriminator of pix2pix (Isola et al. 2017), as VQGAN and latent diffusion use it."""

import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm as apply_spectral_norm

from ldm_train.models.layers import group_norm


class PatchDiscriminator(nn.Module):
    """Classifies overlapping patches, of 70x70 pixels with 3 layers. Higher logits mean "real".

    channels         width of the first layer (published: 64), doubled per layer, up to 8 x channels
    num_layers       number of stride-2 layers (published: 3)
    norm             "group" (default; independent of batch and rank) or "batch" (published; synchronised over GPUs)
    spectral_norm    divide every weight by its largest singular value (Miyato et al. 2018)
    Raises ValueError for any other norm.
    """

    def __init__(
        self,
        in_channels: int = 3,
        channels: int = 64,
        num_layers: int = 3,
        norm: str = "group",
        spectral_norm: bool = False,
    ):
        super().__init__()
        if norm not in ("group", "batch"):
            raise ValueError(f"discriminator norm is 'group' or 'batch', not {norm!r}")
        wrap = apply_spectral_norm if spectral_norm else (lambda layer: layer)

        def normalisation(width: int) -> nn.Module:
            return group_norm(width, 1e-5) if norm == "group" else nn.BatchNorm2d(width)

        layers = [wrap(nn.Conv2d(in_channels, channels, 4, stride=2, padding=1)), nn.LeakyReLU(0.2, inplace=True)]
        width = channels
        for n in range(1, num_layers + 1):
            out, stride = channels * min(2**n, 8), 2 if n < num_layers else 1
            conv = nn.Conv2d(width, out, 4, stride=stride, padding=1, bias=norm != "batch")
            layers += [wrap(conv), normalisation(out), nn.LeakyReLU(0.2, inplace=True)]
            width = out
        layers.append(wrap(nn.Conv2d(width, 1, 4, stride=1, padding=1)))
        self.main = nn.Sequential(*layers)
        for module in self.modules():  # the initialisation of pix2pix
            if isinstance(module, nn.Conv2d) and not spectral_norm:
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):  # its bias is 0 by default
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) in [-1, 1] -> patch logits (B, 1, H', W')."""
        return self.main(images)
