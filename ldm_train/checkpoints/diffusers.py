"""Models in diffusers' folders: Stable Diffusion 1 and 2 and unconditional latent diffusion, without diffusers itself.

Such a folder may come from anyone. Its files are data: none is run, no module that it names is imported, and nothing
outside it is read.
"""

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from ldm_train import names
from ldm_train.checkpoints import diffusers_options as rules
from ldm_train.checkpoints.parts import build
from ldm_train.conditioning.text import FrozenText
from ldm_train.diffusion import parameterisation
from ldm_train.diffusion.parameterisation import Parameterisation
from ldm_train.diffusion.schedule import NoiseSchedule
from ldm_train.latent_diffusion import LatentDiffusion
from ldm_train.models.first_stage import FirstStage
from ldm_train.storage import check_links, file_sha256, read_record

INDEX = "model_index.json"
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "LDMPipeline")
# Sampling options of models that record none.
USUAL_SAMPLING = {
    "num_inference_steps": 50,
    "guidance_scale": 1.0,
    "spacing": "trailing",
    "sampler": {"_target_": "ldm_train.samplers.ddim.ddim", "_partial_": True},
}
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
    key = re.sub(r"\bmid\.(block|attn)_(\d)", lambda m: f"mid_block.{m[1]}.{int(m[2]) - 1}", key)
    key = re.sub(r"\bdown\.(\d+)\.", r"down_blocks.\1.", key)
    key = re.sub(r"\bup\.(\d+)\.", lambda m: f"up_blocks.{levels - 1 - int(m[1])}.", key)
    key = re.sub(r"\.(down|up)sample\.", r".\1samplers.0.", key).replace(".block.", ".resnets.")
    return re.sub(r"\.attn\.(\d+)\.(\w+)", lambda m: f".attentions.{m[1]}.{ATTENTION[m[2]]}", key)


def check_folder_links(folder: Path) -> None:
    """Raises ValueError for a link that leads out of the folder. (A hub's cache keeps its files in blobs/, beside.)"""
    root = folder.resolve()
    check_links(folder, [root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [])


def weight_files(folder: Path) -> list[Path]:
    """The weights of one component: whole or in shards, safetensors before pickles."""
    for stem in WEIGHTS:
        for suffix in (".safetensors", ".fp16.safetensors"):
            if (folder / f"{stem}{suffix}").is_file():
                return [folder / f"{stem}{suffix}"]
        if (index := folder / f"{stem}.safetensors.index.json").is_file():
            shards = read_record(index).get("weight_map")
            names = list(shards.values()) if isinstance(shards, dict) else [shards]
            for name in names:
                if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
                    raise ValueError(f"{index} names {name!r}, which is no file beside it; download the whole model")
            return [folder / name for name in sorted(set(names))]
        if (folder / f"{stem}.bin").is_file():
            return [folder / f"{stem}.bin"]
    raise FileNotFoundError(f"{folder} holds no weights ({WEIGHTS[0]}.safetensors); download the whole model")


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a folder, by diffusers' current names. Raises ValueError for a file that cannot be read."""
    weights: dict[str, torch.Tensor] = {}
    for path in weight_files(folder):
        try:
            # No code is run from a pickle.
            read = torch.load(path, "cpu", weights_only=True) if path.suffix == ".bin" else load_file(path)
            if not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in read.items()):
                raise TypeError("it holds more than tensors by name")
        except Exception as error:  # the libraries raise many kinds
            raise ValueError(
                f"{path} cannot be read ({_first_line(error)}); download it again, as .safetensors"
            ) from error
        weights |= read
    older = r"(.*\.attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)"
    return {re.sub(older, lambda m: f"{m[1]}.{OLDER_ATTENTION[m[2]]}.{m[3]}", key): v for key, v in weights.items()}


def _trunk(options: dict[str, Any]) -> dict[str, Any]:
    """What U-Nets and autoencoders have in common, in our names."""
    widths = options["block_out_channels"]
    mult = [width // widths[0] for width in widths]
    return {"channels": widths[0], "channel_mult": mult, "num_res_blocks": options["layers_per_block"]}


def _built(path: Path, tree: dict[str, Any]) -> nn.Module:
    """A network on the meta device, since a config may ask for any size; its memory comes with its weights."""
    with torch.device("meta"):
        module = build(tree, path)
    groups = rules.read_groups(path)
    for norm in module.modules():  # groups are not in the weights; ours follow the published widths, see `group_norm`
        if isinstance(norm, nn.GroupNorm) and norm.num_groups != groups:
            raise ValueError(
                f"{path} has norm_num_groups={groups} at width {norm.num_channels}, ours has {norm.num_groups}; models with "
                "32 groups and at least 128 channels can be loaded"
            )
    return module


def _load(module: nn.Module, folder: Path, name: Callable[[str], str]) -> None:
    """Loads a folder's tensors, which have other names, into a module. Raises ValueError for a tensor that is missing,
    unexpected or of another shape."""
    weights = _weights(folder)
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
    """The U-Net's num_heads or head_dim, for those levels that have attention.

    attention_head_dim is the width of a head in UNet2DModel (null: one head) and, in spite of its name, the number of
    heads in UNet2DConditionModel.
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


def unet_tree(folder: Path, latent_channels: int) -> tuple[dict[str, Any], list[int]]:
    """The tree of a U-Net, and the size of the latents that it was trained on."""
    path = folder / "config.json"
    kind, options = rules.read_model(path, rules.UNETS)
    for name in ("in_channels", "out_channels"):
        if options[name] != latent_channels:
            raise ValueError(
                f"{path} has {name}={options[name]}, the latents have {latent_channels} channels: inpainting, depth and "
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
    else:  # with scale_shift, the middle attention there has no norm unless its groups are given
        extra = {"mid_attention": mid_attention}
        groups = options["norm_num_groups"]
        allowed = (None, groups) if options["resnet_time_scale_shift"] == "default" else (groups,)
        if mid_attention and options["attn_norm_num_groups"] not in allowed:
            raise rules.refused(path, "attn_norm_num_groups", options["attn_norm_num_groups"], f"={groups}")
    middle = [len(options["block_out_channels"]) - 1] if mid_attention else []
    tree = {
        "_target_": "ldm_train.models.unet.UNet",
        "in_channels": options["in_channels"],
        "out_channels": options["out_channels"],
        "attention_levels": attention,
        "scale_shift": options["resnet_time_scale_shift"] == "scale_shift",
    }
    size = options["sample_size"] or 64
    tree |= _trunk(options) | _head_size(path, options, attention + middle, conditional) | extra
    return tree, size if isinstance(size, list) else [size, size]


def load_unet(folder: Path, latent_channels: int) -> tuple[nn.Module, list[int]]:
    """The U-Net, and the size of the latents that it was trained on."""
    tree, size = unet_tree(folder, latent_channels)
    unet = _built(folder / "config.json", tree)
    _load(unet, folder, lambda key: unet_key(key, tree["num_res_blocks"]))
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
    network = _built(folder / "config.json", tree["autoencoder"])
    _load(network, folder, lambda key: autoencoder_key(key, len(tree["autoencoder"]["channel_mult"])))
    return FirstStage(network, tree["scale_factor"])


def _text(folder: Path, dim: int) -> FrozenText:
    """CLIP's text encoder and tokenizer. The library is given what was checked here, not the folder's own configs."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    encoder, words = folder / "text_encoder", folder / "tokenizer"
    path = encoder / "config.json"
    options = rules.read_options(path, rules.CLIP, known=False)
    if options["hidden_size"] != dim:
        raise rules.refused(path, "hidden_size", options["hidden_size"], f"={dim}, as the U-Net asks,")
    rules.read_options(words / "tokenizer_config.json", rules.TOKENIZER)
    if not (words / "tokenizer.json").is_file() and not all(
        (words / n).is_file() for n in ("vocab.json", "merges.txt")
    ):
        raise FileNotFoundError(f"{words} holds no vocab.json and merges.txt; download the whole model")
    config, weights = CLIPTextConfig(**options), _weights(encoder)
    try:
        tokenizer = CLIPTokenizer.from_pretrained(words, local_files_only=True, trust_remote_code=False)
        model, told = CLIPTextModel.from_pretrained(
            None, config=config, state_dict=weights, dtype=torch.float32, output_loading_info=True
        )
        if told["missing_keys"]:
            raise ValueError(f"the encoder lacks {sorted(told['missing_keys'])[0]}")
        if (most := max(tokenizer.get_vocab().values())) >= options["vocab_size"]:
            raise ValueError(f"token {most} has no embedding")
    except Exception as error:  # the library raises many kinds
        raise ValueError(
            f"{encoder} and {words} are no CLIP text encoder ({_first_line(error)}); download them again"
        ) from error
    return FrozenText(str(encoder), dim, max_length=options["max_position_embeddings"], pretrained=(tokenizer, model))


PREDICTIONS: dict[str, type[Parameterisation]] = {
    kind: getattr(parameterisation, path.rpartition(".")[2]) for kind, path in names.PREDICTIONS.items()
}


def load_schedule(folder: Path) -> tuple[NoiseSchedule, Parameterisation]:
    """The schedule, and what the U-Net predicts."""
    path = folder / "scheduler_config.json"
    _, options = rules.read_class(path, rules.SCHEDULERS)
    prediction, zero_snr = options["prediction_type"], options["rescale_betas_zero_snr"]
    if zero_snr and prediction == "epsilon":  # pure noise says nothing of the image
        raise rules.refused(path, "rescale_betas_zero_snr", zero_snr, "=False, or with prediction_type='v_prediction',")
    ends = options["beta_start"], options["beta_end"], options["num_train_timesteps"]
    try:
        return NoiseSchedule(rules.BETAS[options["beta_schedule"]], *ends, zero_snr), PREDICTIONS[prediction]()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _part(folder: Path, index: dict[str, Any], library: str, *names: str) -> str:
    """The first of these components that a pipeline has. Raises ValueError where it has none, or one of its own."""
    for name in names:
        value = index.get(name)
        if isinstance(value, list) and len(value) == 2 and value[0] is not None:
            if value[0] != library:
                raise ValueError(
                    f"{folder / INDEX} takes its {name} from {value[0]!r}; {library}' own can be loaded, and nothing that "
                    "a folder names is imported"
                )
            return name
    raise ValueError(f"{folder / INDEX} names no {' or '.join(names)}; it is no latent diffusion pipeline")


def load_diffusers(folder: str | Path) -> LatentDiffusion:
    """A pipeline's folder: U-Net, KL or VQ autoencoder, CLIP text encoder where there is one, noise schedule.

    Raises FileNotFoundError for a part that is missing, ValueError, naming file and option, for one not built here.
    """
    folder = Path(folder)
    check_folder_links(folder)
    index = read_record(folder / INDEX)
    if index.get("_class_name") not in PIPELINES:
        raise ValueError(f"{folder / INDEX} is for {index.get('_class_name')!r}; {', '.join(PIPELINES)} can be loaded")
    vae = _part(folder, index, "diffusers", "vae", "vqvae")
    first_stage = load_first_stage(folder / vae)
    unet, size = load_unet(folder / _part(folder, index, "diffusers", "unet"), first_stage.latent_channels)
    conditioners = {}
    if context_dim := unet.condition_widths["context"]:
        for name in ("text_encoder", "tokenizer"):
            _part(folder, index, "transformers", name)
        conditioners["text"] = _text(folder, context_dim)
    schedule, prediction = load_schedule(folder / _part(folder, index, "diffusers", "scheduler"))
    return LatentDiffusion(unet, first_stage, schedule, conditioners, prediction, size).eval()


def diffusers_metadata(folder: str | Path) -> dict[str, Any]:
    """As the metadata.json of a native folder: the sha256 of weights and configs, and the usual sampling options of such models."""
    folder = Path(folder)
    check_folder_links(folder)
    digest = hashlib.sha256()
    parts = [folder / n for n in ("unet", "vae", "vqvae", "text_encoder") if (folder / n).is_dir()]
    configs = [folder / INDEX, *sorted(folder.glob("*/*config.json"))]
    for path in (*configs, *(p for part in parts for p in weight_files(part))):
        digest.update(file_sha256(path).encode())
    scale = 7.5 if (folder / "text_encoder").is_dir() else 1.0
    return {"sha256": digest.hexdigest(), "sampling": USUAL_SAMPLING | {"guidance_scale": scale}}
