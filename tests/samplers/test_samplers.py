"""Samplers on Gaussian data, where the answer is known, against diffusers, and with one image per seed in any batch."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from ldm_train.checkpoints.diffusers import PREDICTIONS
from ldm_train.conditioning.class_label import ClassLabel
from ldm_train.diffusion.denoiser import Denoiser
from ldm_train.diffusion.parameterisation import Epsilon
from ldm_train.diffusion.schedule import NoiseSchedule
from ldm_train.latent_diffusion import LatentDiffusion, Sampling
from ldm_train.models.autoencoder import AutoencoderKL
from ldm_train.models.first_stage import FirstStage
from ldm_train.models.unet import UNet
from ldm_train.rng import NoiseSource
from ldm_train.samplers.ddim import ddim
from ldm_train.samplers.ddpm import ddpm
from ldm_train.samplers.euler import euler

SCHEDULE = NoiseSchedule()
MEAN, STD = 0.7, 0.5


def gaussian(mean: float = MEAN, std: float = STD) -> Callable:
    """E[x_0 | x_t] for data N(mean, std^2): the perfect denoiser."""

    def denoise(x_t: torch.Tensor, t: float) -> torch.Tensor:
        alpha, sigma, _ = (v.item() for v in SCHEDULE.at(t))
        return mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (x_t - alpha * mean)

    return denoise


def marginal(t: float, mean: float = MEAN, std: float = STD) -> tuple[float, float]:
    """Mean and standard deviation of x_t."""
    alpha, sigma, _ = (v.item() for v in SCHEDULE.at(t))
    return alpha * mean, (alpha**2 * std**2 + sigma**2) ** 0.5


def flow(x: torch.Tensor, t: float, s: float) -> torch.Tensor:
    """Returns the exact probability flow of x from t to s, which keeps each point's quantile."""
    (mean_t, std_t), (mean_s, std_s) = marginal(t), marginal(s)
    return mean_s + std_s * (x - mean_t) / std_t


def test_ddim_converges_to_the_exact_flow_at_first_order() -> None:
    x = torch.randn(1, 1, 16, 16, dtype=torch.float64)
    errors = []
    for steps in (50, 100, 200):
        times = torch.linspace(999, 0, steps + 1, dtype=torch.float64)
        errors.append((ddim(gaussian(), x, times, SCHEDULE, NoiseSource([0])) - flow(x, 999, 0)).abs().max().item())
    assert errors[2] < 0.05
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.15)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.15)


def test_ddim_arrives_at_the_clean_image() -> None:
    x = torch.randn(1, 1, 16, 16, dtype=torch.float64)
    out = ddim(gaussian(), x, SCHEDULE.timesteps(1000), SCHEDULE, NoiseSource([0]))
    torch.testing.assert_close(out, flow(x, 999, -1), rtol=0, atol=0.02)


@pytest.mark.parametrize(
    "sampler",
    [ddpm, partial(ddpm, variance="large"), partial(ddim, eta=1.0), partial(ddim, eta=0.5), ddim],
    ids=["ddpm small", "ddpm large", "ddim eta 1", "ddim eta 0.5", "ddim eta 0"],
)
def test_samples_have_the_mean_and_deviation_of_the_data(sampler: Callable) -> None:
    mean, std = marginal(999)
    x = mean + std * torch.randn(1, 1, 144, 144)
    out = sampler(gaussian(), x, SCHEDULE.timesteps(1000), SCHEDULE, NoiseSource([5]))
    assert out.mean().item() == pytest.approx(MEAN, abs=0.01)
    assert out.std().item() == pytest.approx(STD, rel=0.02)


@pytest.mark.parametrize(("variance", "data_std"), [("small", 0.0), ("large", 1.0)])
def test_ddpm_is_exact_in_few_steps_where_its_variance_is_right(variance: str, data_std: float) -> None:
    """The posterior's variance is right for Dirac data, beta for unit Gaussian data. Then even three steps give the
    exact deviation at the last time."""
    times = torch.tensor([999.0, 600.0, 250.0, 40.0], dtype=torch.float64)
    mean, std = marginal(999, 0.0, data_std)
    x = mean + std * torch.randn(1, 1, 256, 256)
    out = ddpm(gaussian(0.0, data_std), x, times, SCHEDULE, NoiseSource([6]), variance=variance)
    assert out.std().item() == pytest.approx(marginal(40, 0.0, data_std)[1], rel=0.015)


def test_no_noise_is_added_on_the_clean_image() -> None:
    x, last = torch.randn(1, 1, 8, 8), torch.tensor([49, -1], dtype=torch.float64)
    for sampler in (ddpm, partial(ddpm, variance="large"), partial(ddim, eta=1.0), ddim):
        torch.testing.assert_close(sampler(gaussian(), x, last, SCHEDULE, NoiseSource([0])), gaussian()(x, 49.0))


def test_ddim_with_eta_one_is_ddpm() -> None:
    x, times = torch.randn(2, 1, 8, 8), SCHEDULE.timesteps(10)
    noise = NoiseSource([1, 2])
    torch.testing.assert_close(
        ddim(gaussian(), x, times, SCHEDULE, noise, eta=1.0), ddpm(gaussian(), x, times, SCHEDULE, noise),
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_ddim_equals_diffusers(network: torch.nn.Module, prediction_type: str, spacing: str) -> None:
    x = torch.randn(2, 2, 8, 8)
    reference = DDIMScheduler(
        1000, beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=True, timestep_spacing=spacing, prediction_type=prediction_type,
    )  # fmt: skip
    reference.set_timesteps(20)
    expected = x
    for t in reference.timesteps:
        expected = reference.step(network(expected, t.expand(2)), t, expected).prev_sample
    denoise = Denoiser(network, SCHEDULE, PREDICTIONS[prediction_type](), {})
    out = ddim(denoise, x, SCHEDULE.timesteps(20, spacing), SCHEDULE, NoiseSource([0, 1]))
    assert (out - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize(("variance", "theirs"), [("small", "fixed_small"), ("large", "fixed_large")])
def test_a_ddpm_step_equals_diffusers(network: torch.nn.Module, variance: str, theirs: str) -> None:
    """Compares the step's mean, by giving both the same noise, and with it the variance."""
    x = torch.randn(1, 2, 8, 8)
    reference = DDPMScheduler(
        1000, beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear", clip_sample=False,
        variance_type=theirs, timestep_spacing="trailing",
    )  # fmt: skip
    reference.set_timesteps(20)
    denoise, noise = Denoiser(network, SCHEDULE, Epsilon(), {}), NoiseSource([9])
    for t, s in ((999, 949), (499, 449), (99, 49)):
        generator = torch.Generator().manual_seed(4)
        z = torch.randn(x.shape, generator=generator)
        expected = reference.step(
            network(x, torch.tensor([t])), t, x, generator=torch.Generator().manual_seed(4)
        ).prev_sample
        times = torch.tensor([t, s], dtype=torch.float64)
        out = ddpm(denoise, x, times, SCHEDULE, noise, variance=variance)
        alpha_t, alpha_s = (SCHEDULE.at(v)[0].item() for v in (t, s))
        beta = 1 - (alpha_t / alpha_s) ** 2
        spread = beta if variance == "large" else beta * (1 - alpha_s**2) / (1 - alpha_t**2)
        ours = out + spread**0.5 * (z - noise.normal(x.shape[1:], 0))
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    torch.manual_seed(0)
    first_stage = FirstStage(AutoencoderKL(z_channels=2, channels=16, channel_mult=(1, 1), num_res_blocks=1))
    unet = UNet(2, 32, (1, 2), num_res_blocks=1, attention_levels=(1,), num_heads=2, context_dim=8)
    for p in unet.parameters():
        torch.nn.init.normal_(p, std=0.05)
    return LatentDiffusion(
        unet, first_stage, NoiseSchedule(), {"class": ClassLabel(4, 8, "context")}, latent_size=(8, 8)
    )


@pytest.mark.parametrize(
    ("sampler", "guidance_scale"),
    [
        (ddpm, 1.0), (ddpm, 3.0), (ddim, 3.0), (partial(ddim, eta=1.0), 3.0),
        *(pytest.param(sampler, 1.0, marks=pytest.mark.slow) for sampler in (ddim, partial(ddim, eta=1.0))),
    ],
)  # fmt: skip
def test_a_seed_gives_the_same_image_in_batches_of_one_four_and_sixteen(
    model: LatentDiffusion, sampler: Callable, guidance_scale: float
) -> None:
    seeds, labels = list(range(100, 116)), torch.arange(16) % 4
    noise = NoiseSource(seeds).normal((2, 8, 8), "start")
    together = model.sample({"class_label": labels}, seeds, Sampling(sampler, 4, guidance_scale))
    assert together.shape == (16, 3, 16, 16)
    assert (together[0] - together[1]).abs().max() > 0.01
    for size in (1, 4):
        for i in (0, 4, 12):
            part = slice(i, i + size)
            assert torch.equal(NoiseSource(seeds[part]).normal((2, 8, 8), "start"), noise[part])
            alone = model.sample({"class_label": labels[part]}, seeds[part], Sampling(sampler, 4, guidance_scale))
            torch.testing.assert_close(together[part], alone, rtol=1e-4, atol=1e-4)


def test_the_callback_sees_every_step_and_changes_nothing(model: LatentDiffusion) -> None:
    seen = []
    for sampler in (ddim, ddpm):
        quiet = model.sample({}, [3], Sampling(sampler, 5))
        seen.clear()
        told = model.sample({}, [3], Sampling(sampler, 5), callback=lambda step, x0: seen.append((step, x0.shape)))
        assert torch.equal(quiet, told)
        assert seen == [(step, (1, 2, 8, 8)) for step in range(5)]


def test_an_unknown_variance_is_named() -> None:
    with pytest.raises(ValueError, match="'learned'"):
        ddpm(gaussian(), torch.zeros(1, 1, 2, 2), SCHEDULE.timesteps(2), SCHEDULE, NoiseSource([0]), variance="learned")


@pytest.mark.parametrize(("sampler", "option"), [(ddim, "eta"), (euler, "ancestral")])
@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_more_noise_than_the_ancestral_steps_is_refused(sampler: Callable, option: str, share: float) -> None:
    x, times = torch.randn(2, 1, 8, 8), SCHEDULE.timesteps(2)
    with pytest.raises(ValueError, match=f"{option}={share} is a share"):
        sampler(gaussian(), x, times, SCHEDULE, NoiseSource([1, 2]), **{option: share})
