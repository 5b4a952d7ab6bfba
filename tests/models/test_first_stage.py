"""The frozen first stage scales latents to unit variance, and decoding undoes the scaling."""

import pytest
import torch

from ldm_train.models.autoencoder import AutoencoderKL
from ldm_train.models.first_stage import FirstStage


@pytest.fixture
def autoencoder() -> AutoencoderKL:
    return AutoencoderKL(z_channels=4, channels=16, channel_mult=(1, 1), num_res_blocks=1)


def test_it_stays_frozen_and_in_eval_mode(autoencoder: AutoencoderKL) -> None:
    stage = FirstStage(autoencoder).train()
    assert not any(m.training for m in stage.modules())
    assert not any(p.requires_grad for p in stage.parameters())


def test_statistics_make_every_channel_zero_mean_and_unit_variance(autoencoder: AutoencoderKL) -> None:
    stage = FirstStage(autoencoder)
    mean, std = torch.tensor([1.0, -2.0, 0.0, 5.0]), torch.tensor([0.1, 3.0, 1.0, 7.0])
    z = mean.view(1, 4, 1, 1) + std.view(1, 4, 1, 1) * torch.randn(2, 4, 100, 100)
    stage.set_statistics(1 / std, mean)
    latents = stage.latents(torch.cat([z, torch.full_like(z, -30.0)], dim=1))
    torch.testing.assert_close(latents.mean(dim=(0, 2, 3)), torch.zeros(4), rtol=0, atol=0.03)
    torch.testing.assert_close(latents.std(dim=(0, 2, 3)), torch.ones(4), rtol=0.03, atol=0)


def test_decoding_undoes_the_scaling_in_any_chunk(autoencoder: AutoencoderKL) -> None:
    stage = FirstStage(autoencoder, scale_factor=0.18215, shift=0.5)
    z = torch.randn(5, 4, 4, 4)
    latents = (z - 0.5) * 0.18215
    with torch.no_grad():
        expected = autoencoder.decode(z).clamp(-1, 1)
    torch.testing.assert_close(stage.decode(latents), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stage.decode(latents, chunk=2), expected, rtol=1e-4, atol=1e-5)


def test_its_scale_travels_with_the_weights(autoencoder: AutoencoderKL) -> None:
    saved = FirstStage(autoencoder, scale_factor=0.5, shift=0.25).state_dict()
    restored = FirstStage(autoencoder)
    restored.load_state_dict(saved)
    assert restored.scale.unique().item() == 0.5
    assert restored.shift.unique().item() == 0.25
