"""The contract of metrics of a set of images. A kind of metric is a class and a file `conf/metric/<kind>.yaml` that
names it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ldm_train.metrics.distribution import Estimate
from ldm_train.metrics.sets import KEPT, FeatureSet

REFERENCE = "reference"  # evaluation.reference
TRAINING, HELD_OUT = "train_split", "val_split"  # splits of the data


class Metric:
    """A number computed from the features that one extractor gives for a set of images. Subclasses set the attributes
    and implement `measure`.

    published_with    the extractor used if a name is the kind alone; None: a name must include an extractor
    higher_is_better  True if larger values are better
    compared_with     the sets it compares with: REFERENCE, TRAINING, HELD_OUT
    needs_features    whether it needs their single features; False: mean and covariance are enough
    needs_classes     whether it needs an extractor with `logits`
    keep              how many features are kept of each set it compares with
    least             the smallest number of images it can be measured on

    An extractor is a callable, images (B, C, H, W) in [-1, 1] -> features (B, D), optionally with `logits` or `texts`.
    """

    published_with: str | None = None
    higher_is_better = False
    compared_with: tuple[str, ...] = (REFERENCE,)
    needs_features = True
    needs_classes = False
    keep = KEPT
    least = 2

    def __init__(self, name: str, kind: str, extractor: str):
        self.name, self.kind, self.extractor = name, kind, extractor

    @property
    def sign(self) -> int:
        """-1 if higher is better, else 1: sign * value is to be minimised."""
        return -1 if self.higher_is_better else 1

    def check(self, extractor: Any, fields: Sequence[str]) -> None:
        """Raises ValueError if it cannot be measured with this extractor, for a model with these condition fields."""
        if self.needs_classes and not hasattr(extractor, "logits"):
            raise ValueError(f"{self.name} needs class probabilities, which {type(extractor).__name__} has not")

    def collect(self, extractor: Any, features: torch.Tensor, conditions: Mapping[str, Any]) -> torch.Tensor | None:
        """Returns values (B,), one per image, to keep beside the features (B, D), or None. conditions: what the images
        were drawn under, by field: `caption` (B texts), `class_label` (B,); empty if nothing is known of them."""
        return None

    def measure(self, made: FeatureSet, values: torch.Tensor, *others: FeatureSet) -> Estimate:
        """Computes the metric. values: those of `collect` for all images (N,). others: the sets that it compares
        with."""
        raise NotImplementedError

    def pairs(self, made: FeatureSet, *others: FeatureSet) -> list[tuple[int, int]]:
        """Returns at most a page of images worth viewing beside one of the first set that it compares with, a split of
        the data: (index of the image, index in the split)."""
        return []
