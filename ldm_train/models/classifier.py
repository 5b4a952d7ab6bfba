"""A classifier of noisy latents, for classifier guidance (Dhariwal and Nichol 2021, arXiv:2105.05233, section 4)."""

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F

from ldm_train.models.layers import ResBlock, embedding_mlp, group_norm, timestep_embedding
from ldm_train.models.transformer import AttentionBlock
from ldm_train.models.unet_encoder import Downsample, Layers


class AttentionPool(nn.Module):
    """Pools a feature map by attention from an extra token, the mean of all positions (CLIP's pooling, as in ADM).

    size: (h, w) of the position embeddings, which are interpolated for other sizes.
    """

    def __init__(self, channels: int, heads: int, out_channels: int, size: Sequence[int]):
        super().__init__()
        self.heads, self.size = heads, tuple(size)
        self.positional_embedding = nn.Parameter(torch.randn(channels, size[0] * size[1] + 1) / channels**0.5)
        self.qkv_proj = nn.Conv1d(channels, 3 * channels, 1)
        self.c_proj = nn.Conv1d(channels, out_channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) -> (B, out_channels)"""
        position, (h, w) = self.positional_embedding, x.shape[-2:]
        if (h, w) != self.size:
            grid = position[None, :, 1:].unflatten(2, self.size)
            grid = F.interpolate(grid, (h, w), mode="bicubic", align_corners=False)
            position = torch.cat([position[:, :1], grid[0].flatten(1)], dim=1)
        tokens = x.flatten(2)
        tokens = torch.cat([tokens.mean(dim=2, keepdim=True), tokens], dim=2) + position.to(x.dtype)
        qkv = self.qkv_proj(tokens)
        q, k, v = rearrange(qkv, "b (three heads d) n -> three b heads n d", three=3, heads=self.heads)
        pooled = F.scaled_dot_product_attention(q[:, :, :1], k, v)  # only the first token is a query
        return self.c_proj(rearrange(pooled, "b heads n d -> b (heads d) n"))[:, :, 0]


class NoisyClassifier(nn.Module):
    """The downsampling half of the U-Net with attention pooling: noisy latents and timesteps -> logits.

    in_channels                 channels of the latents
    latent_size                 (h, w) of the latents in training
    classes                     class names, or their number
    channels, channel_mult, num_res_blocks, attention_levels, head_dim, scale_shift, resblock_resample, dropout
                                as in `UNet`
    Raises ValueError for widths with attention that are not divisible by head_dim.
    """

    def __init__(
        self,
        in_channels: int,
        latent_size: Sequence[int],
        classes: Sequence[str] | int,
        channels: int,
        channel_mult: Sequence[int],
        num_res_blocks: int = 2,
        attention_levels: Sequence[int] = (),
        head_dim: int = 64,
        scale_shift: bool = True,
        resblock_resample: bool = True,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.names = [str(c) for c in (range(classes) if isinstance(classes, int) else classes)]
        self.channels, emb_dim = channels, 4 * channels

        def attention(width: int) -> AttentionBlock:
            if width % head_dim:
                raise ValueError(f"classifier: width {width} does not split into heads of {head_dim} channels")
            return AttentionBlock(width, width // head_dim)

        self.time_embed = embedding_mlp(channels, emb_dim)
        width = channels * channel_mult[0]
        self.input_blocks = nn.ModuleList([nn.Conv2d(in_channels, width, 3, padding=1)])
        for level, mult in enumerate(channel_mult):
            for _ in range(num_res_blocks):
                layers: list[nn.Module] = [ResBlock(width, channels * mult, emb_dim, dropout, scale_shift)]
                width = channels * mult
                if level in attention_levels:
                    layers.append(attention(width))
                self.input_blocks.append(Layers(layers))
            if level < len(channel_mult) - 1:
                down = ResBlock(width, width, emb_dim, dropout, scale_shift, "down")
                self.input_blocks.append(Layers([down if resblock_resample else Downsample(width)]))
        first, second = (ResBlock(width, width, emb_dim, dropout, scale_shift) for _ in range(2))
        self.middle_block = Layers([first, attention(width), second])
        f = 2 ** (len(channel_mult) - 1)
        pool = AttentionPool(width, width // head_dim, len(self.names), [s // f for s in latent_size])
        self.out = nn.Sequential(group_norm(width, 1e-5), nn.SiLU(), pool)

    def forward(self, noisy_latents: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """noisy_latents (B, C, h, w), timesteps (B,) in [0, T) -> logits (B, classes)"""
        emb = self.time_embed(timestep_embedding(timesteps, self.channels).to(noisy_latents.dtype))
        x = self.input_blocks[0](noisy_latents)
        for layers in self.input_blocks[1:]:
            x = layers(x, emb, None, None)
        return self.out(self.middle_block(x, emb, None, None))
