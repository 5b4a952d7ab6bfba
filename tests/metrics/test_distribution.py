"""Frechet and kernel distances against closed forms, scipy and torchmetrics, and the coverage of their intervals."""

from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from torchmetrics.image.kid import KernelInceptionDistance

from ldm_train.data.loose import image_batches
from ldm_train.metrics.distribution import (
    T_QUANTILE,
    frechet_distance,
    frechet_estimate,
    kernel_estimate,
    mean_estimate,
    precision_estimate,
    recall_estimate,
)
from ldm_train.metrics.features import TinyEval
from ldm_train.metrics.sets import GROUPS, FeatureSet, Moments, group_of


def kernel_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return kernel_estimate(a, b).value


def exactly(mean: torch.Tensor, covariance: torch.Tensor, count: int = 200) -> torch.Tensor:
    """Returns features (count, dim) with exactly this sample mean and unbiased covariance."""
    z = torch.randn(count, len(mean), dtype=torch.float64)
    z = z - z.mean(dim=0)
    z = z @ torch.linalg.inv(torch.linalg.cholesky(z.T @ z / (count - 1))).T
    return mean + z @ torch.linalg.cholesky(covariance).T


def random_covariance(dim: int) -> torch.Tensor:
    a = torch.randn(dim, dim, dtype=torch.float64)
    return a @ a.T / dim + 0.1 * torch.eye(dim, dtype=torch.float64)


def test_moments_stream_in_any_batches() -> None:
    features = torch.randn(50, 6) + 100  # far from 0
    moments = Moments.of(features.split(7))
    assert moments.count == 50
    torch.testing.assert_close(moments.mean, features.double().mean(dim=0))
    torch.testing.assert_close(moments.covariance, features.double().T.cov(), rtol=1e-6, atol=1e-8)


def test_frechet_distance_of_gaussians_that_commute_is_its_closed_form() -> None:
    """|mu_a - mu_b|^2 + sum (sqrt(a) - sqrt(b))^2 if both covariances are diagonal."""
    a, b = torch.rand(5, dtype=torch.float64) + 0.1, torch.rand(5, dtype=torch.float64) + 0.1
    mean_a, mean_b = torch.randn(2, 5, dtype=torch.float64)
    left, right = (Moments.of([exactly(m, torch.diag(v))]) for m, v in ((mean_a, a), (mean_b, b)))
    expected = (mean_a - mean_b).square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    assert frechet_distance(left, right) == pytest.approx(expected.item(), rel=1e-9)


def test_frechet_distance_equals_scipys_matrix_root() -> None:
    a, b = random_covariance(12), random_covariance(12)
    mean_a, mean_b = torch.randn(2, 12, dtype=torch.float64)
    root = scipy.linalg.sqrtm((a @ b).numpy())
    expected = (mean_a - mean_b).square().sum() + a.trace() + b.trace() - 2 * np.trace(root).real
    left, right = Moments.of([exactly(mean_a, a)]), Moments.of([exactly(mean_b, b)])
    assert frechet_distance(left, right) == pytest.approx(expected.item(), rel=1e-9)
    assert frechet_distance(right, left) == pytest.approx(expected.item(), rel=1e-9)


def test_frechet_distance_at_deficient_rank() -> None:
    """Fewer samples than dimensions: Tr (A^1/2 B A^1/2)^1/2 is the nuclear norm of the centred features' product."""
    x, y = torch.randn(10, 64, dtype=torch.float64), torch.randn(12, 64, dtype=torch.float64) + 0.2
    a, b = Moments.of([x]), Moments.of([y])
    nuclear = torch.linalg.matrix_norm((x - x.mean(0)) @ (y - y.mean(0)).T / (9 * 11) ** 0.5, ord="nuc")
    expected = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * nuclear
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-5)  # roots of rounding errors, 64 of them


def test_frechet_distance_does_not_move_with_both_sets() -> None:
    x, y = torch.randn(40, 4), torch.randn(40, 4) * 2 + 1
    shift = 5 * torch.ones(4)
    near = frechet_distance(Moments.of([x]), Moments.of([y]))
    assert frechet_distance(Moments.of([x + shift]), Moments.of([y + shift])) == pytest.approx(near, rel=1e-5)


class Flatten(torch.nn.Module):
    """A feature extractor for torchmetrics: the first 16 values of an image."""

    num_features = 16

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)[:, :16].float()


def test_kernel_distance_equals_torchmetrics_over_one_full_subset() -> None:
    a, b = torch.randn(30, 3, 4, 4), torch.randn(30, 3, 4, 4) * 1.5 + 0.3
    reference = KernelInceptionDistance(feature=Flatten(), subsets=1, subset_size=30)
    reference.update(a, real=True)
    reference.update(b, real=False)
    expected = reference.compute()[0].item()
    assert kernel_distance(Flatten()(a), Flatten()(b)) == pytest.approx(expected, rel=1e-4)


def test_kernel_distance_is_unbiased() -> None:
    values = torch.tensor([kernel_distance(torch.randn(8, 3), torch.randn(6, 3)) for _ in range(2000)])
    assert abs(values.mean().item()) < 4 * values.std().item() / 2000**0.5
    assert (values < 0).any()


def test_too_few_samples_are_named() -> None:
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        _ = Moments.of([torch.randn(1, 3)]).covariance
    with pytest.raises(ValueError, match="at least 2 samples a side, got 5 and 1"):
        kernel_distance(torch.randn(5, 3), torch.randn(1, 3))
    with pytest.raises(ValueError, match="no features"):
        Moments.of([])


def coverage(measure, truth: float, draws: int, draw) -> float:
    estimates = [measure(draw(k)) for k in range(draws)]
    return sum(e.low <= truth <= e.high for e in estimates) / draws


def draw(k: int, n: int = 160, dim: int = 12) -> torch.Tensor:
    """Returns features (n, dim) of a Gaussian that differs from the reference."""
    generator = torch.Generator().manual_seed(k)
    scale = torch.linspace(0.7, 1.4, dim, dtype=torch.float64)
    return 0.2 + scale * torch.randn(n, dim, generator=generator, dtype=torch.float64)


REFERENCE = torch.randn(3000, 12, generator=torch.Generator().manual_seed(99), dtype=torch.float64)


def test_the_interval_of_a_frechet_distance_covers_its_expectation() -> None:
    """Between 90 and 98 % of the intervals hold the expectation at that n (estimated from 1,500 other draws)."""
    reference = Moments.of([REFERENCE])
    truth = np.mean([frechet_distance(reference, Moments.of([draw(k)])) for k in range(10_000, 11_500)])
    assert 0.90 <= coverage(lambda x: frechet_estimate(reference, FeatureSet.of(x)), truth, 300, draw) <= 0.98


def test_the_interval_of_a_kernel_distance_covers_its_expectation() -> None:
    truth = np.mean([kernel_distance(REFERENCE[:500], draw(k)) for k in range(10_000, 10_700)])
    assert 0.90 <= coverage(lambda x: kernel_estimate(REFERENCE[:500], x), truth, 300, draw) <= 0.98


def test_the_kernel_jackknife_is_that_of_leaving_out_one_sample() -> None:
    features = draw(3, 30)
    found = kernel_estimate(REFERENCE[:100], features)
    left = [kernel_distance(REFERENCE[:100], torch.cat([features[:k], features[k + 1 :]])) for k in range(30)]
    spread = 1.959964 * (29 / 30 * np.square(np.array(left) - np.mean(left)).sum()) ** 0.5
    assert found.high - found.value == pytest.approx(spread, rel=1e-6)
    assert found.value == pytest.approx(kernel_distance(REFERENCE[:100], features))


def test_the_frechet_jackknife_is_that_of_leaving_out_a_group() -> None:
    features, reference = draw(3, 100), Moments.of([REFERENCE])
    found = frechet_estimate(reference, FeatureSet.of(features))
    left = []
    for k in range(GROUPS):
        keep = group_of(torch.arange(100)) != k
        assert keep.sum() == 95
        left.append(frechet_distance(reference, Moments.of([features[keep]])))
    spread = T_QUANTILE * (19 / 20 * np.square(np.array(left) - np.mean(left)).sum()) ** 0.5
    assert (found.low, found.high) == pytest.approx((found.value - spread, found.value + spread), rel=1e-6)
    assert pytest.approx(scipy.stats.t.ppf(0.975, GROUPS - 1)) == T_QUANTILE


def test_groups_hold_samples_of_all_classes_where_classes_come_in_turn() -> None:
    for turn in (2, 5, 10, 20):
        indices = torch.arange(4000)
        groups, classes = group_of(indices), indices % turn
        counts = torch.stack([torch.bincount(classes[groups == k], minlength=turn) for k in range(GROUPS)])
        assert (counts.sum(dim=1) == 200).all()
        # as if each sample's class were drawn: a mean of 200 / turn, five standard deviations aside
        assert ((counts - 200 / turn).abs() <= 5 * (200 / turn) ** 0.5).all()
    turned = draw(0, 2000) + 3 * (torch.arange(2000) % 10 == 0)[:, None]  # each tenth is of another class
    mixed = turned[torch.randperm(2000, generator=torch.Generator().manual_seed(0))]
    reference = Moments.of([REFERENCE])
    widths = [e.high - e.low for e in (frechet_estimate(reference, FeatureSet.of(x)) for x in (turned, mixed))]
    assert widths[0] == pytest.approx(widths[1], rel=0.5)


def test_too_few_samples_have_a_value_but_no_interval() -> None:
    assert np.isnan(frechet_estimate(Moments.of([REFERENCE]), FeatureSet.of(draw(0, 40))).low)
    assert np.isnan(kernel_estimate(REFERENCE[:10], draw(0, 2)).high)
    one = mean_estimate(torch.tensor([3.0]))
    assert one.value == 3.0
    assert np.isnan(one.low)
    assert one.as_dict() == {"value": 3.0, "interval": None, "n": 1}


def test_the_interval_of_a_mean_is_the_usual_one() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)) * 2 + 5
    found = mean_estimate(values)
    low, high = scipy.stats.t.interval(0.95, 399, float(values.mean()), float(values.std()) / 20)
    assert (found.low, found.high, found.n) == pytest.approx((low, high, 400), rel=1e-4)
    assert found.as_dict() == {"value": found.value, "interval": [found.low, found.high], "n": 400}


@pytest.mark.parametrize(("right", "count"), [(0, 5), (3, 13), (62, 64), (64, 64), (9_700, 10_000)])
def test_the_interval_of_a_share_is_wilsons(right: int, count: int) -> None:
    found = mean_estimate(torch.arange(count) < right)
    wanted = scipy.stats.binomtest(right, count).proportion_ci(0.95, "wilson")
    assert (found.value, found.low, found.high) == pytest.approx((right / count, *wanted), abs=1e-6)


@pytest.mark.slow
def test_intervals_cover_on_real_photos(datasets: Path) -> None:
    """With CIFAR-10 features of the shipped network and 60 disjoint draws of 80 photos, at least nine in ten intervals
    of FID, KID, precision and recall hold the mean over all draws. The reference is other photos."""
    extractor, features = TinyEval(), []
    for images in image_batches([str(datasets / "cifar10" / "test.tar")], batch_size=256):
        features.append(extractor(images))
        if len(features) == 20:  # 5,120 photos
            break
    features = torch.cat(features)[torch.randperm(5000, generator=torch.Generator().manual_seed(0))]
    reference, rest = features[:200], features[200:]
    moments, indices = Moments.of([reference]), torch.arange(80)
    measures = {
        "fid": lambda x: frechet_estimate(moments, FeatureSet.of(x)),
        "kid": lambda x: kernel_estimate(reference, x),
        "precision": lambda x: precision_estimate(reference, x),
        "recall": lambda x: recall_estimate(reference, x, indices),
    }
    draws = rest.split(80)
    for name, measured in measures.items():
        found = [measured(x) for x in draws]
        truth = np.mean([e.value for e in found])
        covered = np.mean([e.low <= truth <= e.high for e in found])
        assert 0.90 <= covered <= 1.0, f"{name} covers {covered:.0%}"
