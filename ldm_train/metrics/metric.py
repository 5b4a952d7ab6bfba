"""The contract of metrics of a set of images. A kind of metric is a class and a file `conf/metric/<kind>.yaml` that names it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ldm_train.metrics.distribution import Estimate
from ldm_train.metrics.sets import KEPT, FeatureSet

REFERENCE = "reference"  # evaluation.reference
TRAINING, HELD_OUT = "train_split", "val_split"  # of the data


class Metric:
    """A number computed from a set of images by the features of one extractor. Subclasses state the attributes and implement `measure`.

    published_with    the extractor that the kind alone stands for; None: always say one
    higher_is_better
    compared_with     the sets it compares with: REFERENCE, TRAINING, HELD_OUT
    needs_features    of these one by one; False: mean and covariance will do
    needs_classes     an extractor with `logits`
    keep              how many features are kept of each set that it compares with
    least             images it can be measured on

    An extractor is a callable, images (B, C, H, W) in [-1, 1] -> features (B, D), perhaps with `logits` or `texts`.
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
        """-1 where higher is better, so that sign * value is to be made small."""
        return -1 if self.higher_is_better else 1

    def check(self, extractor: Any, fields: Sequence[str]) -> None:
        """Raises ValueError where it cannot be measured with this extractor, for a model with these condition fields."""
        if self.needs_classes and not hasattr(extractor, "logits"):
            raise ValueError(f"{self.name} needs class probabilities, which {type(extractor).__name__} has not")

    def collect(self, extractor: Any, features: torch.Tensor, conditions: Mapping[str, Any]) -> torch.Tensor | None:
        """Values (B,), one per image, to keep beside the features (B, D); None for none. conditions: what the images were drawn
        under, by field: `caption` (B texts), `class_label` (B,); empty where nothing is known of them."""
        return None

    def measure(self, made: FeatureSet, values: torch.Tensor, *others: FeatureSet) -> Estimate:
        """values: those of `collect` for all images (N,). others: the sets that it is compared with."""
        raise NotImplementedError

    def pairs(self, made: FeatureSet, *others: FeatureSet) -> list[tuple[int, int]]:
        """Images worth looking at beside one of the first set that it is compared with, a split of the data: (index of the
        image, index in the split), at most a page."""
        return []
