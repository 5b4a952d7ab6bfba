"""Distances between sets of features: Frechet distance (FID's) and kernel distance (KID's). All in float64."""

from collections.abc import Iterable

import torch

from ldm_train.distributed import gathered


class Moments:
    """Mean and covariance of features, streaming: no list of features is kept.

    dim: features per sample.
    """

    def __init__(self, dim: int):
        self.count = 0
        self.total = torch.zeros(dim, dtype=torch.float64)
        self.outer = torch.zeros(dim, dim, dtype=torch.float64)

    def add(self, features: torch.Tensor) -> None:
        """features (B, dim)."""
        features = features.detach().double().cpu()
        self.count += len(features)
        self.total += features.sum(dim=0)
        self.outer += features.T @ features

    @classmethod
    def gathered(cls, own: "Moments | None") -> "Moments":
        """The joint moments of all ranks; a rank without samples passes None. Raises ValueError where none has any."""
        parts = [m for m in gathered(own) if m is not None]
        if not parts:
            raise ValueError("no features")
        joint = cls(len(parts[0].total))
        for part in parts:
            joint.count += part.count
            joint.total += part.total
            joint.outer += part.outer
        return joint

    @property
    def mean(self) -> torch.Tensor:
        return self.total / self.count

    @property
    def covariance(self) -> torch.Tensor:
        """Unbiased, (dim, dim). Raises ValueError for fewer than two samples."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, got {self.count}")
        return (self.outer - self.count * torch.outer(self.mean, self.mean)) / (self.count - 1)

    @classmethod
    def of(cls, batches: Iterable[torch.Tensor]) -> "Moments":
        """Moments of batches of features (B, dim)."""
        moments: Moments | None = None
        for features in batches:
            moments = moments or cls(features.shape[1])
            moments.add(features)
        if moments is None:
            raise ValueError("no features")
        return moments


def _root(matrix: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mu_a - mu_b|^2 + Tr(A + B - 2 (A^1/2 B A^1/2)^1/2)   (Dowson and Landau 1982; Heusel et al. 2017).

    The root is taken of a symmetric matrix by its eigenvalues: no imaginary residue, also at deficient rank.
    """
    root = _root(a.covariance)
    cross = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0).sqrt().sum()
    trace = a.covariance.trace() + b.covariance.trace() - 2 * cross
    return float((a.mean - b.mean).square().sum() + trace)


def kernel_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Unbiased squared maximum mean discrepancy of features (N, dim), (M, dim) under (x.y / dim + 1)^3 (Binkowski et
    al. 2018). May be slightly negative for equal distributions."""
    a, b = a.double(), b.double()

    def kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    n, m = len(a), len(b)
    if n < 2 or m < 2:
        raise ValueError(f"the kernel distance needs at least 2 samples a side, got {n} and {m}")
    aa, bb = kernel(a, a), kernel(b, b)
    within = (aa.sum() - aa.trace()) / (n * (n - 1)) + (bb.sum() - bb.trace()) / (m * (m - 1))
    return float(within - 2 * kernel(a, b).mean())
