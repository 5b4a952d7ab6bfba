"""The patch discriminator equals pix2pix' with three layers: parameter count, 70-pixel patches, normalisation."""

import pytest
import torch

from ldm_train.models.discriminator import PatchDiscriminator


def test_parameter_count_is_the_published_one() -> None:
    assert sum(p.numel() for p in PatchDiscriminator(norm="batch").parameters()) == 2_765_633


def test_a_logit_sees_seventy_pixels() -> None:
    discriminator = PatchDiscriminator(channels=4, norm="batch").eval()
    images = torch.randn(1, 3, 160, 160, requires_grad=True)
    logits = discriminator(images)
    assert logits.shape == (1, 1, 18, 18)
    logits[0, 0, 9, 9].backward()
    seen = images.grad.abs().sum(dim=(0, 1)) > 0
    assert seen.any(dim=0).sum() == 70
    assert seen.any(dim=1).sum() == 70


@torch.no_grad()
def test_group_norm_judges_each_image_alone() -> None:
    discriminator = PatchDiscriminator(in_channels=1, channels=8).train()
    images = torch.randn(4, 1, 32, 32)
    torch.testing.assert_close(discriminator(images)[:1], discriminator(images[:1]), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_spectral_norm_bounds_every_convolution() -> None:
    discriminator = PatchDiscriminator(channels=8, spectral_norm=True).train()
    for _ in range(60):  # each forward is one power iteration
        discriminator(torch.randn(2, 3, 32, 32))
    convolutions = [m for m in discriminator.modules() if isinstance(m, torch.nn.Conv2d)]
    largest = [torch.linalg.matrix_norm(c.weight.flatten(1), ord=2).item() for c in convolutions]
    assert largest == pytest.approx([1.0] * 5, rel=0.05)


def test_weights_start_as_published() -> None:
    """Convolutions N(0, 0.02), batch normalisation N(1, 0.02) with bias 0."""
    discriminator = PatchDiscriminator(norm="batch")
    norms = [m for m in discriminator.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    convolutions = [m for m in discriminator.modules() if isinstance(m, torch.nn.Conv2d)]
    assert (len(norms), len(convolutions)) == (3, 5)
    for mean, weights in (
        (0.0, torch.cat([m.weight.flatten() for m in convolutions])),  # 2,763,776
        (1.0, torch.cat([m.weight for m in norms])),  # 896
    ):
        error = 5 * 0.02 / len(weights) ** 0.5  # five standard errors; the deviation's is 1 / sqrt(2) of the mean's
        assert abs(weights.mean().item() - mean) < error
        assert abs(weights.std().item() - 0.02) < error
    assert all((m.bias == 0).all() for m in norms)


def test_an_unknown_norm_is_named() -> None:
    with pytest.raises(ValueError, match="'instance'"):
        PatchDiscriminator(norm="instance")
