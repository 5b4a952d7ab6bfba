"""LatentDiffusion: errors name parts that do not fit, an absent condition is null, cached and fresh latents agree."""

import pytest
import torch

from ldm_train.conditioning.class_label import ClassLabel
from ldm_train.conditioning.spatial import LowResolution
from ldm_train.conditioning.text import TrainedText, train_tokenizer
from ldm_train.diffusion.schedule import NoiseSchedule
from ldm_train.latent_diffusion import Guidance, LatentDiffusion, Panorama, Sampling, Start
from ldm_train.models.autoencoder import AutoencoderKL
from ldm_train.models.first_stage import FirstStage
from ldm_train.models.transformer import CrossAttention
from ldm_train.models.unet import UNet
from ldm_train.rng import NoiseSource
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
        ({"in_channels": 4}, "diffusion.network.in_channels is 4, the first stage's latents have 2"),
        ({"context_dim": 8}, "diffusion.network.context_dim is 8"),
        ({"vector_dim": 6}, "diffusion.network.vector_dim is 6"),
        ({"conditioners": {"class": ClassLabel(3, 6)}}, "diffusion.network.vector_dim is 0"),
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
        class_and_text().sample({"caption": ["a", "b", "c"]}, [0, 1], Sampling(ddim, 2))


def test_a_sample_without_a_text_has_the_null_condition_beside_others_with_one() -> None:
    model = class_and_text()
    for parameter in model.conditioners.parameters():
        torch.nn.init.normal_(parameter)
    some, none = model.condition({"caption": ["a", None]}), model.null_condition(2)
    both = model.condition({"caption": ["a", "b"]})
    for name, value in some.items():
        torch.testing.assert_close(value[1], none[name][1])
        torch.testing.assert_close(value[0], both[name][0])


def test_fields_that_the_model_does_not_read_are_named() -> None:
    model = class_and_text()
    how = Sampling(ddim, 2, guidance_scale=2.0)
    with pytest.raises(ValueError, match="the model reads class_label, caption, not captoin"):
        model.sample({"captoin": ["a"]}, [0], how)
    with pytest.raises(ValueError, match="the model reads class_label, caption, not text"):
        model.sample({"caption": ["a"]}, [0], how, guidance=Guidance(negative={"text": ["b"]}))


def test_guidance_pulls_away_from_the_null_condition() -> None:
    model = class_and_text()
    for p in model.network.parameters():
        torch.nn.init.normal_(p, std=0.1)
    plain, guided, off = (model.sample({"caption": ["a cat"]}, [3], Sampling(ddim, 3, s)) for s in (1.0, 4.0, 0.0))
    null = model.sample({}, [3], Sampling(ddim, 3))
    torch.testing.assert_close(off, null, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(guided, plain, atol=1e-4)


def test_images_may_be_drawn_at_another_size() -> None:
    assert build().sample({}, [0], Sampling(ddim, 2), latent_size=(6, 10)).shape == (1, 3, 12, 20)


def randomised(model: LatentDiffusion, std: float = 0.1) -> LatentDiffusion:
    for p in model.network.parameters():
        torch.nn.init.normal_(p, std=std)
    return model


def calls(model: LatentDiffusion) -> list[int]:
    """Returns a list that collects the batch size of every later call of the U-Net."""
    seen: list[int] = []
    model.network.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    return seen


def test_a_guidance_scale_of_one_is_no_guidance_bit_for_bit_at_one_call_a_step() -> None:
    model = randomised(class_and_text())
    seen = calls(model)
    off = model.sample({"caption": ["a cat"]}, [3], Sampling(ddim, 4, 1.0))
    assert seen == [1] * 4
    denoise = model.denoiser(model.condition({"caption": ["a cat"]}))
    times = model.schedule.timesteps(4)
    noise = NoiseSource([3])
    x_t = noise.normal((2, 4, 4), "start")
    assert torch.equal(off, model.decode(ddim(denoise, x_t, times, model.schedule, noise)))
    seen.clear()
    model.sample({"caption": ["a cat"]}, [3], Sampling(ddim, 4, 2.0))
    assert seen == [2] * 4


def test_keys_and_values_of_a_context_are_computed_once_in_a_sampling_and_in_every_step_under_gradients() -> None:
    model = randomised(class_and_text())
    keys = [m for m in model.network.modules() if isinstance(m, CrossAttention)]
    seen: list[int] = []
    for attention in keys:
        if attention.to_k.in_features != attention.to_q.in_features:
            attention.to_k.register_forward_hook(lambda *_: seen.append(1))
    model.sample({"caption": ["a cat"]}, [3], Sampling(ddim, 1, 2.0))
    once = len(seen)
    model.sample({"caption": ["a cat"]}, [3], Sampling(ddim, 4, 2.0))
    assert len(seen) == 2 * once > 0
    x_t, denoise = torch.randn(1, 2, 4, 4), model.denoiser(model.condition({"caption": ["a cat"]}))
    with torch.no_grad():
        kept = denoise(x_t, 500.0)
    denoise(x_t, 500.0).sum().backward()
    assert all(attention.to_k.weight.grad is not None for attention in keys)
    assert torch.equal(denoise(x_t, 500.0), kept)


def test_a_model_without_conditions_is_never_evaluated_twice() -> None:
    model = randomised(build())
    seen = calls(model)
    guided = model.sample({}, [3], Sampling(ddim, 3, 5.0))
    assert seen == [1] * 3
    assert torch.equal(guided, model.sample({}, [3], Sampling(ddim, 3, 1.0)))


def test_a_mixture_is_its_parts_at_its_ends_and_keeps_every_token_that_counts() -> None:
    model = randomised(class_and_text())
    short, long = {"caption": ["a cat"]}, {"caption": ["a dog a dog"]}
    one, none = torch.ones(1), torch.zeros(1)
    for name, value in model.condition(short).items():
        torch.testing.assert_close(model.mixture([(one, short), (none, long)])[name], value)
        torch.testing.assert_close(model.mixture([(one, long), (one, short), (-one, long)])[name][:, :3], value[:, :3])
    for name, value in model.null_condition(1).items():
        torch.testing.assert_close(model.mixture([(none, short)])[name], value)
    halves = model.mixture([(one / 2, short), (one / 2, long)])
    wanted = (model.condition(short)["context"] + model.condition(long)["context"]) / 2
    torch.testing.assert_close(halves["context"], wanted)
    assert halves["context_mask"].sum() == model.condition(long)["context_mask"].sum()
    made = model.sample({}, [3], Sampling(ddim, 3), condition=model.mixture([(one, short)]))
    torch.testing.assert_close(made, model.sample(short, [3], Sampling(ddim, 3)))


def test_guidance_keeps_what_training_never_dropped_in_a_given_condition_too() -> None:
    """The noise level of the small picture, which stands in the vector beside the class, is kept with the picture."""
    low = LowResolution(factor=2, noise_levels=50, vector_dim=4)
    model = randomised(build({"class": ClassLabel(3, 6), "low": low}, concat_channels=3, vector_dim=10)).eval()
    batch = {"class_label": torch.tensor([0, 2]), "lowres": torch.rand(2, 3, 4, 4) * 2 - 1}
    how, seeds, condition = Sampling(ddim, 3, 5.0), [3, 4], model.condition(batch)
    torch.testing.assert_close(model.sample({}, seeds, how, condition=condition), model.sample(batch, seeds, how))
    alone = randomised(build({"low": LowResolution(factor=2)}, concat_channels=3))  # nothing is left to guide
    seen = calls(alone)
    alone.sample({}, seeds, how, condition=alone.condition({"lowres": batch["lowres"]}))
    assert seen == [2] * 3


def test_known_latents_that_do_not_fit_are_named() -> None:
    model, known, mask = build(), torch.randn(1, 2, 6, 4), torch.ones(1, 1, 6, 4)
    assert model.sample({}, [3], Sampling(ddim, 2), Start(known=known, mask=mask)).shape == (1, 3, 12, 8)
    with pytest.raises(ValueError, match=r"2 seeds but known of lengths \[1\]"):
        model.sample({}, [3, 4], Sampling(ddim, 2), Start(known=known, mask=mask))
    with pytest.raises(ValueError, match="known latents and the mask of their hole go together"):
        model.sample({}, [3], Sampling(ddim, 2), Start(known=known))


def test_what_is_inverted_is_drawn_again() -> None:
    model = randomised(class_and_text(), 0.02)
    batch, latents = {"caption": ["a cat", "a dog"]}, torch.randn(2, 2, 4, 4)
    noise = model.invert(latents, batch, Sampling(num_inference_steps=20), iterations=8)
    made = model.sample(batch, [0, 1], Sampling(ddim, 20), Start(noise=noise))
    assert (made - model.decode(latents)).abs().max() < 0.02
    with pytest.raises(ValueError, match=r"1 seeds but batch of lengths \[2\]"):
        model.sample(batch, [0], Sampling(ddim, 2), Start(noise=noise))


@pytest.mark.parametrize("spatial", [False, True])
def test_a_panorama_of_one_window_is_the_model_itself_and_larger_ones_are_averages(spatial: bool) -> None:
    torch.manual_seed(0)
    model = randomised(build({"low": LowResolution(factor=2)}, concat_channels=3) if spatial else class_and_text())
    x_t, t = torch.randn(1, 2, 4, 10), torch.tensor([300.0])
    condition = model.null_condition(1, (4, 10))
    if spatial:
        condition["concat"] = torch.randn(1, 3, 4, 10)
    wide = model.denoiser(condition, overlap=2)
    windows = Panorama(model.predict, model.latent_size, 2)(x_t, t, condition)
    small = {k: v[..., :4] if k == "concat" else v for k, v in condition.items()}
    torch.testing.assert_close(
        model.denoiser(small, 2)(x_t[..., :4], 300.0), model.denoiser(small)(x_t[..., :4], 300.0)
    )
    # Columns that only the first window covers equal its output.
    torch.testing.assert_close(windows[..., :2], model.predict(x_t[..., :4], t, small)[..., :2])
    assert wide.shares_model(model.denoiser(condition, overlap=2))
    assert not wide.shares_model(model.denoiser(condition))
    assert model.sample({}, [3], Sampling(ddim, 2, overlap=2), latent_size=(4, 10)).shape == (1, 3, 8, 20)
