"""Metrics by name, over any extractors: what is collected of two sets of images, and what is measured of it.

A name is `<kind>_<extractor>` (fid_tiny, precision_clip, kid_mine), or one of the published names: fid, fid_inf, kid, is,
precision and recall on Inception, fd_dinov2, cmmd and clip_score on CLIP.
"""

import io
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ldm_train.distributed import gathered
from ldm_train.metrics.distribution import (
    Estimate,
    frechet_at_infinity,
    frechet_estimate,
    gaussian,
    inception_score,
    kernel_estimate,
    mean_estimate,
    precision_estimate,
    recall_estimate,
)
from ldm_train.metrics.sets import GROUPS, UNKNOWN, FeatureSet, Moments

KINDS = ("fid_inf", "fid", "fd", "kid", "is", "precision", "recall", "cmmd", "clip_score")
PUBLISHED = {kind: (kind, "inception") for kind in ("fid", "fid_inf", "kid", "is", "precision", "recall")}
PUBLISHED |= {"fd_dinov2": ("fd", "dinov2"), "cmmd": ("cmmd", "clip"), "clip_score": ("clip_score", "clip")}
HIGHER_IS_BETTER = ("is", "precision", "recall", "clip_score")
WITHOUT_REFERENCE = ("is", "clip_score")
FROM_MOMENTS = ("fid", "fid_inf", "fd", *WITHOUT_REFERENCE)  # what an imported (mu, sigma) file is enough for


@dataclass(frozen=True)
class Metric:
    name: str
    kind: str
    extractor: str

    @property
    def sign(self) -> int:
        """-1 where higher is better, so that sign * value is to be made small."""
        return -1 if self.kind in HIGHER_IS_BETTER else 1


def parse_metrics(names: Sequence[str], extractors: Sequence[str]) -> list[Metric]:
    """Raises ValueError for a name that is none, listing those there are."""
    found = []
    for name in names:
        own = ((k, name[len(k) + 1 :]) for k in KINDS if name.startswith(f"{k}_"))
        known = next((pair for pair in own if pair[1] in extractors), (None, None))
        kind, extractor = PUBLISHED.get(name, known)
        if kind is None or extractor not in extractors:
            tiny = [f"{k}_tiny" for k in ("fid", "kid", "precision", "recall") if "tiny" in extractors]
            raise ValueError(
                f"metrics: {name!r} is none; choose from {', '.join([*PUBLISHED, *tiny])}, or <kind>_<extractor> with a kind of "
                f"{', '.join(KINDS)} and an extractor of {', '.join(extractors)} (more: evaluation.extractors.<name>)"
            )
        found.append(Metric(name, kind, extractor))
    return found


class Collected:
    """What the metrics need to know of a set of images, in a stream; the same for any batches and ranks.

    metrics: decide which extractors see the images. extractors: name -> images -> features.
    reference: the set that others are compared with; it is not resampled and has no captions to be judged by.
    """

    def __init__(self, metrics: Sequence[Metric], extractors: Mapping[str, nn.Module], reference: bool = False):
        used = [m for m in metrics if not (reference and m.kind in WITHOUT_REFERENCE)]
        self.extractors = {m.extractor: extractors[m.extractor] for m in used}
        self.wants = {(m.extractor, m.kind) for m in used}
        self.groups = 1 if reference else GROUPS
        self.sets: dict[str, FeatureSet] = {}
        self.fits: list[tuple[torch.Tensor, torch.Tensor]] = []  # indices and CLIPScores

    def add(self, images: torch.Tensor, indices: torch.Tensor, captions: Sequence[str] | None = None) -> None:
        """images (B, C, H, W) in [-1, 1], indices (B,) in the whole set, captions they were drawn from.

        Raises ValueError where a metric needs what is not there: captions, or an extractor with classes or texts.
        """
        for name, extractor in self.extractors.items():
            features = extractor(images)
            logits = None
            if (name, "is") in self.wants:
                if not hasattr(extractor, "logits"):
                    raise ValueError(f"is_{name} needs class probabilities, which {type(extractor).__name__} has not")
                logits = extractor.logits(features)
            if (name, "clip_score") in self.wants:
                if captions is None or not all(captions):
                    raise ValueError("clip_score judges pictures by their captions, and this model takes none")
                if not hasattr(extractor, "texts"):
                    raise ValueError(
                        f"clip_score_{name} needs embeddings of texts; {type(extractor).__name__} has none"
                    )
                cosines = (features * extractor.texts(captions)).sum(dim=1)
                self.fits.append((indices.cpu(), 100 * cosines.clamp(min=0).double().cpu()))
            if name not in self.sets:
                self.sets[name] = FeatureSet(features.shape[1], self.groups)
            self.sets[name].add(features, indices, logits)

    def gathered(self) -> "Collected":
        """The joint set of all ranks, on every rank."""
        for name in self.extractors:
            self.sets[name] = FeatureSet.gathered(self.sets.get(name), self.groups)
        self.fits = [part for parts in gathered(self.fits) for part in parts]
        return self

    def state(self) -> dict[str, Any]:
        """What an interrupted collection continues from: tensors, numbers and names."""
        return {"sets": {name: features.state() for name, features in self.sets.items()}, "fits": self.fits}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Raises whatever a state of another kind leads to, with nothing changed."""
        sets = {name: FeatureSet.restored(saved) for name, saved in state["sets"].items()}
        fits = [(indices.long(), values.double()) for indices, values in state["fits"]]
        self.sets, self.fits = sets, fits


def write_reference(features: FeatureSet, file: io.BufferedWriter) -> None:
    """As .npz with mu and sigma, as pytorch-fid and its kin read and write it, beside n and the features kept."""
    moments, (kept, indices) = features.moments, features.kept()
    np.savez(
        file, mu=moments.mean.numpy(), sigma=moments.covariance.numpy(), n=moments.count, features=kept.float().numpy(),
        indices=indices.numpy(),
    )  # fmt: skip


def read_reference(path: str | Path) -> FeatureSet:
    """A file of `write_reference`, or anyone's with mu and sigma (then without features: Frechet distances only).

    Raises ValueError where it is none.
    """
    try:
        with np.load(path) as found:
            mean, covariance = torch.from_numpy(found["mu"]), torch.from_numpy(found["sigma"])
            if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
                raise KeyError
            features = FeatureSet(len(mean), groups=1)
            features.groups[0] = Moments.stated(mean, covariance, int(found["n"]) if "n" in found else UNKNOWN)
            if "features" in found:
                features.add_kept(torch.from_numpy(found["features"]), torch.from_numpy(found["indices"]))
            return features
    except (KeyError, OSError, ValueError, zipfile.BadZipFile, EOFError, TypeError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"{path} is no file of reference statistics (.npz with mu (D,) and sigma (D, D))") from error


def measure(metrics: Sequence[Metric], reference: Mapping[str, FeatureSet], made: Collected) -> dict[str, Estimate]:
    """Every metric of a set of images against reference sets (by extractor); both gathered over ranks.

    Raises ValueError where the reference holds moments alone and a metric needs features.
    """
    found = {}
    for metric in metrics:
        if metric.kind == "clip_score":
            found[metric.name] = mean_estimate(torch.cat([values for _, values in made.fits]))
            continue
        ours = made.sets[metric.extractor]
        if metric.kind == "is":
            found[metric.name] = inception_score(ours)
            continue
        theirs = reference[metric.extractor]
        dims = len(theirs.groups[0].total), len(ours.groups[0].total)
        if dims[0] != dims[1]:
            raise ValueError(f"{metric.name}: the reference has {dims[0]} features per image, the extractor {dims[1]}")
        if metric.kind not in FROM_MOMENTS and not len(theirs.kept()[0]):
            raise ValueError(
                f"{metric.name} needs features; this reference holds mean and covariance only (fid and fd work)"
            )
        if metric.kind in ("fid", "fd"):
            found[metric.name] = frechet_estimate(theirs.moments, ours)
        elif metric.kind == "fid_inf":
            found[metric.name] = frechet_at_infinity(theirs.moments, ours)
        elif metric.kind == "kid":
            found[metric.name] = kernel_estimate(theirs.kept()[0], ours.kept()[0])
        elif metric.kind == "cmmd":
            found[metric.name] = kernel_estimate(theirs.kept()[0], ours.kept()[0], gaussian, 1000.0)
        elif metric.kind == "precision":
            found[metric.name] = precision_estimate(theirs.kept()[0], ours.kept()[0])
        else:
            found[metric.name] = recall_estimate(theirs.kept()[0], *ours.kept())
    return found
