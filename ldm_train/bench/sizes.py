"""The sizes of the benchmarks. The first of each table is for tests; the next two are for CPUs, the others (and base)
for GPUs."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class UNetSize:
    """A size of U-Net. latents: (C, h, w). tokens: of the context (0: none). network: options of `UNet`."""

    latents: tuple[int, int, int]
    batch: int
    tokens: int
    network: dict[str, Any]


@dataclass(frozen=True)
class AutoencoderSize:
    """A size of autoencoder. side: pixels. network: options of `AutoencoderKL`. lpips: use LPIPS with a VGG16 of random
    weights, which costs the same as the trained ones; else the `tiny` network. discriminator: options of
    `PatchDiscriminator`."""

    side: int
    batch: int
    network: dict[str, Any]
    lpips: bool
    discriminator: dict[str, Any]


def _unet(channels: int, mult: tuple[int, ...], blocks: int, levels: tuple[int, ...], **options: Any) -> dict[str, Any]:
    own = {"channels": channels, "channel_mult": mult, "num_res_blocks": blocks, "attention_levels": levels}
    return own | options


def _kl(channels: int, mult: tuple[int, ...], blocks: int, **options: Any) -> dict[str, Any]:
    return {"z_channels": 4, "channels": channels, "channel_mult": mult, "num_res_blocks": blocks} | options


UNETS = {
    "tiny": UNetSize((4, 8, 8), 2, 4, _unet(32, (1, 2), 1, (1,), head_dim=16, context_dim=32)),
    # small: about the quickstart's latents; base: four times their area with ten times the weights.
    "small": UNetSize((4, 8, 8), 64, 4, _unet(64, (1, 2), 1, (0, 1), head_dim=32, context_dim=128)),
    "base": UNetSize((4, 16, 16), 16, 8, _unet(128, (1, 2, 3), 1, (1, 2), head_dim=32, context_dim=256)),
    # As published: unconditional LDM-4 (CelebA-HQ, FFHQ, LSUN bedrooms), and Stable Diffusion 1.
    "ldm4": UNetSize((3, 64, 64), 32, 0, _unet(224, (1, 2, 3, 4), 2, (1, 2, 3), head_dim=32)),
    "sd1": UNetSize((4, 64, 64), 16, 77, _unet(320, (1, 2, 4, 4), 2, (0, 1, 2), num_heads=8, context_dim=768)),
}

_SMALL_GAN = {"channels": 32, "num_layers": 2}
AUTOENCODERS = {
    "tiny": AutoencoderSize(16, 2, _kl(16, (1, 2), 1), False, {"channels": 8, "num_layers": 2}),
    "small": AutoencoderSize(32, 8, _kl(64, (1, 2, 2), 1), True, _SMALL_GAN),
    "base": AutoencoderSize(64, 4, _kl(64, (1, 2, 4), 1), True, {"channels": 64, "num_layers": 3}),
    # As published.
    "kl_f4": AutoencoderSize(256, 8, _kl(128, (1, 2, 4), 2, z_channels=3), True, {}),
    "kl_f8": AutoencoderSize(256, 8, _kl(128, (1, 2, 4, 4), 2), True, {}),
}
UNETS_ON = {"on_cpu": ("small", "base"), "on_gpu": ("base", "ldm4", "sd1")}
AUTOENCODERS_ON = {"on_cpu": ("small", "base"), "on_gpu": ("base", "kl_f8")}
