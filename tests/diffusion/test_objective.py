"""The objective: targets that invert to x_0, weights in closed form, timesteps stratified over the global batch."""

import pytest
import torch

from ldm_train.diffusion.objective import DiffusionObjective
from ldm_train.diffusion.parameterisation import Epsilon, Sample, VPrediction
from ldm_train.diffusion.process import expand_to
from ldm_train.diffusion.schedule import NoiseSchedule

SCHEDULE = NoiseSchedule()
KINDS = (Epsilon(), VPrediction(), Sample())


@pytest.mark.parametrize("kind", KINDS)
def test_the_target_inverts_to_the_latents(kind) -> None:
    objective = DiffusionObjective(SCHEDULE, kind)
    latents, noise = torch.randn(2, 5, 4, 3, 3, dtype=torch.float64)
    t = torch.tensor([0, 1, 250, 700, 999])
    x_t = SCHEDULE.add_noise(latents, noise, t)
    alpha, sigma, _ = SCHEDULE.at(t)
    target = objective.target(latents, noise, t)
    x0 = kind.to_pred_x0(target, x_t, expand_to(alpha, x_t), expand_to(sigma, x_t))
    torch.testing.assert_close(x0, latents, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_of_a_perfect_prediction_is_zero_and_of_another_its_mean_square(kind) -> None:
    objective = DiffusionObjective(SCHEDULE, kind)
    latents, noise, t = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.tensor([5, 500, 999])
    target = objective.target(latents, noise, t)
    assert objective(lambda x, s: target, latents, noise, t).tolist() == [0, 0, 0]
    offset = torch.tensor([1.0, 2.0, 3.0])
    loss = objective(lambda x, s: target + expand_to(offset, x), latents, noise, t)
    torch.testing.assert_close(loss, offset.square(), rtol=1e-5, atol=0)


def test_the_network_sees_the_noisy_latents_at_their_timesteps() -> None:
    latents, noise, t = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.tensor([5, 500, 999])
    seen = []
    DiffusionObjective(SCHEDULE)(lambda x, s: seen.append((x, s)) or x, latents, noise, t)
    torch.testing.assert_close(seen[0][0], SCHEDULE.add_noise(latents, noise, t), rtol=0, atol=0)
    assert torch.equal(seen[0][1], t)


@pytest.mark.parametrize(
    ("kind", "closed_form"),
    [
        (Epsilon(), lambda snr, clipped: clipped / snr),
        (Sample(), lambda snr, clipped: clipped),
        (VPrediction(), lambda snr, clipped: clipped / (snr + 1)),
    ],
)
def test_min_snr_weights_are_their_closed_form(kind, closed_form) -> None:
    objective = DiffusionObjective(SCHEDULE, kind, "min_snr", min_snr_gamma=3.0)
    t = torch.arange(1000)
    snr = SCHEDULE.alphas_cumprod / (1 - SCHEDULE.alphas_cumprod)
    torch.testing.assert_close(objective.weight(t), closed_form(snr, torch.minimum(snr, torch.tensor(3.0))).float())


@pytest.mark.parametrize("kind", [VPrediction(), Sample()])
def test_min_snr_leaves_no_timestep_untrained_where_no_signal_is_left(kind) -> None:
    schedule = NoiseSchedule(zero_terminal_snr=True)
    assert schedule.snr[-1] == 0
    weight = DiffusionObjective(schedule, kind, "min_snr").weight(torch.arange(1000))
    assert (weight > 0).all()
    assert weight[-1] == 1
    clipped = schedule.snr[:-1].clamp(max=5.0)  # every other step has the paper's weight
    expected = clipped if isinstance(kind, Sample) else clipped / (schedule.snr[:-1] + 1)
    torch.testing.assert_close(weight[:-1], expected.float())


def test_at_no_signal_v_and_the_clean_latents_are_one_target() -> None:
    """They are equal up to the sign, so one weight is right for both."""
    schedule, last = NoiseSchedule(zero_terminal_snr=True), torch.tensor([999])
    latents, noise = torch.randn(2, 1, 4, 3, 3, dtype=torch.float64).unbind(0)
    v = DiffusionObjective(schedule, VPrediction()).target(latents, noise, last)
    torch.testing.assert_close(-v, DiffusionObjective(schedule, Sample()).target(latents, noise, last))


def test_min_snr_weighs_the_same_error_in_x0_alike_for_every_parameterisation() -> None:
    """For one estimate of x_0, weight x loss is the same in all three parameterisations."""
    latents, noise, t = torch.randn(2, 4, 2, 4, 4, dtype=torch.float64).unbind(0) + (torch.tensor([3, 200, 600, 999]),)
    wrong = latents + 0.1 * torch.randn_like(latents)
    abar = expand_to(SCHEDULE.alphas_cumprod[t], latents)
    x_t = SCHEDULE.add_noise(latents, noise, t)
    eps = (x_t - abar.sqrt() * wrong) / (1 - abar).sqrt()
    outputs = {Sample: wrong, Epsilon: eps, VPrediction: abar.sqrt() * eps - (1 - abar).sqrt() * wrong}
    weighted = []
    for kind, output in outputs.items():
        objective = DiffusionObjective(SCHEDULE, kind(), "min_snr")
        weighted.append(objective(lambda x, s, o=output: o, latents, noise, t) * objective.weight(t))
    torch.testing.assert_close(weighted[1], weighted[0], rtol=1e-3, atol=0)
    torch.testing.assert_close(weighted[2], weighted[0], rtol=1e-3, atol=0)


def test_l1_is_the_mean_absolute_error() -> None:
    latents, noise, t = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.tensor([5, 500, 999])
    output = torch.randn_like(noise)
    loss = DiffusionObjective(SCHEDULE, loss="l1")(lambda x, s: output, latents, noise, t)
    torch.testing.assert_close(loss, (output - noise).abs().flatten(1).mean(dim=1))


def test_learned_uncertainty_settles_at_the_logarithm_of_the_loss() -> None:
    """At each timestep, loss / exp(u) + u has its minimum at u = ln(loss)."""
    objective = DiffusionObjective(SCHEDULE, weighting="learned")
    optimizer = torch.optim.Adam(objective.parameters(), lr=0.05)
    t, loss = torch.tensor([3, 400, 999]), torch.tensor([0.02, 0.5, 3.0])
    for _ in range(400):
        optimizer.zero_grad()
        objective.weighted(loss, t).sum().backward()
        optimizer.step()
    torch.testing.assert_close(objective.uncertainty.detach()[t], loss.log(), rtol=0.01, atol=0.01)
    torch.testing.assert_close(objective.weight(t), 1 / loss, rtol=0.02, atol=0)
    assert objective.uncertainty[4] == 0


def test_offset_noise_adds_a_constant_per_picture_and_channel() -> None:
    noise = DiffusionObjective(SCHEDULE, offset_noise=0.5).draw_noise(torch.zeros(400, 3, 8, 8))
    assert noise.mean(dim=(2, 3)).var().item() == pytest.approx(0.25 + 1 / 64, rel=0.1)
    assert (noise - noise.mean(dim=(2, 3), keepdim=True)).var().item() == pytest.approx(1 - 1 / 64, rel=0.02)


def test_epsilon_is_refused_without_signal_at_the_end() -> None:
    with pytest.raises(ValueError, match=r"zero_terminal_snr.*diffusion/objective=v"):
        DiffusionObjective(NoiseSchedule(zero_terminal_snr=True))


def test_uniform_weights_are_one() -> None:
    assert DiffusionObjective(SCHEDULE).weight(torch.tensor([0, 999])).tolist() == [1, 1]


def test_one_timestep_per_stratum_over_ranks_and_micro_batches() -> None:
    objective, count, world, accumulate = DiffusionObjective(SCHEDULE), 5, 2, 4
    total = count * world * accumulate  # 40 strata of 25 timesteps
    drawn = []
    for part in range(world * accumulate):
        generator = torch.Generator().manual_seed(part)
        drawn.append(objective.sample_timesteps(count, part, world * accumulate, generator))
    strata = torch.cat(drawn) // (1000 // total)
    assert sorted(strata.tolist()) == list(range(total))
    # Every part spans the schedule: its loss, which is what is logged, is comparable with that of a whole batch.
    assert all((times * count // 1000).tolist() == list(range(count)) for times in drawn)


@pytest.mark.parametrize("stratified", [True, False])
def test_timesteps_are_uniform_in_expectation(stratified: bool) -> None:
    objective = DiffusionObjective(SCHEDULE, stratified=stratified)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([objective.sample_timesteps(7, generator=generator) for _ in range(20_000)])
    assert drawn.dtype == torch.int64
    assert (drawn.min().item(), drawn.max().item()) == (0, 999)
    counts = torch.bincount(drawn // 100, minlength=10).double()
    # 14,000 expected per tenth; a multinomial count has a standard deviation of about 112.
    assert (counts - 14_000).abs().max() < 560


def test_stratified_means_vary_less() -> None:
    def spread(stratified: bool) -> float:
        objective, generator = DiffusionObjective(SCHEDULE, stratified=stratified), torch.Generator().manual_seed(0)
        means = [objective.sample_timesteps(16, generator=generator).double().mean() for _ in range(500)]
        return torch.stack(means).std().item()

    assert spread(True) < 0.2 * spread(False)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="weighting 'p2' is not one of"):
        DiffusionObjective(SCHEDULE, weighting="p2")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("betas", ["scaled_linear", "linear", "cosine"])
def test_epsilon_on_a_schedule_that_ends_without_signal_is_warned_of_with_the_remedy(kind, betas: str) -> None:
    said = DiffusionObjective(NoiseSchedule(betas, 1e-4, 2e-2), kind).warning()
    if betas == "cosine" and isinstance(kind, Epsilon):
        assert "signal-to-noise ratio of 2e-09" in said
        assert "diffusion/objective=v" in said
    else:
        assert said == ""
