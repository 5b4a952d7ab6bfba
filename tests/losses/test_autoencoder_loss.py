"""One backward pass of AutoencoderLoss gives the gradients of the plain simultaneous formulation, and no loss
reaches the wrong player."""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

from ldm_train.losses.autoencoder import AutoencoderLoss
from ldm_train.losses.perceptual import TinyPerceptual
from ldm_train.models.autoencoder import AutoencoderKL, AutoencoderVQ
from ldm_train.models.discriminator import PatchDiscriminator

KL_WEIGHT = 0.01  # large enough that a wrong KL gradient shows in float32
ON = 10  # an optimiser step at which the discriminator is on


class Players(nn.Module):
    """A tiny autoencoder (KL, or VQ if num_codes is above 0) and its loss."""

    def __init__(
        self,
        perceptual: bool = True,
        norm: str = "group",
        num_codes: int = 0,
        std: float = 0.15,
        patch_size: int = 1,
        **arguments,
    ) -> None:
        super().__init__()
        kind = partial(AutoencoderVQ, num_codes=num_codes) if num_codes else AutoencoderKL
        self.autoencoder = kind(z_channels=2, channels=16, channel_mult=(1, 2), num_res_blocks=1, patch_size=patch_size)
        discriminator = PatchDiscriminator(channels=8, num_layers=2, norm=norm)
        for p in discriminator.parameters():  # with 0.15, logits are of order 1: some hinges active, some not
            nn.init.normal_(p, std=std)
        self.loss = AutoencoderLoss(
            TinyPerceptual() if perceptual else None,
            discriminator,
            **{"kl_weight": KL_WEIGHT, "disc_start": ON} | arguments,
        )
        with torch.no_grad():
            self.loss.logvar.fill_(0.3 if self.loss.logvar.requires_grad else 0.0)

    def forward_pass(self, images: torch.Tensor, seed: int) -> tuple:
        torch.manual_seed(seed)  # the same posterior noise in both formulations
        return self.autoencoder(images)

    def one_pass(
        self, images: torch.Tensor, seed: int = 0, step: int = ON, cast: Callable = lambda rec: rec
    ) -> tuple[torch.Tensor, dict]:
        rec, features, posterior = self.forward_pass(images, seed)
        return self.loss(images, cast(rec), features, posterior, self.autoencoder.decoder.conv_out, step)

    def gradients(self) -> dict[str, torch.Tensor]:
        found = {
            name: (torch.zeros_like(p) if p.grad is None else p.grad.clone())
            for name, p in self.named_parameters()
            if "perceptual" not in name
        }
        self.zero_grad()
        return found


def simultaneous(
    players: Players, images: torch.Tensor, seed: int = 0, autocast: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The published loss, written naively. Returns (generator's loss, discriminator's loss), each on its own graph.

    Sums over C, H, W and means over B; the adaptive weight by autograd at the last weight; the generator's term with
    the discriminator frozen, the discriminator's on detached reconstructions.
    """
    loss = players.loss
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        rec, _, posterior = players.forward_pass(images, seed)
    rec = rec.float()
    absolute = (images - rec).abs()
    if loss.perceptual is not None:
        absolute = absolute + loss.perceptual_weight * loss.perceptual(rec, images).view(-1, 1, 1, 1)
    nll = (absolute / loss.logvar.exp() + loss.logvar).sum() / len(images)
    q = torch.distributions.Normal(posterior.mean, posterior.std)
    kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum() / len(images)
    generator, discriminator = adversaries(players, images, rec, nll)
    return nll + loss.kl_weight * kl + generator, discriminator


def simultaneous_vq(players: Players, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The published losses of VQ models (generator's, discriminator's): L1 + LPIPS as a mean over B, C, H, W plus the
    codebook's loss, a mean over the latents: |z - sg(e)|^2 + 0.25 |sg(z) - e|^2 with e the nearest code to z."""
    loss, autoencoder = players.loss, players.autoencoder
    z = autoencoder.encode_moments(images)
    codes = autoencoder.quantize.embedding.weight
    distance = (z.detach().movedim(1, -1).unsqueeze(-2) - codes.detach()).square().sum(dim=-1)  # (B, h, w, codes)
    e = codes[distance.argmin(dim=-1)].movedim(-1, 1)
    codebook = (z - e.detach()).square().mean() + 0.25 * (z.detach() - e).square().mean()
    rec = autoencoder.decoder.conv_out(autoencoder.decode_features(z + (e - z).detach()))
    absolute = (images - rec).abs() + loss.perceptual_weight * loss.perceptual(rec, images).view(-1, 1, 1, 1)
    nll = absolute.mean()
    generator, discriminator = adversaries(players, images, rec, nll)
    return nll + loss.codebook_weight * codebook + generator, discriminator


def adversaries(
    players: Players, images: torch.Tensor, rec: torch.Tensor, nll: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (the generator's adversarial term, the discriminator's loss), both with the published disc_factor."""
    loss = players.loss
    frozen = copy.deepcopy(loss.discriminator).requires_grad_(False)
    generator = -frozen(rec).mean()
    last = players.autoencoder.decoder.conv_out.weight
    (g_nll,) = torch.autograd.grad(nll, last, retain_graph=True)
    (g_gan,) = torch.autograd.grad(generator, last, retain_graph=True)
    weight = (g_nll.norm() / (g_gan.norm() + 1e-4)).clamp(0, loss.max_adaptive_weight) * loss.disc_weight

    real, fake = loss.discriminator(images), loss.discriminator(rec.detach())
    hinge = 0.5 * (torch.relu(1 - real).mean() + torch.relu(1 + fake).mean())
    return weight * loss.disc_factor * generator, loss.disc_factor * hinge


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    """Asserts equality up to tolerance x the same player's largest gradient norm, and that both get gradients."""
    for player in ("autoencoder", "loss.discriminator"):
        names = [n for n in expected if n.startswith(player)]
        scale = max(expected[n].norm() for n in names)
        assert scale > 0
        for n in names:
            assert (found[n] - expected[n]).norm() <= tolerance * scale, n


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(7)) * 2 - 1


CASES = {
    "tiny perceptual": {},
    "no perceptual": {"perceptual": False},
    "learned logvar": {"learn_logvar": True},
    "weights": {"perceptual_weight": 0.3, "disc_weight": 0.8, "disc_factor": 0.7},
    "clamped adaptive weight": {"max_adaptive_weight": 2.0},
    "batch norm": {"norm": "batch"},
    "patches": {"patch_size": 2},
}


@pytest.mark.parametrize("arguments", CASES.values(), ids=CASES.keys())
def test_one_pass_equals_the_simultaneous_formulation(arguments: dict, images: torch.Tensor) -> None:
    players = Players(**arguments)
    scalar, logs = players.one_pass(images)
    scalar.backward()
    found = players.gradients()
    for loss in simultaneous(players, images):
        loss.backward()
    expected = players.gradients()
    assert_same(found, expected)
    assert 0 < logs["adaptive_weight"] <= players.loss.max_adaptive_weight
    if players.loss.logvar.requires_grad:
        torch.testing.assert_close(found["loss.logvar"], expected["loss.logvar"], rtol=1e-5, atol=0)
        assert found["loss.logvar"] != 0


VQ_CASES = {
    # With losses summed over C, H, W, the same limit would have clamped the weight: 1e4 / (3 * 32 * 32) = 3.3.
    "clamp out of reach": ({"std": 0.05}, lambda weight: 4 < weight < 1e4),
    "clamp in reach": ({"max_adaptive_weight": 0.02}, lambda weight: weight == pytest.approx(0.02)),
    "weights": ({"perceptual_weight": 0.3, "codebook_weight": 2.0, "disc_factor": 0.7}, lambda weight: weight > 0),
}


@pytest.mark.parametrize(("arguments", "expected_weight"), VQ_CASES.values(), ids=VQ_CASES.keys())
def test_vq_gradients_are_those_of_the_published_means(
    arguments: dict, expected_weight: Callable, images: torch.Tensor
) -> None:
    players = Players(num_codes=16, reduction="mean", **arguments)
    scalar, logs = players.one_pass(images)
    scalar.backward()
    found = players.gradients()
    for loss in simultaneous_vq(players, images):
        loss.backward()
    assert_same(found, players.gradients())
    assert expected_weight(logs["adaptive_weight"].item())


def test_means_divide_the_generators_loss_alone(images: torch.Tensor) -> None:
    """Reconstruction, KL and log-variance keep their ratios, the discriminator its loss and the logs their units."""
    options = {"learn_logvar": True, "disc_start": ON + 5, "disc_warmup": 10}
    sums, means = (Players(reduction=reduction, **options) for reduction in ("sum", "mean"))
    means.load_state_dict(sums.state_dict())
    logs = []
    for players in (sums, means):
        scalar, found = players.one_pass(images)
        scalar.backward()
        logs.append(found)
    size, found = images[0].numel(), means.gradients()
    expected = {n: g if "discriminator" in n else g / size for n, g in sums.gradients().items()}
    assert_same(found, expected)
    torch.testing.assert_close(found["loss.logvar"], expected["loss.logvar"], rtol=1e-5, atol=0)
    assert logs[0] == logs[1]


def test_accumulated_micro_batches_equal_the_simultaneous_formulation(images: torch.Tensor) -> None:
    players = Players()
    for seed, part in enumerate(images.chunk(2)):
        (players.one_pass(part, seed)[0] / 2).backward()
    found = players.gradients()
    for seed, part in enumerate(images.chunk(2)):
        for loss in simultaneous(players, part, seed):
            (loss / 2).backward()
    assert_same(found, players.gradients())


def test_loss_scaling_by_a_power_of_two_changes_nothing(images: torch.Tensor) -> None:
    """Does what 16-mixed does: scale the scalar, backward, unscale."""
    players = Players(learn_logvar=True)
    players.one_pass(images)[0].backward()
    plain = players.gradients()
    (players.one_pass(images)[0] * 2**12).backward()
    for name, gradient in players.gradients().items():
        torch.testing.assert_close(gradient / 2**12, plain[name], rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_reconstructions_give_the_gradient_up_to_rounding(
    dtype: torch.dtype, images: torch.Tensor
) -> None:
    players = Players()
    for loss in simultaneous(players, images):
        loss.backward()
    expected = players.gradients()
    (players.one_pass(images, cast=lambda rec: rec.to(dtype))[0] * 2**8).backward()
    found = {name: gradient / 2**8 for name, gradient in players.gradients().items()}
    assert_same(found, expected, tolerance=0.02 if dtype == torch.float16 else 0.1)


def test_under_autocast_only_the_autoencoder_is_rounded(images: torch.Tensor) -> None:
    """The loss turns autocast off: it equals the naive float32 loss after the same bfloat16 autoencoder."""
    players = Players()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scalar, logs = players.one_pass(images)
    assert scalar.dtype == torch.float32
    assert all(v.dtype == torch.float32 for v in logs.values())
    scalar.backward()
    found = players.gradients()
    for loss in simultaneous(players, images, autocast=True):
        loss.backward()
    assert_same(found, players.gradients(), tolerance=0.01)


def test_the_logs_hold_the_true_losses(images: torch.Tensor) -> None:
    players = Players(learn_logvar=True)
    _, logs = players.one_pass(images)
    generator, discriminator = simultaneous(players, images)
    size = images[0].numel()
    adversarial = players.loss.disc_weight * logs["adaptive_weight"] * logs["generator"]
    torch.testing.assert_close(logs["nll"] * size + KL_WEIGHT * logs["kl"] + adversarial, generator, rtol=1e-5, atol=0)
    torch.testing.assert_close(logs["disc"], discriminator, rtol=1e-5, atol=0)


def test_the_discriminators_loss_moves_no_generator(images: torch.Tensor) -> None:
    """While the discriminator warms up alone, the autoencoder's gradient equals the one without a discriminator."""
    players = Players(disc_start=ON + 5, disc_warmup=10, kl_weight=0.0, perceptual=False)
    players.one_pass(images)[0].backward()
    with_it = players.gradients()
    assert max(g.norm() for n, g in with_it.items() if "discriminator" in n) > 0
    players.loss.discriminator = None
    players.one_pass(images)[0].backward()
    for name, gradient in players.gradients().items():
        torch.testing.assert_close(with_it[name], gradient, rtol=0, atol=0)


def test_the_generators_loss_moves_no_discriminator(images: torch.Tensor) -> None:
    """Without its own loss the discriminator gets exactly zero gradients, the generator still its adversarial ones."""
    players = Players(kl_weight=0.0, perceptual=False)
    players.loss.discriminator_loss = lambda real, fake: 0.0 * (real.sum() + fake.sum())
    players.one_pass(images)[0].backward()
    adversarial = players.gradients()
    assert all((g == 0).all() for n, g in adversarial.items() if "discriminator" in n)
    players.loss.disc_weight = 0.0
    players.one_pass(images)[0].backward()
    without = players.gradients()
    assert any(not torch.allclose(adversarial[n], without[n], rtol=1e-3) for n in without if "autoencoder" in n)


def test_inputs_collect_no_gradient_and_frozen_networks_neither(images: torch.Tensor) -> None:
    players = Players()
    players.one_pass(images)[0].backward()
    assert images.grad is None
    assert all(p.grad is None for p in players.loss.perceptual.parameters())


def test_the_perceptual_term_carries_its_gradient(images: torch.Tensor) -> None:
    """Its part of the gradient at the reconstruction is that of perceptual_weight x size x its mean."""
    players, rec = Players(kl_weight=0.0, disc_start=100), None
    differences = []
    for weight in (1.0, 0.0):
        players.loss.perceptual_weight = weight
        rec, features, posterior = players.forward_pass(images, 0)
        rec.retain_grad()
        players.loss(images, rec, features, posterior, players.autoencoder.decoder.conv_out, 0)[0].backward()
        differences.append(rec.grad)
    leaf = rec.detach().requires_grad_()
    (expected,) = torch.autograd.grad(players.loss.perceptual(leaf, images).mean() * images[0].numel(), leaf)
    torch.testing.assert_close(differences[0] - differences[1], expected, rtol=1e-3, atol=1e-6)
    assert expected.norm() > 0.1 * differences[1].norm()


def test_before_disc_start_the_discriminator_gets_zeros_and_the_generator_no_adversary(images: torch.Tensor) -> None:
    players = Players(disc_start=ON + 1)
    scalar, logs = players.one_pass(images)
    scalar.backward()
    assert all(p.grad is not None and (p.grad == 0).all() for p in players.loss.discriminator.parameters())
    assert not {"adaptive_weight", "generator", "disc"} & logs.keys()
    assert {"adaptive_weight", "generator", "disc"} <= players.one_pass(images, step=ON + 1)[1].keys()


@pytest.mark.parametrize(
    ("step", "trained", "factor"),
    [(5, False, 0.0), (6, True, 0.0), (9, True, 0.0), (10, True, 0.25), (12, True, 0.75), (13, True, 1.0)],
)
def test_warm_up_and_ramp_count_optimiser_steps(step: int, trained: bool, factor: float, images: torch.Tensor) -> None:
    players = Players(perceptual=False, disc_start=10, disc_warmup=4, disc_ramp=4)
    assert players.loss.generator_factor(step) == factor
    scalar, logs = players.one_pass(images, step=step)
    scalar.backward()
    assert any((p.grad != 0).any() for p in players.loss.discriminator.parameters()) == trained
    assert ("generator" in logs) == (factor > 0)


def test_the_ramp_scales_the_adversarial_gradient_alone(images: torch.Tensor) -> None:
    players = Players(disc_start=10, disc_ramp=4, disc_warmup=10)
    gradients = []
    for step in (9, 11, 13):  # factor 0, 1/2, 1
        players.one_pass(images, step=step)[0].backward()
        gradients.append(players.gradients())
    off, half, full = gradients
    assert_same(half, {n: (off[n] + full[n]) / 2 for n in off})
    assert any(not torch.allclose(off[n], full[n], rtol=1e-2) for n in off if "autoencoder" in n)


def test_a_vanilla_discriminator_minimises_cross_entropy(images: torch.Tensor) -> None:
    players = Players(perceptual=False, disc_loss="vanilla")
    players.one_pass(images)[0].backward()
    found = players.gradients()
    rec = players.forward_pass(images, 0)[0].detach()
    real, fake = players.loss.discriminator(images), players.loss.discriminator(rec)
    bce = nn.functional.binary_cross_entropy_with_logits
    (0.5 * (bce(real, torch.ones_like(real)) + bce(fake, torch.zeros_like(fake)))).backward()
    for n, expected in players.gradients().items():
        if "discriminator" in n:
            torch.testing.assert_close(found[n], expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("option", "value"), [("disc_loss", "wgan"), ("reduction", "none")])
def test_an_unknown_option_is_named(option: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"{option} is .* not '{value}'"):
        AutoencoderLoss(None, None, **{option: value})
