"""Loads U-Nets and autoencoders from diffusers folders: their options as config trees, their weights in networks of
this package.

Such a folder may come from an untrusted source. Its files are treated as data: no code in it is run, no module that it
names is imported, and nothing outside it is read.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from ldm_train.checkpoints import diffusers_options as rules
from ldm_train.checkpoints.parts import build
from ldm_train.devices import shapes_only
from ldm_train.errors import first_line
from ldm_train.models.first_stage import FirstStage
from ldm_train.storage import check_links, read_older_tensors, read_record

WEIGHTS = ("diffusion_pytorch_model", "model", "pytorch_model")
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
ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
OLDER_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def unet_key(key: str, per_level: int) -> str:
    """Returns diffusers' name for our (CompVis') name of a U-Net's tensor. per_level: residual blocks per level. The
    fused qkv of attention without a context keeps "qkv" in its name, which stands for three tensors there: to_q,
    to_k and to_v."""
    module, leaf = key.rsplit(".", 1)
    if module in UNET_OUTSIDE:
        return f"{UNET_OUTSIDE[module]}.{leaf}"
    part, rest = re.match(r"(input_blocks\.\d+|middle_block|output_blocks\.\d+)\.(.*)", module).groups()
    slot, _, inner = rest.partition(".")  # slot: index of the layer in its block
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
    """Returns diffusers' name for our (CompVis') name of an autoencoder's tensor. levels: number of resolutions.
    Attention there has linear layers, ours 1x1 convolutions."""
    key = key.replace("norm_out", "conv_norm_out").replace("nin_shortcut", "conv_shortcut")
    key = re.sub(r"\bmid\.(block|attn)_(\d)", lambda m: f"mid_block.{m[1]}.{int(m[2]) - 1}", key)
    key = re.sub(r"\bdown\.(\d+)\.", r"down_blocks.\1.", key)
    key = re.sub(r"\bup\.(\d+)\.", lambda m: f"up_blocks.{levels - 1 - int(m[1])}.", key)
    key = re.sub(r"\.(down|up)sample\.", r".\1samplers.0.", key).replace(".block.", ".resnets.")
    return re.sub(r"\.attn\.(\d+)\.(\w+)", lambda m: f".attentions.{m[1]}.{ATTENTION[m[2]]}", key)


def check_folder_links(folder: Path) -> None:
    """Raises ValueError if a link leads out of the folder. (Links to blobs/ in the cache of the Hugging Face Hub are
    allowed.)"""
    root = folder.resolve()
    check_links(folder, [root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [])


def weight_files(folder: Path) -> list[Path]:
    """Returns the weight files of one component: one file or its shards, safetensors in preference to pickles. Raises
    FileNotFoundError if there are none, ValueError if the index names a missing file."""
    for stem in WEIGHTS:
        for suffix in (".safetensors", ".fp16.safetensors"):
            if (folder / f"{stem}{suffix}").is_file():
                return [folder / f"{stem}{suffix}"]
        if (index := folder / f"{stem}.safetensors.index.json").is_file():
            shards = read_record(index).get("weight_map")
            names = list(shards.values()) if isinstance(shards, dict) else [shards]
            for name in names:
                if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
                    raise ValueError(f"{index} names {name!r}, which is not a file beside it; download the whole model")
            return [folder / name for name in sorted(set(names))]
        if (folder / f"{stem}.bin").is_file():
            return [folder / f"{stem}.bin"]
    raise FileNotFoundError(f"{folder} holds no weights ({WEIGHTS[0]}.safetensors); download the whole model")


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Reads the tensors of a folder, under diffusers' current names. Raises ValueError if a file cannot be read."""
    weights: dict[str, torch.Tensor] = {}
    for path in weight_files(folder):
        try:
            # No code is run from a pickle.
            read = read_older_tensors(path) if path.suffix == ".bin" else load_file(path)
            if not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in read.items()):
                raise TypeError("it holds more than tensors by name")
        except Exception as error:  # the libraries raise many types of exceptions
            raise ValueError(
                f"{path} cannot be read ({first_line(error)}); download it again, as .safetensors"
            ) from error
        weights |= read
    older = r"(.*\.attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)"
    return {re.sub(older, lambda m: f"{m[1]}.{OLDER_ATTENTION[m[2]]}.{m[3]}", key): v for key, v in weights.items()}


def _trunk(options: dict[str, Any]) -> dict[str, Any]:
    """Returns the options that U-Nets and autoencoders have in common, under our names."""
    widths = options["block_out_channels"]
    mult = [width // widths[0] for width in widths]
    return {"channels": widths[0], "channel_mult": mult, "num_res_blocks": options["layers_per_block"]}


def built(path: Path, tree: dict[str, Any]) -> nn.Module:
    """Builds a network on the meta device, since a config may ask for any size; memory is allocated with its weights.
    Raises ValueError if the config's number of groups differs from ours."""
    with shapes_only():
        module = build(tree, path)
    groups = rules.read_groups(path)
    for norm in module.modules():  # groups are not in the weights; ours depend on the width, see `group_norm`
        if isinstance(norm, nn.GroupNorm) and norm.num_groups != groups:
            raise ValueError(
                f"{path} has norm_num_groups={groups} at width {norm.num_channels}, ours has {norm.num_groups}; models with "
                "32 groups and at least 128 channels can be loaded"
            )
    return module


def load_weights(module: nn.Module, folder: Path, name: Callable[[str], str], unused: Sequence[str] = ()) -> None:
    """Loads a folder's tensors into a module. name: our tensor name -> diffusers'. unused: prefixes of names that are
    not needed. Raises ValueError if a tensor is missing, unexpected or of another shape."""
    weights = {k: v for k, v in read_weights(folder).items() if not k.startswith(tuple(unused))}
    state, left = {}, set(weights)
    for key, value in module.state_dict().items():
        theirs = name(key)
        names = [theirs.replace("qkv", n) for n in ("to_q", "to_k", "to_v")] if ".qkv." in theirs else [theirs]
        if ".attentions." in theirs and not any(n in weights for n in names):  # attention without a context
            names = [n.replace(".norm.", ".group_norm.").replace(".proj_out.", ".to_out.0.") for n in names]
        if missing := [n for n in names if n not in weights]:
            raise ValueError(f"{folder} lacks {missing[0]}, which its config asks for")
        shape = [value.shape[0] // len(names), *value.shape[1:]]
        for part in names:
            tensor = weights[part]
            if [n for n in tensor.shape if n != 1] != [n for n in shape if n != 1] or not tensor.is_floating_point():
                raise ValueError(
                    f"{folder}: {part} has shape {tuple(tensor.shape)} and type {tensor.dtype}, its config asks for "
                    f"{tuple(shape)} and floating point"
                )
        left -= set(names)
        state[key] = torch.cat([weights[n] for n in names]).view(value.shape).to(value.dtype)
    if left:
        raise ValueError(f"{folder} holds {sorted(left)[0]} and {len(left) - 1} more that its config does not ask for")
    module.load_state_dict(state, assign=True)


def _head_size(path: Path, options: dict[str, Any], levels: list[int], conditional: bool) -> dict[str, int]:
    """Returns the U-Net's num_heads or head_dim, for the levels that have attention.

    attention_head_dim is the width of a head in UNet2DModel (null: one head) and, despite its name, the number of heads
    in UNet2DConditionModel.
    """
    widths, asked = options["block_out_channels"], options["attention_head_dim"]
    if asked is None:
        return {"num_heads": 1}
    numbers = asked if isinstance(asked, list) else [asked] * len(widths)
    if len(numbers) != len(widths):
        raise rules.refused(path, "attention_head_dim", asked, f" of {len(widths)} entries")
    if wrong := [level for level in levels if widths[level] % numbers[level]]:
        raise rules.refused(path, "attention_head_dim", asked, f" that divides the width {widths[wrong[0]]}")
    if len({numbers[level] for level in levels}) <= 1:
        return {"num_heads" if conditional else "head_dim": numbers[-1]}
    if len(head_widths := {widths[level] // numbers[level] for level in levels}) > 1:
        raise rules.refused(path, "attention_head_dim", asked, " that gives heads of equal width, or of equal number,")
    return {"head_dim": head_widths.pop()}


def unet_tree(folder: Path, latent_channels: int, concat: int = 0) -> tuple[dict[str, Any], list[int]]:
    """Returns the config tree of a U-Net, and the size (h, w) of the latents it was trained on."""
    path = folder / "config.json"
    kind, options = rules.read_model(path, rules.UNETS)
    for name, wanted in (("in_channels", latent_channels + concat), ("out_channels", latent_channels)):
        if options[name] != wanted:
            with_condition = f", the condition {concat}" if concat else ""
            raise ValueError(
                f"{path} has {name}={options[name]}, the latents have {latent_channels} channels{with_condition}: depth and x4 "
                "upscaling pipelines cannot be loaded yet"
            )
    conditional = kind == "UNet2DConditionModel"
    attention = [level for level, block in enumerate(options["down_block_types"]) if "Attn" in block]
    mid_attention = options.get("add_attention", True)
    if conditional:
        extra = {
            "context_dim": options["cross_attention_dim"],
            "transformer_depth": options["transformer_layers_per_block"],
            "linear_projection": options["use_linear_projection"],
            "cross_only_levels": attention if options["only_cross_attention"] else [],
        }
    else:  # with scale_shift, diffusers' middle attention has no norm unless its groups are given
        extra = {"mid_attention": mid_attention}
        groups = options["norm_num_groups"]
        allowed = (None, groups) if options["resnet_time_scale_shift"] == "default" else (groups,)
        if mid_attention and options["attn_norm_num_groups"] not in allowed:
            raise rules.refused(path, "attn_norm_num_groups", options["attn_norm_num_groups"], f"={groups}")
    middle = [len(options["block_out_channels"]) - 1] if mid_attention else []
    tree = {
        "_target_": "ldm_train.models.unet.UNet",
        "in_channels": latent_channels,
        "out_channels": latent_channels,
        "concat_channels": concat,
        "attention_levels": attention,
        "scale_shift": options["resnet_time_scale_shift"] == "scale_shift",
    }
    size = options["sample_size"] or 64
    tree |= _trunk(options) | _head_size(path, options, attention + middle, conditional) | extra
    return tree, size if isinstance(size, list) else [size, size]


def load_unet(folder: Path, latent_channels: int, concat: int = 0) -> tuple[nn.Module, list[int]]:
    """Returns the U-Net, and the size (h, w) of the latents it was trained on. concat: channels of an image
    concatenated to the latents."""
    tree, size = unet_tree(folder, latent_channels, concat)
    unet = built(folder / "config.json", tree)
    load_weights(unet, folder, lambda key: unet_key(key, tree["num_res_blocks"]))
    return unet, size


def first_stage_tree(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    kind, options = rules.read_model(path, rules.AUTOENCODERS)
    if options["out_channels"] != options["in_channels"]:
        raise ValueError(
            f"{path} has in_channels={options['in_channels']} and out_channels={options['out_channels']}; autoencoders "
            "with equal numbers can be loaded"
        )
    vq = kind == "VQModel"
    tree = {
        "_target_": f"ldm_train.models.autoencoder.{'AutoencoderVQ' if vq else 'AutoencoderKL'}",
        "z_channels": options["latent_channels"],
        "attention_levels": [n for n, block in enumerate(options["down_block_types"]) if "Attn" in block],
        "mid_attention": options["mid_block_add_attention"],
        "in_channels": options["in_channels"],
    }
    if vq:
        tree |= {"embed_dim": options["vq_embed_dim"], "num_codes": options["num_vq_embeddings"]}
    scale = options["scaling_factor"]
    return {
        "_target_": "ldm_train.models.first_stage.FirstStage",
        "autoencoder": tree | _trunk(options),
        "scale_factor": scale,
    }


def load_first_stage(folder: Path) -> FirstStage:
    tree = first_stage_tree(folder)
    network = built(folder / "config.json", tree["autoencoder"])
    load_weights(network, folder, lambda key: autoencoder_key(key, len(tree["autoencoder"]["channel_mult"])))
    return FirstStage(network, tree["scale_factor"])
