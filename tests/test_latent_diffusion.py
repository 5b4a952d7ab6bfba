"""LatentDiffusion: parts that do not fit are named, an absent condition is null, cached and fresh latents agree."""

import pytest
import torch

from ldm_train.conditioning.class_label import ClassLabel
from ldm_train.conditioning.text import TrainedText, train_tokenizer
from ldm_train.diffusion.schedule import NoiseSchedule
from ldm_train.latent_diffusion import LatentDiffusion
from ldm_train.models.autoencoder import AutoencoderKL
from ldm_train.models.first_stage import FirstStage
from ldm_train.models.unet import UNet
from ldm_train.samplers.ddim import ddim


def build(conditioners: dict | None = None, in_channels: int = 2, **unet) -> LatentDiffusion:
    first_stage = FirstStage(AutoencoderKL(z_channels=2, channels=16, channel_mult=(1, 1), num_res_blocks=1), 0.5)
    network = UNet(in_channels, 16, (1, 1), num_res_blocks=1, attention_levels=(1,), num_heads=2, **unet)
    return LatentDiffusion(network, first_stage, NoiseSchedule(), conditioners, latent_size=(4, 4))


def class_and_text() -> LatentDiffusion:
    text = TrainedText(train_tokenizer(["a cat", "a dog"], 300), 8, depth=1, heads=2, max_length=8)
    return build({"class": ClassLabel(3, 6), "text": text}, context_dim=8, vector_dim=6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_channels": 4}, "diffusion.unet.in_channels is 4, the first stage's latents have 2"),
        ({"context_dim": 8}, "diffusion.unet.context_dim is 8"),
        ({"vector_dim": 6}, "diffusion.unet.vector_dim is 6"),
        ({"conditioners": {"class": ClassLabel(3, 6)}}, "diffusion.unet.vector_dim is 0"),
        ({"conditioners": {"class": ClassLabel(3, 6)}, "vector_dim": 8}, "give 6"),
    ],
)
def test_parts_that_do_not_fit_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**arguments)


@torch.no_grad()
def test_a_field_the_batch_lacks_is_null() -> None:
    model = class_and_text()
    condition, null = model.condition({"caption": ["a cat", "a dog"]}), model.null_condition(2)
    torch.testing.assert_close(condition["vector"], null["vector"])
    assert not torch.allclose(condition["context"], null["context"], atol=1e-3)
    assert model.fields == ("class_label", "caption")


@torch.no_grad()
def test_each_conditioner_is_dropped_by_its_own_mask() -> None:
    model = class_and_text()
    batch, null = {"class_label": torch.tensor([0, 1]), "caption": ["a cat", "a dog"]}, model.null_condition(2)
    kept = model.condition(batch)
    some = model.condition(batch, {"class": torch.tensor([True, False]), "text": torch.tensor([False, True])})
    torch.testing.assert_close(some["vector"], torch.stack([null["vector"][0], kept["vector"][1]]))
    expected = torch.stack([kept["context"][0], null["context"][1]])
    torch.testing.assert_close(some["context"], expected, atol=1e-5, rtol=1e-4)


def test_dropout_masks_are_independent_with_the_conditioners_rates() -> None:
    model = class_and_text()
    model.conditioners["class"].dropout, model.conditioners["text"].dropout = 0.1, 0.4
    drop = model.random_drop(40_000)
    rates = {name: mask.float().mean().item() for name, mask in drop.items()}
    assert rates == pytest.approx({"class": 0.1, "text": 0.4}, abs=0.01)
    assert (drop["class"] & drop["text"]).float().mean().item() == pytest.approx(0.04, abs=0.005)


def test_cached_moments_and_images_give_the_same_latents() -> None:
    model, images = build(), torch.rand(2, 3, 8, 8) * 2 - 1
    moments = model.first_stage.encode_moments(images)
    fresh = model.latents_from({"image": images}, torch.Generator().manual_seed(1))
    cached = model.latents_from({"moments": moments, "image": images * 0}, torch.Generator().manual_seed(1))
    torch.testing.assert_close(cached, fresh)
    assert not torch.allclose(fresh, model.latents_from({"image": images}, torch.Generator().manual_seed(2)))


def test_trainable_is_the_unet_and_its_conditioners_alone() -> None:
    model = class_and_text()
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names == {n for n, _ in model.named_parameters() if not n.startswith("first_stage")}
    assert set(model.trainable().state_dict()) == {n for n in model.state_dict() if not n.startswith("first_stage")}


def test_seeds_and_conditions_must_be_as_many() -> None:
    with pytest.raises(ValueError, match=r"2 seeds but batch of lengths \[3\]"):
        class_and_text().sample({"caption": ["a", "b", "c"]}, [0, 1], ddim, 2)


def test_guidance_pulls_away_from_the_null_condition() -> None:
    model = class_and_text()
    for p in model.unet.parameters():
        torch.nn.init.normal_(p, std=0.1)
    plain, guided, off = (model.sample({"caption": ["a cat"]}, [3], ddim, 3, guidance_scale=s) for s in (1.0, 4.0, 0.0))
    null = model.sample({}, [3], ddim, 3)
    torch.testing.assert_close(off, null, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(guided, plain, atol=1e-4)


def test_images_may_be_drawn_at_another_size() -> None:
    assert build().sample({}, [0], ddim, 2, latent_size=(6, 10)).shape == (1, 3, 12, 20)
