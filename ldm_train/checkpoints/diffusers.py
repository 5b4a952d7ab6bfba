"""Models in diffusers' folders: Stable Diffusion 1 and 2 and unconditional latent diffusion, without diffusers itself."""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from ldm_train.conditioning.text import FrozenText
from ldm_train.data.shards import file_sha256
from ldm_train.diffusion.schedule import NoiseSchedule
from ldm_train.latent_diffusion import LatentDiffusion
from ldm_train.models.autoencoder import AutoencoderKL, AutoencoderVQ
from ldm_train.models.first_stage import FirstStage
from ldm_train.models.layers import group_norm
from ldm_train.models.unet import UNet

INDEX = "model_index.json"
WEIGHTS = ("diffusion_pytorch_model", "model")
BETAS = {"scaled_linear": "scaled_linear", "linear": "linear", "squaredcos_cap_v2": "cosine"}
UNET_OUTSIDE = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "class_embedding.linear_1",
    "label_emb.0.2": "class_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
UNET_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
MIDDLE = {
    "mid.block_1": "mid_block.resnets.0",
    "mid.block_2": "mid_block.resnets.1",
    "mid.attn_1.norm": "mid_block.attentions.0.group_norm",
    "mid.attn_1.proj_out": "mid_block.attentions.0.to_out.0",
    "mid.attn_1": "mid_block.attentions.0.to_",  # q, k, v
}


def is_diffusers(folder: str | Path) -> bool:
    return (Path(folder) / INDEX).is_file()


def unet_key(key: str, per_level: int) -> str:
    """Our name (CompVis') -> diffusers', for `per_level` residual blocks per level. The fused qkv of attention without a
    context is "...to_qkv" there, which stands for three."""
    module, leaf = key.rsplit(".", 1)
    if module in UNET_OUTSIDE:
        return f"{UNET_OUTSIDE[module]}.{leaf}"
    part, rest = re.match(r"(input_blocks\.\d+|middle_block|output_blocks\.\d+)\.(.*)", module).groups()
    slot, _, inner = rest.partition(".")  # slot: which layer of the step
    attention = "transformer_blocks" in inner or inner in ("norm", "proj_in", "proj_out", "qkv")
    if part == "middle_block":
        place = "attentions.0" if attention else f"resnets.{int(slot) // 2}"
        return f"mid_block.{place}.{inner if attention else UNET_RESNET[inner]}.{leaf}"
    side, number = part.split(".")
    level, index = divmod(int(number) - (side == "input_blocks"), per_level + 1)
    block = f"{'down' if side == 'input_blocks' else 'up'}_blocks.{level}"
    if inner in ("op", "conv"):
        return f"{block}.{'downsamplers' if inner == 'op' else 'upsamplers'}.0.conv.{leaf}"
    if attention:
        return f"{block}.attentions.{index}.{inner}.{leaf}"
    return f"{block}.resnets.{index}.{UNET_RESNET[inner]}.{leaf}"


def autoencoder_key(key: str, levels: int) -> str:
    """Our name (CompVis') -> diffusers'. Its attention has linear layers where ours has 1x1 convolutions."""
    key = key.replace("norm_out", "conv_norm_out").replace("nin_shortcut", "conv_shortcut")
    for ours, theirs in MIDDLE.items():
        key = key.replace(f"{ours}." if theirs.endswith("to_") else ours, theirs)
    key = re.sub(r"\bdown\.(\d+)\.block", r"down_blocks.\1.resnets", key)
    key = re.sub(r"\bdown\.(\d+)\.downsample", r"down_blocks.\1.downsamplers.0", key)
    key = re.sub(r"\bup\.(\d+)\.block", lambda m: f"up_blocks.{levels - 1 - int(m[1])}.resnets", key)
    return re.sub(r"\bup\.(\d+)\.upsample", lambda m: f"up_blocks.{levels - 1 - int(m[1])}.upsamplers.0", key)


def _config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    if not (folder / name).is_file():
        raise FileNotFoundError(f"{folder / name} is missing; the diffusers folder is not complete")
    return json.loads((folder / name).read_text())


def _files(folder: Path) -> list[Path]:
    """The weights of one component: whole or in shards, safetensors before pickles."""
    for stem in WEIGHTS:
        for suffix in (".safetensors", ".fp16.safetensors"):
            if (folder / f"{stem}{suffix}").is_file():
                return [folder / f"{stem}{suffix}"]
        if (folder / f"{stem}.safetensors.index.json").is_file():
            names = _config(folder, f"{stem}.safetensors.index.json")["weight_map"].values()
            return [folder / name for name in sorted(set(names))]
        if (folder / f"{stem}.bin").is_file():
            return [folder / f"{stem}.bin"]
    raise FileNotFoundError(f"{folder} holds no weights ({WEIGHTS[0]}.safetensors); download the whole model")


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in _files(folder):
        if path.suffix == ".bin":
            found |= torch.load(path, map_location="cpu", weights_only=True)  # no code is run from a pickle
        else:
            found |= load_file(path)
    return found


def _expect(config: dict[str, Any], where: Path, **wanted: Any) -> None:
    """Raises ValueError, naming the option, for a config that asks for what we do not build."""
    for name, usual in wanted.items():
        allowed = usual if isinstance(usual, tuple) else (usual,)
        if config.get(name, allowed[0]) not in allowed:
            raise ValueError(f"{where} has {name}={config[name]!r}; models with {name}={allowed[0]!r} can be loaded")


def _same_groups(config: dict[str, Any], where: Path) -> None:
    """Group norms are not in the weights; ours follow the published widths (see `group_norm`)."""
    groups = config.get("norm_num_groups", 32)
    if wrong := [w for w in config["block_out_channels"] if group_norm(w, 1e-6).num_groups != groups]:
        raise ValueError(
            f"{where} has norm_num_groups={groups} at width {wrong[0]}, ours has {group_norm(wrong[0], 1e-6).num_groups}; models "
            "with 32 groups and at least 128 channels can be loaded"
        )


def _load(module: nn.Module, weights: dict[str, torch.Tensor], name: Callable[[str], str], where: Path) -> None:
    """Fills a module from tensors under other names. Raises ValueError for one that is missing, left over or of another
    shape."""
    state, left = {}, set(weights)
    for key, value in module.state_dict().items():
        theirs = name(key)
        names = [theirs.replace("qkv", n) for n in ("to_q", "to_k", "to_v")] if ".qkv." in theirs else [theirs]
        if ".attentions." in theirs and not any(n in weights for n in names):  # attention without a context
            names = [n.replace(".norm.", ".group_norm.").replace(".proj_out.", ".to_out.0.") for n in names]
        if missing := [n for n in names if n not in weights]:
            raise ValueError(f"{where} lacks {missing[0]}, which its config asks for")
        found = torch.cat([weights[n] for n in names])
        left -= set(names)
        if [n for n in found.shape if n != 1] != [n for n in value.shape if n != 1]:
            raise ValueError(
                f"{where}: {names[0]} has shape {tuple(found.shape)}, its config asks for {tuple(value.shape)}"
            )
        state[key] = found.view(value.shape).to(value.dtype)
    if left:
        raise ValueError(f"{where} holds {sorted(left)[0]} and {len(left) - 1} more that its config does not ask for")
    module.load_state_dict(state)


def _unet(folder: Path, concat: int) -> UNet:
    config = _config(folder)
    conditional = config["_class_name"] == "UNet2DConditionModel"
    widths, levels = config["block_out_channels"], len(config["block_out_channels"])
    _expect(
        config, folder / "config.json", _class_name=("UNet2DConditionModel", "UNet2DModel"), act_fn=("silu",),
        class_embed_type=None, addition_embed_type=None, encoder_hid_dim=None, dual_cross_attention=False,
        flip_sin_to_cos=True, freq_shift=0, center_input_sample=False, downsample_type="conv", upsample_type="conv",
        only_cross_attention=False, num_class_embeds=None, norm_eps=1e-5, downsample_padding=1,
    )  # fmt: skip
    _same_groups(config, folder / "config.json")
    kinds = config["down_block_types"]
    if unknown := [k for k in kinds if k not in ("CrossAttnDownBlock2D", "AttnDownBlock2D", "DownBlock2D")]:
        raise ValueError(f"{folder / 'config.json'} has a {unknown[0]}, which is no block of a latent diffusion U-Net")
    heads = config.get("num_attention_heads") or config.get("attention_head_dim", 8)
    heads = heads if isinstance(heads, list) else [heads] * levels
    if not conditional:
        size = {"head_dim": heads[0]}
    elif len(set(heads)) == 1:
        size = {"num_heads": heads[0]}
    else:  # SD 2: heads of equal width
        size = {"head_dim": widths[0] // heads[0]}
    depth = config.get("transformer_layers_per_block", 1)
    unet = UNet(
        in_channels=config["in_channels"] - concat,
        out_channels=config["out_channels"],
        concat_channels=concat,
        channels=widths[0],
        channel_mult=[w // widths[0] for w in widths],
        num_res_blocks=config["layers_per_block"],
        attention_levels=[level for level, kind in enumerate(kinds) if "Attn" in kind],
        context_dim=config["cross_attention_dim"] if conditional else None,
        transformer_depth=depth if conditional else None,
        scale_shift=config.get("resnet_time_scale_shift", "default") == "scale_shift",
        linear_projection=config.get("use_linear_projection", False),
        **size,
    )
    _load(unet, _weights(folder), lambda key: unet_key(key, config["layers_per_block"]), folder)
    return unet


def _first_stage(folder: Path) -> FirstStage:
    config = _config(folder)
    widths = config["block_out_channels"]
    _expect(
        config, folder / "config.json", _class_name=("AutoencoderKL", "VQModel"), act_fn="silu", shift_factor=None,
        use_quant_conv=True, use_post_quant_conv=True, norm_type="group", latents_mean=None,
    )  # fmt: skip
    _same_groups(config, folder / "config.json")
    if {k.rpartition("Down")[0] for k in config["down_block_types"]} != {""}:
        raise ValueError(
            f"{folder / 'config.json'} has attention outside the middle, which diffusers' loader cannot name"
        )
    options = {
        "z_channels": config["latent_channels"],
        "channels": widths[0],
        "channel_mult": [w // widths[0] for w in widths],
        "num_res_blocks": config["layers_per_block"],
        "mid_attention": config.get("mid_block_add_attention", True),
        "in_channels": config["in_channels"],
    }
    if config["_class_name"] == "VQModel":
        options["embed_dim"] = config.get("vq_embed_dim") or config["latent_channels"]
        network = AutoencoderVQ(**options, num_codes=config["num_vq_embeddings"])
    else:
        network = AutoencoderKL(**options)
    _load(network, _weights(folder), lambda key: autoencoder_key(key, len(widths)), folder)
    return FirstStage(network, config.get("scaling_factor", 0.18215))


def load_diffusers(folder: str | Path) -> LatentDiffusion:
    """A pipeline's folder: U-Net, KL or VQ autoencoder, CLIP text encoder where there is one, noise schedule. (Clipping
    of x_0 to [-1, 1], which some schedulers' configs ask for, is for pixels and is left out.)

    Raises FileNotFoundError for a part that is missing, ValueError, naming the option, for one that we do not build.
    """
    folder = Path(folder)
    parts = {name: value[1] for name, value in _config(folder, INDEX).items() if isinstance(value, list)}
    vae = next((folder / name for name in ("vae", "vqvae") if parts.get(name)), None)
    if vae is None or not parts.get("unet"):
        raise ValueError(f"{folder / INDEX} names no unet and vae; it is no latent diffusion pipeline")
    first_stage = _first_stage(vae)
    config = _config(folder / "unet")
    if config["in_channels"] != first_stage.latent_channels:
        raise ValueError(
            f"{folder / 'unet'} takes {config['in_channels']} channels, the latents have {first_stage.latent_channels}: "
            "inpainting, depth and upscaling pipelines cannot be loaded yet"
        )
    unet = _unet(folder / "unet", 0)
    conditioners = {}
    if unet.context_dim:
        if parts.get("text_encoder") not in ("CLIPTextModel", "CLIPTextModelWithProjection"):
            raise ValueError(f"{folder / INDEX}: the text encoder is a {parts.get('text_encoder')}; CLIP can be loaded")
        length = _config(folder / "text_encoder").get("max_position_embeddings", 77)
        text = FrozenText(
            str(folder / "text_encoder"), unet.context_dim, max_length=length, tokenizer=str(folder / "tokenizer")
        )
        conditioners["text"] = text
    noise = _config(folder / "scheduler", "scheduler_config.json")
    _expect(
        noise, folder / "scheduler", beta_schedule=("linear", *BETAS), thresholding=False, trained_betas=None,
        prediction_type=("epsilon", "v_prediction", "sample"),
    )  # fmt: skip
    schedule = NoiseSchedule(
        BETAS[noise.get("beta_schedule", "linear")],
        noise.get("beta_start", 0.0001),
        noise.get("beta_end", 0.02),
        noise.get("num_train_timesteps", 1000),
        noise.get("rescale_betas_zero_snr", False),
    )
    size = config.get("sample_size") or 64
    size = [size, size] if isinstance(size, int) else size
    prediction = noise.get("prediction_type", "epsilon")
    return LatentDiffusion(unet, first_stage, schedule, conditioners, prediction, size).eval()


def diffusers_metadata(folder: str | Path) -> dict[str, Any]:
    """What a native folder's metadata.json would say: the sha256 of weights and configs, and how such models are usually sampled."""
    folder = Path(folder)
    digest = hashlib.sha256()
    parts = [folder / n for n in ("unet", "vae", "vqvae", "text_encoder") if (folder / n).is_dir()]
    configs = [folder / INDEX, *sorted(folder.glob("*/*config.json"))]
    for path in (*configs, *(p for part in parts for p in _files(part))):
        digest.update(file_sha256(path).encode())
    text = (folder / "text_encoder").is_dir()
    sampling = {"num_inference_steps": 50, "guidance_scale": 7.5 if text else 1.0, "spacing": "trailing"}
    sampling["sampler"] = {"_target_": "ldm_train.samplers.ddim.ddim", "_partial_": True}
    return {"sha256": digest.hexdigest(), "sampling": sampling}
