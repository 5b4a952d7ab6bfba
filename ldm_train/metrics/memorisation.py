"""Memorisation: whether a model reproduces its training pictures."""

import torch

from ldm_train.metrics.distribution import BLOCK, Estimate, mean_estimate
from ldm_train.metrics.metric import HELD_OUT, TRAINING, Metric
from ldm_train.metrics.sets import FeatureSet

SHOWN = 12  # pairs


def nearest(features: torch.Tensor, among: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (distances, rows) of the nearest of `among` (M, D) to each of features (N, D), float64."""
    among = among.double()
    minima = [torch.cdist(part.double(), among).min(dim=1) for part in features.split(BLOCK)]
    return torch.cat([m.values for m in minima]), torch.cat([m.indices for m in minima])


class Memorisation(Metric):
    """memorisation: the probability that a sample is nearer to its nearest training picture than a held-out picture is
    to its own, ties counted half. 0.5: samples are as new as held-out pictures; 1: copies; below 0.5: further from the
    training pictures than real ones (the test of Meehan, Chaudhuri and Dasgupta 2020, arXiv:2004.05675, over the whole
    space). The interval is for other samples of the model, with both sets of pictures fixed.
    """

    compared_with, keep = (TRAINING, HELD_OUT), 1_000_000

    def measure(self, made: FeatureSet, values: torch.Tensor, *others: FeatureSet) -> Estimate:
        training, held_out = (other.kept()[0] for other in others)
        ours = nearest(made.kept()[0], training)[0]
        theirs = nearest(held_out, training)[0].sort().values
        below, not_above = (torch.searchsorted(theirs, ours, right=right) for right in (False, True))
        return mean_estimate((len(theirs) - (below + not_above) / 2).double() / len(theirs))

    def pairs(self, made: FeatureSet, *others: FeatureSet) -> list[tuple[int, int]]:
        """Returns the samples nearest to a training picture, each with that picture."""
        features, indices = made.kept()
        training, places = others[0].kept()
        distances, rows = nearest(features, training)
        return [(int(indices[k]), int(places[rows[k]])) for k in distances.argsort()[:SHOWN].tolist()]


class Copying(Metric):
    """copying: the share of samples that must be copies, given how often the nearest of all n training and m held-out
    pictures is a training picture: if none is copied, that happens in q = n / (n + m) of the cases, both sets being
    drawn alike; so the share is (observed - q) / (1 - q), ties counted half. 0: none is copied, however typical the
    samples are; 1: all are; below 0: samples are nearer to held-out pictures. Samples that are nearer to real pictures
    of any kind than these are to each other raise `memorisation`, but not this. The interval is for other samples of
    the model, with both sets of pictures fixed.
    """

    compared_with, keep = (TRAINING, HELD_OUT), 1_000_000

    def measure(self, made: FeatureSet, values: torch.Tensor, *others: FeatureSet) -> Estimate:
        training, held_out = (other.kept()[0] for other in others)
        ours, theirs = (nearest(made.kept()[0], pictures)[0] for pictures in (training, held_out))
        usual = len(training) / (len(training) + len(held_out))
        found = mean_estimate((ours < theirs).double() + 0.5 * (ours == theirs).double())
        value, low, high = ((x - usual) / (1 - usual) for x in (found.value, found.low, found.high))
        return Estimate(value, low, high, found.n)
