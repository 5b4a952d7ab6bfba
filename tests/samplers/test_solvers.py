"""The fast solvers: their order on Gaussian data, where the answer is known, and each against diffusers' scheduler."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from math import log2

import diffusers
import numpy as np
import pytest
import torch
from diffusers.schedulers import scheduling_euler_ancestral_discrete

from ldm_train.checkpoints.diffusers import PREDICTIONS
from ldm_train.diffusion.denoiser import Denoiser
from ldm_train.diffusion.parameterisation import Epsilon
from ldm_train.diffusion.schedule import NoiseSchedule
from ldm_train.rng import NoiseSource
from ldm_train.samplers.ddim import ddim
from ldm_train.samplers.dpm_solver import dpm_solver
from ldm_train.samplers.euler import euler
from ldm_train.samplers.heun import heun
from ldm_train.samplers.lms import lms, weights
from ldm_train.samplers.plms import plms
from ldm_train.samplers.unipc import unipc

SCHEDULE = NoiseSchedule()
BETAS = {"beta_start": 0.0015, "beta_end": 0.0195, "beta_schedule": "scaled_linear"}
MEAN, STD = 0.7, 0.5
DETERMINISTIC = {
    "ddim": ddim,
    "euler": euler,
    "heun": heun,
    "2m": dpm_solver,
    "2s": partial(dpm_solver, kind="2s"),
    "unipc": unipc,
    "plms": plms,
    "lms": lms,
}
STOCHASTIC = {
    "euler ancestral": partial(euler, ancestral=1.0),
    "euler churn": partial(euler, churn=40.0),
    "sde 2m": partial(dpm_solver, kind="sde_2m"),
}
ALL = DETERMINISTIC | STOCHASTIC


def gaussian(x_t: torch.Tensor, t: float) -> torch.Tensor:
    """E[x_0 | x_t] for data N(MEAN, STD^2) at any time: the perfect denoiser."""
    alpha, sigma, _ = (v.item() for v in SCHEDULE.at(t))
    return MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x_t - alpha * MEAN)


def marginal(t: float) -> tuple[float, float]:
    alpha, sigma, _ = (v.item() for v in SCHEDULE.at(t))
    return alpha * MEAN, (alpha**2 * STD**2 + sigma**2) ** 0.5


def flow(x: torch.Tensor, t: float, s: float) -> torch.Tensor:
    (mean_t, std_t), (mean_s, std_s) = marginal(t), marginal(s)
    return mean_s + std_s * (x - mean_t) / std_t


@pytest.mark.parametrize(
    ("name", "order"),
    [("ddim", 1), ("euler", 1), ("heun", 2), ("2m", 2), ("2s", 2), ("unipc", 2), ("plms", 1.8), ("lms", 1.8)],
)
def test_order_of_convergence(name: str, order: float) -> None:
    """Measured from t = 999 to 39; the times are whole, so that the schedule is smooth where it is evaluated."""
    x, errors = torch.randn(1, 1, 16, 16, dtype=torch.float64), []
    steps = (48, 96, 192)
    for count in steps:
        times = torch.linspace(999, 39, count + 1, dtype=torch.float64)
        out = DETERMINISTIC[name](gaussian, x, times, SCHEDULE, NoiseSource([0]))
        errors.append((out - flow(x, 999, 39)).abs().max().item())
    orders = [log2(a / b) for a, b in pairwise(errors)]
    assert errors[-1] < (2e-2 if order == 1 else 1e-3)
    if isinstance(order, int):
        assert orders[-1] == pytest.approx(order, abs=0.25), (orders, errors)
    assert orders[-1] > order - 0.25, (orders, errors)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_stochastic_samplers_keep_mean_and_deviation(name: str) -> None:
    mean, std = marginal(999)
    x = mean + std * torch.randn(1, 1, 256, 256)
    out = STOCHASTIC[name](gaussian, x, SCHEDULE.timesteps(1000), SCHEDULE, NoiseSource([5]))
    assert out.mean().item() == pytest.approx(MEAN, abs=0.01)
    assert out.std().item() == pytest.approx(STD, rel=0.03)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("steps", [1, 2, 3, 20])
def test_any_number_of_steps_arrives_at_the_clean_image(name: str, steps: int) -> None:
    x, seen = torch.randn(2, 1, 4, 4), []
    out = ALL[name](
        gaussian, x, SCHEDULE.timesteps(steps), SCHEDULE, NoiseSource([0, 1]), callback=lambda i, x0: seen.append(i)
    )
    assert out.isfinite().all()
    assert seen == list(range(steps))
    if steps == 20:
        assert (out - flow(x, 999, -1)).abs().max() < 0.5 or name in STOCHASTIC


@pytest.mark.parametrize(
    ("name", "calls"), [("heun", 39), ("plms", 21), ("2s", 20), ("2m", 20), ("unipc", 20), ("lms", 20)]
)
def test_evaluations_per_step_are_as_documented(name: str, calls: int) -> None:
    counted = []

    def denoise(x_t: torch.Tensor, t: float) -> torch.Tensor:
        counted.append(t)
        return gaussian(x_t, t)

    DETERMINISTIC[name](denoise, torch.randn(1, 1, 4, 4), SCHEDULE.timesteps(20), SCHEDULE, NoiseSource([0]))
    assert len(counted) == calls


class Recorded:
    """Gives our noise, step by step, to a scheduler of diffusers."""

    def __init__(self, source: NoiseSource):
        self.source, self.step = source, 0

    def __call__(self, shape: tuple, **_: object) -> torch.Tensor:
        made = self.source.normal(shape[1:], self.step)
        self.step += 1
        return made


def theirs(
    scheduler: object, network: torch.nn.Module, x: torch.Tensor, steps: int, noise: Recorded | None = None
) -> torch.Tensor:
    scheduler.set_timesteps(steps)
    # Schedulers that work on noise levels take x / alpha.
    level = getattr(scheduler, "sigmas", None)
    scaled = getattr(scheduler, "init_noise_sigma", 1.0) != 1.0
    x = x * (1 + float(level[0]) ** 2) ** 0.5 if scaled else x
    for t in scheduler.timesteps:
        output = network(scheduler.scale_model_input(x, t), torch.as_tensor(t).expand(len(x)))
        extra = (
            {"variance_noise": noise(x.shape)}
            if isinstance(scheduler, diffusers.DPMSolverMultistepScheduler) and noise
            else {}
        )
        x = scheduler.step(output, t, x, **extra).prev_sample
    return x


@pytest.mark.parametrize("steps", [8, 20])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    ("ours", "scheduler", "options"),
    [
        (euler, "EulerDiscreteScheduler", {}),
        (heun, "HeunDiscreteScheduler", {}),
        (lms, "LMSDiscreteScheduler", {}),
        (plms, "PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": True}),
        (dpm_solver, "DPMSolverMultistepScheduler", {}),
        (partial(dpm_solver, kind="sde_2m"), "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
        (partial(dpm_solver, kind="2s"), "DPMSolverSinglestepScheduler", {}),
        (unipc, "UniPCMultistepScheduler", {}),
        (partial(unipc, order=3), "UniPCMultistepScheduler", {"solver_order": 3}),
    ],
    ids=["euler", "heun", "lms", "plms", "2m", "sde 2m", "2s", "unipc", "unipc 3"],
)
def test_samplers_equal_diffusers(
    network: torch.nn.Module, ours: Callable, scheduler: str, options: dict, prediction_type: str, steps: int
) -> None:
    if ours is plms and prediction_type != "epsilon":
        pytest.skip("diffusers extrapolates velocities of several times and then makes one noise of them")
    x, noise = torch.randn(2, 2, 8, 8), NoiseSource([3, 4])
    options = options | ({} if "Singlestep" in scheduler else {"timestep_spacing": "trailing"})
    reference = getattr(diffusers, scheduler)(1000, prediction_type=prediction_type, **BETAS, **options)
    stochastic = Recorded(noise) if "sde-dpmsolver++" in options.values() else None
    expected = theirs(reference, network, x, steps, stochastic)
    if "Singlestep" in scheduler:  # it has no spacing option: take its times
        reference.set_timesteps(steps)
        times = torch.cat([reference.timesteps.double(), torch.tensor([-1.0], dtype=torch.float64)])
    else:
        times = SCHEDULE.timesteps(steps, "trailing")
    out = ours(Denoiser(network, SCHEDULE, PREDICTIONS[prediction_type](), {}), x, times, SCHEDULE, noise)
    assert (out - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_euler_ancestral_equals_diffusers(network: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    x, noise = torch.randn(2, 2, 8, 8), NoiseSource([3, 4])
    monkeypatch.setattr(scheduling_euler_ancestral_discrete, "randn_tensor", Recorded(noise))
    reference = diffusers.EulerAncestralDiscreteScheduler(1000, timestep_spacing="trailing", **BETAS)
    expected = theirs(reference, network, x, 20)
    denoise = Denoiser(network, SCHEDULE, Epsilon(), {})
    out = euler(denoise, x, SCHEDULE.timesteps(20), SCHEDULE, noise, ancestral=1.0)
    assert (out - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_karras_spacing_equals_diffusers() -> None:
    reference = diffusers.EulerDiscreteScheduler(1000, use_karras_sigmas=True, **BETAS)
    reference.set_timesteps(12)
    times = SCHEDULE.timesteps(12, "karras")
    assert len(times) == 13
    assert times[-1] == -1
    levels = SCHEDULE.levels(times)[1]
    np.testing.assert_allclose(levels, reference.sigmas.double().numpy(), rtol=1e-4, atol=1e-7)


def test_time_of_inverts_the_levels() -> None:
    times = torch.tensor([999.0, 500.25, 17.5, 0.0, -0.5, -1.0], dtype=torch.float64)
    found = [SCHEDULE.time_of(level) for level in SCHEDULE.levels(times)[1]]
    np.testing.assert_allclose(found, times.numpy(), atol=1e-6)


def test_compvis_spacing_is_their_list() -> None:
    """CompVis' ddim_timesteps are arange(0, 1000, 1000 // S) + 1, and the last step goes to time 0."""
    assert SCHEDULE.timesteps(50, "compvis").tolist() == [*(np.arange(0, 1000, 20) + 1)[::-1], 0]
    assert len(SCHEDULE.timesteps(400, "compvis")) == 501  # asked for 400 steps, CompVis takes 500
    with pytest.raises(ValueError, match="spacing=compvis cannot take 1000 of 1000 steps"):
        SCHEDULE.timesteps(1000, "compvis")


def test_lms_weights_integrate_polynomials_exactly() -> None:
    levels = [14.0, 9.0, 5.5, 3.1, 1.2]
    for order in range(1, 5):
        found = weights(levels, 3, order)
        nodes = levels[3 - order + 1 : 4][::-1]
        for power in range(order):
            exact = (levels[4] ** (power + 1) - levels[3] ** (power + 1)) / (power + 1)
            assert sum(w * n**power for w, n in zip(found, nodes)) == pytest.approx(exact, rel=1e-9)


def test_wrong_options_are_named() -> None:
    x, times, noise = torch.zeros(1, 1, 2, 2), SCHEDULE.timesteps(2), NoiseSource([0])
    for sampler, message in (
        (partial(dpm_solver, kind="3m"), "'3m'"),
        (partial(unipc, order=4), "1, 2 or 3"),
        (partial(lms, order=0), "between 1 and 6"),
        (partial(lms, order=7), "between 1 and 6"),
    ):
        with pytest.raises(ValueError, match=message):
            sampler(gaussian, x, times, SCHEDULE, noise)


@pytest.mark.parametrize("sampler", [euler, heun, lms, plms])
def test_infinite_levels_are_refused_with_the_remedy(sampler: Callable) -> None:
    flat = NoiseSchedule(zero_terminal_snr=True)
    with pytest.raises(ValueError, match=r"zero_terminal_snr.*use sampler=ddim, dpm_solver or unipc"):
        sampler(gaussian, torch.zeros(1, 1, 2, 2), flat.timesteps(4), flat, NoiseSource([0]))
    with pytest.raises(ValueError, match="zero_terminal_snr"):
        flat.timesteps(4, "karras")


@pytest.mark.parametrize("name", STOCHASTIC)
def test_an_image_has_the_same_noise_in_any_batch(name: str) -> None:
    x, times = torch.randn(4, 1, 4, 4), SCHEDULE.timesteps(6)
    together = STOCHASTIC[name](gaussian, x, times, SCHEDULE, NoiseSource([4, 5, 6, 7]))
    alone = STOCHASTIC[name](gaussian, x[2:3], times, SCHEDULE, NoiseSource([6]))
    torch.testing.assert_close(together[2:3], alone)
