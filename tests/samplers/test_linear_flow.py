"""Rectified flow: its path, times and target, and that samplers made for variance-preserving processes solve it unchanged."""

from itertools import pairwise
from math import log2
from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from scipy import stats
from test_solvers import ALL, DETERMINISTIC

from ldm_train.diffusion.denoiser import Denoiser
from ldm_train.diffusion.flow_prediction import FlowPrediction
from ldm_train.diffusion.guidance import classifier_free, classifier_guidance
from ldm_train.diffusion.linear_flow import LinearFlow
from ldm_train.diffusion.objective import DiffusionObjective
from ldm_train.diffusion.parameterisation import Epsilon, Sample, VPrediction
from ldm_train.diffusion.process import NoiseProcess, expand_to
from ldm_train.diffusion.schedule import NoiseSchedule
from ldm_train.generation.guides import Guides, schedule_identity
from ldm_train.rng import NoiseSource
from ldm_train.samplers.ddim import ddim, ddim_inversion
from ldm_train.samplers.ddpm import ddpm

FLOW = LinearFlow()
MEAN, STD = 0.7, 0.5


class GaussianFlow:
    """The perfect network for data N(MEAN, STD^2): E[eps - x_0 | x_t] on the straight path, in float64."""

    def __call__(self, x_t: torch.Tensor, timesteps: torch.Tensor, condition: dict) -> torch.Tensor:
        t = expand_to(timesteps.double() / 1000, x_t)
        variance = (1 - t) ** 2 * STD**2 + t**2
        off = (x_t - (1 - t) * MEAN) / variance
        return t * off - (MEAN + (1 - t) * STD**2 * off)


class InDouble(Denoiser):
    """A Denoiser that returns float64 instead of float32, to measure orders of convergence."""

    def __call__(self, x_t: torch.Tensor, t: float) -> torch.Tensor:
        x, alpha, sigma = self.schedule.network_view(x_t, t)
        output = self.network(x, torch.full((len(x),), t, dtype=torch.float64), {})
        return self.parameterisation.to_pred_x0(output, x, alpha, sigma)


def perfect(kind: type = InDouble) -> Denoiser:
    return kind(GaussianFlow(), FLOW, FlowPrediction(), {})


def exact(x: torch.Tensor, t: float, s: float) -> torch.Tensor:
    """Returns the exact solution at s of the probability-flow equation from x at t, both variance preserving."""

    def marginal(time: float) -> tuple[float, float]:
        alpha, sigma = FLOW.numbers(time)
        return alpha * MEAN, (alpha**2 * STD**2 + sigma**2) ** 0.5

    (mean_t, std_t), (mean_s, std_s) = marginal(t), marginal(s)
    return mean_s + std_s * (x - mean_t) / std_t


def test_training_walks_the_straight_path_and_learns_its_direction() -> None:
    latents, noise = torch.randn(2, 3, 4, 5, 5, dtype=torch.float64)
    t = torch.tensor([0.0, 250.0, 999.0], dtype=torch.float64)
    share = (t / 1000).view(-1, 1, 1, 1)
    torch.testing.assert_close(FLOW.add_noise(latents, noise, t), (1 - share) * latents + share * noise)
    objective = DiffusionObjective(FLOW, FlowPrediction())
    torch.testing.assert_close(objective.target(latents, noise, t), noise - latents)


@pytest.mark.parametrize("kind", [FlowPrediction(), Sample()])
def test_the_target_inverts_to_the_latents_and_back(kind) -> None:
    latents, noise = torch.randn(2, 3, 4, 5, 5, dtype=torch.float64)
    t = torch.tensor([1.0, 250.0, 999.0], dtype=torch.float64)
    x_t = FLOW.add_noise(latents, noise, t)
    alpha, sigma = (expand_to(v, x_t) for v in FLOW.training_coefficients(t))
    target = kind.target(latents, noise, alpha, sigma)
    torch.testing.assert_close(kind.to_pred_x0(target, x_t, alpha, sigma), latents)
    torch.testing.assert_close(kind.from_pred_x0(latents, x_t, alpha, sigma), target)


def test_the_direction_can_be_learned_on_a_variance_preserving_path_too() -> None:
    latents, noise = torch.randn(2, 1, 4, 5, 5, dtype=torch.float64)
    alpha, sigma = 0.8, 0.6
    x_t = alpha * latents + sigma * noise
    torch.testing.assert_close(FlowPrediction().to_pred_x0(noise - latents, x_t, alpha, sigma), latents)


def test_min_snr_weighs_an_error_in_x0_like_every_other_parameterisation() -> None:
    latents, noise, t = *torch.randn(2, 3, 4, 5, 5, dtype=torch.float64), torch.tensor([100.0, 500.0, 900.0])
    wrong = latents + 0.1 * torch.randn_like(latents)
    x_t, (alpha, sigma) = FLOW.add_noise(latents, noise, t), FLOW.training_coefficients(t)
    weighted = []
    for kind in (FlowPrediction(), Sample()):
        objective = DiffusionObjective(FLOW, kind, "min_snr")
        output = kind.from_pred_x0(wrong, x_t, expand_to(alpha, x_t), expand_to(sigma, x_t))
        weighted.append(objective(lambda x, s, o=output: o, latents, noise, t) * objective.weight(t))
    torch.testing.assert_close(weighted[0], weighted[1], rtol=1e-4, atol=0)


def test_times_are_uniform_or_logit_normal() -> None:
    uniform = torch.rand(20_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert stats.kstest(LinearFlow().training_times(uniform) / 1000, "uniform").pvalue > 1e-3
    drawn = LinearFlow("logit_normal", mean=-0.3, std=0.8).training_times(uniform) / 1000
    assert stats.kstest(torch.logit(drawn), "norm", args=(-0.3, 0.8)).pvalue > 1e-3


def test_strata_stay_strata() -> None:
    """A global batch draws once from every stratum of the density, here a logit-normal one."""
    flow = LinearFlow("logit_normal")
    drawn = DiffusionObjective(flow, FlowPrediction()).sample_timesteps(50)
    edges = flow.training_times(torch.arange(51, dtype=torch.float64) / 50)
    assert ((drawn >= edges[:-1]) & (drawn <= edges[1:])).all()


def test_levels_and_times_are_inverse_and_samplers_see_unit_variance() -> None:
    for t in (1.0, 250.0, 500.0, 999.0):
        alpha, sigma = FLOW.numbers(t)
        assert alpha**2 + sigma**2 == pytest.approx(1, abs=1e-12)
        assert sigma / alpha == pytest.approx(t / (1000 - t))
        assert FLOW.time_of(sigma / alpha) == pytest.approx(t)
    x = torch.randn(3, 2, 4, 4)
    one = torch.cat([FLOW.network_view(x[i : i + 1], t)[0] for i, t in enumerate((10.0, 500.0, 999.0))])
    torch.testing.assert_close(FLOW.network_view(x, torch.tensor([10.0, 500.0, 999.0]))[0], one)


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace", "karras"])
def test_times_fall_from_the_last_with_signal_to_the_clean_image(spacing: str) -> None:
    times = FLOW.timesteps(20, spacing)
    assert len(times) == 21
    assert times[-1] == 0
    assert times[0] <= FLOW.last_time + 1e-9
    assert (times.diff() < 0).all()
    FLOW.levels(times)  # raises if a level is infinite
    with pytest.raises(ValueError, match="no spacing 'compvis'"):
        FLOW.timesteps(20, "compvis")


@pytest.mark.parametrize(
    ("name", "order"),
    [("ddim", 1), ("euler", 1), ("heun", 2), ("2m", 2), ("2s", 2), ("unipc", 2), ("plms", 1.8), ("lms", 1.8)],
)
def test_samplers_keep_their_order_on_a_flow(name: str, order: float) -> None:
    x, errors = torch.randn(1, 1, 16, 16, dtype=torch.float64), []
    for count in (48, 96, 192):
        times = torch.linspace(900, 100, count + 1, dtype=torch.float64)
        out = DETERMINISTIC[name](perfect(), x, times, FLOW, NoiseSource([0]))
        errors.append((out - exact(x, 900, 100)).abs().max().item())
    orders = [log2(a / b) for a, b in pairwise(errors)]
    assert errors[-1] < (2e-2 if order == 1 else 1e-3), errors
    assert orders[-1] > order - 0.25, (orders, errors)


@pytest.mark.parametrize("name", [*ALL, "ddpm"])
def test_every_sampler_draws_the_data_from_noise(name: str) -> None:
    sampler = ddpm if name == "ddpm" else ALL[name]
    out = sampler(perfect(), torch.randn(1, 1, 128, 128), FLOW.timesteps(1000), FLOW, NoiseSource([5]))
    assert out.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert out.std().item() == pytest.approx(STD, rel=0.05)


@pytest.mark.parametrize("schedule", [FLOW, NoiseSchedule("cosine")], ids=["flow", "cosine"])
@pytest.mark.parametrize("name", DETERMINISTIC)
@pytest.mark.parametrize("steps", [4, 10])
def test_few_steps_from_very_high_noise_levels_do_not_overshoot(name: str, schedule: NoiseProcess, steps: int) -> None:
    """The first step divides the noise level by hundreds, over which no average of slopes holds."""

    def denoise(x_t: torch.Tensor, t: float) -> torch.Tensor:
        alpha, sigma = schedule.numbers(t)
        return MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x_t - alpha * MEAN)

    out = DETERMINISTIC[name](denoise, torch.randn(1, 1, 64, 64), schedule.timesteps(steps), schedule, NoiseSource([0]))
    assert 0.6 * STD < out.std().item() < 1.1 * STD


def test_ddim_on_a_flow_is_the_euler_method_of_diffusers() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    times = FLOW.timesteps(10)
    scheduler.set_timesteps(sigmas=(times[:-1] / 1000).tolist())
    x = torch.randn(2, 1, 8, 8)
    theirs = FLOW.network_view(x, float(times[0]))[0]
    for t in scheduler.timesteps:
        theirs = scheduler.step(GaussianFlow()(theirs, t.expand(2), {}).float(), t, theirs).prev_sample
    ours = ddim(perfect(Denoiser), x, times, FLOW, NoiseSource([0, 1]))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_inversion_finds_the_noise_a_picture_is_drawn_from() -> None:
    x, times = torch.randn(1, 1, 8, 8, dtype=torch.float64), FLOW.timesteps(50)
    drawn = ddim(perfect(), x, times, FLOW, NoiseSource([0]))
    again = ddim_inversion(perfect(), drawn, times, FLOW, iterations=100)
    torch.testing.assert_close(again, x, rtol=1e-5, atol=1e-5)


def test_guidance_acts_on_a_flow() -> None:
    x, t = torch.randn(2, 1, 4, 4), 500.0
    cond, other = perfect(Denoiser), Denoiser(lambda *a: 2 * GaussianFlow()(*a), FLOW, FlowPrediction(), {})
    both = classifier_free(cond, other, 3.0)(x, t)
    torch.testing.assert_close(both, other(x, t) + 3 * (cond(x, t) - other(x, t)))
    whole = classifier_free(cond, other, 3.0, rescale=1.0)(x, t)
    view, alpha, sigma = FLOW.network_view(x, t)
    spread = [FlowPrediction().from_pred_x0(x0, view, alpha, sigma).std(dim=(1, 2, 3)) for x0 in (whole, cond(x, t))]
    torch.testing.assert_close(*spread)
    guided = classifier_guidance(cond, lambda x, t: -x.square().sum(dim=(1, 2, 3)), FLOW, 1.0)(x, t)
    assert guided.isfinite().all()
    assert not torch.allclose(guided, cond(x, t))


def test_a_classifier_sees_on_a_flow_what_it_was_trained_on() -> None:
    flow, seen = LinearFlow(), []
    latents, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)

    def classifier(x_t: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        seen.append(x_t.detach())
        return x_t.flatten(1)[:, :3]

    guides = Guides.__new__(Guides)
    guides.model = SimpleNamespace(schedule=flow, device="cpu")
    guides.classifier, guides.clip, guides.scales = classifier, None, {"classifier": 1.0}
    (wrap,) = guides.wrappers([SimpleNamespace(targets={"class_label": k}) for k in (0, 2)])
    alpha, sigma = flow.pair(700.0, latents)
    wrap(lambda x, t: x)(alpha * latents + sigma * noise, 700.0)
    torch.testing.assert_close(seen[0], flow.add_noise(latents, noise, torch.tensor([700.0, 700.0])))


def test_flows_of_one_path_are_one_schedule_however_they_draw_times() -> None:
    uniform, normal = (schedule_identity(LinearFlow(times)) for times in ("uniform", "logit_normal"))
    assert uniform == normal
    assert uniform != schedule_identity(NoiseSchedule())


def test_what_a_flow_cannot_be_trained_with_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Epsilon cannot learn .* use diffusion/objective=flow"):
        DiffusionObjective(FLOW, Epsilon())
    with pytest.raises(ValueError, match="VPrediction is defined for variance-preserving"):
        DiffusionObjective(FLOW, VPrediction())
    for options, message in (
        ({"times": "cosine"}, "uniform or logit_normal"), ({"last": 1.0}, "between 0 and 1"), ({"std": 0.0}, "above 0"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            LinearFlow(**options)
