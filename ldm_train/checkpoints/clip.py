"""Reads and writes the encoders inside Stable Diffusion checkpoints: CLIP's text encoder under transformers' names
(SD 1), OpenCLIP's text encoder under its own names (SD 2), and the image encoder of CLIP or OpenCLIP (SD 2 unCLIP)."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm_train.devices import shapes_only
from ldm_train.errors import first_line, in_one_line

Tensors = dict[str, torch.Tensor]
CLIP, OPENCLIP, EMBEDDER = "cond_stage_model.transformer.text_model.", "cond_stage_model.model.", "embedder.model."
HEAD = 64  # channels per attention head of a text encoder
VISION_HEADS = 16  # the most heads of an image encoder; each has at least 64 channels
# OpenCLIP's names -> transformers' names, inside a layer.
LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
WHOLE = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
VISION = {
    "class_embedding": "embeddings.class_embedding",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    **{f"{theirs}.{part}": f"{ours}.{part}" for theirs, ours in (("ln_pre", "pre_layrnorm"), ("ln_post", "post_layernorm"))
       for part in ("weight", "bias")},
}  # fmt: skip
UNUSED = ("text_projection", "logit_scale", "attn_mask", "embeddings.position_ids")


def _from_openclip(tensors: Mapping[str, torch.Tensor], whole: Mapping[str, str]) -> Tensors:
    """Renames OpenCLIP's tensors to transformers' names and splits fused q, k, v. whole: the names outside the
    layers."""
    made: Tensors = {}
    for name, tensor in tensors.items():
        if name in whole:
            made[whole[name]] = tensor
        elif layer := re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)", name):
            number, inner = layer.groups()
            if joint := re.fullmatch(r"attn\.in_proj_(weight|bias)", inner):
                for letter, part in zip("qkv", tensor.chunk(3)):
                    made[f"encoder.layers.{number}.self_attn.{letter}_proj.{joint[1]}"] = part
            else:
                module, _, leaf = inner.rpartition(".")
                made[f"encoder.layers.{number}.{LAYER.get(module, module)}.{leaf}"] = tensor
        else:
            made[name] = tensor
    return made


def _to_openclip(tensors: Mapping[str, torch.Tensor], whole: Mapping[str, str]) -> Tensors:
    theirs = {ours: name for name, ours in whole.items()}
    inside = {ours: name for name, ours in LAYER.items()}
    made: Tensors = {}
    for name, tensor in tensors.items():
        if name in theirs:
            made[theirs[name]] = tensor
            continue
        number, module, leaf = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name).groups()
        block = f"transformer.resblocks.{number}"
        if module == "self_attn.q_proj":
            parts = [tensors[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            made[f"{block}.attn.in_proj_{leaf}"] = torch.cat(parts)
        elif module not in ("self_attn.k_proj", "self_attn.v_proj"):
            made[f"{block}.{inside[module]}.{leaf}"] = tensor
    return made


def read_text_encoder(tensors: Mapping[str, torch.Tensor], where: Path) -> tuple[nn.Module, set[str], list[str]]:
    """Builds the text encoder of a checkpoint, with sizes taken from its tensors. Returns (a CLIPTextModel, the names
    of its tensors, the names of tensors that are not needed). Raises ValueError if there is no text encoder, or a
    tensor is missing, unknown or of another shape."""
    from transformers import CLIPTextConfig, CLIPTextModel

    prefix = next((p for p in (CLIP, OPENCLIP) if any(name.startswith(p) for name in tensors)), None)
    if prefix is None:
        raise ValueError(f"{where} holds no text encoder ({CLIP}* or {OPENCLIP}*)")
    names = {name.removeprefix(prefix): name for name in tensors if name.startswith(prefix)}
    unused = sorted(name for own, name in names.items() if own in UNUSED)
    own = {key: tensors[name].float() for key, name in names.items() if key not in UNUSED}
    try:
        own = _from_openclip(own, WHOLE) if prefix == OPENCLIP else own
        words, width = own["embeddings.token_embedding.weight"].shape
        layers = _layers(own)
        options: dict[str, Any] = {
            "vocab_size": words, "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": width // HEAD,
            "intermediate_size": len(own["encoder.layers.0.mlp.fc1.bias"]),
            "max_position_embeddings": len(own["embeddings.position_embedding.weight"]),
            "hidden_act": "quick_gelu" if prefix == CLIP else "gelu", "bos_token_id": words - 2, "eos_token_id": words - 1,
        }  # fmt: skip
        if width % HEAD or layers > 64 or width > 1 << 14:
            raise ValueError(f"{layers} layers of width {width}")
        with shapes_only():
            model = CLIPTextModel(CLIPTextConfig(**options))
        wrapped = any(key.startswith("text_model.") for key in model.state_dict())
        model.load_state_dict({f"text_model.{k}" if wrapped else k: v for k, v in own.items()}, assign=True)
        model = _with_positions(model)
    except (KeyError, RuntimeError, ValueError, TypeError, IndexError) as error:
        raise ValueError(f"{where}: {prefix}* is not a text encoder of CLIP ({in_one_line(error)})") from error
    return model.eval().requires_grad_(False), set(names.values()) - set(unused), unused


def _layers(tensors: Mapping[str, Any]) -> int:
    return 1 + max(int(m[1]) for key in tensors if (m := re.match(r"encoder\.layers\.(\d+)\.", key)))


def read_image_encoder(
    tensors: Mapping[str, torch.Tensor], openclip: bool, where: Path
) -> tuple[Any, nn.Module, set[str], list[str]]:
    """Builds the image encoder of an SD 2 unCLIP checkpoint. Returns (a CLIPImageProcessor, a
    CLIPVisionModelWithProjection, the names of its tensors, the names of tensors that are not needed). Raises the
    same errors as `read_text_encoder`."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    prefix = f"{EMBEDDER}visual."
    names = {name.removeprefix(prefix): name for name in tensors if name.startswith(prefix)}
    unused = sorted(name for name in tensors if name.startswith(EMBEDDER) and not name.startswith(prefix))
    if not names:
        raise ValueError(f"{where} holds no image encoder ({prefix}*)")
    own = {key: tensors[name].float() for key, name in names.items()}
    try:
        projection = own.pop("proj").T.contiguous()
        own = _from_openclip(own, VISION)
        width, channels, patch, _ = own["embeddings.patch_embedding.weight"].shape
        side = patch * math.isqrt(len(own["embeddings.position_embedding.weight"]) - 1)
        options: dict[str, Any] = {
            "hidden_size": width, "num_hidden_layers": _layers(own), "num_attention_heads": min(max(1, width // HEAD), VISION_HEADS),
            "intermediate_size": len(own["encoder.layers.0.mlp.fc1.bias"]), "patch_size": patch, "image_size": side,
            "num_channels": channels, "projection_dim": len(projection), "hidden_act": "gelu" if openclip else "quick_gelu",
        }  # fmt: skip
        if width % options["num_attention_heads"] or options["num_hidden_layers"] > 64 or max(width, side) > 1 << 14:
            raise ValueError(f"{options['num_hidden_layers']} layers of width {width}")
        with shapes_only():
            model = CLIPVisionModelWithProjection(CLIPVisionConfig(**options))
        state = {f"vision_model.{k}": v for k, v in own.items()} | {"visual_projection.weight": projection}
        model.load_state_dict(state, assign=True)
        model = _with_positions(model)
    except (KeyError, RuntimeError, ValueError, TypeError, IndexError) as error:
        raise ValueError(f"{where}: {prefix}* is not an image encoder of CLIP ({in_one_line(error)})") from error
    processor = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return processor, model.eval().requires_grad_(False), set(names.values()), unused


def image_encoder_tensors(encoder: nn.Module) -> Tensors:
    """Returns the tensors of a CLIPVisionModelWithProjection under the names in Stable Diffusion 2 unCLIP
    checkpoints."""
    state = {k: v for k, v in encoder.state_dict().items() if "position_ids" not in k}
    projection = state.pop("visual_projection.weight")
    own = _to_openclip({k.removeprefix("vision_model."): v for k, v in state.items()}, VISION)
    return {f"{EMBEDDER}visual.{k}": v for k, v in (own | {"proj": projection.T}).items()}


def _with_positions(model: nn.Module) -> nn.Module:
    """Replaces a model's meta-device buffers, which no file holds, by position indices 0, 1, 2, ... Returns the
    model."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                setattr(module, name, torch.arange(buffer.numel()).view(buffer.shape).to(buffer.dtype))
    return model


def is_openclip(encoder: nn.Module) -> bool:
    """Returns True for an OpenCLIP encoder, judged by its activation: OpenAI's models use their own approximation of
    GELU. Raises ValueError for an encoder that is not CLIP's."""
    kind = type(encoder).__name__
    if "CLIP" not in kind:
        raise ValueError(f"an encoder of this model is a {kind}, and checkpoints of this format hold CLIP's only")
    return encoder.config.hidden_act == "gelu"


def text_encoder_tensors(encoder: nn.Module) -> Tensors:
    """Returns the tensors of a CLIPTextModel under the names in Stable Diffusion checkpoints."""
    own = {k.removeprefix("text_model."): v for k, v in encoder.state_dict().items() if "position_ids" not in k}
    if is_openclip(encoder):
        return {f"{OPENCLIP}{k}": v for k, v in _to_openclip(own, WHOLE).items()}
    return {f"{CLIP}{k}": v for k, v in own.items()}


def read_clip_tokenizer(folder: str | Path) -> Any:
    """Reads CLIP's tokenizer from a folder with vocab.json and merges.txt, or tokenizer.json. Raises FileNotFoundError
    if they are missing, ValueError if they cannot be read."""
    from transformers import CLIPTokenizer

    folder = Path(folder)
    whole = (folder / "tokenizer.json").is_file() or all((folder / n).is_file() for n in ("vocab.json", "merges.txt"))
    if not whole:
        raise FileNotFoundError(f"tokenizer={folder} is not a folder with CLIP's vocab.json and merges.txt")
    try:
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library raises many types of exceptions
        raise ValueError(f"tokenizer={folder} is not a tokenizer of CLIP ({first_line(error)})") from error
