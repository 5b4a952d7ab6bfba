"""The native model folder: config.yaml (an instantiable tree), model.safetensors, metadata.json."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import yaml
from hydra.utils import get_object, instantiate
from safetensors.torch import load_file, save
from torch import nn

from ldm_train.checkpoints.diffusers import diffusers_metadata, is_diffusers, load_diffusers
from ldm_train.data.shards import file_sha256, write_atomically, write_json
from ldm_train.latent_diffusion import LatentDiffusion

CONFIG, WEIGHTS, METADATA = "config.yaml", "model.safetensors", "metadata.json"


def _serialised(module: nn.Module) -> bytes:
    return save({k: v.detach().cpu().contiguous() for k, v in module.state_dict().items()})


def weights_sha256(module: nn.Module) -> str:
    """The sha256 that a model folder of this module alone would record."""
    return hashlib.sha256(_serialised(module)).hexdigest()


def save_model(folder: str | Path, module: nn.Module, config: dict[str, Any], metadata: dict[str, Any]) -> str:
    """Writes a module with the config that builds it; the weights last but one, so a folder with metadata.json is whole.

    config: nested dictionaries with `_target_`. Returns the weights' sha256.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = _serialised(module)
    digest = hashlib.sha256(weights).hexdigest()
    write_atomically(folder / CONFIG, lambda f: f.write(yaml.safe_dump(config, sort_keys=False).encode()))
    write_atomically(folder / WEIGHTS, lambda f: f.write(weights))
    write_json(folder / METADATA, metadata | {"sha256": digest})
    return digest


def copy_model(source: str | Path, folder: str | Path, extra: dict[str, Any] | None = None) -> None:
    """Copies a model folder file by file, metadata.json (with `extra` in it) last."""
    for name in (CONFIG, WEIGHTS):
        with open(Path(source) / name, "rb") as original:
            write_atomically(Path(folder) / name, lambda file, original=original: shutil.copyfileobj(original, file))
    write_json(Path(folder) / METADATA, read_metadata(source) | (extra or {}))


def _is_ours(target: str) -> bool:
    """Whether a name stands for something defined in ldm_train, not for what one of its modules imports."""
    if not target.startswith("ldm_train."):
        return False
    return str(getattr(get_object(target), "__module__", "")).startswith("ldm_train.")


def check_targets(config: Any, where: Path | str) -> None:
    """Raises ValueError where a config from disk would build anything outside ldm_train."""
    if isinstance(config, dict):
        if "_target_" in config and not _is_ours(str(config["_target_"])):
            raise ValueError(f"{where} asks for {config['_target_']}; only parts of ldm_train may be built from a file")
        for value in config.values():
            check_targets(value, where)
    elif isinstance(config, list):
        for value in config:
            check_targets(value, where)


def read_metadata(folder: str | Path) -> dict[str, Any]:
    """metadata.json of a model folder. Raises FileNotFoundError naming what is missing."""
    folder = Path(folder)
    missing = [n for n in (CONFIG, WEIGHTS, METADATA) if not (folder / n).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} is no complete model folder: {', '.join(missing)} missing; finish its stage first"
        )
    return json.loads((folder / METADATA).read_text())


def find_model(path: str | Path) -> Path | None:
    """The model folder of a run or an exported model, or `path` itself where it is one, also of diffusers."""
    for folder in (Path(path) / "export", Path(path) / "diffusion" / "model", Path(path)):
        if (folder / WEIGHTS).is_file() and (folder / METADATA).is_file():
            return folder
    return Path(path) if is_diffusers(path) else None


def model_metadata(folder: Path) -> dict[str, Any]:
    """The sha256 and the sampling options of a folder that `find_model` found."""
    return diffusers_metadata(folder) if is_diffusers(folder) else read_metadata(folder)


def load_latent_diffusion(path: str | Path) -> LatentDiffusion:
    """A LatentDiffusion with the sampling options that its run chose. path: a run, its export, a model folder, or a folder
    in diffusers' layout. Raises as `load_model` and `load_diffusers`."""
    folder = find_model(path)
    if folder is None:
        raise FileNotFoundError(
            f"{path} holds no trained model (export/ or diffusion/model/); finish its diffusion stage"
        )
    model = load_diffusers(folder) if is_diffusers(folder) else load_model(folder)
    if not isinstance(model, LatentDiffusion):
        raise ValueError(f"{folder} holds a {type(model).__name__}, not a whole latent diffusion model")
    sampling = model_metadata(folder).get("sampling") or {}
    check_targets(sampling, folder)
    model.sampling = instantiate(sampling, _convert_="all")
    return model


def load_model(folder: str | Path) -> nn.Module:
    """The module of a native folder, in eval mode on the CPU.

    Raises FileNotFoundError for an incomplete folder, ValueError for weights that do not match their checksum.
    """
    folder = Path(folder)
    metadata = read_metadata(folder)
    if (digest := file_sha256(folder / WEIGHTS)) != metadata["sha256"]:
        raise ValueError(f"{folder / WEIGHTS} is damaged: sha256 {digest[:12]}, recorded {metadata['sha256'][:12]}")
    config = yaml.safe_load((folder / CONFIG).read_text())
    check_targets(config, folder / CONFIG)
    module = instantiate(config, _convert_="all")
    module.load_state_dict(load_file(folder / WEIGHTS))
    return module.eval()
