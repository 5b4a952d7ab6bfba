"""Classifier-free guidance: affine, the same batched and in two calls, free at scale 1."""

import pytest
import torch

from ldm_train.diffusion.denoiser import Denoiser
from ldm_train.diffusion.guidance import classifier_free
from ldm_train.diffusion.schedule import NoiseSchedule, expand_to

SCHEDULE = NoiseSchedule()


class Network:
    """Some function of everything it is given; counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x_t: torch.Tensor, timesteps: torch.Tensor, condition: dict) -> torch.Tensor:
        self.calls += 1
        shift = condition["vector"].sum(dim=1) + condition["context"].mean(dim=(1, 2))
        return torch.sin(x_t) * expand_to(timesteps / 1000, x_t) + expand_to(shift, x_t)


def condition(count: int = 3) -> dict[str, torch.Tensor]:
    return {"vector": torch.randn(count, 4), "context": torch.randn(count, 5, 2)}


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_batched_and_two_calls_agree(prediction_type: str) -> None:
    network, x_t, t = Network(), torch.randn(3, 2, 4, 4), 321.5
    cond, uncond = (Denoiser(network, SCHEDULE, prediction_type, condition()) for _ in range(2))
    batched = classifier_free(cond, uncond, 4.0)(x_t, t)
    assert network.calls == 1
    apart = classifier_free(lambda x, s: cond(x, s), lambda x, s: uncond(x, s), 4.0)(x_t, t)
    assert network.calls == 3
    torch.testing.assert_close(batched, apart)
    torch.testing.assert_close(batched, uncond(x_t, t) + 4.0 * (cond(x_t, t) - uncond(x_t, t)))


def test_scale_one_is_the_denoiser_itself() -> None:
    cond, uncond = (Denoiser(Network(), SCHEDULE, "epsilon", condition()) for _ in range(2))
    assert classifier_free(cond, uncond, 1.0) is cond


def test_scale_zero_is_unconditional() -> None:
    network, x_t = Network(), torch.randn(3, 2, 4, 4)
    cond, uncond = (Denoiser(network, SCHEDULE, "epsilon", condition()) for _ in range(2))
    torch.testing.assert_close(classifier_free(cond, uncond, 0.0)(x_t, 10.0), uncond(x_t, 10.0))


def test_mixing_x0_equals_mixing_epsilon() -> None:
    network, x_t, t = Network(), torch.randn(3, 2, 4, 4), 600
    c, u = condition(), condition()
    guided = classifier_free(*(Denoiser(network, SCHEDULE, "epsilon", k) for k in (c, u)), 3.0)(x_t, t)
    times = torch.full((3,), float(t))
    eps = network(x_t, times, u) + 3.0 * (network(x_t, times, c) - network(x_t, times, u))
    alpha, sigma, _ = SCHEDULE.at(t)
    torch.testing.assert_close(guided, (x_t - sigma.float() * eps) / alpha.float(), rtol=1e-4, atol=1e-4)


def test_denoisers_of_two_models_are_evaluated_apart() -> None:
    ours, other = Network(), Network()
    guided = classifier_free(
        Denoiser(ours, SCHEDULE, "epsilon", condition()), Denoiser(other, SCHEDULE, "epsilon", condition()), 2.0
    )
    guided(torch.randn(3, 2, 4, 4), 5.0)
    assert (ours.calls, other.calls) == (1, 1)


def test_times_may_differ_within_a_batch() -> None:
    network, x_t, c = Network(), torch.randn(3, 2, 4, 4), condition()
    together = Denoiser(network, SCHEDULE, "epsilon", c)(x_t, torch.tensor([10.0, 500.0, 999.0]))
    for i, t in enumerate((10.0, 500.0, 999.0)):
        alone = Denoiser(network, SCHEDULE, "epsilon", {k: v[i : i + 1] for k, v in c.items()})(x_t[i : i + 1], t)
        torch.testing.assert_close(together[i : i + 1], alone)


def test_pred_x0_is_float32_whatever_the_precision_of_the_network() -> None:
    def half(x_t: torch.Tensor, timesteps: torch.Tensor, c: dict) -> torch.Tensor:
        return x_t.half()

    x_t = torch.randn(2, 1, 4, 4)
    assert Denoiser(half, SCHEDULE, "epsilon", {})(x_t, 700.0).dtype == torch.float32
    assert Denoiser(half, SCHEDULE, "epsilon", {})(x_t.half(), 700.0).dtype == torch.float32
