"""Paired metrics equal torchmetrics', image by image."""

import pytest
import torch
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from ldm_train.metrics.paired import psnr, ssim


@pytest.fixture(params=[1, 3, 5], ids=["grey", "rgb", "five channels"])
def pair(request: pytest.FixtureRequest) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.rand(4, request.param, 24, 32) * 2 - 1
    scale = torch.tensor([0.01, 0.1, 0.3, 0.6]).view(4, 1, 1, 1)
    return (images + scale * torch.randn_like(images)).clamp(-1, 1), images


@pytest.mark.parametrize(("ours", "theirs"), [(psnr, PeakSignalNoiseRatio), (ssim, StructuralSimilarityIndexMeasure)])
def test_values_equal_torchmetrics_per_image(ours, theirs, pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    rec, images = pair
    reference = theirs(data_range=1.0)
    expected = torch.stack([reference((r[None] + 1) / 2, (x[None] + 1) / 2) for r, x in zip(rec, images)])
    torch.testing.assert_close(ours(rec, images), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours(rec[:1], images[:1]), expected[:1], rtol=1e-4, atol=1e-5)


def test_psnr_is_its_closed_form() -> None:
    images = torch.zeros(1, 3, 8, 8)
    assert psnr(images + 0.2, images).item() == pytest.approx(20.0, abs=1e-4)  # 10 log10(2^2 / 0.2^2)


def test_equal_images() -> None:
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    assert psnr(images, images).tolist() == [float("inf")] * 2
    assert ssim(images, images).tolist() == pytest.approx([1.0, 1.0])


def test_ssim_compares_intensities_from_0_up_so_that_grey_is_not_the_darkest() -> None:
    """By the definition's luminance term (Wang et al. 2004, eq. 6): two flat pictures differ in nothing else."""
    grey = torch.tensor([121, 134, 250, 10]) / 255
    a, b = (grey.view(2, 2)[:, k].view(2, 1, 1, 1).expand(2, 3, 16, 16) for k in (0, 1))
    c1, (x, y) = 0.01**2, grey.view(2, 2).T
    expected = (2 * x * y + c1) / (x**2 + y**2 + c1)
    torch.testing.assert_close(ssim(a * 2 - 1, b * 2 - 1), expected, rtol=1e-4, atol=1e-4)
