"""Training techniques: each does what its paper says, and changes nothing when off."""

import copy
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from chains import chain, composed
from torch.nn import functional as F

from ldm_train.diffusion.objective import DiffusionObjective
from ldm_train.diffusion.schedule import NoiseSchedule
from ldm_train.latent_diffusion import LatentDiffusion
from ldm_train.losses.autoencoder import AutoencoderLoss, RunningLogits
from ldm_train.models.autoencoder import AutoencoderIdentity, AutoencoderKL, AutoencoderVQ
from ldm_train.models.discriminator import PatchDiscriminator
from ldm_train.models.dit import DiT
from ldm_train.models.first_stage import FirstStage
from ldm_train.models.unet import UNet
from ldm_train.pipeline.measure import load_weights
from ldm_train.pipeline.values import check_values
from ldm_train.training.alignment import Alignment, check_alignment
from ldm_train.training.latent_augmentation import LatentAugmentation
from ldm_train.training.optim import EMA, power_of_width


def autoencoder() -> AutoencoderKL:
    return AutoencoderKL(4, 8, (1, 2), num_res_blocks=1, mid_attention=False)


def unet() -> UNet:
    return UNet(4, 16, (1, 2), 1, (1,), head_dim=8)


# -- latents while the decoder trains ----------------------------------------------------------------------------------


def test_without_augmentation_nothing_is_drawn_and_nothing_changes() -> None:
    images, before = torch.rand(2, 3, 16, 16), torch.get_rng_state()
    change, wanted = LatentAugmentation().draw(images, 2)
    assert change is None
    assert wanted is images
    assert torch.equal(torch.get_rng_state(), before)


def test_latent_noise_mixes_latents_and_noise_by_one_share_per_picture() -> None:
    change, _ = LatentAugmentation(noise=3.0, most=0.5).draw(torch.zeros(1, 3, 8, 8), 2)
    latents = torch.full((4000, 2, 4, 4), 7.0)
    mixed = change(latents)
    share = 1 - mixed.mean(dim=(1, 2, 3)) / 7  # noise has mean 0
    assert float(share.min()) > -0.3
    assert float(share.mean()) == pytest.approx(0.25, abs=0.02)  # t is uniform up to 0.5
    second = mixed.flatten(1).var(dim=1)
    assert float(second.mean()) == pytest.approx(9 * 0.25 / 3, rel=0.05)  # E (3 t)^2


def test_equivariance_changes_latents_and_pictures_alike() -> None:
    """If the decoder is the identity, the changed latents equal the changed images."""
    images, seen = torch.rand(2, 4, 16, 8), set()
    for seed in range(40):
        torch.manual_seed(seed)
        change, wanted = LatentAugmentation(equivariance=1.0).draw(images, 1)
        assert torch.equal(change(images), wanted)
        seen.add(tuple(wanted.shape[2:]))
    assert {(16, 8), (8, 16)} <= seen  # full size, upright and rotated
    assert all(8 <= max(size) <= 16 and abs(max(size) - 2 * min(size)) <= 1 for size in seen)


def test_equivariance_takes_the_share_of_batches_that_it_says() -> None:
    augmentation, images = LatentAugmentation(equivariance=0.3), torch.rand(1, 3, 8, 8)
    taken = sum(augmentation.draw(images, 2)[0] is not None for _ in range(600))
    assert taken / 600 == pytest.approx(0.3, abs=0.07)


@pytest.mark.parametrize("options", [{"noise": -1}, {"most": 2}, {"equivariance": 1.5}])
def test_impossible_augmentations_name_their_option(options: dict) -> None:
    with pytest.raises(ValueError, match=rf"autoencoder\.task\.augmentation\.{next(iter(options))}"):
        LatentAugmentation(**options)


def test_the_autoencoder_decodes_what_the_change_makes_of_its_latents() -> None:
    network, images = autoencoder(), torch.rand(2, 3, 16, 16)
    whole, _, posterior = network(images, sample=False)
    changed, features, _ = network(images, sample=False, change=lambda z: z.rot90(1, (2, 3)))
    assert torch.allclose(changed, network.decode(posterior.mean.rot90(1, (2, 3))), atol=1e-6)
    assert not torch.allclose(changed, whole)
    assert features.shape[2:] == images.shape[2:]


# -- the discriminator -------------------------------------------------------------------------------------------------


def test_lecam_against_its_formula() -> None:
    running, real, fake = RunningLogits(decay=0.9), torch.tensor([1.0, 3.0]), torch.tensor([-2.0, 0.5])
    running.real.fill_(0.7)
    running.fake.fill_(-0.2)
    wanted = ((real + 0.2).clamp(min=0) ** 2).mean() + ((0.7 - fake).clamp(min=0) ** 2).mean()
    assert float(running(real, fake)) == pytest.approx(float(wanted))
    assert float(running.real) == pytest.approx(0.9 * 0.7 + 0.1 * 2.0)
    assert float(running.fake) == pytest.approx(0.9 * -0.2 + 0.1 * -0.75)
    before = running.real.clone(), running.fake.clone()
    assert running(torch.tensor([torch.nan]), fake).isnan()
    assert (running.real, running.fake) == before  # a step that is not finite changes nothing


Gradients = list[torch.Tensor]


def adversarial_step(**options: float) -> tuple[AutoencoderLoss, dict[str, torch.Tensor], Gradients, Gradients]:
    """Returns (loss module, logs, the discriminator's gradients, the autoencoder's) of one step."""
    torch.manual_seed(0)
    network, discriminator = autoencoder(), PatchDiscriminator(3, 8, 1)
    loss = AutoencoderLoss(None, discriminator, disc_start=0, **options)
    images = torch.rand(4, 3, 16, 16)
    torch.manual_seed(1)
    reconstructions, features, posterior = network(images)
    total, logs = loss(images, reconstructions, features, posterior, network.last_layer, 10)
    total.backward()
    return loss, logs, *([p.grad.clone() for p in part.parameters()] for part in (discriminator, network))


def test_r1_is_the_squared_gradient_at_real_pictures() -> None:
    _, _, plain, _ = adversarial_step()
    loss, logs, with_penalty, _ = adversarial_step(r1_weight=2.0)
    torch.manual_seed(0)
    autoencoder()
    discriminator = PatchDiscriminator(3, 8, 1)
    images = torch.rand(4, 3, 16, 16).requires_grad_()
    (slope,) = torch.autograd.grad(discriminator(images).mean(dim=(1, 2, 3)).sum(), images, create_graph=True)
    penalty = slope.square().sum(dim=(1, 2, 3)).mean()
    assert float(logs["r1"]) == pytest.approx(float(penalty), rel=1e-5)
    own = torch.autograd.grad(penalty, list(discriminator.parameters()), allow_unused=True)
    for a, b, extra in zip(with_penalty, plain, own):
        torch.testing.assert_close(a - b, torch.zeros_like(a) if extra is None else extra, atol=1e-5, rtol=1e-3)
    assert loss.r1_weight == 2.0


def test_lecam_reaches_the_discriminator_alone() -> None:
    _, _, plain, usual = adversarial_step()
    loss, _, pulled, same = adversarial_step(lecam_weight=1.0)
    assert any(not torch.equal(a, b) for a, b in zip(plain, pulled))
    assert all(torch.equal(a, b) for a, b in zip(usual, same))
    assert float(loss.usual_logits.real) != 0


# -- the objective -----------------------------------------------------------------------------------------------------


def objective(**options: float) -> DiffusionObjective:
    return DiffusionObjective(NoiseSchedule("linear", 1e-4, 0.02), **options)


def test_input_perturbation_is_in_the_input_alone_and_only_while_training() -> None:
    seen, latents, noise, t = [], torch.randn(500, 4, 8, 8), torch.randn(500, 4, 8, 8), torch.full((500,), 600)

    def predict(x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return noise

    perturbed = objective(input_perturbation=0.1)
    assert float(perturbed(predict, latents, noise, t).max()) == 0  # the target is the noise itself
    _, sigma = perturbed.schedule.training_coefficients(t)
    extra = (seen[0] - perturbed.schedule.add_noise(latents, noise, t)) / float(sigma[0])
    assert float(extra.std()) == pytest.approx(0.1, rel=0.02)
    perturbed.eval()
    perturbed(predict, latents, noise, t)
    assert torch.equal(seen[1], perturbed.schedule.add_noise(latents, noise, t))


def test_immiscible_noise_is_the_nearest_of_as_many() -> None:
    latents = 2 * torch.randn(64, 4, 4, 4)
    torch.manual_seed(3)
    choices = torch.randn(8, 64, 4, 4, 4)
    torch.manual_seed(3)
    drawn = objective(immiscible=8).draw_noise(latents)
    for k in range(64):
        distances = [float((choices[j, k] - latents[k]).norm()) for j in range(8)]
        assert torch.equal(drawn[k], choices[int(np.argmin(distances)), k])


def test_one_noise_to_choose_from_is_the_usual_noise() -> None:
    latents = torch.randn(3, 4, 4, 4)
    torch.manual_seed(3)
    usual = torch.randn_like(latents)
    torch.manual_seed(3)
    assert torch.equal(objective(immiscible=1).draw_noise(latents), usual)


@pytest.mark.parametrize("options", [{"input_perturbation": -0.1}, {"immiscible": 0}, {"immiscible": 1.5}])
def test_impossible_objectives_name_their_option(options: dict) -> None:
    with pytest.raises(ValueError, match=rf"diffusion\.objective\.{next(iter(options))}"):
        objective(**options)


# -- alignment -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "network", [unet, partial(DiT, 4, hidden_size=16, depth=2, num_heads=2, patch_size=2)], ids=["unet", "dit"]
)
def test_alignment_against_cosines_by_hand_and_its_gradient_reaches_the_network(network: partial) -> None:
    model, first = network(), FirstStage(autoencoder(), scale_factor=0.7)
    alignment, latents = Alignment(0.5, model, first), torch.randn(2, 4, 8, 8)
    said = []
    model.middle[0].register_forward_hook(lambda module, inputs, output: said.append(output))
    model(latents, torch.tensor([5.0, 700.0]))
    loss = alignment(latents, first)
    with torch.no_grad():
        decoder, z = first.autoencoder.decoder, latents / 0.7
        features = decoder.mid(decoder.conv_in(first.autoencoder.post_quant_conv(z)))
        features = features - features.mean(dim=(2, 3), keepdim=True)
    middle = said[0]
    if middle.ndim == 3:
        middle = middle.transpose(1, 2).reshape(2, -1, 4, 4)
    wanted = F.avg_pool2d(features, features.shape[-1] // middle.shape[-1])
    cosines = F.cosine_similarity(alignment.project(middle), wanted, dim=1)
    torch.testing.assert_close(loss, 0.5 * (1 - cosines).mean(dim=(1, 2)))
    loss.sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert all(p.grad is None for p in first.parameters())


def test_a_vq_autoencoder_is_aligned_with_the_features_of_its_codes() -> None:
    """Its decoder never sees latents between the codes."""
    vq = AutoencoderVQ(4, 8, (1, 2), num_codes=8, num_res_blocks=1, mid_attention=False)
    model, first, latents = unet(), FirstStage(vq), torch.randn(2, 4, 8, 8)
    alignment = Alignment(0.5, model, first)

    def loss(of: torch.Tensor) -> torch.Tensor:
        model(latents, torch.tensor([5.0, 700.0]))
        return alignment(of, first)

    codes = vq.quantize.lookup(vq.quantize.nearest(latents))
    assert not torch.equal(codes, latents)
    torch.testing.assert_close(loss(latents), loss(codes))


def test_alignment_is_no_part_of_the_model() -> None:
    model = LatentDiffusion(unet(), FirstStage(autoencoder()), NoiseSchedule("linear", 1e-4, 0.02), {})
    keys = set(model.state_dict())
    Alignment(0.5, model.network, model.first_stage)
    assert set(model.state_dict()) == keys


# -- averages ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [0.05, 0.1, 0.2])
def test_a_power_function_average_has_the_deviation_it_is_named_by(width: float) -> None:
    gamma = power_of_width(width)
    t = (np.arange(200_000) + 0.5) / 200_000
    weights = t**gamma / (t**gamma).sum()
    mean = (weights * t).sum()
    assert np.sqrt((weights * (t - mean) ** 2).sum()) == pytest.approx(width, rel=1e-4)


def test_the_tracked_average_follows_the_profile() -> None:
    module = torch.nn.Linear(1, 1, bias=False)
    average, steps = EMA(module, 0.999, width=0.1), 400
    values = np.sin(np.arange(1, steps + 1) / 30)
    for value in values:
        with torch.no_grad():
            module.weight.fill_(float(value))
        average.update()
    profile = np.diff(np.concatenate([[0], (np.arange(1, steps + 1) / steps) ** (power_of_width(0.1) + 1)]))
    assert float(average.shadow["weight"]) == pytest.approx(float((profile * values).sum()), abs=0.01)


def test_an_average_of_a_width_continues_where_its_state_was() -> None:
    module = torch.nn.Linear(2, 2)
    one, state = EMA(module, 0.99, width=0.1), copy.deepcopy(module.state_dict())
    for k in range(5):
        with torch.no_grad():
            module.weight.add_(k)
        one.update()
    saved = copy.deepcopy(one.state_dict())
    other = EMA(module, 0.99, width=0.1)
    other.load_state_dict(saved)
    for average in (one, other):
        average.update()
    assert torch.equal(one.shadow["weight"], other.shadow["weight"])
    assert state.keys() == module.state_dict().keys()


@pytest.mark.parametrize("width", [0, -1, 0.5])
def test_impossible_widths_are_refused(width: float) -> None:
    with pytest.raises(ValueError, match="ema_width"):
        EMA(torch.nn.Linear(1, 1), 0.99, width=width)


# -- what is refused before anything is made --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("diffusion.task.alignment=abc", r"diffusion\.task\.alignment='abc' is not a number"),
        ("autoencoder.task.augmentation.noise=-1", r"augmentation\.noise=-1 is below 0"),
        ("autoencoder.task.augmentation.equivariance=2", r"equivariance=2 is above 1"),
        ("diffusion.ema_width=0", r"diffusion\.ema_width=0 is below"),
        ("sampling.guidance_interval=[5,0.3]", r"sampling\.guidance_interval=\[5, 0\.3\] is \[low, high\]"),
        ("diffusion.max_time=soon", r"diffusion\.max_time=soon is not a time; write 90s, 30min or 1\.5h"),
    ],
)
def test_what_cannot_be_is_refused_by_name_at_once(options: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_values(composed("train", options))


def test_alignment_needs_features_and_a_middle() -> None:
    with pytest.raises(ValueError, match=r"diffusion\.task\.alignment needs a KL or VQ autoencoder"):
        check_alignment(unet(), AutoencoderIdentity())
    with pytest.raises(ValueError, match=r"Linear has no `middle`"):
        check_alignment(torch.nn.Linear(1, 1), autoencoder())


@pytest.mark.slow
@pytest.mark.chain
def test_both_stages_train_with_orthogonal_steps_but_for_the_discriminator(tmp_path: Path) -> None:
    """Only groups of matrices have a Nesterov momentum; the discriminator is in none of them."""
    chain(tmp_path, "technique=[muon]", "stages=[autoencoder,latents,diffusion]").execute()
    for stage, others in (("autoencoder", {"autoencoder", "discriminator"}), ("diffusion", {"network"})):
        kept = torch.load(tmp_path / f"run/{stage}/checkpoints/last.ckpt", weights_only=True)
        groups = {group["name"]: group for group in kept["optimizer_states"][0]["param_groups"]}
        assert {name for name, group in groups.items() if group["matrices"]} == groups.keys() - others
        states = kept["optimizer_states"][0]["state"]
        for group in groups.values():
            kind = "momentum_buffer" if group["matrices"] else "exp_avg"
            assert all(kind in states[number] for number in group["params"])


@pytest.mark.chain
@pytest.mark.slow
def test_the_best_weights_of_an_aligned_training_are_a_model(tmp_path: Path) -> None:
    """The alignment's projection is in the checkpoint and no part of the model."""
    run = chain(tmp_path, "technique=[alignment]", "stages=[autoencoder,latents,diffusion]")
    run.execute()
    best = torch.load(tmp_path / "run/diffusion/checkpoints/best.ckpt", weights_only=True)
    assert any(key.startswith("alignment.") for key in best["state_dict"])
    weights, averaged = load_weights(run.folder, "best").state_dict(), best["ema"]["shadow"]
    name = next(name for name in averaged if name.startswith("network."))
    assert torch.equal(weights[name], averaged[name])


@pytest.mark.chain
def test_an_autoencoder_trains_without_a_discriminator(tmp_path: Path) -> None:
    run = chain(tmp_path, "technique=[no_gan]", "stages=[autoencoder]")
    check_values(run.config)
    run.execute()
    state = torch.load(tmp_path / "run/autoencoder/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert not [key for key in state if "discriminator" in key]
