"""The autoencoders of latent diffusion (Rombach et al. 2022, appendix G): KL, VQ and identity; published keys."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ldm_train.models.autoencoder_blocks import AttnBlock, Level, Middle, ResnetBlock
from ldm_train.models.layers import group_norm
from ldm_train.models.posterior import DiagonalGaussian, Point, Posterior
from ldm_train.models.quantizer import VectorQuantizer
from ldm_train.models.tiling import Step, Tiles

Change = Callable[[torch.Tensor], torch.Tensor]  # changes latents between encoder and decoder


class Encoder(nn.Module):
    """images (B, in_channels, H, W) -> (B, out_channels, H/f, W/f), f = patch_size * 2^(levels - 1)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        channels: int,
        channel_mult: Sequence[int],
        num_res_blocks: int,
        attention_levels: Sequence[int],
        mid_attention: bool,
        dropout: float,
        patch_size: int,
    ):
        super().__init__()
        self.patch_size = patch_size
        self.conv_in = nn.Conv2d(in_channels * patch_size**2, channels, 3, padding=1)
        self.down = nn.ModuleList()
        width = channels
        for level, mult in enumerate(channel_mult):
            widths = [width] + [channels * mult] * num_res_blocks
            last = level == len(channel_mult) - 1
            self.down.append(Level(widths, level in attention_levels, dropout, down=not last))
            width = widths[-1]
        self.mid = Middle(width, mid_attention, dropout)
        self.norm_out = group_norm(width, 1e-6)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(self, images: torch.Tensor, tiles: Tiles | None = None) -> torch.Tensor:
        """tiles: computes the levels in tiles. The middle, which needs the whole image, is never tiled."""
        x = F.pixel_unshuffle(images, self.patch_size)
        if tiles is not None:
            f = 2 ** (len(self.down) - 1)
            steps = [Step(None, lambda state, _: (self.conv_in(state[0]),))]
            steps += [step for stage in self.down for step in stage.steps()]
            x = tiles.run(steps, x, [s // f for s in x.shape[-2:]], f, 1)
        else:
            x = self.conv_in(x)
            for stage in self.down:
                x = stage(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


def from_patches(width: int, patch_size: int) -> nn.Sequential:
    """(B, width, h, w) -> (B, width, h * patch_size, w * patch_size): a convolution whose channels become the pixels of
    patches (Shi et al. 2016, arXiv 1609.05158). All pixels of a patch start with equal weights, which avoids a
    checkerboard pattern (Aitken et al. 2017, arXiv 1707.02937).
    """
    conv = nn.Conv2d(width, width * patch_size**2, 3, padding=1)
    with torch.no_grad():
        for p in conv.parameters():
            p.copy_(p[:: patch_size**2].repeat_interleave(patch_size**2, dim=0))
    return nn.Sequential(conv, nn.PixelShuffle(patch_size), nn.SiLU())


class Decoder(nn.Module):
    """latents (B, z_channels, h, w) -> features before the last convolution; `images` turns these into images."""

    def __init__(
        self,
        z_channels: int,
        out_channels: int,
        channels: int,
        channel_mult: Sequence[int],
        num_res_blocks: int,
        attention_levels: Sequence[int],
        mid_attention: bool,
        dropout: float,
        patch_size: int,
    ):
        super().__init__()
        self.patch_size = patch_size
        width = channels * channel_mult[-1]
        self.conv_in = nn.Conv2d(z_channels, width, 3, padding=1)
        self.mid = Middle(width, mid_attention, dropout)
        stages = []
        for level, mult in reversed(list(enumerate(channel_mult))):
            widths = [width] + [channels * mult] * (num_res_blocks + 1)
            stages.append(Level(widths, level in attention_levels, dropout, up=level > 0))
            width = widths[-1]
        self.up = nn.ModuleList(reversed(stages))  # up.0 is the highest resolution, as published
        self.norm_out = group_norm(width, 1e-6)
        self.to_pixels = from_patches(width, patch_size) if patch_size > 1 else nn.Identity()
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """-> (B, channels * channel_mult[0], H, W), the input of `conv_out`."""
        x = self.mid(self.conv_in(latents))
        for stage in reversed(self.up):
            x = stage(x)
        return self.to_pixels(F.silu(self.norm_out(x)))

    def tiled(self, latents: torch.Tensor, tiles: Tiles) -> torch.Tensor:
        """-> images (B, out_channels, H, W). The middle, which needs the whole image, is never tiled."""
        steps = [step for stage in reversed(self.up) for step in stage.steps()]
        steps.append(Step(self.norm_out, lambda state, normed: (self.conv_out(self.to_pixels(F.silu(normed))),)))
        x = self.mid(self.conv_in(latents))
        return tiles.run(steps, x, latents.shape[-2:], 1, self.patch_size * 2 ** (len(self.up) - 1))


class Autoencoder(nn.Module):
    """Encoder and decoder with 1x1 projections around the latents. These are unscaled; `FirstStage` scales them.
    Subclasses define the posterior.

    in_channels        image channels (3; 1 and any other number work)
    z_channels         channels between encoder, decoder and their 1x1 projections
    embed_dim          channels of the latents (default: z_channels)
    channels           width of the first level
    channel_mult       width of each level as a multiple of `channels`; f = patch_size * 2^(levels - 1)
    num_res_blocks     residual blocks per level (one more in the decoder)
    attention_levels   levels with self-attention, 0 being the first
    mid_attention      self-attention at the lowest resolution
    patch_size         side in pixels of the patches that are the first level's input channels; after the last level,
                       before the last convolution, features become pixels again. 1 is the published network, which
                       spends most of its time at full resolution; 2 took a third of the time at 64 px on a CPU
    activation_checkpointing    recompute activations in the backward pass: less memory, about a third more time
    Raises ValueError for a patch_size below 1.
    """

    moments_per_latent: int  # channels of `encode_moments` per latent channel
    frozen: tuple[nn.Module, ...] = ()  # parts that do not train and stay in eval mode

    def __init__(
        self,
        z_channels: int,
        channels: int,
        channel_mult: Sequence[int],
        num_res_blocks: int = 2,
        attention_levels: Sequence[int] = (),
        mid_attention: bool = True,
        in_channels: int = 3,
        embed_dim: int | None = None,
        dropout: float = 0.0,
        activation_checkpointing: bool = False,
        patch_size: int = 1,
    ):
        super().__init__()
        if patch_size < 1:
            raise ValueError(f"patch_size={patch_size}: patches have at least 1 pixel a side")
        embed_dim, k = embed_dim or z_channels, self.moments_per_latent
        trunk = (channels, channel_mult, num_res_blocks, attention_levels, mid_attention, dropout, patch_size)
        self.in_channels, self.latent_channels = in_channels, embed_dim
        self.downsample_factor = patch_size * 2 ** (len(channel_mult) - 1)
        self.encoder = Encoder(in_channels, k * z_channels, *trunk)
        self.decoder = Decoder(z_channels, in_channels, *trunk)
        self.quant_conv = nn.Conv2d(k * z_channels, k * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, z_channels, 1)
        for block in self.modules():
            if isinstance(block, ResnetBlock | AttnBlock):
                block.recomputes = activation_checkpointing

    def encoding_parts(self) -> dict[str, nn.Module]:
        """Returns, by name, the parts that determine the latents."""
        return {"encoder": self.encoder, "quant_conv": self.quant_conv}

    def freeze_encoder(self) -> None:
        """Freezes the parts that determine the latents, so that only the decoder side trains."""
        self.frozen = tuple(part.eval().requires_grad_(False) for part in self.encoding_parts().values())

    def train(self, mode: bool = True) -> "Autoencoder":
        super().train(mode)
        for part in self.frozen:
            part.eval()
        return self

    def encode_moments(self, images: torch.Tensor, tiles: Tiles | None = None) -> torch.Tensor:
        """images (B, C, H, W) in [-1, 1] -> the moments of the posterior, which the latent cache stores.

        (B, 2 * latent_channels, H/f, W/f), mean and log-variance, from the KL autoencoder; the latents themselves,
        (B, latent_channels, H/f, W/f), from deterministic ones. Raises ValueError if the size is not divisible by f or
        the number of channels is not `in_channels`. tiles: for images too large for memory.
        """
        check_images(images, self.downsample_factor, self.in_channels)
        return self.quant_conv(self.encoder(images, tiles))

    def posterior(self, moments: torch.Tensor) -> Posterior:
        """Returns the posterior q(z | x) for the output of `encode_moments`."""
        raise NotImplementedError

    def encode(self, images: torch.Tensor) -> Posterior:
        return self.posterior(self.encode_moments(images).float())

    def decode_features(self, latents: torch.Tensor) -> torch.Tensor:
        """Returns the input of the last convolution, where the adaptive weight of the adversarial loss is measured."""
        return self.decoder(self.post_quant_conv(latents))

    def decode(self, latents: torch.Tensor, tiles: Tiles | None = None) -> torch.Tensor:
        """latents (B, C, h, w), unscaled -> images (B, in_channels, h*f, w*f), about [-1, 1]."""
        if tiles is not None:
            return self.decoder.tiled(self.post_quant_conv(latents), tiles)
        return self.last_layer(self.decode_features(latents))

    @property
    def last_layer(self) -> nn.Conv2d:
        return self.decoder.conv_out


def check_images(images: torch.Tensor, factor: int, in_channels: int) -> None:
    """Raises ValueError, naming the remedy, if an autoencoder cannot take images of this size or channel count."""
    channels, height, width = images.shape[1:]
    if height % factor or width % factor:
        raise ValueError(
            f"image size {height}x{width} is not divisible by downsample_factor {factor}; use "
            f"{max(factor, height // factor * factor)}x{max(factor, width // factor * factor)} or another autoencoder.network"
        )
    if channels != in_channels:
        raise ValueError(f"images have {channels} channels, autoencoder.network.in_channels is {in_channels}")


class AutoencoderKL(Autoencoder):
    """An Autoencoder with a diagonal Gaussian posterior, kept near N(0, 1) by a small KL term. Options:
    those of Autoencoder, and

    initial_logvar     where the posterior's log-variance starts. The published 0 makes the first latents mostly noise;
                       -5 lets short runs learn colours from the first steps
    """

    moments_per_latent = 2

    def __init__(
        self, z_channels: int, channels: int, channel_mult: Sequence[int], initial_logvar: float = 0.0, **options: Any
    ):
        super().__init__(z_channels, channels, channel_mult, **options)
        if initial_logvar:
            with torch.no_grad():
                self.quant_conv.bias[self.latent_channels :] = initial_logvar
                self.quant_conv.weight[self.latent_channels :] *= 0.1

    def posterior(self, moments: torch.Tensor) -> DiagonalGaussian:
        return DiagonalGaussian(moments)

    def forward(
        self, images: torch.Tensor, sample: bool = True, change: Change | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, DiagonalGaussian]:
        """-> (reconstruction, features before the last convolution, posterior). Decodes a sample of the posterior, or
        its mean, after `change` if given."""
        posterior = self.encode(images)
        latents = posterior.sample() if sample else posterior.mean
        features = self.decode_features(latents if change is None else change(latents))
        return self.last_layer(features), features, posterior


class AutoencoderVQ(Autoencoder):
    """An Autoencoder whose latents are quantised by a codebook. As published, diffusion runs on the latents before
    quantisation and `decode` quantises. Options as in Autoencoder, and

    num_codes          size of the codebook
    commitment_weight, codebook_weight, codebook_ema, restart_after    as in VectorQuantizer (codebook_ema: ema_decay)
    """

    moments_per_latent = 1

    def __init__(
        self,
        z_channels: int,
        channels: int,
        channel_mult: Sequence[int],
        num_codes: int,
        commitment_weight: float = 1.0,
        codebook_weight: float = 0.25,
        codebook_ema: float | None = None,
        restart_after: int | None = None,
        **options: Any,
    ):
        super().__init__(z_channels, channels, channel_mult, **options)
        self.quantize = VectorQuantizer(
            num_codes, self.latent_channels, commitment_weight, codebook_weight, codebook_ema, restart_after
        )

    def encoding_parts(self) -> dict[str, nn.Module]:
        return super().encoding_parts() | {"quantize": self.quantize}

    def posterior(self, moments: torch.Tensor) -> Point:
        return Point(moments)

    def decode(self, latents: torch.Tensor, tiles: Tiles | None = None) -> torch.Tensor:
        """latents (B, C, h, w) before quantisation -> images (B, in_channels, h*f, w*f), about [-1, 1]."""
        return super().decode(self.quantized(latents), tiles)

    def quantized(self, latents: torch.Tensor) -> torch.Tensor:
        """latents (B, C, h, w) -> their nearest codes, of the same shape."""
        codes = self.quantize.lookup(self.quantize.nearest(latents))
        if latents.requires_grad:  # guidance through the decoder: straight-through gradient
            codes = latents + (codes - latents).detach()
        return codes.to(latents.dtype)

    def forward(
        self, images: torch.Tensor, sample: bool = True, change: Change | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, Point]:
        """-> (reconstruction, features before the last convolution, posterior with codebook loss and indices)."""
        latents = self.encode_moments(images).float()
        codes, loss, indices = self.quantize(latents)
        features = self.decode_features(codes if change is None else change(codes))
        return self.last_layer(features), features, Point(latents, loss, indices)


class AutoencoderIdentity(nn.Module):
    """f = 1: the latents are the images (the paper's LDM-1, diffusion in pixel space). Nothing to train.

    z_channels: image channels
    """

    moments_per_latent = 1
    downsample_factor = 1

    def __init__(self, z_channels: int = 3):
        super().__init__()
        self.in_channels = self.latent_channels = z_channels

    def encode_moments(self, images: torch.Tensor, tiles: Tiles | None = None) -> torch.Tensor:
        check_images(images, 1, self.in_channels)
        return images

    def posterior(self, moments: torch.Tensor) -> Point:
        return Point(moments)

    def encode(self, images: torch.Tensor) -> Point:
        return Point(self.encode_moments(images).float())

    def decode(self, latents: torch.Tensor, tiles: Tiles | None = None) -> torch.Tensor:
        return latents

    def forward(self, images: torch.Tensor, sample: bool = True) -> tuple[torch.Tensor, torch.Tensor, Point]:
        posterior = self.encode(images)
        return posterior.mean, posterior.mean, posterior
