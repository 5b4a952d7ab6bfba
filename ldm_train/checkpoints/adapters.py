"""LoRA files: our own folder format (adapter.json, adapter.safetensors), and single files with the key layouts of
diffusers/PEFT and kohya.

Such files may come from untrusted sources: only named tensors are read, and a tensor that fits no layer of the model is
refused with an error that names it (layers of text encoders that the model lacks are left out and reported).
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import nn

from ldm_train.checkpoints.diffusers_export import unet_tensors
from ldm_train.conditioning.text import FrozenText
from ldm_train.latent_diffusion import LatentDiffusion
from ldm_train.models import lora
from ldm_train.models.unet import UNet
from ldm_train.storage import file_sha256, read_record, write_atomically, write_json

WEIGHTS, RECORD, WORD = "adapter.safetensors", "adapter.json", "learned_embeds.safetensors"
CONTROL = "control.safetensors"  # see `checkpoints/control.py`
LAYOUTS = ("diffusers", "kohya")
NETWORK, ENCODERS = "network.", "encoders."
LARGEST_RANK = 4096
# Suffixes of tensor names in other layouts -> which part of a layer's low-rank update the tensor is.
PARTS = {
    ".lora_A.weight": "down", ".lora_B.weight": "up", ".lora_down.weight": "down", ".lora_up.weight": "up",
    ".lora.down.weight": "down", ".lora.up.weight": "up", ".alpha": "alpha",
    # Of diffusers before 0.25.
    "_lora.down.weight": "down", "_lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down", ".lora_linear_layer.up.weight": "up",
}  # fmt: skip
PREFIXES = ("base_model.model.", "unet.", "lora_unet_", "transformer.")
OWN_TEXT = "text_encoder."
FIRST_TEXT = ("text_encoder.", "lora_te_", "lora_te1_", "")
OF_TEXT = ("text_encoder.", "text_encoder_2.", "lora_te_", "lora_te1_", "lora_te2_", "text_model.")
Parts = dict[str, torch.Tensor]  # down, up and optionally alpha of one layer
Place = tuple[str, int, int]  # our weight's name, index of one of its equal blocks of rows, number of blocks


def write_adapter(folder: str | Path, name: str, tensors: Mapping[str, torch.Tensor], record: dict[str, Any]) -> None:
    """Writes the tensors of an adapter to the file `name` in its folder, then adapter.json: the record and the file's
    sha256."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    data = save({k: v.detach().cpu().contiguous() for k, v in tensors.items()})
    write_atomically(folder / name, lambda file: file.write(data))
    write_json(folder / RECORD, record | {"sha256": file_sha256(folder / name)})


def read_checked(folder: Path, name: str) -> dict[str, Any]:
    """Returns the record of an adapter. Raises ValueError if the file `name` is not the one that it records."""
    record = read_record(folder / RECORD)
    if record.get("sha256") != file_sha256(folder / name):
        raise ValueError(f"{folder / name} is damaged: its sha256 is not the recorded one; take an undamaged copy")
    return record


def save_adapter(folder: str | Path, model: nn.Module, name: str, metadata: Mapping[str, Any]) -> None:
    """Writes the low-rank pairs of a model's adapter to a folder."""
    pairs = lora.pairs_of(model, name)
    tensors = {f"{key}.{part}": getattr(pair, part) for key, pair in pairs.items() for part in ("down", "up")}
    write_adapter(folder, WEIGHTS, tensors, {**metadata, "alpha": {key: pair.alpha for key, pair in pairs.items()}})


def find_adapter(value: str | Path, runs_dir: str | Path, option: str = "adapters") -> Path:
    """Returns the path of an adapter: that of a run (given by name or folder), an adapter folder, or a .safetensors
    file of another program. Raises FileNotFoundError if there is none."""
    tried = []
    for base in (Path(value), Path(runs_dir) / str(value)):
        tried.append(str(base))
        for folder in (base / "diffusion" / "adapter", base / "adapter", base):
            if (folder / RECORD).is_file():
                return folder
        if base.suffix == ".safetensors" and base.is_file():
            return base
    raise FileNotFoundError(
        f"{option}: {value} is not a run that trained an adapter (diffusion/adapter=lora), a folder of one or a .safetensors file; "
        f"looked in {', '.join(tried)}"
    )


def adapter_sha256(path: Path) -> str:
    name = next((name for name in (WORD, CONTROL) if (path / name).is_file()), WEIGHTS)
    return file_sha256(path / name if path.is_dir() else path)


def save_word(folder: str | Path, token: str, rows: torch.Tensor, metadata: Mapping[str, Any]) -> None:
    """Writes a learned word to a folder: its vectors (K, dim) in the format that diffusers loads, and adapter.json."""
    write_adapter(folder, WORD, {token: rows.float()}, {**metadata, "token": token})


def read_word(path: Path) -> tuple[str, torch.Tensor] | None:
    """Reads a learned word and its vectors (K, dim) from a folder, or from a file written by diffusers or webui.
    Returns None if the path holds an adapter of weights instead. Raises ValueError if it is damaged or holds no
    valid word."""
    file = path / WORD if path.is_dir() else path
    if not file.is_file():
        return None
    tensors = finite_tensors(file)
    if len(tensors) != 1 or any("lora" in key for key in tensors):
        if path.is_dir():
            raise ValueError(f"{file} holds {len(tensors)} words, not one; take an undamaged copy")
        return None
    ((token, rows),) = tensors.items()
    if path.is_dir():
        read_checked(path, WORD)
    token = file.stem if token == "emb_params" else token  # in webui's files the word is the file's name
    fits = rows.ndim in (1, 2) and 0 < (1 if rows.ndim == 1 else len(rows)) <= 64
    if not fits or not token.strip() or not token.isprintable() or len(token) > 100:
        raise ValueError(f"{file}: {token!r} of shape {tuple(rows.shape)} is not a learned word")
    return token, rows.float().reshape(-1, rows.shape[-1])


def finite_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Reads a safetensors file. Raises ValueError if it cannot be read, or holds values that are not floating-point or
    not finite."""
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is not a file of weights ({error}); take an undamaged copy") from error
    for key, tensor in tensors.items():
        if key.endswith(".alpha") and not tensor.dtype.is_floating_point:  # kohya's, as diffusers writes it
            tensors[key] = tensor.float()
        elif not tensor.dtype.is_floating_point:
            raise ValueError(f"{path}: its {key} holds {tensor.dtype}, not floating-point values")
        elif not tensor.isfinite().all():
            raise ValueError(f"{path}: its {key} holds values that are not finite")
    return tensors


def read_adapter(path: Path, model: LatentDiffusion) -> tuple[dict[str, lora.Pair], list[str]]:
    """Reads an adapter: its low-rank pairs by the names of the model's weights, and descriptions of what was left out
    of the file. Raises ValueError if the file is damaged or belongs to another architecture."""
    if path.is_dir():
        alphas, found = read_checked(path, WEIGHTS).get("alpha"), dict[str, Parts]()
        if not isinstance(alphas, dict):
            raise ValueError(f"{path / RECORD} records no alpha; take an undamaged copy")
        for key, tensor in finite_tensors(path / WEIGHTS).items():
            weight, _, part = key.rpartition(".")
            if part not in ("down", "up") or type(alphas.get(weight)) not in (int, float):
                raise ValueError(f"{path / RECORD} records no alpha of {weight}; take an undamaged copy")
            found.setdefault(weight, {})[part] = tensor
        if any(key.startswith(ENCODERS) for key in found):
            for conditioner in model.conditioners.values():
                conditioner.require()
        pairs = {key: _pair(key, parts, alphas[key], path) for key, parts in found.items()}
        return pairs, []
    return _foreign(finite_tensors(path), model, path)


class _Declared:
    """The alphas that the settings of PEFT's LoraConfig give to layers: in the header of a file that diffusers wrote, or
    in PEFT's adapter_config.json beside adapter_model.safetensors. Raises ValueError for settings that change what the
    tensors mean and are not supported."""

    def __init__(self, path: Path):
        self.path, self.settings = path, dict[str, Any]()
        try:
            with safe_open(path, "pt") as file:
                header = (file.metadata() or {}).get("lora_adapter_metadata")
            if header is not None:
                self.settings = json.loads(header)
            elif path.name == "adapter_model.safetensors" and (path.parent / "adapter_config.json").is_file():
                self.settings = read_record(path.parent / "adapter_config.json")
            if not isinstance(self.settings, dict):
                raise TypeError(f"a {type(self.settings).__name__}")
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"the LoRA settings of {path} cannot be read ({error}); take an undamaged copy") from error
        if self.settings and any(self._of(network, "use_dora") for network in ("", "unet.", OWN_TEXT)):
            raise ValueError(f"{path} is a DoRA (use_dora), which is not supported; merge it into its model first")

    def _of(self, network: str, name: str) -> Any:
        return self.settings.get(f"{network}{name}", self.settings.get(name))

    def alpha(self, layer: str, rank: int) -> float | None:
        """The alpha of a layer, by its name in the file; None if the settings give none."""
        if not self.settings:
            return None
        network = OWN_TEXT if layer.startswith(OF_TEXT) else "unet."
        alpha, patterns = self._of(network, "lora_alpha"), self._of(network, "alpha_pattern") or {}
        if not isinstance(patterns, dict) or any(not re.fullmatch(r"\^?[\w.]+\$?", str(p)) for p in patterns):
            raise ValueError(f"{self.path}: alpha_pattern holds more than names of layers, which is not supported")
        for pattern, value in patterns.items():
            plain = pattern.strip("^$")
            if layer == plain or layer.endswith(f".{plain}"):
                alpha = value
                break
        if alpha is None:
            return None
        if type(alpha) not in (int, float) or not 0 < alpha < math.inf:
            raise ValueError(f"{self.path}: the alpha of {layer} is {alpha!r:.40}")
        return alpha * math.sqrt(rank) if self._of(network, "use_rslora") else alpha


def _pair(key: str, parts: Parts, alpha: float | None, path: Path) -> lora.Pair:
    """Makes the low-rank pair of one layer. Raises ValueError if its tensors do not fit together."""
    if missing := [part for part in ("down", "up") if part not in parts]:
        raise ValueError(f"{path}: {key} has no {missing[0]}; take an undamaged copy")
    down, up = parts["down"].float(), parts["up"].float()
    rank = down.shape[0] if down.ndim else 0
    fits = down.ndim >= 2 and up.ndim == down.ndim and up.shape[1] == rank and math.prod(up.shape[2:]) == 1
    if not fits or not 0 < rank <= LARGEST_RANK:
        raise ValueError(f"{path}: {key} has down {tuple(down.shape)} and up {tuple(up.shape)}, which give no product")
    if alpha is not None and not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"{path}: the alpha of {key} is {alpha}")
    return lora.Pair.of(down, up, rank if alpha is None else float(alpha))


def _names(network: nn.Module) -> dict[str, list[str]]:
    """Maps each adaptable weight of a U-Net to its layers in diffusers: one, or three if our layer fuses queries, keys
    and values."""
    keys = [k for k, _ in lora.adaptable(network) if k.endswith(".weight") and not k.startswith("control.")]
    numbered = {key: torch.full((3, 1, 1), number) for number, key in enumerate(keys)}
    names: dict[str, list[str]] = {key: [] for key in keys}
    for theirs, marked in unet_tensors(numbered, network.num_res_blocks).items():
        names[keys[int(marked.flatten()[0])]].append(theirs.removesuffix(".weight"))
    return names


def _places(network: nn.Module) -> dict[str, Place]:
    """Maps the layer names of other layouts to places in our network. Each name is included a second time in kohya's
    form, with underscores for dots."""
    weights = [key for key, _ in lora.adaptable(network) if key.endswith(".weight")]
    places = {key.removesuffix(".weight"): (NETWORK + key, 0, 1) for key in weights}
    if isinstance(network, UNet):
        for key, names in _names(network).items():
            places |= {name: (NETWORK + key, number, len(names)) for number, name in enumerate(names)}
    return places | {name.replace(".", "_"): place for name, place in places.items()}


def _text_places(model: LatentDiffusion, load: bool) -> dict[str, Place]:
    """Same as `_places` for the model's frozen text encoder, under CLIP's layer names; empty if there is none or it is
    not loaded. load: load or download it if needed."""
    reader = next(((name, c) for name, c in model.conditioners.items() if isinstance(c, FrozenText)), None)
    if reader is None:
        return {}
    if load:
        reader[1].require()
    if (encoder := reader[1].frozen_encoder()) is None:
        return {}
    places: dict[str, Place] = {}
    for key, _ in lora.adaptable(encoder):
        layer = key.removesuffix(".weight").removeprefix("text_model.")
        for name in (f"text_model.{layer}", f"text_model.{layer}".replace(".", "_")):
            places[OWN_TEXT + name] = (f"{ENCODERS}{reader[0]}.{key}", 0, 1)
    return places


def _text_layer_of(name: str) -> str:
    """Returns the name of a text encoder's layer in the form "text_encoder.text_model...". For layers of a second text
    encoder the result matches no layer of the model."""
    prefix = next(p for p in FIRST_TEXT if name.startswith(p))
    layer = name.removeprefix(prefix).removeprefix("base_model.model.")
    return OWN_TEXT + (layer if layer.startswith("text_model") else f"text_model.{layer}")


def _layer_of(name: str) -> str:
    """Returns a layer's name without the prefix that names its network, and in diffusers' current naming."""
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    name = re.sub(r"\.processor\.(to_[qkv])$", r".\1", name)
    return re.sub(r"\.processor\.to_out$", ".to_out.0", name)


def _shaped(parts: Parts, kernel: tuple[int, ...]) -> Parts:
    """Reshapes down and up if the layer is linear in the file and a 1x1 convolution with this kernel here, or the
    reverse; otherwise returns the parts unchanged."""
    if {"down", "up"} - parts.keys() or parts["down"].shape[2:] == kernel:
        return parts
    if math.prod(kernel) != 1 or any(math.prod(t.shape[2:]) != 1 or t.ndim < 2 for t in parts.values()):
        return parts
    return {part: t.reshape(*t.shape[:2], *kernel) for part, t in parts.items()}


def _foreign(
    tensors: Mapping[str, torch.Tensor], model: LatentDiffusion, path: Path
) -> tuple[dict[str, lora.Pair], list[str]]:
    layers, left = dict[str, Parts](), set[str]()
    text = _text_places(model, load=any(key.startswith(OF_TEXT) for key in tensors))
    declared = _Declared(path)
    for key, tensor in tensors.items():
        end = next((end for end in PARTS if key.endswith(end)), None)
        if end is None:
            raise ValueError(f"{path}: {key} is not part of a LoRA in the layouts of diffusers, PEFT or kohya")
        layer = name = key.removesuffix(end)
        if name.startswith(OF_TEXT) and (name := _text_layer_of(name)) not in text:
            left.add(name)
            continue
        parts = layers.setdefault(name if name in text else _layer_of(name), {})
        parts[PARTS[end]] = tensor
        if PARTS[end] == "down" and tensor.ndim and (alpha := declared.alpha(layer, len(tensor))) is not None:
            parts.setdefault("alpha", torch.tensor(alpha))
    if not layers:
        raise ValueError(f"{path} changes nothing of the denoising network")
    places, weights = _places(model.network) | text, dict(lora.adaptable(model.adaptable()))
    found: dict[str, tuple[int, dict[int, lora.Pair]]] = {}
    for name, parts in layers.items():
        if name not in places:
            raise ValueError(f"{path} changes {name}, which this model lacks: it is of another architecture")
        weight, number, count = places[name]
        alpha = parts.pop("alpha", None)
        if alpha is not None and alpha.numel() != 1:
            raise ValueError(f"{path}: the alpha of {name} is not a number")
        shaped = _shaped(parts, tuple(weights[weight].shape[2:]))
        pair = _pair(name, shaped, None if alpha is None else float(alpha.flatten()[0]), path)
        if number in found.setdefault(weight, (count, {}))[1]:
            raise ValueError(f"{path} holds {name} twice, under two names")
        found[weight][1][number] = pair
    pairs = {
        weight: numbered[0] if count == 1 else _joined(numbered, count, weights[weight].shape[0])
        for weight, (count, numbered) in found.items()
    }
    return pairs, [f"{len(left)} layers of text encoders"] if left else []


def _joined(parts: Mapping[int, lora.Pair], count: int, height: int) -> lora.Pair:
    """Combines the pairs for `count` equal blocks of rows of a weight with `height` rows into one pair for the whole
    weight. Raises ValueError if their shapes do not fit."""
    rank, rows = sum(pair.rank for pair in parts.values()), height // count
    first = next(iter(parts.values()))
    if any(pair.up.shape[0] != rows or pair.down.shape[1:] != first.down.shape[1:] for pair in parts.values()):
        raise ValueError(f"the adapter is of another architecture: a weight here has parts of {rows} rows")
    up, begin = torch.zeros(height, rank, *first.up.shape[2:]), 0
    for number, pair in sorted(parts.items()):
        up[number * rows : (number + 1) * rows, begin : begin + pair.rank] = pair.up * (pair.alpha / pair.rank)
        begin += pair.rank
    down = torch.cat([pair.down for _, pair in sorted(parts.items())])
    return lora.Pair.of(down.detach(), up.detach(), rank)


def export_adapter(pairs: Mapping[str, lora.Pair], model: LatentDiffusion, path: Path, layout: str) -> list[str]:
    """Writes an adapter of a U-Net as one file in the layout of diffusers or kohya. Returns descriptions of what was
    left out. Raises ValueError for an unknown layout, a network other than a U-Net, or an adapter with nothing to
    export."""
    if layout not in LAYOUTS:
        raise ValueError(f"the layout of an adapter is one of {', '.join(LAYOUTS)}, not {layout!r}")
    if not isinstance(model.network, UNet):
        raise ValueError(f"only adapters of U-Nets have names in the layout of {layout}")
    names = {NETWORK + key: [f"unet.{name}" for name in layers] for key, layers in _names(model.network).items()}
    for name, (key, *_) in _text_places(model, load=False).items():
        if "." in name.removeprefix(OWN_TEXT):
            names[key] = [name]
    made, left, most = {}, 0, max((pair.rank for pair in pairs.values()), default=0)
    for key, pair in pairs.items():
        scale = pair.alpha / pair.rank
        if key not in names:
            left += 1
            continue
        layers = names[key]
        for name, up in zip(layers, pair.up.detach().chunk(len(layers))):
            down = pair.down.detach()
            if pair.down.ndim == 3 or re.search(r"\.(to_[qkv]|to_out\.0)$", name):  # a linear layer there
                down, up = down.flatten(1), up.flatten(1)
            if layout == "diffusers":  # which assumes that alpha is the rank, of older versions the same for all layers
                more = most - len(down)
                down = F.pad(down, (*[0, 0] * (down.ndim - 1), 0, more))
                up = F.pad(up * scale, (*[0, 0] * (up.ndim - 2), 0, more))
                made |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
            else:
                part, _, layer = name.partition(".")
                short = f"lora_{'unet' if part == 'unet' else 'te'}_{layer.replace('.', '_')}"
                made |= {f"{short}.lora_down.weight": down, f"{short}.lora_up.weight": up}
                made[f"{short}.alpha"] = torch.tensor(float(pair.alpha))
    if not made:
        raise ValueError(
            "the adapter changes nothing of the denoising network, and only that has names in other layouts"
        )
    data = save({k: v.clone().cpu() for k, v in made.items()}, metadata={"format": "pt"})  # none may share memory
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(data))
    return [f"{left} layers of conditioners"] if left else []
