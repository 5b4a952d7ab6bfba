"""The prior of unCLIP (Ramesh et al. 2022, arXiv:2204.06125, section 2.2): image embeddings from noise and text."""

import torch
from torch import nn

from ldm_train.models.layers import embedding_mlp, timestep_embedding, zero_init
from ldm_train.models.transformer import TransformerBlock


class EmbeddingPrior(nn.Module):
    """A transformer over the tokens of time, noisy embedding and vector condition (if any), which attend to the
    context.

    in_channels     width of the embedding, which is a latent with a single position
    dim, depth, num_heads       of the transformer
    context_dim, vector_dim     widths of the conditions (None: no such condition)
    Raises ValueError if dim is not divisible by num_heads.
    """

    size_multiple = 1

    def __init__(
        self,
        in_channels: int,
        dim: int,
        depth: int,
        num_heads: int,
        context_dim: int | None = None,
        vector_dim: int | None = None,
        dropout: float = 0.0,
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"width {dim} does not split into {num_heads} heads")
        self.in_channels, self.dim, self.vector_dim = in_channels, dim, vector_dim
        self.condition_widths = {"context": context_dim or 0, "concat": 0, "vector": vector_dim or 0}
        self.time_embed, self.embed = embedding_mlp(dim, dim), nn.Linear(in_channels, dim)
        if vector_dim:
            self.vector_embed = nn.Linear(vector_dim, dim)
        self.blocks = nn.ModuleList(
            TransformerBlock(dim, context_dim, num_heads, dim // num_heads, dropout) for _ in range(depth)
        )
        self.norm, self.out = nn.LayerNorm(dim), zero_init(nn.Linear(dim, in_channels))

    def regions(self) -> list[nn.Module]:
        """Returns the modules to compile."""
        return list(self.blocks)

    def projected(self, context: torch.Tensor) -> tuple:
        """Returns each block's keys and values of a context (B, L, context_dim). `forward` takes them instead of the
        context."""
        return tuple(block.projected(context) for block in self.blocks)

    def forward(
        self,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        context: torch.Tensor | tuple | None = None,
        context_mask: torch.Tensor | None = None,
        concat: torch.Tensor | None = None,
        vector: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """noisy_latents (B, C, 1, 1), timesteps (B,) in [0, T), context (B, L, D) or its `projected`, with mask (B, L),
        vector (B, vector_dim). Returns (B, C, 1, 1). Raises ValueError for latents with more than one position."""
        if noisy_latents.shape[2:] != (1, 1):
            raise ValueError(
                f"a prior denoises one embedding, not latents of {tuple(noisy_latents.shape[2:])}; take the image size of the model that "
                "draws, or another diffusion/network="
            )
        noisy = noisy_latents.flatten(1)
        tokens = [self.time_embed(timestep_embedding(timesteps, self.dim).to(noisy.dtype)), self.embed(noisy)]
        if self.vector_dim:
            tokens.append(self.vector_embed(vector.to(noisy.dtype)))
        x = torch.stack(tokens, dim=1)
        own = context if isinstance(context, tuple) else (context,) * len(self.blocks)
        for block, given in zip(self.blocks, own):
            x = block(x, given, context_mask)
        return self.out(self.norm(x[:, 1]))[:, :, None, None]
