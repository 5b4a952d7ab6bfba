"""The diffusion transformer (Peebles and Xie 2022, arXiv:2212.09748), with cross-attention if there is a context."""

import torch
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint

from ldm_train.diffusion.process import widest
from ldm_train.models.layers import attend, embedding_mlp, timestep_embedding, zero_init
from ldm_train.models.transformer import CrossAttention, KeysValues


def position_embedding(height: int, width: int, dim: int, device: torch.device) -> torch.Tensor:
    """Returns sines and cosines of both coordinates, (height * width, dim) float32: half of the features encode the
    column, then half the row."""
    frequencies = 10_000.0 ** -(torch.arange(dim // 4, dtype=(dtype := widest(device)), device=device) / (dim / 4))
    parts = []
    columns, rows = torch.arange(width, device=device), torch.arange(height, device=device)
    for coordinate in torch.meshgrid(columns, rows, indexing="xy"):
        angles = coordinate.flatten().to(dtype)[:, None] * frequencies
        parts += [angles.sin(), angles.cos()]
    return torch.cat(parts, dim=1).float()


class Attention(nn.Module):
    """Multi-head self-attention with one projection for q, k and v."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1))  # (B, N, 3, heads, d)
        q, k, v = qkv.transpose(1, 3).unbind(2)
        return self.proj(attend(q, k, v).transpose(1, 2).flatten(2))


def modulated(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Returns x (B, N, D) scaled by 1 + scale and shifted, per sample; shift, scale (B, D)."""
    return x * (1 + scale[:, None]) + shift[:, None]


class DiTBlock(nn.Module):
    """Self-attention and an MLP whose norms and residuals are modulated by the time embedding (adaLN-zero: the block
    starts as the identity); between them cross-attention, whose output also starts at zero (PixArt-alpha, Chen et al.
    2023, section 2.3)."""

    def __init__(self, dim: int, heads: int, context_dim: int | None, mlp_ratio: float, dropout: float):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False) for _ in range(2))
        self.attn = Attention(dim, heads)
        if context_dim:
            self.cross_attn = CrossAttention(dim, context_dim, heads, dim // heads)
        inner = int(dim * mlp_ratio)
        self.mlp = nn.Sequential(
            nn.Linear(dim, inner), nn.GELU(approximate="tanh"), nn.Dropout(dropout), nn.Linear(inner, dim)
        )
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(
        self, x: torch.Tensor, emb: torch.Tensor, context: torch.Tensor | KeysValues | None, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """x (B, N, D), emb (B, D) -> (B, N, D)"""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(emb).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attn(modulated(self.norm1(x), shift1, scale1))
        if context is not None:
            x = x + self.cross_attn(x, context, mask)
        return x + gate2[:, None] * self.mlp(modulated(self.norm2(x), shift2, scale2))


class DiT(nn.Module):
    """Predicts noise, velocity or x_0 from noisy latents that are cut into patches.

    in_channels                 channels of the latents
    hidden_size, depth, num_heads, mlp_ratio    DiT-S 384, 12, 6; B 768, 12, 12; L 1024, 24, 16; XL 1152, 28, 16; 4.0
    patch_size                  side of a patch in latent cells
    context_dim                 width of cross-attention tokens (None: no cross-attention)
    concat_channels             channels of the spatial condition appended to the input (0: none)
    vector_dim                  width of the condition that joins the timestep embedding (None: none)
    dropout                     dropout rate in the MLPs
    activation_checkpointing    recompute activations in the backward pass: less memory, about a third more time
    Raises ValueError for a hidden_size not divisible by num_heads, or by 4 (sines and cosines of two coordinates).
    """

    def __init__(
        self,
        in_channels: int,
        hidden_size: int,
        depth: int,
        num_heads: int,
        patch_size: int = 2,
        context_dim: int | None = None,
        concat_channels: int = 0,
        vector_dim: int | None = None,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        activation_checkpointing: bool = False,
    ):
        super().__init__()
        if hidden_size % num_heads or hidden_size % 4:
            raise ValueError(
                f"a DiT's hidden_size must be divisible by 4 and by num_heads {num_heads}, not {hidden_size}"
            )
        self.in_channels, self.hidden_size, self.patch_size = in_channels, hidden_size, patch_size
        self.condition_widths = {"context": context_dim or 0, "concat": concat_channels, "vector": vector_dim or 0}
        self.size_multiple = patch_size
        self.activation_checkpointing = activation_checkpointing
        self.x_embedder = nn.Conv2d(in_channels + concat_channels, hidden_size, patch_size, stride=patch_size)
        self.t_embedder = embedding_mlp(256, hidden_size)
        if vector_dim:
            self.y_embedder = embedding_mlp(vector_dim, hidden_size)
        self.blocks = nn.ModuleList(
            DiTBlock(hidden_size, num_heads, context_dim, mlp_ratio, dropout) for _ in range(depth)
        )
        self.norm_final = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))
        self.linear = nn.Linear(hidden_size, patch_size**2 * in_channels)
        self._initialise()

    def _initialise(self) -> None:
        """Initialises as published: Xavier, small weights in the timestep embedding, every block the identity."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        nn.init.xavier_uniform_(self.x_embedder.weight.flatten(1))
        if self.x_embedder.bias is not None:
            nn.init.zeros_(self.x_embedder.bias)
        for name, weight in self.t_embedder.named_parameters():
            if name.endswith("weight"):
                nn.init.normal_(weight, std=0.02)
        for module in self.modules():
            if isinstance(module, DiTBlock | DiT):
                zero_init(module.adaLN_modulation)
            if isinstance(module, CrossAttention):
                zero_init(module.to_out)
        zero_init(self.linear)

    @property
    def middle(self) -> tuple[nn.Module, int]:
        """The middle block, and the width of its output."""
        return self.blocks[len(self.blocks) // 2], self.hidden_size

    def regions(self) -> list[nn.Module]:
        """Returns the modules to compile: the blocks, which are alike, so that one compilation serves all."""
        return list(self.blocks)

    def projected(self, context: torch.Tensor) -> tuple[KeysValues, ...]:
        """Returns each block's keys and values of a context (B, L, context_dim). `forward` takes them instead of the
        context, so that sampling computes them only once."""
        blocks = (block for block in self.blocks if isinstance(block, DiTBlock))
        return tuple(block.cross_attn.projected(context) for block in blocks)

    def forward(
        self,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        context: torch.Tensor | tuple[KeysValues, ...] | None = None,
        context_mask: torch.Tensor | None = None,
        concat: torch.Tensor | None = None,
        vector: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `Backbone`. Raises ValueError if h or w is not divisible by the patch size."""
        height, width = noisy_latents.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"latents of {(height, width)} must be divisible by this DiT's patch size {self.patch_size}"
            )
        x = noisy_latents if concat is None else torch.cat([noisy_latents, concat.to(noisy_latents.dtype)], dim=1)
        rows, columns = height // self.patch_size, width // self.patch_size
        x = self.x_embedder(x).flatten(2).transpose(1, 2)  # (B, N, D)
        x = x + position_embedding(rows, columns, self.hidden_size, x.device).to(x.dtype)
        emb = self.t_embedder(timestep_embedding(timesteps, 256).to(x.dtype))
        if vector is not None:
            emb = emb + self.y_embedder(vector.to(emb.dtype))
        own = context if isinstance(context, tuple) else (context,) * len(self.blocks)
        for block, given in zip(self.blocks, own):
            if self.activation_checkpointing and self.training:
                x = checkpoint(block, x, emb, given, context_mask, use_reentrant=False)
            else:
                x = block(x, emb, given, context_mask)
        shift, scale = self.adaLN_modulation(emb).chunk(2, dim=1)
        patches = self.linear(modulated(self.norm_final(x), shift, scale)).unflatten(1, (rows, columns))
        return rearrange(patches, "b h w (p q c) -> b c (h p) (w q)", p=self.patch_size, q=self.patch_size)
