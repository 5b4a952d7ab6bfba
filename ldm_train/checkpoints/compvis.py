"""Converts models of CompVis/latent-diffusion and its relatives: a checkpoint (.ckpt or .safetensors) with the YAML
that trained it to a model of this package, and back. Every tensor of a checkpoint is used, left out by name, or
refused with an error.

Our networks use CompVis' tensor names (parity is tested), so few tensors are renamed or reshaped.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from ldm_train.checkpoints.clip import (
    image_encoder_tensors,
    read_clip_tokenizer,
    read_image_encoder,
    read_text_encoder,
    text_encoder_tensors,
)
from ldm_train.checkpoints.compvis_conditioners import HELD_TEXT
from ldm_train.checkpoints.compvis_yaml import Published, published
from ldm_train.checkpoints.parts import build, cast, no_larger_than
from ldm_train.conditioning.image_embedding import ImageEmbedding
from ldm_train.conditioning.text import FrozenText
from ldm_train.devices import Uninitialised
from ldm_train.errors import first_line
from ldm_train.latent_diffusion import LatentDiffusion
from ldm_train.models.autoencoder import AutoencoderKL
from ldm_train.models.first_stage import fold_statistics
from ldm_train.storage import read_config, read_older_tensors, shown

FILES = (".ckpt", ".safetensors", ".pt", ".pth", ".bin")
# Prefixes of the names of tensors that our models do not need.
SCHEDULE = ("betas", "alphas_cumprod", "sqrt_", "log_one_minus_", "posterior_", "logvar", "lvlb_weights", "ddim_")
AVERAGES = "model_ema."  # of the names of averaged weights, which follow without their dots
LEFT_OUT = {
    "tables of the noise schedule": (*SCHEDULE, "low_scale_model.", "noise_augmentor."),
    "the depth estimator, since depth maps are given": ("depth_model.",),
    "counters of the averaging": (f"{AVERAGES}decay", f"{AVERAGES}num_updates"),
    "only stage 1 trains with them": (
        "loss.",
        f"{AVERAGES}loss",
        "first_stage_model.loss.",
        "colorize",
        "first_stage_model.colorize",
    ),
    "logits that nothing uses": ("cond_stage_model.transformer.to_logits.",),
    "signs for other programs": ("v_pred", "ztsnr"),
}


@dataclass
class Report:
    """The result of a conversion. mapped: number of checkpoint tensors used. left_out: names of unused tensors by
    reason."""

    mapped: int = 0
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.mapped} tensors mapped"]
        for reason, left in self.left_out.items():
            more = f" and {len(left) - 3} more" if len(left) > 3 else ""
            lines.append(f"left out, {reason}: {', '.join(left[:3])}{more}")
        return "\n  ".join(lines)


Tensors = dict[str, torch.Tensor]


def read_tensors(path: Path) -> Tensors:
    """Reads the tensors of a checkpoint. Raises FileNotFoundError, or ValueError naming the file if it has another
    suffix, is damaged, holds anything but named tensors, or can only be read by running code inside it, which is
    never run."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    if path.suffix not in FILES:
        raise ValueError(f"{path} is not one of {', '.join(FILES)}")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else read_older_tensors(path)
    except Exception as error:  # the libraries raise many types of exceptions
        raise ValueError(
            f"{path} cannot be read without running code that it brings, or is damaged ({first_line(error)[:200]}); take it as "
            ".safetensors, or download it again"
        ) from error
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    tensors = {k: v for k, v in state.items() if isinstance(k, str) and isinstance(v, torch.Tensor)}
    if not tensors or len(tensors) < len(state):
        raise ValueError(f"{path} holds no state_dict of tensors by name")
    return tensors


def _to_ours(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorders the rows of a fused projection from (head, q | k | v, channel) to (q | k | v, head, channel)."""
    return tensor.view(heads, 3, -1, *tensor.shape[1:]).transpose(0, 1).reshape(tensor.shape)


def _to_older(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    return tensor.view(3, heads, -1, *tensor.shape[1:]).transpose(0, 1).reshape(tensor.shape)


@dataclass
class Place:
    """Where one of our tensors is found in a checkpoint. theirs: names of the tensors whose concatenation is ours;
    empty if the checkpoint has none and ours is zero. ours, back: convert theirs to ours and ours to theirs if order
    or shape differ."""

    theirs: Sequence[str]
    ours: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor
    back: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor


def _bert_keys(key: str) -> list[str]:
    """Returns the names in x-transformers for a tensor of a TokenEncoder."""
    whole = {"token_embedding.weight": "token_emb.weight", "position_embedding": "pos_emb.emb.weight"}
    if not key.startswith("transformer."):
        return [whole.get(key, key)]
    number, part = re.fullmatch(r"transformer\.layers\.(\d+)\.(.+)", key).groups()
    attention, forward = (f"attn_layers.layers.{2 * int(number) + k}" for k in (0, 1))
    if part == "self_attn.in_proj_weight":
        return [f"{attention}.1.to_{letter}.weight" for letter in "qkv"]
    if part == "self_attn.in_proj_bias":  # x-transformers has none
        return []
    name, _, kind = part.rpartition(".")
    layers = {"norm1": f"{attention}.0", "norm2": f"{forward}.0", "linear1": f"{forward}.1.net.0.0"}
    layers |= {"linear2": f"{forward}.1.net.2", "self_attn.out_proj": f"{attention}.1.to_out"}
    layers |= {"attention.to_out.0": f"{attention}.1.to_out"}
    layers |= {f"attention.to_{letter}": f"{attention}.1.to_{letter}" for letter in "qkv"}
    return [f"{layers[name]}.{kind}"]


def _class_rows(rows: int) -> Place:
    """The place of the class embedding of a model without a "no class" row: that row is zero here."""

    def ours(tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensor, tensor.new_zeros(1, tensor.shape[1])])

    return Place(["cond_stage_model.embedding.weight"], ours, lambda tensor: tensor[:rows])


def places(model: nn.Module, described: Published, averaged: bool = False) -> dict[str, Place]:
    """Returns the place of each tensor of a model, except for scale and shift of the first stage. averaged: use the
    moving averages (EMA) of the U-Net's or autoencoder's weights."""
    if not isinstance(model, LatentDiffusion):
        keys = [key for key in model.state_dict() if not key.startswith("quantize.ema_")]
        return {key: Place([f"{AVERAGES}{key.replace('.', '')}" if averaged else key]) for key in keys}
    heads = {f"{name}.qkv": module.heads for name, module in model.named_modules() if hasattr(module, "qkv")}
    placed = {}
    for key, tensor in model.state_dict().items():
        part, _, rest = key.partition(".")
        own = part == "conditioners" and isinstance(model.conditioners[rest.partition(".")[0]], ImageEmbedding)
        if "quantize.ema_" in key or own:  # only training needs the first; the others come from the YAML
            continue
        inner = rest.partition(".")[2]
        if part == "network":
            name = f"diffusion_model.{rest}"
            theirs = [f"{AVERAGES}{name.replace('.', '')}" if averaged else f"model.{name}"]
            placed[key] = Place(theirs)
            if described.older_attention and (n := heads.get(key.rpartition(".")[0])):
                placed[key] = Place(theirs, partial(_to_ours, heads=n), partial(_to_older, heads=n))
        elif rest.startswith("autoencoder."):
            placed[key] = Place([f"first_stage_model.{inner}"])
        elif part == "conditioners" and inner == "embedding.weight" and described.class_rows not in (None, len(tensor)):
            placed[key] = _class_rows(described.class_rows)
        elif part == "conditioners" and inner.startswith("encoder."):
            keys = _bert_keys(inner.removeprefix("encoder."))
            placed[key] = Place([f"cond_stage_model.transformer.{k}" for k in keys])
        elif part == "conditioners":
            placed[key] = Place([f"cond_stage_model.{inner}"])
    return placed


def left_out(name: str, described: Published, others: Collection[str] = ()) -> str | None:
    """Returns why a tensor is not needed, or None if it is unknown. others: names of the weights in the form (live or
    averaged) that is not used."""
    if name in others:
        return "the averaged weights" if name.startswith(AVERAGES) else "the weights that were not averaged"
    reasons = dict(LEFT_OUT)
    if "masked_image" in described.tree.get("conditioners", {}):
        reasons["the autoencoder a second time"] = ("cond_stage_model.",)
    return next((reason for reason, starts in reasons.items() if name.startswith(starts)), None)


def _filled(described: Published, tensors: Tensors, averaged: bool, path: Path, yaml: Path) -> tuple[nn.Module, Report]:
    """Builds the described model and loads its weights. Raises ValueError if a tensor is missing, unknown, or of
    another shape or type."""
    with no_larger_than({name: tuple(tensor.shape) for name, tensor in tensors.items()}, yaml), Uninitialised():
        model = build(described.tree, yaml)
    report, state, left = Report(), model.state_dict(), dict(tensors)
    for key, place in places(model, described, averaged).items():
        wanted = state[key].shape
        if missing := [name for name in place.theirs if name not in tensors]:
            raise ValueError(f"{path} lacks {missing[0]}, which {yaml} asks for")
        parts = [left.pop(name) for name in place.theirs]
        try:
            made = place.ours(torch.cat(parts)) if parts else torch.zeros(wanted)
            fits = made.shape == wanted and made.is_floating_point()
        except RuntimeError:  # they cannot be concatenated or reordered
            fits = False
        if not fits:
            raise ValueError(
                f"{path}: {place.theirs[0]} has shape {tuple(parts[0].shape)} and type {parts[0].dtype}, {yaml} asks for "
                f"{tuple(wanted)}{f' in {len(parts)} parts' if len(parts) > 1 else ''} and floating point"
            )
        state[key] = made.float()
        report.mapped += len(parts)
    others = {name for place in places(model, described, not averaged).values() for name in place.theirs}
    for name in left:
        if (reason := left_out(name, described, others)) is None:
            raise ValueError(f"{path} holds {name}, which no model of {yaml} has")
        report.left_out.setdefault(reason, []).append(name)
    if isinstance(model, LatentDiffusion):
        scale = described.tree["first_stage"]["scale_factor"]
        state["first_stage.scale"] = torch.full_like(model.first_stage.scale, scale)
    model.load_state_dict(state, assign=True)
    return model.eval(), report


def _has_averages(tensors: Tensors) -> bool:
    return any(name.startswith(AVERAGES) for name in tensors)


def load(
    path: Path, yaml: Path, which: str | None = None, needs: Mapping[str, Any] | None = None
) -> tuple[nn.Module, Published, Report]:
    """Loads a checkpoint and its YAML as a model of this package, float32, in eval mode. Also returns the description
    and a report.

    which: "averaged" or "live" weights of the U-Net or autoencoder; None: averaged if the YAML of a whole model sets
    use_ema, or the file of an autoencoder has them. needs: see `published`.
    Raises FileNotFoundError, or ValueError naming what is missing, unknown or of another shape.
    """
    needs = {"folder": path.parent} | dict(needs or {})
    described, tensors = published(read_config(yaml), str(yaml), needs), read_tensors(path)
    usual = described.uses_ema if described.latent else _has_averages(tensors)
    averaged = which == "averaged" or (which is None and usual)
    if averaged and not _has_averages(tensors):
        said = "weights=averaged asks for" if which else f"{yaml} speaks of"
        raise ValueError(f"{path} holds no averaged weights ({AVERAGES}*), which {said}; weights=live takes the others")
    scale = tensors.pop("scale_factor", None)  # measured when training began
    if described.latent and scale is not None:
        if scale.numel() != 1 or not scale.isfinite().all() or scale <= 0:
            raise ValueError(f"{path} has the scale_factor {shown(scale.tolist())}, which is not a scale of latents")
        described.tree["first_stage"]["scale_factor"] = float(scale)
    if "ztsnr" in tensors:  # its noise schedule ends without signal
        described.tree["schedule"]["zero_terminal_snr"] = True
    if "v_pred" in tensors and not described.tree["parameterisation"]["_target_"].endswith("VPrediction"):
        raise ValueError(f"{path} says that it predicts velocity (v_pred), {yaml} says otherwise; give its own YAML")
    encoders, used, unused = _encoders(described, tensors, path)
    tensors = {name: tensor for name, tensor in tensors.items() if name not in used and name not in unused}
    model, report = _filled(described, tensors, averaged, path, yaml)
    report.mapped += len(used)
    if unused:
        report.left_out["of the encoders, nothing needs them"] = unused
    for name, encoder in encoders.items():
        conditioner = model.conditioners[name]
        (conditioner.encoder if isinstance(conditioner, ImageEmbedding) else conditioner).take(*encoder)
    return model, described, report


def _encoders(
    described: Published, tensors: Tensors, path: Path
) -> tuple[dict[str, tuple[Any, nn.Module]], set[str], list[str]]:
    """Returns ({conditioner: (tokenizer or image processor, encoder)}, the names of the encoders' tensors, the names of
    tensors that are not needed)."""
    conditioners, made, used, unused = described.tree.get("conditioners", {}), {}, set[str](), list[str]()
    text = conditioners.get("text", {})
    if text.get("path") == HELD_TEXT and text.get("layer") != "projected":
        encoder, used, unused = read_text_encoder(tensors, path)
        words = conditioners["text"]["tokenizer"]
        made["text"] = (read_clip_tokenizer(words) if isinstance(words, str) else words, encoder)
    if conditioners.get("image", {}).get("encoder"):
        openclip = "OpenCLIP" in described.yaml["model"]["params"]["embedder_config"]["target"]
        processor, vision, more, left = read_image_encoder(tensors, openclip, path)
        made["image"], used, unused = (processor, vision), used | more, unused + left
        if vision.config.projection_dim != (dim := conditioners["image"]["encoder_dim"]):
            raise ValueError(
                f"{path}: its image encoder gives {vision.config.projection_dim} values, its YAML says {dim}"
            )
    return made, used, unused


def load_autoencoder(path: Path, yaml: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Returns (the autoencoder, its config tree) from the checkpoint of an autoencoder or of a whole model. Raises the
    same errors as `load`."""
    config, tensors = read_config(yaml), read_tensors(path)
    with suppress(KeyError, TypeError):
        config = {"model": config["model"]["params"]["first_stage_config"]}
        prefix = "first_stage_model."
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    described = published(config, str(yaml))
    if described.latent:
        raise ValueError(f"{yaml} describes no autoencoder")
    model, _ = _filled(described, tensors, _has_averages(tensors), path, yaml)
    return model, described.tree


def read_discriminator(path: Path) -> tuple[Tensors, torch.Tensor | None]:
    """Returns (the weights of the patch discriminator under our names, the log-variance of the likelihood) from the
    checkpoint of an autoencoder's training; ({}, None) if it has none."""
    tensors = read_tensors(path)
    found = {k: v for k, v in tensors.items() if k.startswith("loss.discriminator.")}
    return {k.removeprefix("loss.discriminator."): v for k, v in found.items()}, tensors.get("loss.logvar")


def state_dict(model: nn.Module, described: Published, dtype: torch.dtype = torch.float32) -> Tensors:
    """Returns the tensors of the checkpoint that belongs to the YAML of `described`, in `dtype` except for the scale
    factor in float32. Raises ValueError for what such a file, or this dtype, cannot hold."""
    tensors, state = {}, model.state_dict()
    if isinstance(model, LatentDiffusion) and model.first_stage.one_scale is None:
        state, first = dict(state), model.first_stage
        if not isinstance(first.autoencoder, AutoencoderKL):
            raise ValueError(
                "this model's latents have a mean and a scale for each channel and a codebook, a checkpoint of CompVis has one scale; "
                "train with latents.per_channel=false"
            )
        folded = fold_statistics(first.autoencoder.state_dict(), first.scale, first.shift)
        state |= {f"first_stage.autoencoder.{key}": tensor for key, tensor in folded.items()}
    for key, place in places(model, described).items():
        if not place.theirs:
            if state[key].any():
                raise ValueError(f"{key} is not zero, and a checkpoint of CompVis has no place for it")
            continue
        parts = place.back(state[key].cpu()).chunk(len(place.theirs))
        tensors |= {name: part.to(dtype).contiguous() for name, part in zip(place.theirs, parts)}
        if not all(tensors[name].isfinite().all() for name in place.theirs):
            raise ValueError(f"{key} has values that are not finite in {dtype}; choose another dtype")
    for conditioner in getattr(model, "conditioners", {}).values():
        theirs = {}
        if isinstance(conditioner, FrozenText) and conditioner.layer != "projected":
            theirs = text_encoder_tensors(conditioner.pretrained()[1])
        elif isinstance(conditioner, ImageEmbedding):
            theirs = image_encoder_tensors(conditioner.encoder.loaded().model)
        if theirs:
            tensors |= cast(theirs, dtype)
    if isinstance(model, LatentDiffusion):
        scale = model.first_stage.one_scale
        tensors["scale_factor"] = torch.tensor(1.0 if scale is None else scale)
    return tensors
