"""Vector quantisation of latents (van den Oord et al. 2017), as in VQGAN (Esser et al. 2021) and latent diffusion."""

import torch
import torch.distributed as dist
from einops import rearrange
from torch import nn
from torch.nn import functional as F

from ldm_train.models.layers import full_precision


def _summed(values: torch.Tensor) -> torch.Tensor:
    """Sums `values` over all ranks in place and returns it."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values)
    return values


class VectorQuantizer(nn.Module):
    """Replaces each latent vector by the nearest entry of a codebook.

    num_codes, dim      size of the codebook
    commitment_weight   weight of |z - sg(code)|^2, which pulls the encoder to the codes
    codebook_weight     weight of |sg(z) - code|^2, which pulls the codes to the encoder. The published models trained
                        with commitment 1 and codebook 0.25 (their code swapped the two); these are the defaults
    ema_decay           decay with which codes follow an average of the latents assigned to them, instead of a gradient
                        (None: gradient)
    restart_after       training forward passes (micro-batches) without use after which a code is reset to a random
                        latent of the current one, on several ranks of rank 0's (None: never)
    Raises ValueError for fewer than 2 codes.
    """

    def __init__(
        self,
        num_codes: int,
        dim: int,
        commitment_weight: float = 1.0,
        codebook_weight: float = 0.25,
        ema_decay: float | None = None,
        restart_after: int | None = None,
    ):
        super().__init__()
        if num_codes < 2:
            raise ValueError(f"a codebook needs at least 2 codes, got {num_codes}")
        self.num_codes, self.dim = num_codes, dim
        self.commitment_weight, self.codebook_weight = commitment_weight, codebook_weight
        self.ema_decay, self.restart_after = ema_decay, restart_after
        self.embedding = nn.Embedding(num_codes, dim)
        nn.init.uniform_(self.embedding.weight, -1 / num_codes, 1 / num_codes)
        if ema_decay is not None:
            self.embedding.weight.requires_grad_(False)
            self.register_buffer("ema_count", torch.ones(num_codes))
            self.register_buffer("ema_sum", self.embedding.weight.detach().clone())
        if restart_after is not None:
            self.register_buffer("unused_steps", torch.zeros(num_codes, dtype=torch.long))

    def nearest(self, latents: torch.Tensor) -> torch.Tensor:
        """latents (B, dim, h, w) -> indices (B, h, w) of the nearest codes."""
        flat = rearrange(latents, "b c h w -> (b h w) c").float()
        codes = self.embedding.weight.float()
        # |z - e|^2 without the term |z|^2, which is the same for all codes. Autocast would compute this product in bfloat16,
        # which tells few of thousands of codes apart.
        with full_precision(flat.device):
            distance = torch.addmm(codes.square().sum(dim=1), flat, codes.T, alpha=-2)
        return distance.argmin(dim=1).view(len(latents), *latents.shape[2:])

    def lookup(self, indices: torch.Tensor) -> torch.Tensor:
        """indices (B, h, w) -> codes (B, dim, h, w)."""
        return rearrange(F.embedding(indices, self.embedding.weight), "b h w c -> b c h w")

    def forward(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """latents (B, dim, h, w) -> (codes with a straight-through gradient to the latents, loss (B,), indices (B, h, w)).

        The loss is a mean over latent elements. In training mode, averaged codes are also updated and dead ones
        restarted, identically on all ranks.
        """
        indices = self.nearest(latents.detach())
        codes = self.lookup(indices).to(latents.dtype)
        loss = self.commitment_weight * (latents - codes.detach()).square().flatten(1).mean(dim=1)
        if self.ema_decay is None:
            loss = loss + self.codebook_weight * (latents.detach() - codes).square().flatten(1).mean(dim=1)
        if self.training and (self.ema_decay is not None or self.restart_after is not None):
            self._update(latents.detach(), indices)
        return latents + (codes - latents).detach(), loss, indices

    @torch.no_grad()
    def _update(self, latents: torch.Tensor, indices: torch.Tensor) -> None:
        flat, chosen = rearrange(latents, "b c h w -> (b h w) c").float(), indices.flatten()
        count = torch.zeros(self.num_codes, device=flat.device)
        count = _summed(count.index_add_(0, chosen, torch.ones_like(chosen, dtype=count.dtype)))
        if self.ema_decay is not None:
            total = _summed(torch.zeros_like(self.ema_sum).index_add_(0, chosen, flat))
            finite = total.isfinite().all()  # latents that are not finite change nothing
            self.ema_count.lerp_(torch.where(finite, count, self.ema_count), 1 - self.ema_decay)
            self.ema_sum.lerp_(torch.where(finite, total, self.ema_sum), 1 - self.ema_decay)
            self.embedding.weight.copy_(self.ema_sum / self.ema_count.clamp(min=1e-5)[:, None])
        if self.restart_after is not None:
            self.unused_steps.add_(1).masked_fill_(count > 0, 0)
            # Draws a latent for every code and uses those of the dead: their number is not read from the device.
            dead = self.unused_steps >= self.restart_after
            fresh = flat[torch.randint(len(flat), (self.num_codes,), device=flat.device)]
            if dist.is_available() and dist.is_initialized():
                dist.broadcast(fresh, src=0)
            dead &= fresh.isfinite().all(dim=1)
            weight = self.embedding.weight
            weight.copy_(torch.where(dead[:, None], fresh.to(weight.dtype), weight))
            self.unused_steps.masked_fill_(dead, 0)
            if self.ema_decay is not None:
                self.ema_count.masked_fill_(dead, 1.0)
                self.ema_sum.copy_(torch.where(dead[:, None], fresh, self.ema_sum))


def perplexity(counts: torch.Tensor) -> float:
    """exp of the entropy of code usage: num_codes if all are used equally, 1 if only one is. counts (num_codes,)."""
    share = counts.double() / counts.sum().clamp(min=1)
    return float(torch.exp(-(share * share.clamp(min=1e-12).log()).sum()))
