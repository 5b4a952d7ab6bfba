"""Posteriors of encoders: a Gaussian, or a point mass."""

import torch


class DiagonalGaussian:
    """The posterior q(z | x): a Gaussian with diagonal covariance.

    moments: (B, 2C, h, w), mean and log-variance, which is clamped to [-30, 20].
    """

    def __init__(self, moments: torch.Tensor):
        self.mean, logvar = moments.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)

    @property
    def std(self) -> torch.Tensor:
        return torch.exp(0.5 * self.logvar)

    def sample(self, generator: torch.Generator | None = None) -> torch.Tensor:
        """mean + std * eps, (B, C, h, w). eps is drawn on the generator's device (default: the moments' device)."""
        device = self.mean.device if generator is None else generator.device
        eps = torch.randn(self.mean.shape, generator=generator, device=device, dtype=self.mean.dtype)
        return self.mean + self.std * eps.to(self.mean.device)

    def kl(self) -> torch.Tensor:
        """Returns KL(q || N(0, 1)) in nats, summed over C, h, w: (B,)."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1.0 - self.logvar).sum(dim=(1, 2, 3))

    def regularisation(self) -> dict[str, torch.Tensor]:
        return {"kl": self.kl()}


class Point:
    """The posterior of a deterministic encoder, with all mass on `mean` (B, C, h, w).

    codebook: the quantisation loss (B,); indices: of the codes (B, h, w); None unless the latents were quantised.
    """

    def __init__(self, mean: torch.Tensor, codebook: torch.Tensor | None = None, indices: torch.Tensor | None = None):
        self.mean, self.codebook, self.indices = mean, codebook, indices

    @property
    def std(self) -> torch.Tensor:
        return torch.zeros_like(self.mean)

    def sample(self, generator: torch.Generator | None = None) -> torch.Tensor:
        return self.mean

    def regularisation(self) -> dict[str, torch.Tensor]:
        return {} if self.codebook is None else {"codebook": self.codebook}


Posterior = DiagonalGaussian | Point
