"""Every option of diffusers' classes: what is loaded computes what diffusers computes; errors name the rest."""

import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from tiers import tiered
from torch import nn

from ldm_train.checkpoints.diffusers import schedule_tree
from ldm_train.checkpoints.diffusers_networks import load_first_stage, load_unet
from ldm_train.checkpoints.diffusers_options import SCHEDULERS
from ldm_train.checkpoints.parts import build

TRUNK = {"block_out_channels": [128, 128], "layers_per_block": 1, "norm_num_groups": 32}
LATENTS = {"sample_size": 8, "in_channels": 4, "out_channels": 4}
BASES = {
    "UNet2DConditionModel": TRUNK
    | LATENTS
    | {
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "cross_attention_dim": 16,
        "attention_head_dim": 4,
    },
    "UNet2DModel": TRUNK
    | LATENTS
    | {
        "down_block_types": ["AttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "AttnUpBlock2D"],
        "attention_head_dim": 32,
    },
    "AutoencoderKL": TRUNK
    | {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2},
    "VQModel": TRUNK
    | {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    | {"num_vq_embeddings": 16},
}
# Values that are loaded besides those of the base config; any other value of any option is refused.
EITHER = {"act_fn": ["swish"], "layers_per_block": [2], "block_out_channels": [[128, 256]]}
U_NETS = EITHER | {"sample_size": [None, 16, [8, 16]], "dropout": [0.5], "resnet_time_scale_shift": ["scale_shift"]}
AUTOENCODERS = EITHER | {
    "latent_channels": [5], "scaling_factor": [0.5], "sample_size": [64], "force_upcast": [False, True],
    "mid_block_add_attention": [False],
}  # fmt: skip
LOADED: dict[str, dict[str, list[Any]]] = {
    "UNet2DConditionModel": U_NETS
    | {
        "layers_per_block": [2, [2, 2]], "attention_head_dim": [2, [2, 2]], "cross_attention_dim": [24, [24, 24]],
        "transformer_layers_per_block": [2, [2, 2]], "only_cross_attention": [True, [True, True]], "use_linear_projection": [True],
        "upcast_attention": [True], "addition_embed_type_num_heads": [32], "addition_time_embed_dim": [8],
        "cross_attention_norm": ["layer_norm"], "mid_block_only_cross_attention": [True], "resnet_skip_time_act": [True],
        "projection_class_embeddings_input_dim": [8], "resnet_out_scale_factor": [2.0],
    },
    "UNet2DModel": U_NETS
    | {
        "attention_head_dim": [None, 64], "attn_norm_num_groups": [32], "add_attention": [False], "num_train_timesteps": [500],
        "resnet_time_scale_shift": [],
    },
    "AutoencoderKL": AUTOENCODERS,
    "VQModel": AUTOENCODERS | {"num_vq_embeddings": [8], "vq_embed_dim": [2], "lookup_from_codebook": [True]},
}  # fmt: skip
REFUSED: dict[str, list[Any]] = {
    "attention_head_dim": [[8, 4], [4], 3, 0, "4"],
    "block_out_channels": [[128, 192], [], 128, [10**30, 10**30], [True, True]],
    "down_block_types": [["SimpleCrossAttnDownBlock2D", "DownBlock2D"], ["DownBlock2D"], "DownBlock2D", ["UNetResDownBlock2D"] * 2],
    "up_block_types": [["UpBlock2D", "UpBlock2D"], None, 3],
    "layers_per_block": [[1, 2], 10**30, "1", None],
    "transformer_layers_per_block": [[1, 2], [[1], [2]]],
    "reverse_transformer_layers_per_block": [[1, 1]],
    "cross_attention_dim": [[16, 24], None],
    "only_cross_attention": [[True, False]],
    "norm_num_groups": [16, None],
    "attn_norm_num_groups": [16],
    "time_embedding_type": ["fourier", "learned"],
    "mid_block_type": ["UNetMidBlock2D", "UNetMidBlock2DSimpleCrossAttn", None],
    "scaling_factor": [0, -1, "1", float("nan"), float("inf"), 10**400],
    "latent_channels": [0, 2**40, 4.5],
    "latents_mean": [[0.0] * 4],
}  # fmt: skip
TOGETHER = [
    ("AutoencoderKL", {"in_channels": 1, "out_channels": 1}),
    ("UNet2DConditionModel", {"block_out_channels": [128, 256], "attention_head_dim": [2, 4], "use_linear_projection": True}),
    (
        "UNet2DConditionModel",
        {"down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"], "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"]},
    ),
    ("UNet2DModel", {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 32}),
    ("UNet2DModel", {"resnet_time_scale_shift": "scale_shift", "add_attention": False, "attention_head_dim": None}),
    *(
        (kind, {"down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]}
        | {"up_block_types": ["AttnUpDecoderBlock2D", "UpDecoderBlock2D"]})
        for kind in ("AutoencoderKL", "VQModel")
    ),
]  # fmt: skip


def other_than(default: Any) -> list[Any]:
    """Returns other values for an option, chosen by the type of its default."""
    if isinstance(default, bool):
        return [not default]
    if isinstance(default, (int, float)):
        return [default + 1, default * 2 + 3]
    return ["another", 1, True, ["another"]] if default is None or isinstance(default, str) else [["another"]]


def write(folder: Path, kind: str, options: dict[str, Any]) -> nn.Module:
    """Makes a component with random weights and writes its folder as diffusers does; returns the model."""
    network = getattr(diffusers, kind)(**options).eval()
    generator = torch.Generator().manual_seed(1)
    for p in network.parameters():  # zeros and ones would hide the layers before them
        p.data = torch.randn(p.shape, generator=generator) * (0.5 / p[0].numel() ** 0.5) + (p.ndim == 1) * p.data
    network.save_pretrained(folder)
    return network


def load(folder: Path, kind: str) -> nn.Module:
    return load_unet(folder, 4)[0] if kind.startswith("UNet") else load_first_stage(folder)


@torch.no_grad()
def assert_equal(kind: str, theirs: nn.Module, ours: nn.Module) -> None:
    generator = torch.Generator().manual_seed(2)
    x, t = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([3, 700])
    if kind == "UNet2DConditionModel":
        context = torch.randn(2, 5, ours.condition_widths["context"], generator=generator)
        expected, got = theirs(x, t, context).sample, ours(x, t, context)
    elif kind == "UNet2DModel":
        expected, got = theirs(x, t).sample, ours(x, t)
    else:
        images = torch.randn(1, theirs.config.in_channels, 16, 16, generator=generator)
        encoded = theirs.encode(images)
        latents = encoded.latents if kind == "VQModel" else encoded.latent_dist.mean
        moments = ours.encode_moments(images)
        torch.testing.assert_close(ours.posterior(moments).mean, latents, rtol=1e-4, atol=1e-4)
        expected = theirs.decode(latents).sample.clamp(-1, 1)
        got = ours.decode(latents * theirs.config.scaling_factor)
    assert expected.std() > 0.01
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=2e-4)


OPTIONS = [
    (kind, name)
    for kind in BASES
    for name in inspect.signature(getattr(diffusers, kind).__init__).parameters
    if name != "self"
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in BASES}
    for kind, folder in folders.items():
        assert_equal(kind, write(folder, kind, BASES[kind]), load(folder, kind))
    return folders


@tiered(("kind", "name"), OPTIONS, fast=12)
def test_every_option_computes_as_in_diffusers_or_is_refused_by_name(
    kind: str, name: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    for value in LOADED[kind].get(name, []):
        theirs = write(tmp_path, kind, BASES[kind] | {name: value})
        assert_equal(kind, theirs, load(tmp_path, kind))
    config = json.loads((bases[kind] / "config.json").read_text())
    if name not in LOADED[kind] or name in REFUSED:
        for value in REFUSED.get(name) or other_than(config[name]):
            if value == config[name] or value in LOADED[kind].get(name, []):
                continue
            (tmp_path / "config.json").write_text(json.dumps(config | {name: value}))
            with pytest.raises(ValueError, match=rf"config.json has (.* and )?{name}="):
                load(tmp_path, kind)


@pytest.mark.parametrize(("kind", "options"), TOGETHER)
def test_options_that_belong_together_compute_as_in_diffusers(kind: str, options: dict, tmp_path: Path) -> None:
    assert_equal(kind, write(tmp_path, kind, BASES[kind] | options), load(tmp_path, kind))


def test_the_middle_attention_without_a_norm_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "UNet2DModel", BASES["UNet2DModel"] | {"resnet_time_scale_shift": "scale_shift"})
    with pytest.raises(
        ValueError, match=r"attn_norm_num_groups=None; models with attn_norm_num_groups=32 can be loaded"
    ):
        load(tmp_path, "UNet2DModel")


@pytest.mark.parametrize("kind", BASES)
def test_an_option_that_nobody_knows_and_another_class_are_refused(
    kind: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    config = json.loads((bases[kind] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"new_in_99": True}))
    with pytest.raises(
        ValueError, match=r"config.json has new_in_99=True; models with new_in_99 left out can be loaded"
    ):
        load(tmp_path, kind)
    for other in ("AutoencoderTiny", None, ["x"], {"a": 1}):
        (tmp_path / "config.json").write_text(json.dumps(config | {"_class_name": other}))
        with pytest.raises(ValueError, match=r"config.json is for .*can be loaded"):
            load(tmp_path, kind)


@pytest.mark.parametrize("kind", BASES)
def test_the_older_names_of_attention_are_read_linear_or_convolution(
    kind: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    if kind == "UNet2DConditionModel":
        pytest.skip("its attention never had them")
    from safetensors.torch import load_file, save_file

    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    (tmp_path / "config.json").write_text((bases[kind] / "config.json").read_text())
    weights = load_file(bases[kind] / "diffusion_pytorch_model.safetensors")
    theirs = getattr(diffusers, kind).from_pretrained(bases[kind])
    for ranks in (2, 4):
        renamed = {}
        for key, value in weights.items():
            part = next((p for p in older if f".attentions.0.{p}." in key), None)
            if part and ranks == 4 and key.endswith("weight"):
                value = value[:, :, None, None].contiguous()
            renamed[key.replace(part, older[part]) if part else key] = value
        assert renamed.keys() != weights.keys()
        save_file(renamed, tmp_path / "diffusion_pytorch_model.safetensors")
        assert_equal(kind, theirs, load(tmp_path, kind))
        if ranks == 2:  # diffusers itself reads the linear form
            assert_equal(kind, getattr(diffusers, kind).from_pretrained(tmp_path), load(tmp_path, kind))


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_every_scheduler_has_the_schedule_it_has_in_diffusers(kind: str, tmp_path: Path) -> None:
    if kind == "DPMSolverSDEScheduler":
        pytest.importorskip("torchsde")
    make = getattr(diffusers, kind)
    known = inspect.signature(make.__init__).parameters
    assert set(known) - {"self"} <= set(SCHEDULERS[kind])
    zero_snr = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    for options in (
        {},
        {"beta_schedule": "scaled_linear", "beta_start": 0.001, "beta_end": 0.013, "prediction_type": "v_prediction"},
        {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 77},
        *([zero_snr] if "rescale_betas_zero_snr" in known else []),
    ):
        theirs = make(**options)
        theirs.save_config(tmp_path)
        tree, prediction = schedule_tree(tmp_path)
        assert prediction == theirs.config.prediction_type
        schedule = build(tree, tmp_path)
        torch.testing.assert_close(schedule.alphas_cumprod.float(), theirs.alphas_cumprod, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "kind", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler", "LCMScheduler"]
)
def test_schedulers_of_other_processes_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    getattr(diffusers, kind)().save_config(tmp_path)
    with pytest.raises(ValueError, match=rf"scheduler_config.json is for '{kind}'; DDIMScheduler, .* can be loaded"):
        schedule_tree(tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"beta_schedule": "exp"},
        {"beta_schedule": "sigmoid"},
        {"trained_betas": [0.1, 0.2]},
        {"thresholding": True},
        {"variance_type": "learned_range"},
        {"use_flow_sigmas": True},
        {"prediction_type": "flow_prediction"},
        {"timestep_type": "continuous"},
        {"rescale_betas_zero_snr": True},
        {"num_train_timesteps": 10**30},
        {"num_train_timesteps": "1000"},
        {"beta_start": float("nan")},
        {"beta_end": 2},
        {"snr_shift_scale": 3.0},
    ],
)
def test_a_schedule_that_would_be_another_is_refused_by_name(options: dict, tmp_path: Path) -> None:
    config = {"_class_name": "DDIMScheduler"} | options
    (tmp_path / "scheduler_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"scheduler_config.json has {next(iter(options))}="):
        schedule_tree(tmp_path)
    (tmp_path / "scheduler_config.json").write_text(json.dumps({"_class_name": "DDIMScheduler", "beta_start": 0.5}))
    with pytest.raises(ValueError, match=r"scheduler_config.json: need 0 < beta_start"):
        build(schedule_tree(tmp_path)[0], tmp_path / "scheduler_config.json")
