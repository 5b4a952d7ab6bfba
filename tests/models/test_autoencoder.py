"""The KL autoencoder equals the published one: parameter counts, arithmetic (that of diffusers) and posterior."""

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL as Reference

from ldm_train.checkpoints.diffusers_networks import autoencoder_key
from ldm_train.models.autoencoder import AutoencoderKL
from ldm_train.models.posterior import DiagonalGaussian

PUBLISHED = {
    "kl-f4": (55_312_063, {"z_channels": 3, "channels": 128, "channel_mult": (1, 2, 4)}),
    "kl-f8": (83_653_863, {"z_channels": 4, "channels": 128, "channel_mult": (1, 2, 4, 4)}),
    "kl-f16": (
        69_610_963,
        {"z_channels": 16, "channels": 128, "channel_mult": (1, 1, 2, 2, 4), "attention_levels": (4,)},
    ),
    "kl-f32": (
        103_880_131,
        {"z_channels": 64, "channels": 128, "channel_mult": (1, 1, 2, 2, 4, 4), "attention_levels": (4, 5)},
    ),
}


@pytest.mark.parametrize(("count", "arguments"), PUBLISHED.values(), ids=PUBLISHED.keys())
def test_parameter_count_is_the_published_one(count: int, arguments: dict) -> None:
    with torch.device("meta"):
        autoencoder = AutoencoderKL(**arguments)
    assert sum(p.numel() for p in autoencoder.parameters()) == count


def tiny(**arguments) -> AutoencoderKL:
    return AutoencoderKL(**{"z_channels": 4, "channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1} | arguments)


def randomised(model: torch.nn.Module, std: float = 0.08) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator) * std
    return model.eval()


def diffusers_entry(key: str, value: torch.Tensor, levels: int) -> tuple[str, torch.Tensor]:
    """Returns diffusers' name and weight for ours; 1x1 convolutions of the attention become linear layers."""
    key = autoencoder_key(key, levels)
    return key, value[..., 0, 0] if "attentions" in key and value.ndim == 4 else value


@torch.no_grad()
def test_encode_and_decode_equal_diffusers() -> None:
    ours = randomised(tiny(channels=128, channel_mult=(1, 2, 2)))  # 32 groups, as diffusers' default
    theirs = Reference(
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=(128, 256, 256),
        layers_per_block=1,
        latent_channels=4,
    ).eval()
    theirs.load_state_dict(dict(diffusers_entry(k, v, 3) for k, v in ours.state_dict().items()), strict=True)
    images, latents = torch.rand(2, 3, 16, 24) * 2 - 1, torch.randn(2, 4, 4, 6)
    moments, decoded = ours.encode_moments(images), ours.decode(latents)
    expected = theirs.encode(images).latent_dist.parameters
    torch.testing.assert_close(moments, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(decoded, theirs.decode(latents).sample, rtol=1e-4, atol=1e-5)
    assert moments.std() > 0.05
    assert decoded.std() > 0.05


def test_posterior_is_the_gaussian_of_torch_distributions() -> None:
    moments = torch.randn(3, 8, 2, 5)
    posterior = DiagonalGaussian(moments)
    q = torch.distributions.Normal(moments[:, :4], (0.5 * moments[:, 4:]).exp())
    expected = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum(dim=(1, 2, 3))
    torch.testing.assert_close(posterior.kl(), expected)
    torch.testing.assert_close(posterior.std, q.stddev)


def test_samples_follow_the_posterior_and_repeat_with_the_generator() -> None:
    moments = torch.tensor([0.7, -0.3, -1.0, 0.5]).view(1, 4, 1, 1).expand(1, 4, 200, 200)
    posterior = DiagonalGaussian(moments)
    z = posterior.sample(torch.Generator().manual_seed(3))
    assert torch.equal(z, posterior.sample(torch.Generator().manual_seed(3)))
    torch.testing.assert_close(z.mean(dim=(2, 3))[0], torch.tensor([0.7, -0.3]), rtol=0, atol=0.03)
    torch.testing.assert_close(z.std(dim=(2, 3))[0], torch.tensor([-0.5, 0.25]).exp(), rtol=0.02, atol=0)


def test_extreme_log_variances_stay_finite() -> None:
    posterior = DiagonalGaussian(torch.tensor([0.0, 1e4]).view(1, 2, 1, 1))
    assert posterior.kl().isfinite().all()
    assert DiagonalGaussian(torch.tensor([0.0, -1e4]).view(1, 2, 1, 1)).std.item() == pytest.approx(2.718281828**-15)


@pytest.mark.parametrize("in_channels", [1, 3, 5])
@torch.no_grad()
def test_any_channels_and_non_square_images(in_channels: int) -> None:
    autoencoder = tiny(in_channels=in_channels, channels=16, mid_attention=False)
    images = torch.randn(2, in_channels, 8, 12)
    reconstructions, features, posterior = autoencoder(images)
    assert reconstructions.shape == images.shape
    assert posterior.mean.shape == (2, 4, 4, 6)
    torch.testing.assert_close(autoencoder.decoder.conv_out(features), reconstructions)


@torch.no_grad()
def test_without_sampling_the_mean_is_decoded() -> None:
    autoencoder, images = tiny(), torch.randn(2, 3, 8, 8)
    reconstructions, _, posterior = autoencoder(images, sample=False)
    torch.testing.assert_close(reconstructions, autoencoder.decode(posterior.mean))


@torch.no_grad()
def test_attention_at_a_level_has_a_place_in_encoder_and_decoder() -> None:
    autoencoder = tiny(attention_levels=(1,))
    assert [len(level.attn) for level in autoencoder.encoder.down] == [0, 1]
    assert [len(level.attn) for level in autoencoder.decoder.up] == [0, 2]
    assert autoencoder(torch.randn(1, 3, 8, 8))[0].shape == (1, 3, 8, 8)


def test_latents_may_be_narrower_than_the_encoder() -> None:
    autoencoder = tiny(z_channels=8, embed_dim=2)
    assert autoencoder.latent_channels == 2
    assert autoencoder.encode_moments(torch.randn(1, 3, 8, 8)).shape == (1, 4, 4, 4)


def test_a_size_that_does_not_fit_is_answered_with_one_that_does() -> None:
    autoencoder = tiny(channel_mult=(1, 1, 1))
    with pytest.raises(ValueError, match=r"18x21 is not divisible by downsample_factor 4; use 16x20"):
        autoencoder.encode_moments(torch.randn(1, 3, 18, 21))
    with pytest.raises(ValueError, match="images have 1 channels"):
        autoencoder.encode_moments(torch.randn(1, 1, 16, 16))


@pytest.mark.parametrize("patch_size", [2, 4])
def test_patches_are_channels_of_the_published_network(patch_size: int) -> None:
    """Equals published networks with the same weights: an encoder of 3 * patch_size^2 input channels, and a decoder
    whose output channels are the features of all pixels of a patch. Patches are split and joined by hand."""
    p, ours = patch_size, randomised(tiny(patch_size=patch_size))
    features = 32 * p**2
    encoder, decoder = tiny(in_channels=3 * p**2), tiny(in_channels=features)
    state = ours.state_dict()
    encoder.encoder.load_state_dict({k[8:]: v for k, v in state.items() if k.startswith("encoder.")})
    moved = {
        k[8:].replace("to_pixels.0", "conv_out"): v
        for k, v in state.items()
        if k.startswith("decoder.") and "conv_out" not in k
    }
    decoder.decoder.load_state_dict(moved)
    images = torch.rand(2, 3, 16 * p, 8 * p) * 2 - 1
    apart = torch.stack([images[:, c, i::p, j::p] for c in range(3) for i in range(p) for j in range(p)], dim=1)
    assert ours.downsample_factor == 2 * p
    with torch.no_grad():
        assert torch.equal(ours.encoder(images), encoder.encoder(apart))
        latents = torch.randn(2, 4, 8, 4)
        parts = decoder.last_layer(decoder.decoder(latents))
        together = torch.empty(2, 32, 16 * p, 8 * p)
        for index, part in enumerate(parts.unbind(1)):
            channel, within = divmod(index, p * p)
            together[:, channel, within // p :: p, within % p :: p] = part
        expected = ours.last_layer(torch.nn.functional.silu(together))
        torch.testing.assert_close(ours.last_layer(ours.decoder(latents)), expected)


def test_the_pixels_of_a_patch_begin_alike() -> None:
    with torch.no_grad():
        made = tiny(patch_size=2).decode_features(torch.randn(2, 4, 8, 8))
    coarse = torch.nn.functional.avg_pool2d(made, 2)
    torch.testing.assert_close(torch.nn.functional.interpolate(coarse, scale_factor=2), made)
    assert coarse.std() > 0.01


def test_patches_of_no_pixels_are_refused() -> None:
    with pytest.raises(ValueError, match="patch_size=0"):
        tiny(patch_size=0)
