"""Streamed sets of features: their moments, class sums and a random subset, the same for any batches and ranks."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from ldm_train.distributed import gathered, world_size

GROUPS = 20  # of the jackknife
UNKNOWN = 2  # the count given to moments from other sources whose number of samples is unknown
KEPT = 10_000  # features of a set that are kept one by one, for metrics that need more than moments
FLUSH = 2048  # rows collected before they are added to the groups' sums


class Moments:
    """Mean and covariance of features (B, dim), streaming: no list of features is kept."""

    def __init__(self, dim: int):
        self.count = 0
        self.total = torch.zeros(dim, dtype=torch.float64)
        self.outer = torch.zeros(dim, dim, dtype=torch.float64)

    def add(self, features: torch.Tensor) -> None:
        features = features.detach().cpu().double()
        self.count += len(features)
        self.total += features.sum(dim=0)
        self.outer += features.T @ features

    @classmethod
    def gathered(cls, own: "Moments | None") -> "Moments":
        """Returns the joint moments of all ranks; a rank without samples passes None. Raises ValueError if no rank has
        any."""
        parts = [m for m in gathered(own) if m is not None]
        if not parts:
            raise ValueError("no features")
        return cls.joined(parts)

    @classmethod
    def joined(cls, parts: Sequence["Moments"]) -> "Moments":
        """Returns the moments of several sets together."""
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
        """Returns the moments of all samples except those of `part`, which must be among them."""
        rest = Moments(len(self.total))
        rest.count = self.count - part.count
        rest.total, rest.outer = self.total - part.total, self.outer - part.outer
        return rest

    @classmethod
    def stated(cls, mean: torch.Tensor, covariance: torch.Tensor, count: int) -> "Moments":
        """Builds moments from a given mean (dim,), unbiased covariance (dim, dim) and number of samples."""
        moments = cls(len(mean))
        moments.count, moments.total = count, mean.double() * count
        moments.outer = covariance.double() * (count - 1) + count * torch.outer(mean.double(), mean.double())
        return moments

    @classmethod
    def of(cls, batches: Iterable[torch.Tensor]) -> "Moments":
        """Moments of batches of features (B, dim)."""
        moments = None
        for features in batches:
            moments = moments or cls(features.shape[1])
            moments.add(features)
        if moments is None:
            raise ValueError("no features")
        return moments


def _mixed(indices: torch.Tensor) -> torch.Tensor:
    """Hashes int64 to random-looking int64 (after the finaliser of splitmix64), so that the choice of kept features
    does not follow their order."""
    x = indices * -7046029254386353131
    x = (x ^ (x >> 30)) * -4658895280553007687
    return x ^ (x >> 27)


def group_of(indices: torch.Tensor, groups: int = GROUPS) -> torch.Tensor:
    """Returns the jackknife's group of each sample. Of `groups` consecutive samples each is in another group, in an order
    that differs from one run of samples to the next, so that no group holds a single class where classes come in turn."""
    return (indices + _mixed(indices // groups)) % groups


class FeatureSet:
    """Features of a set of images, as a stream: sums for each of the jackknife's groups, and a random subset kept as it
    is.

    A sample's group and whether it is kept depend on its index alone, so the result does not depend on batches or
    ranks. dim: features per sample. groups: 1 for a reference, which is never resampled. keep: the most features kept.
    """

    def __init__(self, dim: int, groups: int = GROUPS, keep: int = KEPT):
        self.groups, self.keep = [Moments(dim) for _ in range(groups)], keep
        self.class_sums: list[tuple[torch.Tensor, float]] = []  # per group: sum of p(y|x), sum of p log p
        self._kept, self._kept_indices = torch.empty(0, dim), torch.empty(0, dtype=torch.int64)
        self._waiting: list[tuple[torch.Tensor, torch.Tensor]] = []

    def add(self, features: torch.Tensor, indices: torch.Tensor, logits: torch.Tensor | None = None) -> None:
        """Adds features (B, dim), indices (B,) of the samples in the whole set, and logits (B, classes) for the
        Inception score. Raises ValueError if features are not finite."""
        features, indices = features.detach().cpu(), indices.cpu()
        if not features.isfinite().all():
            raise ValueError("features are not finite: the images or the extractor's weights contain NaN or inf")
        self._waiting.append((features, indices))
        if logits is not None:
            self._add_classes(logits.detach().cpu().double().softmax(dim=1), indices)
        if sum(len(f) for f, _ in self._waiting) >= FLUSH:
            self._flush()

    def _add_classes(self, p: torch.Tensor, indices: torch.Tensor) -> None:
        entropy = torch.special.xlogy(p, p).sum(dim=1)
        if not self.class_sums:
            self.class_sums = [(torch.zeros(p.shape[1], dtype=torch.float64), 0.0) for _ in self.groups]
        for k, (total, sum_entropy) in enumerate(self.class_sums):
            mine = group_of(indices, len(self.groups)) == k
            self.class_sums[k] = (total + p[mine].sum(dim=0), sum_entropy + float(entropy[mine].sum()))

    def _flush(self) -> None:
        if not self._waiting:
            return
        features, indices = (torch.cat(parts) for parts in zip(*self._waiting))
        self._waiting = []
        groups = group_of(indices, len(self.groups))
        for k, moments in enumerate(self.groups):
            moments.add(features[groups == k])
        self.add_kept(features, indices)

    def add_kept(self, features: torch.Tensor, indices: torch.Tensor) -> None:
        """Updates the random subset with features that the moments already include."""
        features, indices = torch.cat([self._kept, features]), torch.cat([self._kept_indices, indices])
        chosen = _mixed(indices).argsort()[: self.keep]
        chosen = chosen[indices[chosen].argsort()]
        self._kept, self._kept_indices = features[chosen], indices[chosen]

    @property
    def dim(self) -> int:
        return len(self.groups[0].total)

    @property
    def count(self) -> int:
        self._flush()
        return sum(group.count for group in self.groups)

    @property
    def moments(self) -> Moments:
        self._flush()
        return Moments.joined(self.groups)

    def left_out(self) -> list[Moments]:
        """Returns the moments without each group in turn."""
        joint = self.moments
        return [joint.without(part) for part in self.groups]

    def kept(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (features, indices) of at most `keep` samples, in the order of their indices."""
        self._flush()
        return self._kept, self._kept_indices

    def state(self) -> dict[str, Any]:
        """Returns tensors and numbers from which `restored` makes an equal set."""
        self._flush()
        sums = [(group.count, group.total, group.outer) for group in self.groups]
        return {"groups": sums, "keep": self.keep, "class_sums": self.class_sums, "kept": self.kept()}

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> "FeatureSet":
        made = cls(state["kept"][0].shape[1], len(state["groups"]), state["keep"])
        for group, (count, total, outer) in zip(made.groups, state["groups"]):
            group.count, group.total, group.outer = count, total, outer
        made.class_sums, (made._kept, made._kept_indices) = state["class_sums"], state["kept"]
        return made

    @classmethod
    def gathered(cls, own: "FeatureSet | None", groups: int = GROUPS) -> "FeatureSet":
        """Returns the joint set of all ranks, gathered one group at a time (at 2,048 features each is 34 MB a rank); a
        rank without samples passes None. Raises ValueError if no rank has any."""
        if world_size() == 1 and own is not None:
            return own
        shapes = [shape for shape in gathered(own and (own.dim, own.keep)) if shape]
        if not shapes:
            raise ValueError("no features")
        dim, keep = shapes[0]
        joint = cls(dim, groups, keep)
        if own is not None:
            own._flush()
        joint.groups = [Moments.gathered(own and own.groups[k]) for k in range(groups)]
        for kept in gathered(own and own.kept()):
            if kept is not None:
                joint.add_kept(*kept)
        sums = [part for part in gathered(own and own.class_sums) if part]
        joint.class_sums = [(sum(t for t, _ in group), sum(e for _, e in group)) for group in zip(*sums)]
        return joint

    @classmethod
    def of(cls, features: torch.Tensor, groups: int = GROUPS) -> "FeatureSet":
        """A set of features (N, dim)."""
        made = cls(features.shape[1], groups)
        made.add(features, torch.arange(len(features)))
        return made
