"""The quantiser against brute force and gradients in closed form; averaged codes and restarts; code usage."""

import pytest
import torch

from ldm_train.models.quantizer import VectorQuantizer, perplexity


def quantizer(**options) -> VectorQuantizer:
    made = VectorQuantizer(**{"num_codes": 16, "dim": 3} | options)
    torch.nn.init.normal_(made.embedding.weight)
    return made


def test_each_vector_gets_the_nearest_code() -> None:
    made, latents = quantizer(), torch.randn(2, 3, 4, 5)
    flat = latents.permute(0, 2, 3, 1).reshape(-1, 3)
    # cdist's default form is a matrix product, which rounds as the quantiser's does; differences in float64 do not.
    gaps = flat.double()[:, None] - made.embedding.weight.double()
    expected = gaps.square().sum(dim=2).argmin(dim=1).view(2, 4, 5)
    indices = made.nearest(latents)
    assert torch.equal(indices, expected)
    codes = made.lookup(indices)
    assert torch.equal(codes[1, :, 2, 3], made.embedding.weight[expected[1, 2, 3]])
    assert torch.equal(made(latents)[2], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_chooses_the_codes_that_float32_chooses(dtype: torch.dtype) -> None:
    made, latents = quantizer(num_codes=2048), torch.randn(2, 3, 8, 8)
    expected = made.nearest(latents)
    with torch.autocast("cpu", dtype):
        assert torch.equal(made.nearest(latents), expected)
        assert torch.equal(made(latents)[2], expected)


def test_the_gradient_passes_straight_through_and_the_losses_pull_with_their_weights() -> None:
    made, latents = quantizer(commitment_weight=0.7, codebook_weight=0.2), torch.randn(2, 3, 4, 4, requires_grad=True)
    codes, loss, indices = made(latents)
    torch.testing.assert_close(codes, made.lookup(indices))
    upstream = torch.randn_like(codes)
    (straight,) = torch.autograd.grad(codes, latents, upstream, retain_graph=True)
    assert torch.equal(straight, upstream)
    looked_up = made.lookup(indices)
    gap, count = (latents - looked_up).detach(), latents[0].numel()
    torch.testing.assert_close(loss.detach(), 0.9 * gap.square().flatten(1).mean(dim=1))
    to_latents, to_codes = torch.autograd.grad(loss.sum(), [latents, made.embedding.weight])
    torch.testing.assert_close(to_latents, 0.7 * 2 * gap / count)
    expected = torch.zeros_like(made.embedding.weight).index_add_(
        0, indices.flatten(), -0.2 * 2 * gap.permute(0, 2, 3, 1).reshape(-1, 3) / count
    )
    torch.testing.assert_close(to_codes, expected)


def test_averaged_codes_settle_on_the_means_of_their_latents() -> None:
    made = quantizer(num_codes=2, dim=1, ema_decay=0.5)
    made.embedding.weight.data = torch.tensor([[-1.0], [1.0]])
    made.ema_sum.copy_(made.embedding.weight)
    latents = torch.tensor([-3.0, -5.0, 2.0, 4.0]).view(1, 1, 2, 2)
    for _ in range(40):
        made(latents)
    torch.testing.assert_close(made.embedding.weight, torch.tensor([[-4.0], [3.0]]), rtol=1e-4, atol=0)
    assert not made.embedding.weight.requires_grad
    made.eval()
    before = made.embedding.weight.clone()
    made(latents + 1)
    assert torch.equal(before, made.embedding.weight)


def test_latents_that_are_not_finite_change_no_averaged_code() -> None:
    made = quantizer(num_codes=4, dim=2, ema_decay=0.5, restart_after=1)
    latents = torch.randn(2, 2, 4, 4)
    made(latents)
    before = {name: value.clone() for name, value in made.state_dict().items() if name != "unused_steps"}
    made(torch.where(torch.arange(4) == 1, torch.nan, latents))
    made(torch.full_like(latents, torch.nan))
    assert all(value.isfinite().all() for value in made.state_dict().values())
    assert all(torch.equal(made.state_dict()[name], before[name]) for name in ("ema_sum", "ema_count"))


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_dead_codes_restart_on_latents_of_the_batch(ema_decay: float | None) -> None:
    made = quantizer(num_codes=4, dim=2, restart_after=3, ema_decay=ema_decay)
    made.embedding.weight.data = torch.tensor([[0.0, 0.0], [90.0, 0], [0, 90.0], [90.0, 90.0]])
    if ema_decay:
        made.ema_sum.copy_(made.embedding.weight)
    latents = torch.randn(2, 2, 4, 4)
    for _ in range(2):
        made(latents)
    assert (made.embedding.weight[1:].abs().max(dim=1).values > 50).all()
    made(latents)
    flat = latents.permute(0, 2, 3, 1).reshape(-1, 2)
    copies = (made.embedding.weight[1:, None] == flat).all(dim=2)  # (3, 32), bit-exact
    assert copies.any(dim=1).all()
    made(latents)
    assert perplexity(torch.bincount(made.nearest(latents).flatten(), minlength=4)) > 1.5


def test_perplexity_counts_the_codes_in_use() -> None:
    assert perplexity(torch.tensor([5, 5, 5, 5])) == pytest.approx(4)
    assert perplexity(torch.tensor([7, 0, 0, 0])) == pytest.approx(1)


def test_one_code_is_no_codebook() -> None:
    with pytest.raises(ValueError, match="at least 2 codes, got 1"):
        VectorQuantizer(1, 4)
