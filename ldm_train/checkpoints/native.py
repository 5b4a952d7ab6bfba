"""The native model folder: config.yaml (an instantiable tree), model.safetensors, metadata.json."""

import hashlib
import math
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import nn

from ldm_train import names
from ldm_train.checkpoints.diffusers import diffusers_metadata, is_diffusers, load_diffusers
from ldm_train.checkpoints.hub import downloaded, is_repo
from ldm_train.checkpoints.parts import build, build_sampler, find_part, no_larger_than, targets
from ldm_train.conditioning.base import Conditioner
from ldm_train.devices import Uninitialised, shapes_only
from ldm_train.errors import in_one_line
from ldm_train.latent_diffusion import LatentDiffusion, Sampling
from ldm_train.storage import file_sha256, inside, read_config, read_record, write_atomically, write_json

CONFIG, WEIGHTS, METADATA = "config.yaml", "model.safetensors", "metadata.json"


def _serialised(module: nn.Module) -> bytes:
    return save({k: v.detach().cpu().contiguous() for k, v in module.state_dict().items()})


def weights_sha256(module: nn.Module) -> str:
    """Returns the sha256 that a model folder with only this module would record."""
    return hashlib.sha256(_serialised(module)).hexdigest()


def _trained(config: dict[str, Any], where: str | Path, trust: Sequence[str]) -> dict[str, Any]:
    """Returns a model's config with the options of its conditioners after training, see
    `Conditioner.trained_options`."""
    conditioners = config.get("conditioners")
    if not isinstance(conditioners, dict):
        return config
    own = dict(conditioners)
    for name, options in conditioners.items():
        if isinstance(options, dict) and "_target_" in options:
            part = find_part(options["_target_"], where, trust)
            if isinstance(part, type) and issubclass(part, Conditioner):
                own[name] = part.trained_options(options)
    return config | {"conditioners": own}


def save_model(folder: str | Path, module: nn.Module, config: dict[str, Any], metadata: dict[str, Any]) -> str:
    """Writes a module with the config that builds it. metadata.json is written last, so a folder that has it is
    complete.

    config: nested dictionaries with `_target_`. Returns the sha256 of the weights.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = _trained(config, folder / CONFIG, list(targets(config)))  # trusted, since the module was built from it
    weights, text = _serialised(module), yaml.safe_dump(config, sort_keys=False).encode()
    digests = {"sha256": hashlib.sha256(weights).hexdigest(), "config_sha256": hashlib.sha256(text).hexdigest()}
    write_atomically(folder / CONFIG, lambda f: f.write(text))
    write_atomically(folder / WEIGHTS, lambda f: f.write(weights))
    write_json(folder / METADATA, metadata | digests)
    return digests["sha256"]


def read_tree(folder: str | Path) -> dict[str, Any]:
    """Reads a model folder's config under current names. Encoders inside the folder ("./text_encoder") get their full
    path. Raises ValueError if such a path leads out of the folder."""
    folder = Path(folder)
    tree = names.model(read_config(folder / CONFIG))
    conditioners = tree.get("conditioners")
    sections = (
        [part for part in conditioners.values() if isinstance(part, dict)] if isinstance(conditioners, dict) else []
    )
    for options in [*sections, *(part.get("encoder") for part in sections)]:
        if isinstance(options, dict) and str(options.get("path", "")).startswith("./"):
            options["path"] = str(inside(folder / options["path"], folder).resolve())
    return tree


def copy_model(source: str | Path, folder: str | Path, extra: dict[str, Any] | None = None) -> None:
    """Copies a model folder file by file, metadata.json (with `extra` added) last."""
    for name in (CONFIG, WEIGHTS):
        with open(Path(source) / name, "rb") as original:
            write_atomically(Path(folder) / name, lambda file, original=original: shutil.copyfileobj(original, file))
    write_json(Path(folder) / METADATA, read_metadata(source) | (extra or {}))


def read_metadata(folder: str | Path) -> dict[str, Any]:
    """Reads metadata.json of a model folder.

    Raises FileNotFoundError naming what is missing, ValueError if it is not the record of a model.
    """
    folder = Path(folder)
    missing = [n for n in (CONFIG, WEIGHTS, METADATA) if not (folder / n).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} is not a complete model folder: {', '.join(missing)} missing; finish its stage first"
        )
    metadata = read_record(folder / METADATA)
    if not isinstance(metadata.get("sha256"), str) or not isinstance(metadata.get("sampling", {}), dict):
        raise ValueError(f"{folder / METADATA} does not record a model's sha256 (and sampling); take an undamaged copy")
    return metadata


def find_model(path: str | Path) -> Path | None:
    """Returns the model folder of a run or an exported model, or `path` itself if it is a model folder, also one of
    diffusers. Returns None if there is none."""
    for folder in (Path(path) / "export", Path(path) / "diffusion" / "model", Path(path)):
        if (folder / WEIGHTS).is_file() and (folder / METADATA).is_file():
            return folder
    return Path(path) if is_diffusers(path) else None


def model_metadata(folder: Path) -> dict[str, Any]:
    """Returns the sha256 and the sampling options of a folder that `find_model` returned."""
    return diffusers_metadata(folder) if is_diffusers(folder) else read_metadata(folder)


SAMPLING = {
    "num_inference_steps": int,
    "guidance_scale": int | float,
    "spacing": str,
    "sampler": dict,
    "guidance_interval": list,
}


def recorded_sampling(folder: str | Path) -> dict[str, Any]:
    """Returns the sampling options in a model folder's metadata, as plain values. Raises ValueError for unknown options
    and invalid values."""
    sampling = model_metadata(Path(folder)).get("sampling") or {}
    for name, value in sampling.items():
        known = name in SAMPLING and isinstance(value, SAMPLING[name]) and not isinstance(value, bool)
        if isinstance(value, list):
            known = known and len(value) == 2 and all(type(v) in (int, float) and 0 <= v < math.inf for v in value)
        if not known or (isinstance(value, float) and not math.isfinite(value)):
            raise ValueError(f"{folder} records an unknown or invalid sampling option {name}={value!r}; pass {name}=")
    return sampling


def load_latent_diffusion(path: str | Path, trust: Sequence[str] = ()) -> LatentDiffusion:
    """Loads a LatentDiffusion with the sampling options recorded by its run. path: a run, its export, a model folder, a
    folder in diffusers' layout, or "org/name" on the Hub. trust: see `load_model`. Raises the same errors as
    `load_model` and `load_diffusers`."""
    if is_repo(path):
        path = downloaded(str(path))
    folder = find_model(path)
    if folder is None:
        raise FileNotFoundError(
            f"{path} holds no trained model (export/ or diffusion/model/); finish its diffusion stage"
        )
    model = load_diffusers(folder) if is_diffusers(folder) else load_model(folder, trust)
    if not isinstance(model, LatentDiffusion):
        raise ValueError(f"{folder} holds a {type(model).__name__}, not a whole latent diffusion model")
    recorded = recorded_sampling(folder)
    if "sampler" in recorded:
        recorded["sampler"] = build_sampler(recorded["sampler"], folder, trust)
    model.sampling = Sampling(**recorded).over(model.sampling)
    return model


def load_model(folder: str | Path, trust: Sequence[str] = ()) -> nn.Module:
    """Loads the module of a native folder, in eval mode on the CPU.

    trust: the user's own packages whose classes the folder's config may name, in addition to this package's models.
    Raises FileNotFoundError for an incomplete folder, ValueError if the weights do not match their checksum or their
    config, or the config asks for anything but models (see `parts.find_part`).
    """
    folder = Path(folder)
    metadata = read_metadata(folder)
    # Older folders record only the first.
    for name, expected in ((WEIGHTS, metadata["sha256"]), (CONFIG, metadata.get("config_sha256"))):
        if expected is not None and (digest := file_sha256(folder / name)) != expected:
            raise ValueError(f"{folder / name} is damaged: sha256 {digest[:12]}, recorded {str(expected)[:12]}")
    module, weights = _built(folder, trust), load_file(folder / WEIGHTS)
    try:
        module.load_state_dict(names.weights(weights) if isinstance(module, LatentDiffusion) else weights)
    except RuntimeError as error:  # a tensor is missing, unexpected or of another shape
        raise ValueError(
            f"{folder / WEIGHTS} does not fit the model of {folder / CONFIG}: {in_one_line(error)}"
        ) from error
    return module.eval()


def weight_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a folder's weights by name, without reading them. Raises ValueError for a damaged file."""
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is not a file of weights ({error}); take an undamaged copy") from error


def _built(folder: Path, trust: Sequence[str]) -> nn.Module:
    """Builds the module that a folder's config describes, without loading its weights. Raises the ValueErrors of
    `load_model`, also if the module grows far beyond the shapes in the weights file."""
    shapes, tree = weight_shapes(folder), read_tree(folder)
    # Classes of other packages may have parameters that their weights file lacks.
    ours = all(name.startswith("ldm_train.") for name in targets(tree))
    with no_larger_than(shapes, folder / CONFIG), Uninitialised() if ours else nullcontext():
        module = build(_trained(tree, folder / CONFIG, trust), folder / CONFIG, trust)
    if not isinstance(module, nn.Module):
        raise ValueError(f"{folder / CONFIG} describes no model but a {type(module).__name__}")
    return module


def _autoencoder(module: nn.Module, folder: str | Path) -> nn.Module:
    missing = [name for name in ("in_channels", "latent_channels", "encode_moments") if not hasattr(module, name)]
    if missing:
        raise ValueError(f"{folder} holds a {type(module).__name__} (without {missing[0]}), not an autoencoder")
    return module


def load_autoencoder(folder: str | Path, trust: Sequence[str] = ()) -> nn.Module:
    """Same as `load_model`, for a folder that must hold an autoencoder. Raises ValueError, naming it, if it holds
    another model."""
    return _autoencoder(load_model(folder, trust), folder)


def meta_autoencoder(folder: str | Path, trust: Sequence[str] = ()) -> nn.Module:
    """Builds the autoencoder of a folder on the meta device: only its shapes, without time or memory. Raises the same
    errors as `load_autoencoder`, except that checksums are not verified."""
    read_metadata(folder)
    with shapes_only():
        return _autoencoder(_built(Path(folder), trust), folder)
