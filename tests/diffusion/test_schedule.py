"""The noise schedule: its tables equal diffusers', `at` equals them at integers, `timesteps` are Lin et al.'s
table 2."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from ldm_train.diffusion.schedule import NoiseSchedule, make_betas, rescale_zero_terminal_snr

KINDS = [("scaled_linear", 0.0015, 0.0195), ("scaled_linear", 0.00085, 0.012), ("linear", 0.0001, 0.02)]


@pytest.mark.parametrize(("kind", "start", "end"), KINDS)
def test_tables_and_add_noise_equal_diffusers(kind: str, start: float, end: float) -> None:
    schedule = NoiseSchedule(kind, start, end)
    latents, noise, t = torch.randn(4, 2, 3, 5), torch.randn(4, 2, 3, 5), torch.tensor([0, 10, 500, 999])
    for scheduler in (DDPMScheduler, DDIMScheduler):
        reference = scheduler(1000, beta_start=start, beta_end=end, beta_schedule=kind)
        torch.testing.assert_close(schedule.betas.float(), reference.betas, rtol=1e-5, atol=0)
        torch.testing.assert_close(schedule.alphas_cumprod.float(), reference.alphas_cumprod, rtol=1e-4, atol=0)
        torch.testing.assert_close(
            schedule.add_noise(latents, noise, t), reference.add_noise(latents, noise, t), rtol=1e-4, atol=1e-5
        )


def test_add_noise_is_its_closed_form() -> None:
    schedule, latents, noise = NoiseSchedule(), torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    product = 1.0
    for beta in make_betas("scaled_linear", 0.0015, 0.0195, 1000)[:301].tolist():
        product *= 1 - beta
    noisy = schedule.add_noise(latents, noise, torch.tensor([300, 300]))
    torch.testing.assert_close(noisy, product**0.5 * latents + (1 - product) ** 0.5 * noise)


def test_at_equals_the_tables_at_integers() -> None:
    schedule = NoiseSchedule()
    alpha, sigma, log_snr = schedule.at(torch.arange(1000))
    torch.testing.assert_close(alpha.square(), schedule.alphas_cumprod, rtol=1e-12, atol=0)
    torch.testing.assert_close(sigma.square(), 1 - schedule.alphas_cumprod, rtol=1e-10, atol=0)
    torch.testing.assert_close(log_snr, schedule.snr.log(), rtol=1e-9, atol=1e-9)


def test_at_is_variance_preserving_and_monotone_between_integers() -> None:
    t = torch.linspace(-1, 999, 40_001, dtype=torch.float64)
    alpha, sigma, log_snr = NoiseSchedule().at(t)
    torch.testing.assert_close(alpha.square() + sigma.square(), torch.ones_like(t), rtol=1e-12, atol=0)
    assert (alpha.diff() < 0).all()
    assert (sigma.diff() > 0).all()
    assert (log_snr.diff() < 0).all()
    assert sigma.diff().max() < 0.01  # no jump, not even between the clean image and entry 0


def test_the_clean_image_stands_at_minus_one() -> None:
    alpha, sigma, log_snr = NoiseSchedule().at(-1.0)
    assert (alpha.item(), sigma.item(), log_snr.item()) == (1.0, 0.0, float("inf"))


def test_tables_stay_float64_whatever_the_model_is_cast_to() -> None:
    schedule = NoiseSchedule().half()
    assert schedule.alphas_cumprod.dtype == torch.float64
    assert torch.equal(schedule.alphas_cumprod, NoiseSchedule().alphas_cumprod)
    half = torch.ones(1, 2).half()
    assert schedule.add_noise(half, half, torch.tensor([3])).dtype == torch.float16


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("steps", [1000, 250, 100, 50, 20, 7])
def test_timesteps_equal_diffusers(spacing: str, steps: int) -> None:
    reference = DDIMScheduler(1000, timestep_spacing=spacing)
    reference.set_timesteps(steps)
    times = NoiseSchedule().timesteps(steps, spacing)
    assert times[:-1].tolist() == reference.timesteps.tolist()[:steps]
    assert times[-1] == -1
    assert (times.diff() < 0).all()


def test_a_single_step_starts_at_pure_noise() -> None:
    assert NoiseSchedule().timesteps(1).tolist() == [999, -1]


@pytest.mark.parametrize("steps", [0, 1001])
def test_a_number_of_steps_outside_the_schedule_is_named(steps: int) -> None:
    with pytest.raises(ValueError, match=f"num_inference_steps is {steps}; it must lie between 1 and 1000"):
        NoiseSchedule().timesteps(steps)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("sigmoid",), "unknown beta schedule 'sigmoid'"), (("linear", 0.1, 0.01), "need 0 < beta_start <= beta_end < 1")],
)
def test_wrong_arguments_are_named(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NoiseSchedule(*arguments)


def test_an_unknown_spacing_is_named() -> None:
    with pytest.raises(ValueError, match="unknown spacing 'cosine'"):
        NoiseSchedule().timesteps(10, "cosine")


def test_cosine_and_sqrt_equal_their_sources() -> None:
    reference = DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2")
    torch.testing.assert_close(make_betas("cosine", 0.1, 0.2, 1000).float(), reference.betas, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        make_betas("sqrt", 0.0001, 0.02, 10), torch.linspace(0.0001, 0.02, 10, dtype=torch.float64) ** 0.5
    )
    assert NoiseSchedule("cosine").alphas_cumprod[-1] > 0


def test_zero_terminal_snr_equals_diffusers_and_stays_finite() -> None:
    betas = make_betas("scaled_linear", 0.00085, 0.012, 1000)
    reference = DDIMScheduler(1000, 0.00085, 0.012, "scaled_linear", rescale_betas_zero_snr=True)
    torch.testing.assert_close(rescale_zero_terminal_snr(betas).float(), reference.betas, rtol=1e-3, atol=1e-6)
    schedule = NoiseSchedule("scaled_linear", 0.00085, 0.012, zero_terminal_snr=True)
    assert schedule.alphas_cumprod[-1] == 0
    alpha, sigma, log_snr = schedule.at(torch.linspace(-0.5, 999, 3001, dtype=torch.float64))
    assert (alpha[-1] < 1e-9, sigma[-1] == 1) == (True, True)
    assert alpha.isfinite().all()
    assert log_snr.isfinite().all()
    torch.testing.assert_close(alpha.square() + sigma.square(), torch.ones_like(alpha), rtol=1e-12, atol=0)


def test_numbers_and_pairs_equal_the_tables():
    schedule = NoiseSchedule()
    times = [-1.0, -0.3, 0.0, 17.25, 998.5, 999.0]
    alpha, sigma, _ = schedule.at(torch.tensor(times, dtype=torch.float64))
    for k, t in enumerate(times):
        assert schedule.numbers(t) == (float(alpha[k]), float(sigma[k]))
    assert schedule.coefficients(torch.tensor(times, dtype=torch.float64)) == (alpha.tolist(), sigma.tolist())
    pair = schedule.pair(torch.tensor(times), torch.zeros(6, 2, 4, 4))
    torch.testing.assert_close(pair[1].flatten(), sigma.float())
    assert pair[0].shape == (6, 1, 1, 1)
