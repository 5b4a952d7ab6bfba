"""Distances between sets of features: Frechet distance (FID's) and kernel distance (KID's). All in float64, with intervals."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ldm_train.distributed import gathered

GROUPS = 20  # of the jackknife
T_QUANTILE = 2.0930240544083  # of Student's t with GROUPS - 1 degrees of freedom at 97.5 %
NORMAL_QUANTILE = 1.959963984540054


@dataclass(frozen=True)
class Estimate:
    """A number measured on n samples, and the 95 % interval of its expectation at that n: what other samples of the same
    model would give on average. (A Frechet distance's expectation falls with n; the interval says nothing of infinite n.)"""

    value: float
    low: float
    high: float
    n: int

    def as_dict(self) -> dict[str, Any]:
        known = self.low == self.low  # not NaN, which JSON does not have
        return {"value": self.value, "interval": [self.low, self.high] if known else None, "n": self.n}


def mean_estimate(values: torch.Tensor) -> Estimate:
    """The mean of values (N,), one per sample. One sample has no interval (NaN)."""
    values = values.double()
    mean, n = float(values.mean()), len(values)
    spread = NORMAL_QUANTILE * float(values.std()) / n**0.5 if n > 1 else float("nan")
    return Estimate(mean, mean - spread, mean + spread, n)


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

    def without(self, part: "Moments") -> "Moments":
        """The moments of all samples but those of `part`, which are among them."""
        rest = Moments(len(self.total))
        rest.count = self.count - part.count
        rest.total, rest.outer = self.total - part.total, self.outer - part.outer
        return rest

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


def frechet_estimate(reference: Moments, features: torch.Tensor) -> Estimate:
    """The Frechet distance of features (N, dim) to a fixed reference, with the interval of a jackknife that leaves out one
    of 20 groups at a time (Student's t with 19 degrees of freedom).

    A bootstrap would be of no use: drawing with replacement adds the bias of smaller samples. Coverage is measured in
    tests. Fewer than 60 samples have no interval (NaN).
    """
    joint, n = Moments.of([features]), len(features)
    value = frechet_distance(reference, joint)
    if n < 3 * GROUPS:
        return Estimate(value, float("nan"), float("nan"), n)
    rest = [joint.without(Moments.of([features[k::GROUPS]])) for k in range(GROUPS)]
    left = torch.tensor([frechet_distance(reference, moments) for moments in rest], dtype=torch.float64)
    spread = T_QUANTILE * float(((GROUPS - 1) / GROUPS * (left - left.mean()).square().sum()).sqrt())
    return Estimate(value, value - spread, value + spread, n)


def kernel_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Unbiased squared maximum mean discrepancy of features (N, dim), (M, dim) under (x.y / dim + 1)^3 (Binkowski et
    al. 2018). May be slightly negative for equal distributions."""
    return kernel_estimate(a, b).value


def kernel_estimate(reference: torch.Tensor, features: torch.Tensor) -> Estimate:
    """`kernel_distance` of features (M, dim) to a fixed reference (N, dim), with the interval of the jackknife that leaves
    out one sample at a time, in closed form. It is unbiased, so the interval holds at any n. Two samples have none."""
    a, b = reference.double(), features.double()

    def kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    n, m = len(a), len(b)
    if n < 2 or m < 2:
        raise ValueError(f"the kernel distance needs at least 2 samples a side, got {n} and {m}")
    aa, bb, across = kernel(a, a), kernel(b, b), kernel(a, b).mean(dim=0)
    within = (aa.sum() - aa.trace()) / (n * (n - 1))
    own = bb.sum(dim=1) - bb.diagonal()  # of each sample with all others
    value = float(within + own.sum() / (m * (m - 1)) - 2 * across.mean())
    if m < 3:
        return Estimate(value, float("nan"), float("nan"), m)
    left = (own.sum() - 2 * own) / ((m - 1) * (m - 2)) - 2 * (across.sum() - across) / (m - 1)
    spread = NORMAL_QUANTILE * float(((m - 1) / m * (left - left.mean()).square().sum()).sqrt())
    return Estimate(value, value - spread, value + spread, m)
