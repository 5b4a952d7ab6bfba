"""The published metrics: the sets that each compares, and the features it needs."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ldm_train.devices import to_device
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
from ldm_train.metrics.metric import Metric
from ldm_train.metrics.sets import GROUPS, FeatureSet


class FrechetDistance(Metric):
    """fd: the Frechet distance on any extractor, e.g. FD-DINOv2 (Stein et al. 2023)."""

    needs_features = False

    def measure(self, made: FeatureSet, values: torch.Tensor, *others: FeatureSet) -> Estimate:
        return frechet_estimate(others[0].moments, made)


class FrechetInceptionDistance(FrechetDistance):
    """fid: the Frechet Inception distance (Heusel et al. 2017)."""

    published_with = "inception"


class FrechetAtInfinity(FrechetInceptionDistance):
    """fid_inf: the FID extrapolated to infinitely many images (Chong and Forsyth 2020)."""

    least = 6 * GROUPS

    def measure(self, made: FeatureSet, values: torch.Tensor, *others: FeatureSet) -> Estimate:
        return frechet_at_infinity(others[0].moments, made)


class KernelInceptionDistance(Metric):
    """kid: the kernel Inception distance (Binkowski et al. 2018)."""

    published_with = "inception"

    def measure(self, made: FeatureSet, values: torch.Tensor, *others: FeatureSet) -> Estimate:
        return kernel_estimate(others[0].kept()[0], made.kept()[0])


class ClipMaximumMeanDiscrepancy(Metric):
    """cmmd: the CLIP maximum mean discrepancy, times 1,000 (Jayasumana et al. 2024)."""

    published_with = "clip"

    def measure(self, made: FeatureSet, values: torch.Tensor, *others: FeatureSet) -> Estimate:
        return kernel_estimate(others[0].kept()[0], made.kept()[0], gaussian, 1000.0)


class InceptionScore(Metric):
    """is: the Inception score (Salimans et al. 2016), of all images as one split."""

    published_with, higher_is_better, needs_classes, compared_with = "inception", True, True, ()

    def measure(self, made: FeatureSet, values: torch.Tensor, *others: FeatureSet) -> Estimate:
        return inception_score(made)


class Precision(Metric):
    """precision: improved precision (Kynkaanniemi et al. 2019)."""

    published_with, higher_is_better = "inception", True
    least = 4  # a third neighbour

    def measure(self, made: FeatureSet, values: torch.Tensor, *others: FeatureSet) -> Estimate:
        return precision_estimate(others[0].kept()[0], made.kept()[0])


class Recall(Precision):
    """recall: improved recall (Kynkaanniemi et al. 2019)."""

    def measure(self, made: FeatureSet, values: torch.Tensor, *others: FeatureSet) -> Estimate:
        return recall_estimate(others[0].kept()[0], *made.kept())


class PerImage(Metric):
    """The mean of a value that each image has by itself, given the condition it was drawn under (`collect`)."""

    higher_is_better, compared_with = True, ()

    def measure(self, made: FeatureSet, values: torch.Tensor, *others: FeatureSet) -> Estimate:
        return mean_estimate(values)


class ClipScore(PerImage):
    """clip_score: 100 max(cos, 0) of images and the captions they were drawn from (Hessel et al. 2021). Images drawn from
    an empty caption are left out."""

    published_with = "clip"

    def check(self, extractor: Any, fields: Sequence[str]) -> None:
        if "caption" not in fields:
            raise ValueError(f"{self.name} judges pictures by their captions, and this model takes none")
        if not hasattr(extractor, "texts"):
            raise ValueError(f"{self.name} needs embeddings of texts, which {type(extractor).__name__} has not")

    def collect(self, extractor: Any, features: torch.Tensor, conditions: Mapping[str, Any]) -> torch.Tensor | None:
        self.check(extractor, [*conditions])
        captions = [caption for caption in conditions["caption"] if caption]
        if not captions:
            return None
        described = to_device(torch.tensor([bool(caption) for caption in conditions["caption"]]), features.device)
        return 100 * (features[described] * extractor.texts(captions)).sum(dim=1).clamp(min=0)


class ClassAccuracy(PerImage):
    """class_accuracy: the share of images that a classifier assigns to the class they were drawn under (Ravuri and
    Vinyals 2019 train on samples and classify photos; here the classifier is trained on photos). Its classes are the
    data's, in their order."""

    def check(self, extractor: Any, fields: Sequence[str]) -> None:
        if "class_label" not in fields:
            raise ValueError(f"{self.name} judges pictures by their classes, and this model takes none")
        if not hasattr(extractor, "logits"):
            raise ValueError(f"{self.name} needs a classifier, and {type(extractor).__name__} has no `logits`")

    def collect(self, extractor: Any, features: torch.Tensor, conditions: Mapping[str, Any]) -> torch.Tensor | None:
        self.check(extractor, [*conditions])
        logits, labels = extractor.logits(features), torch.as_tensor(conditions["class_label"])
        if (largest := int(labels.max())) >= logits.shape[1]:
            raise ValueError(
                f"{self.name}: its classifier knows {logits.shape[1]} classes, and class {largest} was asked for"
            )
        return logits.argmax(dim=1) == labels.to(logits.device)

    def measure(self, made: FeatureSet, values: torch.Tensor, *others: FeatureSet) -> Estimate:
        return mean_estimate(values.bool())  # truth values, for the interval of a share
