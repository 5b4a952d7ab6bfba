"""Metrics of sets of features: Frechet and kernel distances, precision and recall, Inception score.

All are computed in float64 and returned as an `Estimate` with a 95 % interval. Sets are accumulated as a stream
(`FeatureSet`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ldm_train.metrics.sets import GROUPS, FeatureSet, Moments, group_of

BLOCK = 1024  # rows of a distance matrix computed at a time
NEAREST = 16  # neighbours kept for leaving groups out
T_QUANTILE = 2.0930240544083  # of Student's t with GROUPS - 1 degrees of freedom at 97.5 %
NORMAL_QUANTILE = 1.959963984540054
# Two-sided 95 % quantiles of Student's t for 1 to 10 degrees of freedom. For more, its expansion around the normal
# quantile (Abramowitz and Stegun, 26.7.5) is exact to four digits.
STUDENT_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True)
class Estimate:
    """A number measured on n samples, and the 95 % interval of its expectation at that n: the mean over other samples of the
    same model. (A Frechet distance's expectation falls with n; the interval does not cover the limit of infinite n.)"""

    value: float
    low: float
    high: float
    n: int

    @classmethod
    def around(cls, value: float, spread: float, n: int) -> "Estimate":
        """Returns value ± spread; a spread of NaN means too few samples for an interval."""
        return cls(value, value - spread, value + spread, n)

    @property
    def has_interval(self) -> bool:
        return not math.isnan(self.low)

    def as_dict(self) -> dict[str, Any]:
        value = self.value if math.isfinite(self.value) else None  # infinite, e.g. the PSNR of equal pictures
        return {"value": value, "interval": [self.low, self.high] if self.has_interval else None, "n": self.n}


def student_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, to four digits."""
    if freedom <= len(STUDENT_QUANTILES):
        return STUDENT_QUANTILES[freedom - 1]
    z = NORMAL_QUANTILE
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def mean_estimate(values: torch.Tensor) -> Estimate:
    """The mean of values (N,), one per sample, with Student's interval. Of truth values it is a share, with Wilson's
    interval (Wilson 1927), which stays within 0 to 1. One sample has no interval (NaN)."""
    n, mean = len(values), float(values.double().mean())
    if n < 2:
        return Estimate.around(mean, math.nan, n)
    if values.dtype == torch.bool:
        z = NORMAL_QUANTILE
        centre, spread = mean + z**2 / (2 * n), z * (mean * (1 - mean) / n + z**2 / (4 * n**2)) ** 0.5
        return Estimate(mean, *(max(0.0, min(1.0, (centre + s) / (1 + z**2 / n))) for s in (-spread, spread)), n)
    return Estimate.around(mean, student_quantile(n - 1) * float(values.double().std()) / n**0.5, n)


def _root(matrix: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


class Frechet:
    """The Frechet distance to a fixed reference:  |mu_a - mu_b|^2 + Tr(A + B - 2 (A^1/2 B A^1/2)^1/2)
    (Dowson and Landau 1982; Heusel et al. 2017).

    The root is that of a symmetric matrix, by its eigenvalues: no imaginary residue, even at deficient rank.
    """

    def __init__(self, reference: Moments):
        self.mean, covariance = reference.mean, reference.covariance
        self.root, self.trace = _root(covariance), covariance.trace()

    def __call__(self, moments: Moments) -> float:
        covariance = moments.covariance
        cross = torch.linalg.eigvalsh(self.root @ covariance @ self.root).clamp(min=0).sqrt().sum()
        return float((self.mean - moments.mean).square().sum() + self.trace + covariance.trace() - 2 * cross)


def frechet_distance(a: Moments, b: Moments) -> float:
    """Returns the Frechet distance of two sets."""
    return Frechet(a)(b)


def _jackknife(value: float, left: Sequence[float], n: int) -> Estimate:
    """Returns `value` with the interval of a delete-a-group jackknife (Student's t, GROUPS - 1 degrees of freedom).
    left: the values without each group; empty if there are too few samples for an interval."""
    rest = torch.tensor(left, dtype=torch.float64)
    squares = (rest - rest.mean()).square().sum()
    spread = T_QUANTILE * float(((len(rest) - 1) / len(rest) * squares).sqrt()) if left else math.nan
    return Estimate.around(value, spread, n)


def frechet_estimate(reference: Moments, made: FeatureSet) -> Estimate:
    """Returns the Frechet distance of a set to a fixed reference, with the interval of a jackknife that leaves out one
    of 20 groups at a time.

    A bootstrap would not work: drawing with replacement adds the bias of smaller samples. Coverage is measured in
    tests. Fewer than 60 samples have no interval (NaN).
    """
    distance, joint = Frechet(reference), made.moments
    left = [distance(rest) for rest in made.left_out()] if joint.count >= 3 * GROUPS else []
    return _jackknife(distance(joint), left, joint.count)


def frechet_at_infinity(reference: Moments, made: FeatureSet) -> Estimate:
    """Extrapolates the Frechet distance to infinitely many samples of the same model (Chong and Forsyth 2020): its bias
    falls as 1 / n, so the line through the value at n and those at n / 2 is extended to 1 / n = 0. The reference stays
    the finite set it is. Raises ValueError for fewer than 120 samples."""
    n = made.count
    if n < 6 * GROUPS:
        raise ValueError(f"an extrapolation to infinite n needs at least {6 * GROUPS} samples, got {n}")
    distance = Frechet(reference)

    def extrapolated(groups: list[Moments]) -> float:
        joint, middle = Moments.joined(groups), len(groups) // 2
        halves = [Moments.joined(part) for part in (groups[::2], groups[1::2], groups[:middle], groups[middle:])]
        value, mean = distance(joint), sum(distance(half) for half in halves) / len(halves)
        inverse = sum(1 / half.count for half in halves) / len(halves)
        slope = (mean - value) / (inverse - 1 / joint.count)
        return value - slope / joint.count

    groups = made.groups
    left = [extrapolated(groups[:k] + groups[k + 1 :]) for k in range(len(groups))]
    return _jackknife(extrapolated(groups), left, n)


Kernel = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def polynomial(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """KID's kernel, (x.y / dim + 1)^3 (Binkowski et al. 2018)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def gaussian(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """CMMD's kernel on embeddings of length 1, standard deviation 10 (Jayasumana et al. 2024)."""
    return torch.exp(-torch.cdist(x, y).square() / 200)


def kernel_estimate(
    reference: torch.Tensor, features: torch.Tensor, kernel: Kernel = polynomial, scale: float = 1.0
) -> Estimate:
    """Returns the unbiased squared maximum mean discrepancy of features (M, dim) to a fixed reference (N, dim), times
    `scale`, with the interval of the jackknife that leaves out one sample at a time, in closed form. It is unbiased, so
    the interval holds at any n. Two samples have no interval (NaN); fewer on either side raise ValueError."""
    a, b = reference.double(), features.double()
    n, m = len(a), len(b)
    if n < 2 or m < 2:
        raise ValueError(f"the kernel distance needs at least 2 samples a side, got {n} and {m}")

    def row_sums(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.cat([kernel(part, y).sum(dim=1) for part in x.split(BLOCK)])

    def own_sums(x: torch.Tensor) -> torch.Tensor:  # of each sample with all others
        itself = torch.cat([kernel(part, part).diagonal() for part in x.split(64)])
        return row_sums(x, x) - itself

    within, own, across = own_sums(a).sum() / (n * (n - 1)), own_sums(b), row_sums(b, a) / n
    value = scale * float(within + own.sum() / (m * (m - 1)) - 2 * across.mean())
    if m < 3:
        return Estimate.around(value, math.nan, m)
    left = (own.sum() - 2 * own) / ((m - 1) * (m - 2)) - 2 * (across.sum() - across) / (m - 1)
    spread = scale * NORMAL_QUANTILE * float(((m - 1) / m * (left - left.mean()).square().sum()).sqrt())
    return Estimate.around(value, spread, m)


def inception_score(made: FeatureSet) -> Estimate:
    """Returns exp E KL(p(y|x) || p(y)) of all samples as one split (Salimans et al. 2016). Raises ValueError if the
    extractor gave no class probabilities."""
    if not made.class_sums:
        raise ValueError("an Inception score needs an extractor with classes (a method `logits`)")
    n_made = made.count  # read before the groups' counts, which it updates
    groups = range(len(made.groups))

    def score(skip: int | None) -> float:
        chosen = [k for k in groups if k != skip]
        n = sum(made.groups[k].count for k in chosen)
        p = sum(made.class_sums[k][0] for k in chosen) / n
        entropy = sum(made.class_sums[k][1] for k in chosen) / n
        return float(torch.exp(entropy - torch.special.xlogy(p, p).sum()))

    left = [score(k) for k in groups] if n_made >= 3 * GROUPS else []
    return _jackknife(score(None), left, n_made)


def _enough(a: torch.Tensor, b: torch.Tensor, k: int) -> None:
    if min(len(a), len(b)) < k + 1:
        raise ValueError(f"precision and recall need at least {k + 1} samples a side, got {len(a)} and {len(b)}")


def precision_estimate(reference: torch.Tensor, features: torch.Tensor, k: int = 3) -> Estimate:
    """Improved precision (Kynkaanniemi et al. 2019): the share of samples (M, dim) within the distance of some reference
    feature (N, dim) to its k-th neighbour."""
    a, b = reference.double(), features.double()
    _enough(a, b, k)
    radii = torch.cat([torch.cdist(part, a).kthvalue(k + 1, dim=1).values for part in a.split(BLOCK)])
    return mean_estimate(torch.cat([(torch.cdist(part, a) <= radii).any(dim=1) for part in b.split(BLOCK)]))


def recall_estimate(reference: torch.Tensor, features: torch.Tensor, indices: torch.Tensor, k: int = 3) -> Estimate:
    """Improved recall: the share of reference features (N, dim) within the distance of some sample (M, dim) to its k-th
    neighbour. indices (M,): of the samples, which determine the groups that the jackknife leaves out."""
    a, b = reference.double(), features.double()
    _enough(a, b, k)
    groups, m = group_of(indices), len(b)
    nearest = [torch.cdist(part, b).topk(min(m, NEAREST), dim=1, largest=False) for part in b.split(BLOCK)]
    distances, neighbours = (torch.cat(part) for part in zip(*nearest))

    def radii(skip: int | None) -> torch.Tensor:
        if skip is None:
            return distances[:, k]
        among = (groups[neighbours] != skip).cumsum(dim=1) > k  # a sample's first neighbour is itself
        chosen = distances.gather(1, among.long().argmax(dim=1, keepdim=True)).squeeze(1)
        return chosen.masked_fill(groups == skip, -1.0)  # a sample that is left out covers nothing

    skips = [None] if m < 3 * GROUPS else [None, *range(GROUPS)]
    circles = [radii(skip) for skip in skips]
    covered = torch.zeros(len(skips), dtype=torch.float64)
    for part in a.split(BLOCK):
        gaps = torch.cdist(part, b)
        covered += torch.stack([(gaps <= circle).any(dim=1).sum() for circle in circles])
    value, *left = (covered / len(a)).tolist()
    return _jackknife(value, left, m)
