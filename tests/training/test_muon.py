"""Muon against torch's own for matrices, the singular values of its steps, and AdamW for all else; resumed and skipped steps."""

import copy

import pytest
import torch
from torch import nn

from ldm_train.training.muon import Muon, orthogonalised, split_matrices


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.begin = nn.Conv2d(3, 24, 3, padding=1)
        self.middle = nn.Conv2d(24, 40, 3, padding=1)
        self.norm = nn.GroupNorm(4, 40)
        self.linear = nn.Linear(40, 20)
        self.tall = nn.Linear(20, 60, bias=False)
        self.end = nn.Linear(60, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.end(
            self.tall(self.linear(self.norm(self.middle(self.begin(x)).relu()).mean(dim=(2, 3))).relu()).relu()
        )


def trained(network: nn.Module, optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> nn.Module:
    for step in range(first, first + steps):
        images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (network(images) - images.mean(dim=(2, 3))[:, :1]).square().mean().backward()
        optimizer.step()
    return network


def muon(network: nn.Module, **options: float) -> Muon:
    groups = [{"params": list(network.parameters()), "name": "network"}]
    return Muon(split_matrices(groups, network), lr=1e-3, **options)


def test_weights_of_layers_are_apart_but_for_narrow_ones() -> None:
    network = Small()
    rest, matrices = split_matrices([{"params": list(network.parameters()), "name": "network"}], network)
    names = {p: name for name, p in network.named_parameters()}
    # The first layer is a matrix of 24 x 27.
    assert [names[p] for p in matrices["params"]] == ["begin.weight", "middle.weight", "linear.weight", "tall.weight"]
    assert len(rest["params"]) + len(matrices["params"]) == len(names)
    assert (rest["name"], matrices["name"]) == ("network", "network_matrices")


def test_groups_of_other_networks_stay_as_they_are() -> None:
    ours, other = Small(), Small()
    groups = [
        {"params": list(n.parameters()), "name": name} for n, name in ((ours, "network"), (other, "discriminator"))
    ]
    last = split_matrices(groups, ours)[-1]
    assert last["params"] == list(other.parameters())
    assert not last["matrices"]


@pytest.mark.parametrize("shape", [(20, 20), (16, 200), (300, 40), (5, 24, 60)])
def test_steps_are_nearly_orthogonal(shape: tuple[int, ...]) -> None:
    """All singular values within what the coefficients lead to, and the singular vectors those of the gradient."""
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    found = u.mT @ orthogonalised(matrices) @ vh.mT
    values = found.diagonal(dim1=-2, dim2=-1)
    assert values.min() > 0.65
    assert values.max() < 1.25
    torch.testing.assert_close(found, torch.diag_embed(values), rtol=0, atol=1e-5)


def test_matrices_move_as_with_torchs_muon() -> None:
    """Torch's computes in bfloat16, whose steps of 2^-8 five iterations multiply to some percent of a step."""
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(shape) * 0.1) for shape in ((24, 96), (80, 32))]
    theirs = [nn.Parameter(w.detach().clone()) for w in weights]
    ours = Muon([{"params": weights, "matrices": True}], lr=1e-3, matrix_scale=20.0, momentum=0.9, weight_decay=0.1)
    reference = torch.optim.Muon(theirs, lr=0.02, momentum=0.9, weight_decay=0.1)
    begun = [w.detach().clone() for w in weights]
    for _ in range(6):
        for w, v in zip(weights, theirs):
            w.grad = torch.randn_like(w)
            v.grad = w.grad.clone()
        ours.step()
        reference.step()
    for w, v, start in zip(weights, theirs, begun):
        assert (w - v).norm() < 0.02 * (w - start).norm()


def test_a_convolution_is_the_matrix_of_its_output_channels() -> None:
    torch.manual_seed(0)
    kernel = nn.Parameter(torch.randn(24, 16, 3, 3).contiguous(memory_format=torch.channels_last))
    matrix = nn.Parameter(kernel.detach().reshape(24, -1).clone())
    both = Muon([{"params": [kernel], "matrices": True}, {"params": [matrix], "matrices": True}])
    kernel.grad = torch.randn_like(kernel)
    matrix.grad = kernel.grad.reshape(24, -1).clone()
    both.step()
    assert torch.equal(kernel.reshape(24, -1), matrix)


def test_all_else_moves_as_with_adamw() -> None:
    """To the bit where no matrix is apart."""
    torch.manual_seed(0)
    ours, theirs = Small(), Small()
    theirs.load_state_dict(ours.state_dict())
    options = {"lr": 2e-3, "betas": (0.9, 0.95), "weight_decay": 0.05}
    trained(ours, Muon(ours.parameters(), **options), 5)
    trained(theirs, torch.optim.AdamW(theirs.parameters(), **options), 5)
    for p, q in zip(ours.parameters(), theirs.parameters()):
        assert torch.equal(p, q)


@pytest.mark.parametrize("fused", [False, True])
def test_a_resumed_training_goes_on_to_the_bit(fused: bool) -> None:
    torch.manual_seed(0)
    network = Small()
    copied = copy.deepcopy(network)
    trained(network, muon(network, fused=fused), 6)
    first = muon(copied, fused=fused)
    trained(copied, first, 3)
    second = muon(copied, fused=fused)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    trained(copied, second, 3, first=3)
    for p, q in zip(network.parameters(), copied.parameters()):
        assert torch.equal(p, q)


def test_a_gradient_that_is_not_finite_moves_no_matrix_where_the_optimiser_is_told() -> None:
    torch.manual_seed(0)
    network = Small()
    optimizer = muon(network)
    trained(network, optimizer, 2)
    before = copy.deepcopy(network.state_dict())
    kept = {p: state["momentum_buffer"].clone() for p, state in optimizer.state.items() if "momentum_buffer" in state}
    for p in network.parameters():
        p.grad = torch.full_like(p, torch.nan)
    optimizer.found_inf = torch.ones(())
    with torch.no_grad():
        optimizer._step_matrices(optimizer.param_groups[1], {p: p.grad for p in optimizer.param_groups[1]["params"]})
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert kept
    assert all(torch.equal(optimizer.state[p]["momentum_buffer"], value) for p, value in kept.items())


def test_one_learning_rate_scales_all_steps() -> None:
    """Of groups with their own, too."""
    network = Small()
    groups = [{"params": list(network.parameters()), "name": "network", "lr": 5e-4}]
    rest, matrices = Muon(split_matrices(groups, network), lr=1e-3, matrix_scale=20.0).param_groups
    assert (rest["lr"], matrices["lr"]) == (5e-4, pytest.approx(1e-2))
    rest, matrices = muon(network, matrix_scale=10.0).param_groups
    assert (rest["lr"], matrices["lr"]) == (1e-3, pytest.approx(1e-2))


def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match="matrix_scale=-1"):
        Muon([nn.Parameter(torch.zeros(1))], matrix_scale=-1)
