"""The diffusion transformer: the published function (that of diffusers) and sizes, and the effect of conditions."""

import pytest
import torch
from diffusers import DiTTransformer2DModel

from ldm_train.models.dit import DiT


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    """Fills all parameters, including the zeroed ones, so that every part affects the output."""
    torch.manual_seed(0)
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return module.eval()


def reference(ours: DiT, layers: int, size: int) -> DiTTransformer2DModel:
    """Returns diffusers' DiT with our weights. Its class table is zero, because our vector is another condition."""
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=layers, sample_size=size, norm_num_groups=4,
        norm_eps=1e-6,
    ).eval()  # fmt: skip
    state = ours.state_dict()
    names = {"pos_embed.proj": "x_embedder", "proj_out_1": "adaLN_modulation.1", "proj_out_2": "linear"}
    for i in range(layers):
        block, own = f"transformer_blocks.{i}", f"blocks.{i}"
        names |= {
            f"{block}.norm1.emb.timestep_embedder.linear_1": "t_embedder.0",
            f"{block}.norm1.emb.timestep_embedder.linear_2": "t_embedder.2",
            f"{block}.norm1.linear": f"{own}.adaLN_modulation.1",
            f"{block}.attn1.to_out.0": f"{own}.attn.proj",
            f"{block}.ff.net.0.proj": f"{own}.mlp.0",
            f"{block}.ff.net.2": f"{own}.mlp.3",
        }
    theirs = {f"{new}.{p}": state[f"{old}.{p}"] for new, old in names.items() for p in ("weight", "bias")}
    for i in range(layers):
        theirs[f"transformer_blocks.{i}.norm1.emb.class_embedder.embedding_table.weight"] = torch.zeros(1001, 16)
        for p in ("weight", "bias"):
            for part, value in zip("qkv", state[f"blocks.{i}.attn.qkv.{p}"].chunk(3)):
                theirs[f"transformer_blocks.{i}.attn1.to_{part}.{p}"] = value
    model.load_state_dict(theirs)
    for block in model.transformer_blocks:  # its frequencies are 10000^(-i / 127), the published ones 10000^(-i / 128)
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    return model


def test_a_dit_is_that_of_diffusers() -> None:
    ours = randomised(DiT(4, 16, depth=2, num_heads=2))
    x, t = torch.randn(3, 4, 8, 8), torch.tensor([0, 417, 999])
    with torch.no_grad():
        expected = reference(ours, 2, 8)(x, t, class_labels=torch.zeros(3, dtype=torch.long)).sample
        torch.testing.assert_close(ours(x, t), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("size", "count"), [((384, 12, 6), 33_000_000), ((768, 12, 12), 130_000_000), ((1024, 24, 16), 458_000_000)]
)
def test_dits_have_the_published_sizes(size: tuple[int, int, int], count: int) -> None:
    """The paper's table 1 rounds to millions and counts a table of 1,001 classes and output channels for variances."""
    with torch.device("meta"):
        model = DiT(4, *size)
    width = size[0]
    total = sum(p.numel() for p in model.parameters()) + 1001 * width + 16 * (width + 1)
    assert total == pytest.approx(count, rel=0.01)


def test_dit_xl_has_the_published_weights_to_the_last_one() -> None:
    with torch.device("meta"):
        model = DiT(4, 1152, 28, 16)
    table, positions, variances = 1001 * 1152, 256 * 1152, 16 * (1152 + 1)
    assert sum(p.numel() for p in model.parameters()) + table + positions + variances == 675_129_632


def test_a_new_dit_is_zero_whatever_it_is_told() -> None:
    model = DiT(4, 32, 2, 2, context_dim=8, vector_dim=4, concat_channels=1)
    x, t = torch.randn(2, 4, 4, 4), torch.tensor([3, 871])
    out = model(x, t, torch.randn(2, 3, 8), None, torch.randn(2, 1, 4, 4), torch.randn(2, 4))
    assert out.abs().max() == 0


def test_every_condition_reaches_the_output_and_masked_tokens_do_not() -> None:
    model = randomised(DiT(4, 32, 2, 2, context_dim=8, vector_dim=4, concat_channels=1))
    x, t = torch.randn(1, 4, 4, 6), torch.tensor([417.5])
    told = {"context": torch.randn(1, 3, 8), "concat": torch.randn(1, 1, 4, 6), "vector": torch.randn(1, 4)}
    mask = torch.tensor([[True, True, False]])
    with torch.no_grad():
        out = model(x, t, **told, context_mask=mask)
        assert out.shape == x.shape
        for name in told:
            assert not torch.allclose(out, model(x, t, **told | {name: told[name] + 1}, context_mask=mask), atol=1e-4)
        hidden = told["context"].clone()
        hidden[:, 2] += 5
        torch.testing.assert_close(model(x, t, **told | {"context": hidden}, context_mask=mask), out, rtol=0, atol=0)


def test_recomputed_activations_change_no_gradient() -> None:
    plain, saving = (DiT(4, 32, 2, 2, activation_checkpointing=c) for c in (False, True))
    saving.load_state_dict(randomised(plain).state_dict())
    x, t = torch.randn(2, 4, 4, 4), torch.tensor([3, 871])
    for model in (plain, saving):
        model.train()(x, t).square().sum().backward()
    for a, b in zip(plain.parameters(), saving.parameters()):
        torch.testing.assert_close(a.grad, b.grad)


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match="patch size 2"):
        DiT(4, 32, 1, 2)(torch.randn(1, 4, 7, 8), torch.tensor([1]))
    with pytest.raises(ValueError, match="divisible by 4 and by num_heads 5"):
        DiT(4, 32, 1, 5)


def test_what_is_projected_of_a_context_stands_for_it_to_the_bit() -> None:
    model = randomised(DiT(4, 16, 2, 2, context_dim=6))
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 700.0]), torch.randn(2, 3, 6)
    assert torch.equal(model(x, t, model.projected(context)), model(x, t, context))
