"""Averaging, learning-rate schedules and clipping."""

import copy
import math

import pytest
import torch
from torch import nn

from ldm_train.training.optim import EMA, clip_by_group, lr_multiplier


def train(module: nn.Module, steps: int, after) -> None:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        module(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
        after()


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9999])
def test_ema_is_its_formula_with_warm_up(decay: float) -> None:
    module = nn.Linear(3, 2)
    ema = EMA(module, decay)
    expected = {name: p.detach().double() for name, p in module.named_parameters()}
    updates = 0

    def after() -> None:
        nonlocal updates
        ema.update()
        updates += 1
        d = min(decay, (1 + updates) / (10 + updates))
        for name, p in module.named_parameters():
            expected[name] = d * expected[name] + (1 - d) * p.detach().double()

    train(module, 30, after)
    assert ema.updates == 30
    for name, value in ema.shadow.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-7)


def test_applied_brings_the_averages_and_restores_bit_exactly() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    ema = EMA(module, 0.9)
    train(module, 5, ema.update)
    raw = copy.deepcopy(module.state_dict())
    addresses = [p.data_ptr() for p in module.parameters()]
    with ema.applied():
        for name, p in module.named_parameters():
            assert torch.equal(p, ema.shadow[name])
            assert not torch.equal(p, raw[name])
    with pytest.raises(RuntimeError, match="inside"), ema.applied():
        raise RuntimeError("inside")
    assert all(torch.equal(value, raw[name]) for name, value in module.state_dict().items())
    assert [p.data_ptr() for p in module.parameters()] == addresses  # the optimiser's own parameters


def test_ema_covers_exactly_the_trainable_parameters() -> None:
    module = nn.ModuleDict({"live": nn.Linear(2, 2), "frozen": nn.Linear(2, 2).requires_grad_(False)})
    assert EMA(module, 0.9).shadow.keys() == {"live.weight", "live.bias"}


def test_ema_resumes_exactly() -> None:
    module = nn.Linear(3, 2)
    ema = EMA(module, 0.99)
    train(module, 4, ema.update)
    twin = copy.deepcopy(module)
    resumed = EMA(twin, 0.99)
    resumed.load_state_dict(copy.deepcopy(ema.state_dict()))
    for m, e in ((module, ema), (twin, resumed)):
        torch.manual_seed(1)
        train(m, 3, e.update)
    assert resumed.updates == 7
    assert all(torch.equal(resumed.shadow[n], ema.shadow[n]) for n in ema.shadow)


def test_averages_of_other_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="EMA of other parameters"):
        EMA(nn.Linear(2, 2), 0.9).load_state_dict(EMA(nn.Linear(2, 2, bias=False), 0.9).state_dict())
    with pytest.raises(ValueError, match="ema_decay must be in"):
        EMA(nn.Linear(2, 2), 1.0)


@pytest.mark.parametrize(
    ("schedule", "closed_form"),
    [
        ("constant", lambda p: 1.0),
        ("linear", lambda p: 1 - 0.9 * p),
        ("cosine", lambda p: 0.1 + 0.9 * (1 + math.cos(math.pi * p)) / 2),
    ],
)
def test_learning_rate_warms_up_then_follows_its_schedule(schedule: str, closed_form) -> None:
    factor = lr_multiplier(schedule, max_steps=110, warmup_steps=10, final=0.1)
    assert [factor(s) for s in range(10)] == pytest.approx([s / 10 for s in range(10)])
    assert [factor(s) for s in (10, 35, 60, 110)] == pytest.approx([closed_form(p) for p in (0, 0.25, 0.5, 1)])
    assert factor(500) == factor(110)


def published(n: int, warm_up: int, start: float, peak: float, least: float, end: int) -> float:
    """Latent diffusion's LambdaWarmUpCosineScheduler; with peak = least = 1 its LambdaLinearScheduler as released."""
    if n < warm_up:
        return (peak - start) / warm_up * n + start
    return least + 0.5 * (peak - least) * (1 + math.cos(math.pi * min((n - warm_up) / (end - warm_up), 1.0)))


@pytest.mark.parametrize(
    ("schedule", "final", "start", "warm_up"),
    [("constant", 1.0, 1e-6, 10_000), ("cosine", 1e-3, 0.01, 1_000)],  # lsun_churches, inpainting_big
)
def test_warm_up_is_the_published_one_step_for_step(schedule: str, final: float, start: float, warm_up: int) -> None:
    factor = lr_multiplier(schedule, 50_000, warm_up, final, start)
    steps = [0, 1, 2, warm_up // 2, warm_up - 1, warm_up, warm_up + 1, 30_000, 50_000, 60_000]
    expected = [published(n, warm_up, start, 1.0, final, 50_000) for n in steps]
    assert [factor(n) for n in steps] == pytest.approx(expected, rel=1e-9)


def test_without_warm_up_the_first_step_has_the_full_rate() -> None:
    assert lr_multiplier("cosine", 10)(0) == 1.0


def test_an_unknown_schedule_is_named() -> None:
    with pytest.raises(ValueError, match="not 'step'"):
        lr_multiplier("step", 10)


def test_clipping_one_group_leaves_the_other() -> None:
    big, small = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))
    big.grad, small.grad = torch.full((4,), 50.0), torch.full((4,), 0.1)
    norms = clip_by_group([{"params": [big], "name": "big"}, {"params": [small], "name": "small"}], max_norm=1.0)
    assert {k: v.item() for k, v in norms.items()} == pytest.approx({"big": 100.0, "small": 0.2})
    assert big.grad.norm().item() == pytest.approx(1.0, rel=1e-4)
    assert small.grad.tolist() == pytest.approx([0.1] * 4)
