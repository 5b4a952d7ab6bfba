"""The U-Net equals the published one: parameter counts, arithmetic (diffusers with the same weights) and behaviour."""

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from ldm_train.checkpoints.diffusers_networks import unet_key
from ldm_train.models.control import Control
from ldm_train.models.unet import UNet

TINY = {"in_channels": 4, "channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1, "num_heads": 2}

PUBLISHED = {
    "stable diffusion 1": (
        859_520_964,
        {"in_channels": 4, "channels": 320, "channel_mult": (1, 2, 4, 4), "attention_levels": (0, 1, 2)}
        | {"num_heads": 8, "context_dim": 768},
    ),
    "celebahq, ffhq, bedrooms (LDM-4)": (
        274_056_163,
        {"in_channels": 3, "channels": 224, "channel_mult": (1, 2, 3, 4), "attention_levels": (1, 2, 3)}
        | {"head_dim": 32},
    ),
    "churches (LDM-8)": (
        294_966_916,
        {"in_channels": 4, "channels": 192, "channel_mult": (1, 2, 2, 4, 4), "attention_levels": (0, 1, 2, 3)}
        | {"num_heads": 8, "scale_shift": True, "resblock_resample": True},
    ),
    "celebahq (LDM-8, table 13)": (
        257_733_124,
        {"in_channels": 4, "channels": 256, "channel_mult": (1, 2, 4), "attention_levels": (0, 1, 2), "head_dim": 32},
    ),
    "imagenet (cin256-v2)": (
        400_920_579,
        {"in_channels": 3, "channels": 192, "channel_mult": (1, 2, 3, 5), "attention_levels": (1, 2, 3)}
        | {"num_heads": 1, "context_dim": 512},
    ),
    "layout to image": (
        246_277_379,
        {"in_channels": 3, "channels": 128, "channel_mult": (1, 2, 3, 4), "attention_levels": (1, 2, 3)}
        | {"head_dim": 32, "context_dim": 512, "transformer_depth": 3},
    ),
    "semantic synthesis": (
        215_229_315,
        {"in_channels": 3, "concat_channels": 3, "channels": 128, "channel_mult": (1, 4, 8), "num_heads": 8},
    ),
}


@pytest.mark.parametrize(("count", "arguments"), PUBLISHED.values(), ids=PUBLISHED.keys())
def test_parameter_count_is_the_published_one(count: int, arguments: dict) -> None:
    with torch.device("meta"):
        unet = UNet(**arguments)
    assert sum(p.numel() for p in unet.parameters()) == count


# diffusers uses one number of groups for all norms; ours is the published 32 from 128 channels up.
WIDE = TINY | {"channels": 128}


def randomised(model: torch.nn.Module, std: float = 0.05) -> torch.nn.Module:
    """Makes every parameter random, because zero-initialised layers would hide what precedes them."""
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator) * std
    return model.eval()


def reference(unet: UNet, attention_levels: tuple[int, ...], **arguments) -> UNet2DConditionModel:
    """Returns diffusers' U-Net with our weights, loaded strictly: every one of its parameters is one of ours."""
    kinds = ["CrossAttn" if level in attention_levels else "" for level in range(unet.size_multiple.bit_length())]
    model = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(128, 256),
        layers_per_block=arguments.pop("layers_per_block", 1),
        down_block_types=[f"{k}DownBlock2D" for k in kinds],
        up_block_types=[f"{k}UpBlock2D" for k in reversed(kinds)],
        cross_attention_dim=16,
        attention_head_dim=2,  # diffusers' name for the number of heads
        **arguments,
    )
    per_level = model.config.layers_per_block
    model.load_state_dict({unet_key(k, per_level): v for k, v in unet.state_dict().items()}, strict=True)
    return model.eval()


@pytest.mark.parametrize(
    ("levels", "ours", "theirs"),
    [
        ((0, 1), {}, {}),
        ((0,), {"num_res_blocks": 2}, {"layers_per_block": 2}),
        ((0, 1), {"scale_shift": True}, {"resnet_time_scale_shift": "scale_shift"}),
        ((1,), {"linear_projection": True}, {"use_linear_projection": True}),
        ((0, 1), {"transformer_depth": 2}, {"transformer_layers_per_block": 2}),
        ((0, 1), {"vector_dim": 10}, {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 10}),
    ],
    ids=["attention everywhere", "attention at level 0", "scale_shift", "linear_projection", "depth 2", "vector"],
)
@torch.no_grad()
def test_forward_equals_diffusers(levels: tuple[int, ...], ours: dict, theirs: dict) -> None:
    unet = randomised(UNet(**WIDE | ours, attention_levels=levels, context_dim=16))
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([3, 871]), torch.randn(2, 5, 16)
    vector = torch.randn(2, 10) if "vector_dim" in ours else None
    expected = reference(unet, levels, **theirs)(x, t, encoder_hidden_states=context, class_labels=vector).sample
    torch.testing.assert_close(unet(x, t, context=context, vector=vector), expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.05  # something to compare


@torch.no_grad()
def test_context_mask_equals_diffusers_and_a_shorter_context() -> None:
    unet = randomised(UNet(**WIDE, attention_levels=(0, 1), context_dim=16))
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([3, 871]), torch.randn(2, 5, 16)
    mask = torch.tensor([[True] * 3 + [False] * 2] * 2)
    masked = unet(x, t, context=context, context_mask=mask)
    expected = reference(unet, (0, 1))(x, t, encoder_hidden_states=context, encoder_attention_mask=mask.float()).sample
    torch.testing.assert_close(masked, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(masked, unet(x, t, context=context[:, :3]), rtol=1e-4, atol=1e-5)
    changed = context.clone()
    changed[:, 3:] = 100.0
    torch.testing.assert_close(unet(x, t, context=changed, context_mask=mask), masked, rtol=0, atol=0)
    assert not torch.allclose(unet(x, t, context=context), masked, atol=1e-3)


@pytest.mark.parametrize("context_dim", [None, 16], ids=["self-attention", "cross-attention"])
@torch.no_grad()
def test_output_is_zero_at_start(context_dim: int | None) -> None:
    unet = UNet(**TINY, attention_levels=(0, 1), context_dim=context_dim)
    context = torch.randn(2, 5, 16) if context_dim else None
    assert unet(torch.randn(2, 4, 8, 8), torch.tensor([3, 871]), context=context).abs().max() == 0


@torch.no_grad()
def test_residual_branches_start_as_the_identity() -> None:
    unet = UNet(**TINY, attention_levels=(0, 1))
    same_width = unet.middle_block
    x = torch.randn(2, 64, 4, 4)
    torch.testing.assert_close(same_width(x, torch.randn(2, 128), None, None), x, rtol=0, atol=0)


def test_a_single_context_token_is_a_condition() -> None:
    unet = randomised(UNet(**TINY, attention_levels=(1,), context_dim=16))
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([500])
    one, other = (unet(x, t, context=torch.randn(1, 1, 16)) for _ in range(2))
    assert (one - other).abs().max() > 1e-3


@torch.no_grad()
def test_concat_joins_the_input_and_float_timesteps_lie_between_integers() -> None:
    unet = randomised(UNet(**TINY, attention_levels=(1,), concat_channels=2))
    x, concat = torch.randn(1, 4, 8, 8), torch.randn(1, 2, 8, 8)
    low, middle, high = (unet(x, torch.tensor([t]), concat=concat) for t in (10.0, 10.5, 11.0))
    assert low.shape == x.shape
    torch.testing.assert_close(middle, (low + high) / 2, rtol=0.1, atol=0.05)
    assert not torch.allclose(low, unet(x, torch.tensor([10.0]), concat=-concat), atol=1e-3)


@pytest.mark.parametrize("resblock_resample", [False, True])
@torch.no_grad()
def test_any_size_that_survives_the_halvings(resblock_resample: bool) -> None:
    unet = randomised(UNet(**TINY, attention_levels=(1,), out_channels=8, resblock_resample=resblock_resample))
    assert unet(torch.randn(1, 4, 6, 10), torch.tensor([1])).shape == (1, 8, 6, 10)
    with pytest.raises(ValueError, match="divisible by 2"):
        unet(torch.randn(1, 4, 7, 8), torch.tensor([1]))


def test_activation_checkpointing_changes_no_gradient() -> None:
    plain = randomised(UNet(**TINY, attention_levels=(0, 1), context_dim=16))
    saving = UNet(**TINY, attention_levels=(0, 1), context_dim=16, activation_checkpointing=True)
    saving.load_state_dict(plain.state_dict())
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([3, 871]), torch.randn(2, 5, 16)
    for unet in (plain, saving):
        unet.train()(x, t, context=context, context_mask=torch.ones(2, 5, dtype=torch.bool)).square().sum().backward()
    for (name, p), q in zip(plain.named_parameters(), saving.parameters()):
        torch.testing.assert_close(q.grad, p.grad, rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": None}, "exactly one of head_dim and num_heads"),
        ({"head_dim": 32}, "exactly one of head_dim and num_heads"),
        ({"attention_levels": (2,)}, "levels 0 to 1"),
        ({"num_heads": 5}, "does not split into heads"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UNet(**TINY | {"attention_levels": (1,)} | arguments)


@pytest.mark.parametrize("options", [{}, {"cross_only_levels": (0,)}, {"transformer_depth": 2}])
def test_what_is_projected_of_a_context_stands_for_it_to_the_bit(options: dict) -> None:
    unet = UNet(**TINY | {"attention_levels": (0, 1), "context_dim": 6} | options).eval()
    for p in unet.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x, t, context, mask = (
        torch.randn(2, 4, 8, 8),
        torch.tensor([3.0, 700.0]),
        torch.randn(2, 3, 6),
        torch.ones(2, 3).bool(),
    )
    assert torch.equal(unet(x, t, unet.projected(context), mask), unet(x, t, context, mask))


def test_a_control_has_the_device_and_type_of_its_network() -> None:
    network = UNet(4, channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_levels=(), num_heads=2)
    assert {parameter.dtype for parameter in Control(network.double()).parameters()} == {torch.float64}
    assert {parameter.device.type for parameter in Control(network.to("meta")).parameters()} == {"meta"}
