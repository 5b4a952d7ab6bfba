"""The text encoders inside Stable Diffusion's checkpoints: CLIP as transformers names it (SD 1), OpenCLIP by its own names (SD 2)."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

Tensors = dict[str, torch.Tensor]
CLIP, OPENCLIP = "cond_stage_model.transformer.text_model.", "cond_stage_model.model."
HEAD = 64  # channels of a head in both
# OpenCLIP's names -> transformers', inside a layer.
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
UNUSED = ("text_projection", "logit_scale", "attn_mask", "embeddings.position_ids")


def _from_openclip(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """By transformers' names, without what is unused."""
    made: Tensors = {}
    for name, tensor in tensors.items():
        if name in WHOLE:
            made[WHOLE[name]] = tensor
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


def _to_openclip(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    theirs = {ours: name for name, ours in WHOLE.items()}
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
    """(a CLIPTextModel, the names of the tensors that it is made of, those that nothing needs) of a checkpoint. Its sizes are
    those of the tensors. Raises ValueError where there is none, or one with a tensor missing, unknown or of another shape."""
    from transformers import CLIPTextConfig, CLIPTextModel

    prefix = next((p for p in (CLIP, OPENCLIP) if any(name.startswith(p) for name in tensors)), None)
    if prefix is None:
        raise ValueError(f"{where} holds no text encoder ({CLIP}* or {OPENCLIP}*)")
    names = {name.removeprefix(prefix): name for name in tensors if name.startswith(prefix)}
    unused = sorted(name for own, name in names.items() if own in UNUSED)
    own = {key: tensors[name].float() for key, name in names.items() if key not in UNUSED}
    try:
        own = _from_openclip(own) if prefix == OPENCLIP else own
        words, width = own["embeddings.token_embedding.weight"].shape
        layers = 1 + max(int(m[1]) for key in own if (m := re.match(r"encoder\.layers\.(\d+)\.", key)))
        options: dict[str, Any] = {
            "vocab_size": words, "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": width // HEAD,
            "intermediate_size": len(own["encoder.layers.0.mlp.fc1.bias"]),
            "max_position_embeddings": len(own["embeddings.position_embedding.weight"]),
            "hidden_act": "quick_gelu" if prefix == CLIP else "gelu", "bos_token_id": words - 2, "eos_token_id": words - 1,
        }  # fmt: skip
        if width % HEAD or layers > 64 or width > 1 << 14:
            raise ValueError(f"{layers} layers of width {width}")
        with torch.device("meta"):
            model = CLIPTextModel(CLIPTextConfig(**options))
        wrapped = any(key.startswith("text_model.") for key in model.state_dict())
        model.load_state_dict({f"text_model.{k}" if wrapped else k: v for k, v in own.items()}, assign=True)
        model = _with_positions(model)
    except (KeyError, RuntimeError, ValueError, TypeError, IndexError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{where}: {prefix}* is no text encoder of CLIP ({reason})") from error
    return model.eval().requires_grad_(False), set(names.values()) - set(unused), unused


def _with_positions(model: nn.Module) -> nn.Module:
    """The buffers that no file holds, off the meta device."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                setattr(module, name, torch.arange(buffer.numel()).view(buffer.shape).to(buffer.dtype))
    return model


def is_openclip(encoder: nn.Module) -> bool:
    """By the activation: OpenAI's models have their own approximation of GELU."""
    return encoder.config.hidden_act == "gelu"


def text_encoder_tensors(encoder: nn.Module) -> Tensors:
    """A CLIPTextModel by the names of Stable Diffusion's checkpoints."""
    own = {k.removeprefix("text_model."): v for k, v in encoder.state_dict().items() if "position_ids" not in k}
    if is_openclip(encoder):
        return {f"{OPENCLIP}{k}": v for k, v in _to_openclip(own).items()}
    return {f"{CLIP}{k}": v for k, v in own.items()}


def read_clip_tokenizer(folder: str | Path) -> Any:
    """CLIP's tokenizer of a folder with vocab.json and merges.txt, or tokenizer.json. Raises FileNotFoundError or ValueError."""
    from transformers import CLIPTokenizer

    folder = Path(folder)
    whole = (folder / "tokenizer.json").is_file() or all((folder / n).is_file() for n in ("vocab.json", "merges.txt"))
    if not whole:
        raise FileNotFoundError(f"tokenizer={folder} is no folder with CLIP's vocab.json and merges.txt")
    try:
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library raises many kinds
        raise ValueError(f"tokenizer={folder} is no tokenizer of CLIP ({str(error).splitlines()[0]})") from error
