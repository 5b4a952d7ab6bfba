"""Reads and writes ControlNets: our own folder format (adapter.json, control.safetensors), and diffusers'
ControlNetModel."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm_train.checkpoints import diffusers_describe as describe
from ldm_train.checkpoints import diffusers_options as rules
from ldm_train.checkpoints.adapters import CONTROL, RECORD, finite_tensors, read_checked, write_adapter
from ldm_train.checkpoints.diffusers_export import Component, unet_tensors, write_component
from ldm_train.checkpoints.diffusers_networks import load_weights, read_weights, unet_key
from ldm_train.checkpoints.parts import whole
from ldm_train.conditioning.control import NAME, PICTURES, ControlPicture, controlled
from ldm_train.devices import shapes_only
from ldm_train.errors import first_line, in_one_line
from ldm_train.latent_diffusion import LatentDiffusion
from ldm_train.models.control import Control
from ldm_train.storage import read_record

COPY, PICTURE = "copy.", "picture."
KIND = "ControlNetModel"
# Our modules -> diffusers'; the other modules are those of a U-Net's encoder.
OUTSIDE = {"zero_convs.": "controlnet_down_blocks.", "middle_zero_conv.": "controlnet_mid_block."}
# Options that must be equal in a control and its U-Net, in addition to the shapes of the weights.
SAME = (
    "block_out_channels", "layers_per_block", "down_block_types", "in_channels", "cross_attention_dim", "norm_num_groups",
    "attention_head_dim", "use_linear_projection", "resnet_time_scale_shift",
)  # fmt: skip
IN_PICTURE = "controlnet_cond_embedding."


def parts_of(model: LatentDiffusion) -> nn.ModuleDict:
    """Returns the copied encoder and the convolutions for the control image. Raises ValueError for a model without a
    control."""
    copy = controlled(model.network).control
    if copy is None or NAME not in model.conditioners:
        raise ValueError("this model has no control; train one with diffusion/adapter=control")
    return nn.ModuleDict({"copy": copy, "picture": model.conditioners[NAME]})


def save_control(folder: str | Path, model: LatentDiffusion, metadata: Mapping[str, Any]) -> None:
    """Writes a model's control to a folder."""
    parts = parts_of(model)
    picture = parts["picture"]
    described = {"field": picture.field, "control": picture.options, "dropout": picture.dropout}
    write_adapter(folder, CONTROL, parts.state_dict(), {**metadata, **described})


def take_control(folder: Path, model: LatentDiffusion, strength: float = 1.0) -> None:
    """Adds the control in one of our folders to a model, with the conditioner that reads its control image. strength:
    scale of the control, 1 as trained. Raises ValueError if it is damaged or belongs to another architecture, or the
    model already has one."""
    record, tensors = read_checked(folder, CONTROL), finite_tensors(folder / CONTROL)
    with shapes_only():  # a record may describe a network of any size
        described = _picture(record, folder / RECORD).state_dict()
    _check_picture(described, tensors, PICTURE, folder / RECORD)
    picture = _picture(record, folder / RECORD)
    copy = _added(model, picture, folder)
    parts = nn.ModuleDict({"copy": copy, "picture": picture})
    try:
        parts.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{folder} is a control of another architecture: {in_one_line(error)}") from error
    copy.strength = float(strength)


def _check_picture(
    described: Mapping[str, torch.Tensor], held: Mapping[str, torch.Tensor], prefix: str, where: Path
) -> None:
    """Raises ValueError if the held weights of the control image's convolutions, under this prefix, are missing or have
    shapes other than the described ones."""
    if any(prefix + key not in held or held[prefix + key].shape != value.shape for key, value in described.items()):
        raise ValueError(f"{where} describes another picture than its weights hold; take an undamaged copy")


def _picture(record: Mapping[str, Any], where: Path) -> ControlPicture:
    """Builds the conditioner that a record describes. Raises ValueError if it describes none."""
    try:
        kind, options = PICTURES[record["field"]], record["control"]
        sizes = [*options["hidden"], *(v for k, v in options.items() if k != "hidden")]
        if any(type(size) is not int or not 0 < size <= 2**14 for size in sizes) or len(options["hidden"]) > 8:
            raise ValueError("its widths are not numbers of channels")
        return kind(**options, dropout=float(record.get("dropout", 0.0)))
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise ValueError(f"{where} describes no control ({first_line(error)}); take an undamaged copy") from error


def drop_control(model: LatentDiffusion) -> None:
    """Removes a model's control and its conditioner, if it has them."""
    network = controlled(model.network)
    if network.control is not None:
        network.control = None
        network.condition_widths = {
            slot: width for slot, width in network.condition_widths.items() if slot != "control"
        }
        del model.conditioners[NAME]


def _levels(config: Mapping[str, Any], name: str) -> Any:
    """Returns an option of a diffusers config in comparable form: tuples become lists, and attention heads a list of
    those at the levels that have attention."""
    value = config[name]
    if name != "attention_head_dim":
        return list(value) if isinstance(value, tuple) else value
    kinds = config["down_block_types"]
    heads = value if isinstance(value, list) else [value] * len(kinds)
    return [number for number, kind in zip(heads, kinds) if "Attn" in kind]


def _added(model: LatentDiffusion, picture: ControlPicture, where: Path) -> Control:
    """Adds an untrained control and its conditioner to a model and returns the control. Raises ValueError, naming
    `where`, if the model cannot take it."""
    try:
        network = controlled(model.network)
        if (width := picture.widths["control"]) != network.skip_widths[0]:
            raise ValueError(f"it is for a U-Net of width {width}, this model's is {network.skip_widths[0]}")
        if picture.field in model.fields:
            raise ValueError(f"this model reads {picture.field} already")
        picture.attach(model.first_stage)
        copy = network.add_control()
    except ValueError as error:
        raise ValueError(f"{where}: the control does not fit ({error})") from error
    model.conditioners[NAME] = picture.to(model.device).eval()
    return copy


def _their_key(key: str, per_level: int) -> str:
    """Returns diffusers' name for a weight of a control. per_level: residual blocks per level."""
    if key.startswith(PICTURE):
        return IN_PICTURE + key.removeprefix(PICTURE)
    key = key.removeprefix(COPY)
    for ours, theirs in OUTSIDE.items():
        if key.startswith(ours):
            return theirs + key.removeprefix(ours)
    return unet_key(key, per_level)


def export_control(folder: Path, model: LatentDiffusion, tree: Mapping[str, Any], dtype: torch.dtype) -> None:
    """Writes a model's control as a ControlNetModel of diffusers. tree: of its U-Net. Raises ValueError if that class
    cannot express it."""
    network, parts = whole(tree), parts_of(model)
    kind, config = describe.unet_config(network, model.network, list(model.latent_size))
    if kind != "UNet2DConditionModel":
        raise ValueError(f"a {KIND} of diffusers has a context, and this model none; its control stays in our form")
    if describe.is_narrow(model.network):
        raise ValueError(
            f"a {KIND} of diffusers has equally many groups in all norms, and this U-Net, which is narrower than 128 channels, has "
            "not; its control stays in our form"
        )
    shared = {k: v for k, v in config.items() if k in rules.CONTROLS[KIND]}
    picture, per_level = parts["picture"], network["num_res_blocks"]
    shared |= {"conditioning_channels": picture.channels, "conditioning_embedding_out_channels": picture.hidden}
    state, own = parts.state_dict(), (PICTURE, *(COPY + name for name in OUTSIDE))
    tensors = {_their_key(k, per_level): v for k, v in state.items() if k.startswith(own)}
    tensors |= unet_tensors({k.removeprefix(COPY): v for k, v in state.items() if not k.startswith(own)}, per_level)
    write_component(folder, Component("diffusers", KIND, shared, tensors), dtype)


def is_control_of_diffusers(folder: Path) -> bool:
    return (folder / "config.json").is_file() and read_record(folder / "config.json").get("_class_name") == KIND


def take_control_of_diffusers(folder: Path, model: LatentDiffusion, tree: Mapping[str, Any], field: str) -> None:
    """Adds the control in a diffusers folder to a model. tree: of the model's U-Net. field: the batch field that holds
    its control image, a key of PICTURES. Raises ValueError if it does not fit."""
    path = folder / "config.json"
    _, options = rules.read_model(path, rules.CONTROLS)
    network = whole(tree)
    kind, ours = describe.unet_config(network, model.network, list(model.latent_size))
    if kind != "UNet2DConditionModel":
        raise ValueError(f"{path} is a control of a U-Net with a context, and this model's has none")
    for name in SAME:
        if _levels(options, name) != _levels(ours, name):
            raise ValueError(
                f"{path} is a control of another architecture: its {name} is {options[name]}, the model's {ours[name]}"
            )
    given = {
        "width": model.network.skip_widths[0],
        "factor": model.first_stage.downsample_factor,
        "hidden": list(options["conditioning_embedding_out_channels"]),
        "channels": options["conditioning_channels"],
    }
    try:
        with shapes_only():  # a config may describe a network of any size
            described = PICTURES[field](**given).state_dict()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    _check_picture(described, read_weights(folder), IN_PICTURE, path)
    picture = PICTURES[field](**given)
    copy = _added(model, picture, folder)
    load_weights(
        nn.ModuleDict({"copy": copy, "picture": picture}),
        folder,
        lambda key: _their_key(key, network["num_res_blocks"]),
    )
