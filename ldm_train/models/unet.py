"""The conditional U-Net of latent diffusion (Rombach et al. 2022, appendix E), after ADM (Dhariwal and Nichol 2021)."""

from collections.abc import Sequence

import torch
from torch import nn

from ldm_train.models.control import Control
from ldm_train.models.layers import ResBlock, Upsample, embedding_mlp, group_norm, zero_init
from ldm_train.models.transformer import AttentionBlock, SpatialTransformer
from ldm_train.models.unet_encoder import Downsample, Encoder, Layers


class UNet(Encoder):
    """Predicts noise, velocity or x_0 from noisy latents.

    in_channels, out_channels   channels of the latents
    concat_channels             channels of the spatial condition appended to the input (0: none)
    channels                    width of the first level
    channel_mult                width of each level in units of `channels`; each level after the first halves the size
    num_res_blocks              residual blocks per level (one more on the way up)
    attention_levels            levels with attention, 0 being the full latent resolution
    mid_attention               attention in the middle
    head_dim / num_heads        give exactly one: channels per head, or heads
    context_dim                 width of cross-attention tokens. None builds plain self-attention blocks unless
                                `transformer_depth` is given
    transformer_depth           blocks per SpatialTransformer (default 1 if there is a context)
    cross_only_levels           levels whose transformers attend only to the context and have no self-attention
    vector_dim                  width of the condition that joins the timestep embedding (None: no such condition)
    vector_classes              the vector is one index below this number, for an embedding table (vector_dim must be 1)
    scale_shift, resblock_resample, linear_projection, dropout   as in ADM and SD 2
    activation_checkpointing    recompute activations in the backward pass: less memory, about a third more time
    controlled                  add a copy of the encoder that is steered by a picture, see `Control`
    Raises ValueError for options that do not fit together.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        channel_mult: Sequence[int],
        num_res_blocks: int = 2,
        attention_levels: Sequence[int] = (),
        head_dim: int | None = None,
        num_heads: int | None = None,
        context_dim: int | None = None,
        transformer_depth: int | None = None,
        vector_dim: int | None = None,
        vector_classes: int | None = None,
        cross_only_levels: Sequence[int] = (),
        out_channels: int | None = None,
        concat_channels: int = 0,
        scale_shift: bool = False,
        resblock_resample: bool = False,
        linear_projection: bool = False,
        dropout: float = 0.0,
        activation_checkpointing: bool = False,
        mid_attention: bool = True,
        controlled: bool = False,
    ):
        super().__init__()
        self.num_res_blocks = num_res_blocks
        if (head_dim is None) == (num_heads is None):
            raise ValueError("give exactly one of head_dim and num_heads to the U-Net")
        if vector_classes and vector_dim != 1:
            raise ValueError(f"vector_classes needs vector_dim 1 (an index), got {vector_dim}")
        unknown = [level for level in attention_levels if not 0 <= level < len(channel_mult)]
        if unknown:
            raise ValueError(
                f"attention_levels {unknown} do not exist: channel_mult has levels 0 to {len(channel_mult) - 1}"
            )
        self.in_channels, self.channels, self.middle_mult = in_channels, channels, channel_mult[-1]
        self.condition_widths = {"context": context_dim or 0, "concat": concat_channels, "vector": vector_dim or 0}
        self.size_multiple = 2 ** (len(channel_mult) - 1)
        self.vector_classes, self.vector_dim = vector_classes, vector_dim
        self.activation_checkpointing = activation_checkpointing
        depth = transformer_depth or (1 if context_dim else 0)
        emb_dim = 4 * channels

        def block(width: int, out_width: int, resample: str | None = None) -> ResBlock:
            return ResBlock(width, out_width, emb_dim, dropout, scale_shift, resample)

        def attention(width: int, level: int | None = None) -> nn.Module:
            heads = num_heads or width // head_dim
            if heads < 1 or width % heads:
                raise ValueError(f"width {width} does not split into heads of {head_dim or width / heads} channels")
            if not depth:
                return AttentionBlock(width, heads)
            options = {"linear_projection": linear_projection, "cross_only": level in cross_only_levels}
            return SpatialTransformer(width, heads, width // heads, context_dim, depth, dropout, **options)

        self.time_embed = embedding_mlp(channels, emb_dim)
        if vector_classes:
            self.label_emb = nn.Embedding(vector_classes, emb_dim)
        elif vector_dim:
            self.label_emb = nn.Sequential(embedding_mlp(vector_dim, emb_dim))

        width = channels * channel_mult[0]
        self.input_blocks = nn.ModuleList([Layers([nn.Conv2d(in_channels + concat_channels, width, 3, padding=1)])])
        skips = [width]
        for level, mult in enumerate(channel_mult):
            for _ in range(num_res_blocks):
                layers = [block(width, channels * mult)]
                width = channels * mult
                if level in attention_levels:
                    layers.append(attention(width, level))
                self.input_blocks.append(Layers(layers))
                skips.append(width)
            if level < len(channel_mult) - 1:
                down = block(width, width, "down") if resblock_resample else Downsample(width)
                self.input_blocks.append(Layers([down]))
                skips.append(width)

        self.skip_widths = tuple(skips)
        self.middle_block = Layers(
            [block(width, width), attention(width) if mid_attention else nn.Identity(), block(width, width)]
        )

        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(channel_mult))):
            for i in range(num_res_blocks + 1):
                layers = [block(width + skips.pop(), channels * mult)]
                width = channels * mult
                if level in attention_levels:
                    layers.append(attention(width, level))
                if level and i == num_res_blocks:
                    layers.append(block(width, width, "up") if resblock_resample else Upsample(width))
                self.output_blocks.append(Layers(layers))

        self.out = nn.Sequential(
            group_norm(width, 1e-5), nn.SiLU(), zero_init(nn.Conv2d(width, out_channels or in_channels, 3, padding=1))
        )
        self.control: Control | None = None
        if controlled:
            self.add_control()

    def add_control(self) -> Control:
        """Adds and returns a copy of the encoder, whose output is zero at first. From now on `forward` takes a
        picture's features too. Raises ValueError if the U-Net already has a control."""
        if self.control is not None:
            raise ValueError("this U-Net has a control already; take one at a time")
        self.control = Control(self)
        self.condition_widths = self.condition_widths | {"control": self.skip_widths[0]}
        return self.control

    @property
    def middle(self) -> tuple[nn.Module, int]:
        """The middle block, at the lowest resolution, and the width of its output."""
        return self.middle_block, self.channels * self.middle_mult

    def regions(self) -> list[nn.Module]:
        """Returns the modules to compile: blocks, many of which are alike."""
        return [m for m in self.modules() if isinstance(m, ResBlock | SpatialTransformer | AttentionBlock)]

    def projected(self, context: torch.Tensor) -> tuple:
        """Returns the keys and values of a context (B, L, context_dim) for each attention to it. `forward` takes them
        instead of the context, so that sampling computes them only once."""
        own = tuple(
            layers.projected(context) for layers in (*self.input_blocks, self.middle_block, *self.output_blocks)
        )
        return own if self.control is None else own + self.control.projected(context)

    def forward(
        self,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        context: torch.Tensor | tuple | None = None,
        context_mask: torch.Tensor | None = None,
        concat: torch.Tensor | None = None,
        vector: torch.Tensor | None = None,
        control: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """noisy_latents (B, C, h, w), timesteps (B,) in [0, T), context (B, L, D) or its `projected`, with
        mask (B, L), concat (B, concat_channels, h, w), vector (B, vector_dim), control (B, width of the first level, h, w): the
        features of a picture. Returns (B, out_channels, h, w).

        Raises ValueError if h or w is not divisible by `size_multiple`.
        """
        if noisy_latents.shape[-1] % self.size_multiple or noisy_latents.shape[-2] % self.size_multiple:
            raise ValueError(
                f"latents of {tuple(noisy_latents.shape[-2:])} must be divisible by {self.size_multiple} for this U-Net"
            )
        emb = self.embed(timesteps, vector, noisy_latents.dtype)
        x = noisy_latents if concat is None else torch.cat([noisy_latents, concat.to(noisy_latents.dtype)], dim=1)
        down = len(self.input_blocks) + 1
        count = down + len(self.output_blocks)
        own = context if isinstance(context, tuple) else (context,) * (count + down)
        skips, middle = self.encode(x, emb, own, context_mask)
        if self.control is not None and control is not None:
            added, to_middle = self.control(x, timesteps, own[count:], context_mask, vector, control)
            skips, middle = [skip + more for skip, more in zip(skips, added)], middle + to_middle
        x = middle
        for layers, given in zip(self.output_blocks, own[down:count]):
            x = self.run_layers(layers, torch.cat([x, skips.pop()], dim=1), emb, given, context_mask)
        return self.out(x)
