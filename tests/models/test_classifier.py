"""The classifier of noisy latents: its shapes, what it depends on, and that it learns."""

import pytest
import torch
from torch.nn import functional as F

from ldm_train.models.classifier import NoisyClassifier


def build(**options) -> NoisyClassifier:
    torch.manual_seed(0)
    arguments = {
        "in_channels": 2, "latent_size": (8, 8), "classes": ["a", "b", "c"], "channels": 16, "channel_mult": (1, 2),
        "num_res_blocks": 1, "attention_levels": (1,), "head_dim": 16,
    }  # fmt: skip
    return NoisyClassifier(**arguments | options)


@pytest.mark.parametrize("options", [{}, {"resblock_resample": False, "scale_shift": False}, {"classes": 3}])
def test_logits_for_any_size(options: dict) -> None:
    network = build(**options)
    for size in ((8, 8), (16, 8)):
        assert network(torch.randn(2, 2, *size), torch.tensor([3, 700])).shape == (2, 3)
    assert len(network.names) == 3


def test_the_time_matters() -> None:
    network, x = build(), torch.randn(2, 2, 8, 8)
    for p in network.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    a, b = (network(x, torch.full((2,), float(t))) for t in (0, 900))
    assert (a - b).abs().max() > 1e-3


def test_it_learns_to_tell_classes_apart() -> None:
    network, g = build(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    centres = torch.randn(3, 2, 8, 8, generator=g)
    for _ in range(40):
        labels = torch.randint(3, (32,), generator=g)
        x = centres[labels] + 0.5 * torch.randn(32, 2, 8, 8, generator=g)
        logits = network(x, torch.zeros(32))
        optimizer.zero_grad()
        F.cross_entropy(logits, labels).backward()
        optimizer.step()
    assert (logits.argmax(1) == labels).float().mean() > 0.9


def test_heads_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match="width 32 does not split into heads of 24"):
        build(head_dim=24)
