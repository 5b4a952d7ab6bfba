"""Collects, as a stream, the features of image sets that metrics need, and computes the metrics."""

import io
import zipfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ldm_train.distributed import gathered
from ldm_train.metrics.distribution import Estimate
from ldm_train.metrics.metric import Metric
from ldm_train.metrics.sets import GROUPS, KEPT, UNKNOWN, FeatureSet, Moments


class Collected:
    """Features and values of a set of images for the metrics, as a stream; the same for any batches and ranks.

    metrics: decide which extractors see the images. extractors: name -> module (images -> features). compared: the name
    of the set if it is one that metrics compare with, which is not resampled; None for the set that is measured.
    """

    def __init__(self, metrics: Sequence[Metric], extractors: Mapping[str, Any], compared: str | None = None):
        self.metrics = [m for m in metrics if compared is None or compared in m.compared_with]
        self.extractors = {m.extractor: extractors[m.extractor] for m in self.metrics}
        self.resampled, self.groups = compared is None, GROUPS if compared is None else 1
        kept = [(m.keep if compared else KEPT, m.extractor) for m in self.metrics]
        self.keep = {extractor: keep for keep, extractor in sorted(kept)}  # the largest of several metrics
        self.sets: dict[str, FeatureSet] = {}
        self.values: dict[str, list[torch.Tensor]] = {}  # by metric: the values (B,) of each batch, one per image

    def add(self, images: torch.Tensor, indices: torch.Tensor, conditions: Mapping[str, Any] | None = None) -> None:
        """Adds images (B, C, H, W) in [-1, 1], with their indices (B,) in the whole set and the conditions they were
        drawn under, by field.

        Raises ValueError if a metric needs captions or classes, or an extractor with classes or texts, and there are
        none.
        """
        asked: list[tuple[str, torch.Tensor, torch.Tensor | None, dict[str, torch.Tensor]]] = []
        for name, extractor in self.extractors.items():
            features, logits, own = extractor(images), None, {}
            for metric in (m for m in self.metrics if m.extractor == name and self.resampled):
                if metric.needs_classes and logits is None:
                    metric.check(extractor, ())
                    logits = extractor.logits(features)
                if (values := metric.collect(extractor, features, conditions or {})) is not None:
                    own[metric.name] = values
            asked.append((name, features, logits, own))
        for name, features, logits, own in asked:  # read after all work is queued: the device is synchronised once
            for metric_name, values in own.items():
                self.values.setdefault(metric_name, []).append(values.cpu().double())
            if name not in self.sets:
                self.sets[name] = FeatureSet(features.shape[1], self.groups, self.keep[name])
            self.sets[name].add(features, indices, logits)

    def gathered(self) -> "Collected":
        """Merges the sets of all ranks, on every rank; returns this object."""
        self.sets = {name: FeatureSet.gathered(self.sets.get(name), self.groups) for name in self.extractors}
        parts, self.values = gathered(self.values), {}
        for name, values in (item for part in parts for item in part.items()):
            self.values.setdefault(name, []).extend(values)
        return self

    def state(self) -> dict[str, Any]:
        """Returns the state from which an interrupted collection continues: tensors, numbers and names."""
        return {"sets": {name: features.state() for name, features in self.sets.items()}, "values": self.values}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues from a `state`. Raises errors of any type for an invalid one, and then leaves this object
        unchanged."""
        sets = {name: FeatureSet.restored(saved) for name, saved in state["sets"].items()}
        values = {name: [v.double() for v in batches] for name, batches in state["values"].items()}
        self.sets, self.values = sets, values


def write_reference(features: FeatureSet, file: io.BufferedWriter) -> None:
    """Writes .npz with mu and sigma, in the format of pytorch-fid and others, and also n and the features kept."""
    moments, (kept, indices) = features.moments, features.kept()
    mu, sigma = moments.mean.numpy(), moments.covariance.numpy()
    np.savez(file, mu=mu, sigma=sigma, n=moments.count, features=kept.float().numpy(), indices=indices.numpy())


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
    except FileNotFoundError:
        raise
    except (KeyError, OSError, ValueError, zipfile.BadZipFile, EOFError, TypeError) as error:
        raise ValueError(
            f"{path} is not a file of reference statistics (.npz with mu (D,) and sigma (D, D))"
        ) from error


Sets = Mapping[str, Mapping[str, FeatureSet]]


def check_compared(metric: Metric, names: Collection[str]) -> None:
    """Raises ValueError if a set that a metric compares with is not among those of these names."""
    if not {*metric.compared_with} <= {*names}:
        raise ValueError(
            f"{metric.name} compares with a run's training and validation pictures: ldm-evaluate run=<run>"
        )


def compared(metric: Metric, sets: Sets) -> list[FeatureSet]:
    """Returns the sets that a metric compares with, out of `sets`: {name: {extractor: features}}.

    Raises ValueError if one is missing, or holds moments alone and the metric needs features.
    """
    check_compared(metric, [name for name in sets if metric.extractor in sets[name]])
    others = [sets[name][metric.extractor] for name in metric.compared_with]
    if metric.needs_features and not all(len(other.kept()[0]) for other in others):
        raise ValueError(
            f"{metric.name} needs features; this reference holds mean and covariance only (fid and fd work)"
        )
    return others


def measure(metrics: Sequence[Metric], sets: Sets, made: Collected) -> dict[str, Estimate]:
    """Computes every metric of a set of images; all sets must be gathered over ranks. Raises ValueError as `compared`
    does, and if the numbers of features differ."""
    estimates = {}
    for metric in metrics:
        ours, others = made.sets[metric.extractor], compared(metric, sets)
        for theirs in others:
            if theirs.dim != ours.dim:
                raise ValueError(
                    f"{metric.name}: the reference has {theirs.dim} features per image, the extractor {ours.dim}"
                )
        batches = made.values.get(metric.name)
        values = torch.cat(batches) if batches else torch.empty(0)
        estimates[metric.name] = metric.measure(ours, values, *others)
    return estimates
