"""Collects in a stream the features of image sets that metrics need, and computes the metrics."""

import io
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ldm_train.distributed import gathered
from ldm_train.metrics.distribution import Estimate
from ldm_train.metrics.metric import Metric
from ldm_train.metrics.sets import GROUPS, KEPT, UNKNOWN, FeatureSet, Moments


class Collected:
    """Features and values of a set of images for the metrics, in a stream; equal for any batches and ranks.

    metrics: decide which extractors see the images. extractors: name -> images -> features. compared: the set is one that
    metrics compare with, by its name there; it is not resampled. None: the set that is measured.
    """

    def __init__(self, metrics: Sequence[Metric], extractors: Mapping[str, Any], compared: str | None = None):
        self.metrics = [m for m in metrics if compared is None or compared in m.compared_with]
        self.extractors = {m.extractor: extractors[m.extractor] for m in self.metrics}
        self.resampled, self.groups = compared is None, GROUPS if compared is None else 1
        mine = {name: [m for m in self.metrics if m.extractor == name] for name in self.extractors}
        self.keep = {name: KEPT if compared is None else max(m.keep for m in mine[name]) for name in mine}
        self.sets: dict[str, FeatureSet] = {}
        self.values: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}  # by metric: (indices, numbers) of batches

    def add(self, images: torch.Tensor, indices: torch.Tensor, captions: Sequence[str] | None = None) -> None:
        """images (B, C, H, W) in [-1, 1], indices (B,) in the whole set, captions they were drawn from.

        Raises ValueError where a metric needs captions, or an extractor with classes or texts, and there are none.
        """
        for name, extractor in self.extractors.items():
            features, logits = extractor(images), None
            for metric in (m for m in self.metrics if m.extractor == name and self.resampled):
                if metric.needs_classes and logits is None:
                    metric.check(extractor, ())
                    logits = extractor.logits(features)
                if (values := metric.collect(extractor, features, captions)) is not None:
                    self.values.setdefault(metric.name, []).append((indices.cpu(), values.cpu()))
            if name not in self.sets:
                self.sets[name] = FeatureSet(features.shape[1], self.groups, self.keep[name])
            self.sets[name].add(features, indices, logits)

    def gathered(self) -> "Collected":
        """The joint set of all ranks, on every rank."""
        for name in self.extractors:
            self.sets[name] = FeatureSet.gathered(self.sets.get(name), self.groups)
        parts = gathered(self.values)
        names = dict.fromkeys(name for part in parts for name in part)
        self.values = {name: [pair for part in parts for pair in part.get(name, [])] for name in names}
        return self

    def values_of(self, metric: Metric) -> torch.Tensor:
        """The values that a metric collected, one per image (N,)."""
        pairs = self.values.get(metric.name, [])
        return torch.cat([values for _, values in pairs]) if pairs else torch.empty(0)

    def state(self) -> dict[str, Any]:
        """The state from which an interrupted collection continues: tensors, numbers and names."""
        return {"sets": {name: features.state() for name, features in self.sets.items()}, "values": self.values}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues from a `state`. Raises errors of any type for an invalid one, and then changes nothing."""
        sets = {name: FeatureSet.restored(saved) for name, saved in state["sets"].items()}
        values = {n: [(i.long(), v.double()) for i, v in state["values"][n]] for n in state["values"]}
        self.sets, self.values = sets, values


def write_reference(features: FeatureSet, file: io.BufferedWriter) -> None:
    """Writes .npz with mu and sigma, in the format of pytorch-fid and others, and also n and the features kept."""
    moments, (kept, indices) = features.moments, features.kept()
    np.savez(
        file, mu=moments.mean.numpy(), sigma=moments.covariance.numpy(), n=moments.count, features=kept.float().numpy(),
        indices=indices.numpy(),
    )  # fmt: skip


def read_reference(path: str | Path) -> FeatureSet:
    """Reads a file of `write_reference`, or another one with mu and sigma (then without features: Frechet distances only).

    Raises ValueError for any other file.
    """
    try:
        with np.load(path) as archive:
            mean, covariance = torch.from_numpy(archive["mu"]), torch.from_numpy(archive["sigma"])
            if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
                raise KeyError
            kept = len(archive["features"]) if "features" in archive else 0
            features = FeatureSet(len(mean), groups=1, keep=max(KEPT, kept))
            features.groups[0] = Moments.stated(mean, covariance, int(archive["n"]) if "n" in archive else UNKNOWN)
            if "features" in archive:
                features.add_kept(torch.from_numpy(archive["features"]), torch.from_numpy(archive["indices"]))
            return features
    except (KeyError, OSError, ValueError, zipfile.BadZipFile, EOFError, TypeError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"{path} is no file of reference statistics (.npz with mu (D,) and sigma (D, D))") from error


Sets = Mapping[str, Mapping[str, FeatureSet]]


def compared(metric: Metric, sets: Sets) -> list[FeatureSet]:
    """The sets that a metric compares with, out of `sets`: {name: {extractor: features}}.

    Raises ValueError where one is missing, or holds moments alone and the metric needs features."""
    feature_sets = []
    for name in metric.compared_with:
        if metric.extractor not in sets.get(name, {}):
            raise ValueError(
                f"{metric.name} compares with a run's training and validation pictures: ldm-evaluate run=<run>"
            )
        feature_sets.append(sets[name][metric.extractor])
        if metric.needs_features and not len(feature_sets[-1].kept()[0]):
            raise ValueError(
                f"{metric.name} needs features; this reference holds mean and covariance only (fid and fd work)"
            )
    return feature_sets


def measure(metrics: Sequence[Metric], sets: Sets, made: Collected) -> dict[str, Estimate]:
    """Every metric of a set of images; all sets gathered over ranks. Raises ValueError as `compared` does."""
    estimates = {}
    for metric in metrics:
        ours, others = made.sets[metric.extractor], compared(metric, sets)
        for theirs in others:
            dims = len(theirs.groups[0].total), len(ours.groups[0].total)
            if dims[0] != dims[1]:
                raise ValueError(
                    f"{metric.name}: the reference has {dims[0]} features per image, the extractor {dims[1]}"
                )
        estimates[metric.name] = metric.measure(ours, made.values_of(metric), *others)
    return estimates
