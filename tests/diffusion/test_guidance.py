"""Classifier-free guidance (affine, the same in one batched call and in two, free at scale 1), its options,
classifier and score guidance, and known latents that are kept."""

from functools import partial

import pytest
import torch

from ldm_train.diffusion.denoiser import Denoiser
from ldm_train.diffusion.guidance import HIGHEST, classifier_free, classifier_guidance, keep_known, score_guidance
from ldm_train.diffusion.parameterisation import Epsilon, Sample, VPrediction
from ldm_train.diffusion.process import expand_to
from ldm_train.diffusion.schedule import NoiseSchedule
from ldm_train.rng import NoiseSource
from ldm_train.samplers.ddim import ddim
from ldm_train.samplers.dpm_solver import dpm_solver
from ldm_train.samplers.euler import euler
from ldm_train.samplers.heun import heun
from ldm_train.samplers.unipc import unipc

SCHEDULE = NoiseSchedule()


class Network:
    """A function of all its inputs that counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x_t: torch.Tensor, timesteps: torch.Tensor, condition: dict) -> torch.Tensor:
        self.calls += 1
        shift = condition["vector"].sum(dim=1) + condition["context"].mean(dim=(1, 2))
        return torch.sin(x_t) * expand_to(timesteps / 1000, x_t) + expand_to(shift, x_t)


def condition(count: int = 3) -> dict[str, torch.Tensor]:
    return {"vector": torch.randn(count, 4), "context": torch.randn(count, 5, 2)}


@pytest.mark.parametrize("kind", [Epsilon(), VPrediction(), Sample()])
def test_batched_and_two_calls_agree(kind) -> None:
    network, x_t, t = Network(), torch.randn(3, 2, 4, 4), 321.5
    cond, uncond = (Denoiser(network, SCHEDULE, kind, condition()) for _ in range(2))
    batched = classifier_free(cond, uncond, 4.0)(x_t, t)
    assert network.calls == 1
    separate = classifier_free(lambda x, s: cond(x, s), lambda x, s: uncond(x, s), 4.0)(x_t, t)
    assert network.calls == 3
    torch.testing.assert_close(batched, separate)
    torch.testing.assert_close(batched, uncond(x_t, t) + 4.0 * (cond(x_t, t) - uncond(x_t, t)))


def test_scale_one_is_the_denoiser_itself() -> None:
    cond, uncond = (Denoiser(Network(), SCHEDULE, Epsilon(), condition()) for _ in range(2))
    assert classifier_free(cond, uncond, 1.0) is cond


def test_scale_zero_is_unconditional() -> None:
    network, x_t = Network(), torch.randn(3, 2, 4, 4)
    cond, uncond = (Denoiser(network, SCHEDULE, Epsilon(), condition()) for _ in range(2))
    torch.testing.assert_close(classifier_free(cond, uncond, 0.0)(x_t, 10.0), uncond(x_t, 10.0))


def test_mixing_x0_equals_mixing_epsilon() -> None:
    network, x_t, t = Network(), torch.randn(3, 2, 4, 4), 600
    c, u = condition(), condition()
    guided = classifier_free(*(Denoiser(network, SCHEDULE, Epsilon(), k) for k in (c, u)), 3.0)(x_t, t)
    times = torch.full((3,), float(t))
    eps = network(x_t, times, u) + 3.0 * (network(x_t, times, c) - network(x_t, times, u))
    alpha, sigma, _ = SCHEDULE.at(t)
    torch.testing.assert_close(guided, (x_t - sigma.float() * eps) / alpha.float(), rtol=1e-4, atol=1e-4)


def test_denoisers_of_two_models_are_evaluated_apart() -> None:
    ours, other = Network(), Network()
    guided = classifier_free(
        Denoiser(ours, SCHEDULE, Epsilon(), condition()), Denoiser(other, SCHEDULE, Epsilon(), condition()), 2.0
    )
    guided(torch.randn(3, 2, 4, 4), 5.0)
    assert (ours.calls, other.calls) == (1, 1)


def test_times_may_differ_within_a_batch() -> None:
    network, x_t, c = Network(), torch.randn(3, 2, 4, 4), condition()
    together = Denoiser(network, SCHEDULE, Epsilon(), c)(x_t, torch.tensor([10.0, 500.0, 999.0]))
    for i, t in enumerate((10.0, 500.0, 999.0)):
        alone = Denoiser(network, SCHEDULE, Epsilon(), {k: v[i : i + 1] for k, v in c.items()})(x_t[i : i + 1], t)
        torch.testing.assert_close(together[i : i + 1], alone)


def test_pred_x0_is_float32_whatever_the_precision_of_the_network() -> None:
    def half(x_t: torch.Tensor, timesteps: torch.Tensor, c: dict) -> torch.Tensor:
        return x_t.half()

    x_t = torch.randn(2, 1, 4, 4)
    assert Denoiser(half, SCHEDULE, Epsilon(), {})(x_t, 700.0).dtype == torch.float32
    assert Denoiser(half, SCHEDULE, Epsilon(), {})(x_t.half(), 700.0).dtype == torch.float32


def guided_pair() -> tuple[Network, Denoiser, Denoiser]:
    network = Network()
    return network, *(Denoiser(network, SCHEDULE, Epsilon(), condition()) for _ in range(2))


def test_guidance_acts_inside_its_interval_only() -> None:
    network, cond, uncond = guided_pair()
    x_t = torch.randn(3, 2, 4, 4)
    levels = SCHEDULE.levels(torch.tensor([200.0, 500.0, 800.0]))[1]
    guided = classifier_free(cond, uncond, 4.0, interval=(levels[0] + 1e-6, levels[2] - 1e-6))
    for t, inside in ((200.0, False), (500.0, True), (800.0, False)):
        network.calls = 0
        expected = classifier_free(cond, uncond, 4.0)(x_t, t) if inside else cond(x_t, t)
        assert torch.equal(guided(x_t, t), expected)
    assert network.calls == 2  # outside: one for the reference and one for the guided denoiser


def test_an_interval_without_an_upper_end_holds_pure_noise() -> None:
    network, schedule = Network(), NoiseSchedule("scaled_linear", 1e-4, 2e-2, zero_terminal_snr=True)
    cond, uncond = (Denoiser(network, schedule, VPrediction(), condition()) for _ in range(2))
    x_t, whole = torch.randn(3, 2, 4, 4), classifier_free(cond, uncond, 4.0)
    assert torch.equal(classifier_free(cond, uncond, 4.0, interval=(0.0, HIGHEST))(x_t, 999.0), whole(x_t, 999.0))
    assert not torch.equal(classifier_free(cond, uncond, 4.0, interval=(0.0, 1e5))(x_t, 999.0), whole(x_t, 999.0))


@pytest.mark.parametrize("kind", [Epsilon(), VPrediction()])
def test_rescale_brings_the_output_back_to_its_own_deviation(kind) -> None:
    network, x_t, t = Network(), torch.randn(3, 2, 4, 4), 400.0
    cond, uncond = (Denoiser(network, SCHEDULE, kind, condition()) for _ in range(2))
    alpha, sigma, _ = (v.float() for v in SCHEDULE.at(t))

    def output(x0: torch.Tensor) -> torch.Tensor:
        return kind.from_pred_x0(x0, x_t, alpha, sigma)

    plain, free = output(cond(x_t, t)), output(classifier_free(cond, uncond, 7.5)(x_t, t))
    whole = output(classifier_free(cond, uncond, 7.5, rescale=1.0)(x_t, t))
    torch.testing.assert_close(whole.std(dim=(1, 2, 3)), plain.std(dim=(1, 2, 3)), rtol=1e-3, atol=1e-4)
    part = output(classifier_free(cond, uncond, 7.5, rescale=0.7)(x_t, t))
    torch.testing.assert_close(part, 0.7 * whole + 0.3 * free, rtol=1e-3, atol=1e-4)  # Lin et al., eq. 16


def test_an_output_and_its_estimate_are_inverse() -> None:
    x_t, output = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    alpha, sigma, _ = (v.float() for v in SCHEDULE.at(321.0))
    for kind in (Epsilon(), VPrediction(), Sample()):
        again = kind.from_pred_x0(kind.to_pred_x0(output, x_t, alpha, sigma), x_t, alpha, sigma)
        torch.testing.assert_close(again, output, rtol=1e-4, atol=1e-4)


def test_thresholding_keeps_the_unguided_range() -> None:
    _, cond, uncond = guided_pair()
    x_t, t = torch.randn(3, 2, 16, 16), 300.0
    free = classifier_free(cond, uncond, 20.0)(x_t, t)
    kept = classifier_free(cond, uncond, 20.0, threshold=95.0)(x_t, t)
    usual = torch.quantile(cond(x_t, t).abs().flatten(1), 0.95, dim=1)
    found = torch.quantile(free.abs().flatten(1), 0.95, dim=1)
    for i in range(3):
        if found[i] > usual[i]:
            assert kept[i].abs().max() <= usual[i] * 1.0001
        else:
            assert torch.equal(kept[i], free[i])
    assert (found > usual).any()


def test_what_is_known_stays_exactly() -> None:
    _, cond, uncond = guided_pair()
    known, mask = torch.randn(3, 2, 4, 4), torch.zeros(3, 1, 4, 4)
    mask[:, :, 1:3, 1:3] = 1
    times, start = SCHEDULE.timesteps(7), torch.randn(3, 2, 4, 4)
    hole = mask.expand_as(known) > 0.5
    for sampler in (ddim, partial(ddim, eta=1.0), dpm_solver, heun, unipc, euler):
        denoise = keep_known(classifier_free(cond, uncond, 3.0), known, mask)
        out = sampler(denoise, start, times, SCHEDULE, NoiseSource([0, 1, 2]))
        if sampler in (heun, euler):  # these work on x / alpha, which rounds
            torch.testing.assert_close(out[~hole], known[~hole])
        else:
            assert torch.equal(out[~hole], known[~hole])
        assert not torch.allclose(out[hole], known[hole], atol=0.01)


def test_options_that_mean_nothing_are_named() -> None:
    _, cond, uncond = guided_pair()
    for options, message in (
        ({"rescale": 2.0}, r"guidance\.rescale is a share"),
        ({"threshold": 0.0}, r"guidance\.threshold is a percentile"),
        ({"interval": (3.0, 1.0)}, r"guidance\.interval is \[low, high\]"),
    ):
        with pytest.raises(ValueError, match=message):
            classifier_free(cond, uncond, 2.0, **options)
    kept = keep_known(cond, torch.zeros(3, 2, 4, 4), torch.ones(3, 1, 4, 4))
    with pytest.raises(ValueError, match="put other guidance around it, not inside"):
        classifier_free(kept, uncond, 2.0, rescale=0.5)


def test_joined_conditions_are_the_same_tensors_in_every_step() -> None:
    seen = []

    def network(x_t: torch.Tensor, timesteps: torch.Tensor, c: dict) -> torch.Tensor:
        seen.append(c["context"])
        return x_t

    cond, uncond = (Denoiser(network, SCHEDULE, Epsilon(), condition()) for _ in range(2))
    guided, x_t = classifier_free(cond, uncond, 2.0), torch.randn(3, 2, 4, 4)
    guided(x_t, 5.0)
    guided(x_t, 4.0)
    assert seen[0] is seen[1]
    cond(x_t, 3.0)  # without guidance: replaces the cached joined condition
    assert len(seen[2]) == 3
    guided(x_t, 2.0)
    assert torch.equal(seen[3], seen[0])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("t", [5.0, 400.0, torch.tensor([90.0, 700.5])])
def test_classifier_guidance_is_bayes_rule(t: float | torch.Tensor, mode: type) -> None:
    """Data N(0, 1), a label whose likelihood is N(x0; 2, 0.5^2): guided by grad log p(y | x_t), the posterior mean
    E[x0 | x_t] becomes E[x0 | x_t, y], both known in closed form."""
    centre, spread = 2.0, 0.5
    alpha, sigma = (torch.as_tensor(v).double() for v in SCHEDULE.pair(t, torch.zeros(2, 1, 1, 1, dtype=torch.float64)))
    x_t = torch.randn(2, 3, 4, 4, dtype=torch.float64)

    def log_probability(x: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        a, s = SCHEDULE.pair(times.double(), x.double())
        return (-((a * x - centre) ** 2) / (2 * (s**2 + spread**2))).flatten(1).sum(1)  # x0 | x_t is N(a x, s^2)

    with mode():
        guided = classifier_guidance(lambda x, _: alpha * x, log_probability, SCHEDULE, 1.0)(x_t, t)
    posterior = (alpha * x_t / sigma**2 + centre / spread**2) / (1 / sigma**2 + 1 / spread**2)
    torch.testing.assert_close(guided.double(), posterior, rtol=1e-4, atol=1e-4)


def test_score_guidance_moves_the_estimate_by_the_gradient_times_the_variance() -> None:
    x_t, direction = torch.randn(2, 3, 4, 4), torch.randn(3, 4, 4)
    _, sigma = SCHEDULE.numbers(300.0)
    with torch.inference_mode():
        guided = score_guidance(lambda x, _: 0.3 * x, lambda x0: (x0 * direction).sum(dim=(1, 2, 3)), SCHEDULE, 2.0)(
            x_t, 300.0
        )
    torch.testing.assert_close(guided, 0.3 * x_t + 2.0 * sigma**2 * direction)


def test_outside_guides_of_scale_zero_are_not_there() -> None:
    def denoise(x: torch.Tensor, t: float) -> torch.Tensor:
        return x

    assert classifier_guidance(denoise, None, SCHEDULE, 0.0) is denoise
    assert score_guidance(denoise, None, SCHEDULE, 0.0) is denoise


def test_classifier_guidance_refuses_a_schedule_without_signal_at_its_end() -> None:
    with pytest.raises(ValueError, match="ends without any"):
        classifier_guidance(lambda x, t: x, None, NoiseSchedule(zero_terminal_snr=True), 1.0)


def test_guides_compose_and_what_is_known_stays() -> None:
    network, x_t = Network(), torch.randn(3, 2, 4, 4)
    cond, uncond = (Denoiser(network, SCHEDULE, Epsilon(), condition()) for _ in range(2))
    known, mask = torch.randn(3, 2, 4, 4), torch.zeros(3, 1, 4, 4)
    mask[..., :2] = 1
    inner = classifier_free(cond, uncond, 3.0)
    guided = score_guidance(inner, lambda x0: x0.sum(dim=(1, 2, 3)), SCHEDULE, 1.0)
    guided = classifier_guidance(guided, lambda x, t: x.sum(dim=(1, 2, 3)), SCHEDULE, 1.0)
    made = keep_known(guided, known, mask)(x_t, 500.0)
    alpha, sigma = SCHEDULE.numbers(500.0)
    wanted = inner(x_t, 500.0) + sigma**2 + sigma**2 / alpha
    torch.testing.assert_close(made[..., :2], wanted[..., :2])
    assert torch.equal(made[..., 2:], known[..., 2:])
    with pytest.raises(ValueError, match="put other guidance around it, not inside"):
        classifier_free(guided, uncond, 3.0, rescale=0.5)
