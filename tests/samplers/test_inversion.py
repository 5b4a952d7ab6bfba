"""DDIM inversion (from latents to noise) and resampling jumps (stretches of steps repeated)."""

from functools import partial

import pytest
import torch

from ldm_train.diffusion.denoiser import Denoiser
from ldm_train.diffusion.parameterisation import Epsilon, VPrediction
from ldm_train.diffusion.schedule import NoiseSchedule
from ldm_train.rng import NoiseSource
from ldm_train.samplers.ddim import ddim, ddim_inversion
from ldm_train.samplers.dpm_solver import dpm_solver
from ldm_train.samplers.resampling import resampled

SCHEDULE = NoiseSchedule()
MEAN, STD = 0.7, 0.5


def gaussian(x_t: torch.Tensor, t: float) -> torch.Tensor:
    """E[x_0 | x_t] for data N(MEAN, STD^2)."""
    alpha, sigma = SCHEDULE.numbers(t)
    return MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x_t - alpha * MEAN)


def error(denoise, latents: torch.Tensor, steps: int, iterations: int) -> float:
    """Returns the root mean square error of latents after inversion and sampling, relative to their deviation."""
    times, noise = SCHEDULE.timesteps(steps), NoiseSource(range(len(latents)))
    x_t = ddim_inversion(denoise, latents, times, SCHEDULE, iterations=iterations)
    again = ddim(denoise, x_t, times, SCHEDULE, noise)
    return float((again - latents).square().mean().sqrt() / latents.std())


def test_inversion_then_ddim_gives_the_latents_back() -> None:
    """Within 1 % in 50 steps of 5 iterations, within 1e-5 with 50 iterations; more iterations or steps come closer."""
    latents = MEAN + STD * torch.randn(8, 2, 4, 4, dtype=torch.float64)
    by_iterations = [error(gaussian, latents, 50, k) for k in (1, 2, 5, 50)]
    assert by_iterations == sorted(by_iterations, reverse=True)
    assert by_iterations[2] < 0.01
    assert by_iterations[3] < 1e-5
    assert error(gaussian, latents, 100, 2) < by_iterations[1]


def test_inverted_data_are_noise() -> None:
    latents = MEAN + STD * torch.randn(500, 1, 4, 4, dtype=torch.float64)
    x_t = ddim_inversion(gaussian, latents, SCHEDULE.timesteps(250), SCHEDULE, iterations=20)
    assert abs(float(x_t.mean())) < 0.05
    assert abs(float(x_t.std()) - 1) < 0.05


def test_a_network_is_inverted_too(network: torch.nn.Module) -> None:
    denoise = Denoiser(network, SCHEDULE, VPrediction(), {})
    latents = torch.randn(2, 2, 8, 8)
    seen: list[int] = []
    times = SCHEDULE.timesteps(20)
    x_t = ddim_inversion(denoise, latents, times, SCHEDULE, iterations=30, callback=lambda k, _: seen.append(k))
    assert seen == list(range(20))
    again = ddim(denoise, x_t, times, SCHEDULE, NoiseSource([0, 1]))
    assert (again - latents).square().mean().sqrt() < 0.02
    with pytest.raises(ValueError, match="at least one iteration"):
        ddim_inversion(denoise, latents, times, SCHEDULE, iterations=0)


@pytest.mark.parametrize("sampler", [ddim, dpm_solver, partial(dpm_solver, kind="sde_2m")])
def test_jumps_keep_mean_and_deviation(sampler) -> None:
    noise, times = NoiseSource(range(400)), SCHEDULE.timesteps(150)
    x_t = noise.normal((1, 4, 4), "start")
    made = resampled(gaussian, x_t, times, SCHEDULE, noise, sampler=sampler, jump_length=50, repeats=3)
    assert abs(float(made.mean()) - MEAN) < 0.03
    assert abs(float(made.std()) - STD) < 0.05


def test_without_repeats_the_stretches_are_the_sampler_itself(network: torch.nn.Module) -> None:
    denoise, x_t, noise = Denoiser(network, SCHEDULE, Epsilon(), {}), torch.randn(2, 2, 8, 8), NoiseSource([0, 1])
    times = SCHEDULE.timesteps(12)
    made = resampled(denoise, x_t, times, SCHEDULE, noise, sampler=ddim, jump_length=5, repeats=1)
    torch.testing.assert_close(made, ddim(denoise, x_t, times, SCHEDULE, noise))


def test_every_stretch_is_taken_so_often_and_counted() -> None:
    calls, seen = [], []

    def denoise(x: torch.Tensor, t: float) -> torch.Tensor:
        calls.append(t)
        return gaussian(x, t)

    noise, times = NoiseSource([0]), SCHEDULE.timesteps(7)
    made = resampled(
        denoise, torch.randn(1, 1, 2, 2), times, SCHEDULE, noise,
        sampler=ddim, jump_length=3, repeats=2, callback=lambda k, _: seen.append(k),
    )  # fmt: skip
    t = times.tolist()
    assert calls == t[:3] * 2 + t[3:6] * 2 + t[6:7] * 2
    assert seen == list(range(14))
    assert made.isfinite().all()
    with pytest.raises(ValueError, match="at least 1, not 0 and 2"):
        resampled(denoise, made, times, SCHEDULE, noise, sampler=ddim, jump_length=0, repeats=2)
