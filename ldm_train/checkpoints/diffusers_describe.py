"""Describes our models as diffusers configs."""

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from ldm_train import names
from ldm_train.checkpoints.diffusers_options import BETAS

# Spacings at which diffusers' DDIM takes the same steps, if the number of steps divides that of the training timesteps.
SPACINGS = {
    "trailing": {"timestep_spacing": "trailing", "steps_offset": 0},
    "leading": {"timestep_spacing": "leading", "steps_offset": 0},
    "compvis": {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False},
}


def _kept(tree: Mapping[str, Any], refused: Mapping[str, Any], what: str) -> None:
    """Raises ValueError if an option differs from the only value that diffusers' networks have."""
    for name, only in refused.items():
        if tree[name] != only:
            raise ValueError(f"{what}.{name} is {tree[name]}; networks of diffusers have {only} only")


def _trunk(tree: Mapping[str, Any], network: nn.Module, what: str) -> dict[str, Any]:
    """Returns the options that U-Nets and autoencoders have in common. If the norms differ in their number of groups
    (see `is_narrow`), `norm_num_groups` is a number that divides all widths."""
    if tree["channel_mult"][0] != 1:
        raise ValueError(
            f"{what}.channel_mult begins with {tree['channel_mult'][0]}; in diffusers the first level has `channels`"
        )
    norms = [m for m in network.modules() if isinstance(m, nn.GroupNorm)]
    groups = {m.num_groups for m in norms}
    return {
        "block_out_channels": [tree["channels"] * mult for mult in tree["channel_mult"]],
        "layers_per_block": tree["num_res_blocks"],
        "norm_num_groups": groups.pop() if len(groups) == 1 else math.gcd(*(m.num_channels for m in norms)),
    }


def is_narrow(network: nn.Module) -> bool:
    """Returns True if the network's norms differ in their number of groups."""
    return len({m.num_groups for m in network.modules() if isinstance(m, nn.GroupNorm)}) > 1


def _blocks(tree: Mapping[str, Any], plain: str, attentive: str) -> dict[str, list[str]]:
    down = [attentive if level in tree["attention_levels"] else plain for level in range(len(tree["channel_mult"]))]
    up = [kind.replace("Down", "Up").replace("Encoder", "Decoder") for kind in reversed(down)]
    return {"down_block_types": down, "up_block_types": up}


def autoencoder_config(
    tree: Mapping[str, Any], network: nn.Module, scaling_factor: float
) -> tuple[str, dict[str, Any]]:
    """Returns (class, config) of a KL or VQ autoencoder. tree: with all options, see `parts.whole`. Raises ValueError
    if diffusers cannot express it."""
    if tree["_target_"].endswith("ImageEmbeddings"):
        raise ValueError(
            "a prior draws its latents through another model, which no pipeline of diffusers does; it stays in our form"
        )
    kind = {"AutoencoderKL": "AutoencoderKL", "AutoencoderVQ": "VQModel"}[tree["_target_"].rpartition(".")[2]]
    _kept(tree, {"patch_size": 1}, "autoencoder.network")
    config = _trunk(tree, network, "autoencoder.network")
    config |= _blocks(tree, "DownEncoderBlock2D", "AttnDownEncoderBlock2D")
    config |= {
        "in_channels": tree["in_channels"], "out_channels": tree["in_channels"], "latent_channels": tree["z_channels"],
        "mid_block_add_attention": tree["mid_attention"], "scaling_factor": scaling_factor, "act_fn": "silu",
    }  # fmt: skip
    if kind == "VQModel":
        config |= {"num_vq_embeddings": tree["num_codes"], "vq_embed_dim": tree["embed_dim"]}
    elif tree["embed_dim"] != tree["z_channels"]:
        raise ValueError(
            f"autoencoder.network.embed_dim is {tree['embed_dim']}, z_channels {tree['z_channels']}; in diffusers' AutoencoderKL "
            "they are equal"
        )
    return kind, config


def unet_config(tree: Mapping[str, Any], network: nn.Module, size: list[int]) -> tuple[str, dict[str, Any]]:
    """Returns (class, config) of a U-Net. tree: with all options, see `parts.whole`. size: (h, w) of the latents it was
    trained on. Raises ValueError if diffusers cannot express it."""
    if (kind := tree["_target_"].rpartition(".")[2]) != "UNet":
        raise ValueError(
            f"diffusion.network is a {kind}, which has no counterpart in diffusers; U-Nets can be exported"
        )
    what = "diffusion.network"
    _kept(tree, {"resblock_resample": False, "vector_classes": None}, what)
    config = _trunk(tree, network, what)
    config |= {
        "sample_size": size[0] if len(set(size)) == 1 else list(size),
        "in_channels": tree["in_channels"] + tree["concat_channels"], "out_channels": tree["out_channels"],
        "resnet_time_scale_shift": "scale_shift" if tree["scale_shift"] else "default", "act_fn": "silu",
        "norm_eps": 1e-5, "flip_sin_to_cos": True, "freq_shift": 0,
    }  # fmt: skip
    widths, levels = config["block_out_channels"], range(len(tree["channel_mult"]))
    middle = [levels[-1]] if tree["mid_attention"] else []
    attention = sorted({*tree["attention_levels"], *middle})
    heads = [tree["num_heads"] or max(1, widths[level] // tree["head_dim"]) for level in levels]
    if tree["transformer_depth"]:
        _kept(tree, {"mid_attention": True}, what)
        if not tree["context_dim"]:
            raise ValueError(f"{what}.transformer_depth without a context has no counterpart in diffusers")
        config |= _blocks(tree, "DownBlock2D", "CrossAttnDownBlock2D")
        config |= {
            "attention_head_dim": [n if level in attention else 1 for level, n in zip(levels, heads)],
            "cross_attention_dim": tree["context_dim"], "transformer_layers_per_block": tree["transformer_depth"],
            "use_linear_projection": tree["linear_projection"],
            "only_cross_attention": [level in tree["cross_only_levels"] for level in levels],
        }  # fmt: skip
        if tree["vector_dim"]:
            config |= {"class_embed_type": "projection", "projection_class_embeddings_input_dim": tree["vector_dim"]}
        return "UNet2DConditionModel", config
    _kept(tree, {"context_dim": None}, what)
    sizes = {widths[level] // heads[level] for level in attention} or {8}
    if len(sizes) > 1 and any(heads[level] != 1 for level in attention):
        raise ValueError(
            f"{what} has heads of {sorted(sizes)} channels; in diffusers' UNet2DModel they are equally wide: give head_dim"
        )
    config |= _blocks(tree, "DownBlock2D", "AttnDownBlock2D")
    config |= {
        "attention_head_dim": sizes.pop() if len(sizes) == 1 else None,
        "add_attention": tree["mid_attention"], "attn_norm_num_groups": config["norm_num_groups"],
    }  # fmt: skip
    if tree["vector_dim"]:
        config["class_embed_type"] = "identity"  # the conditioners include the projection of the vector
    return "UNet2DModel", config


def scheduler_config(tree: Mapping[str, Any], prediction: str, spacing: str) -> dict[str, Any]:
    """Returns the config of a DDIMScheduler. tree: of a NoiseSchedule, with all options. prediction: dotted path of the
    parameterisation's class. Raises ValueError if diffusers cannot express it."""
    kind, predictions = tree["_target_"].rpartition(".")[2], {path: word for word, path in names.PREDICTIONS.items()}
    if kind != "NoiseSchedule" or prediction not in predictions:
        raise ValueError(
            f"a {kind} with {prediction.rpartition('.')[2]} has no counterpart among diffusers' schedulers of DDPMs"
        )
    theirs = {ours: word for word, ours in BETAS.items()}
    if tree["kind"] not in theirs:
        raise ValueError(f"diffusion.schedule.kind is {tree['kind']}; diffusers knows {', '.join(theirs)}")
    config = {
        "num_train_timesteps": tree["num_train_timesteps"], "beta_start": tree["beta_start"], "beta_end": tree["beta_end"],
        "beta_schedule": theirs[tree["kind"]], "prediction_type": predictions[prediction],
        "rescale_betas_zero_snr": tree["zero_terminal_snr"], "clip_sample": False, "set_alpha_to_one": True,
    }  # fmt: skip
    return config | SPACINGS.get(spacing, SPACINGS["trailing"])
