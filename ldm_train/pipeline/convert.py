"""ldm-convert: a model from one form into another."""

import hashlib
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml as yaml_library
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save
from torch import nn

from ldm_train import names
from ldm_train.checkpoints import compvis
from ldm_train.checkpoints.compvis import FILES
from ldm_train.checkpoints.compvis_describe import describe
from ldm_train.checkpoints.compvis_yaml import needs_of
from ldm_train.checkpoints.diffusers import (
    USUAL_SAMPLING,
    check_folder_links,
    first_stage_tree,
    is_diffusers,
    load_first_stage,
    weight_files,
)
from ldm_train.checkpoints.native import CONFIG, METADATA, find_model, load_model, read_metadata, save_model
from ldm_train.conditioning.text import read_tokenizer
from ldm_train.latent_diffusion import LatentDiffusion
from ldm_train.rules import Rule, check, either, flag, list_of, one_of, optional, text, whole
from ldm_train.storage import file_sha256, read_config, write_atomically

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
RULES: dict[str, Rule] = {
    **dict.fromkeys(("from", "to"), text("path; give from=<model> to=<folder or file>")),
    **dict.fromkeys(("config", "tokenizer"), optional(text("file"))),
    "format": one_of("native", "compvis"),
    "weights": optional(one_of("averaged", "live")),
    "labels": optional(either(whole(1), list_of(str))),
    "null_class": optional(flag),
    "dtype": one_of(*DTYPES),
    **dict.fromkeys(("verify", "dry_run", "overwrite"), flag),
}
SAMPLING = USUAL_SAMPLING | {"spacing": "compvis"}  # as the published models' own script draws


def yaml_beside(path: Path) -> Path:
    """The YAML of a checkpoint: of its name, or the only one in its folder. Raises FileNotFoundError with the remedy."""
    named = path.with_suffix(".yaml")
    others = sorted(path.parent.glob("[!.]*.yaml"))
    if named.is_file():
        return named
    if len(others) == 1:
        return others[0]
    raise FileNotFoundError(
        f"{path} needs the YAML that describes its model: config=<file.yaml>, or {named.name} beside it"
    )


def read(config: DictConfig) -> tuple[nn.Module, dict[str, Any], dict[str, Any], compvis.Report | None]:
    """(the model, its tree, metadata for a native folder, what was mapped) of `from`."""
    source = Path(config["from"])
    if source.suffix in FILES:
        if not source.is_file():
            raise FileNotFoundError(f"from={source}: there is no such file")
        labels = OmegaConf.to_container(config.labels) if OmegaConf.is_list(config.labels) else config.labels
        tokenizer = None if config.tokenizer is None else read_tokenizer(config.tokenizer).to_str()
        needs = {"labels": labels, "tokenizer": tokenizer, "null_class": config.null_class}
        yaml = Path(config.config) if config.config is not None else yaml_beside(source)
        model, described, report = compvis.load(source, yaml, config.weights, needs)
        metadata: dict[str, Any] = {"converted_from": source.name}
        if described.latent:
            metadata["sampling"] = SAMPLING
        if (classes := described.tree.get("conditioners", {}).get("class_label")) is not None:
            metadata["null_class"] = described.class_rows == classes["classes"] + 1
        return model, described.tree, metadata, report
    folder = native_folder(source)
    metadata = {k: v for k, v in read_metadata(folder).items() if k not in ("sha256", "config_sha256")}
    return load_model(folder), names.model(read_config(folder / CONFIG)), metadata, None


def native_folder(source: Path) -> Path:
    """The model folder of `from`: of a run, of its autoencoder where it has no more yet, or itself. Raises FileNotFoundError."""
    for folder in (find_model(source), source / "autoencoder" / "model"):
        if folder is not None and (folder / METADATA).is_file():
            return folder
    raise FileNotFoundError(
        f"from={source} is no checkpoint ({', '.join(FILES[:2])}), no run with a finished model and no model folder"
    )


def is_foreign(path: Path) -> bool:
    """Whether a path is a checkpoint of CompVis' code, a pipeline of diffusers or one of its autoencoders."""
    return (path.suffix in FILES and path.is_file()) or is_diffusers(path) or (path / "config.json").is_file()


def adopted_autoencoder(path: Path, cache: Path) -> Path:
    """The native model folder of a foreign autoencoder, alone or in a whole model: below `cache`, converted at its first use.
    Raises FileNotFoundError or ValueError, naming what cannot be converted."""
    if path.is_file():
        yaml = yaml_beside(path)
        files = [path, yaml]
    else:
        check_folder_links(path)
        folder = next((path / name for name in ("vae", "vqvae") if is_diffusers(path) and (path / name).is_dir()), path)
        files = [folder / "config.json", *weight_files(folder)]
    digest = hashlib.sha256("".join(map(file_sha256, files)).encode()).hexdigest()
    target = cache / f"{path.stem}-{digest[:12]}"
    if (target / METADATA).is_file():
        return target
    if path.is_file():
        network, tree = compvis.load_autoencoder(path, yaml)
    else:
        network, tree = load_first_stage(folder).autoencoder, first_stage_tree(folder)["autoencoder"]
    metadata = {"downsample_factor": network.downsample_factor, "converted_from": path.name}
    save_model(target, network, tree, metadata)
    return target


def has_null_class(model: nn.Module, metadata: Mapping[str, Any]) -> bool:
    """Whether the last row of the class embedding, if there is one, says something."""
    rows = [
        tensor[-1]
        for key, tensor in model.state_dict().items()
        if re.fullmatch(r"conditioners\.\w+\.embedding\.weight", key)
    ]
    return metadata.get("null_class") is not False or any(row.any() for row in rows)


def outputs(model: nn.Module) -> torch.Tensor:
    """What a model computes from fixed noise: an autoencoder's reconstruction, a U-Net's prediction with its decoding."""
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        if not isinstance(model, LatentDiffusion):
            f, channels = model.downsample_factor, model.in_channels
            return model(torch.randn(1, channels, 2 * f, 2 * f, generator=generator).clamp(-1, 1), sample=False)[0]
        network, side = model.network, 2 * model.network.size_multiple
        x = torch.randn(1, network.in_channels, side, side, generator=generator)
        widths = network.condition_widths
        given = {
            "context": torch.randn(1, 4, widths["context"], generator=generator) if widths["context"] else None,
            "concat": torch.randn(1, widths["concat"], side, side, generator=generator) if widths["concat"] else None,
            "vector": torch.ones(1, widths["vector"]) if widths["vector"] else None,
        }
        predicted = network(x, torch.tensor([500.0]), **{k: v for k, v in given.items() if v is not None})
        return torch.cat([predicted.flatten(), model.decode(x).flatten()])


def convert(config: DictConfig) -> Path:
    """Reads `from`, writes `to`. Raises ValueError or FileNotFoundError naming what cannot be converted; then nothing is
    written."""
    check(config, RULES, tuple(RULES))
    target, dtype = Path(config.to), DTYPES[config.dtype]
    if config.format == "compvis" and target.suffix not in FILES[:2]:
        raise ValueError(f"to={target}: a checkpoint of CompVis is a file, {' or '.join(FILES[:2])}")
    if config.format == "native" and dtype != torch.float32:
        raise ValueError("dtype= is for format=compvis; native folders hold float32")
    written = [target] if config.format == "native" else [target, target.with_suffix(".yaml")]
    if (there := [path for path in written if path.exists()]) and not config.overwrite:
        raise FileExistsError(f"to={there[0]} exists; choose another, or overwrite=true")
    model, tree, metadata, report = read(config)
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"from: {config['from']}, {type(model).__name__} of {size:,} parameters")
    if report is not None:
        print(f"  {report}")
    if config.format == "native":
        print(f"to: {target}, a model folder ({4 * size / 1e6:,.1f} MB of weights)")
        if config.dry_run:
            return target
        save_model(target, model, tree, metadata)
        again = load_model(target) if config.verify else None
    else:
        null_class = has_null_class(model, metadata)
        described = describe(tree, null_class)
        tensors = compvis.state_dict(model, described, dtype)
        megabytes = sum(tensor.nbytes for tensor in tensors.values()) / 1e6
        print(f"to: {target} and {written[1].name}, {len(tensors)} tensors, {megabytes:,.1f} MB, {config.dtype}")
        if config.dry_run:
            return target
        yaml = yaml_library.safe_dump(described.yaml, sort_keys=False).encode()
        data = save(tensors, {"format": "pt"}) if target.suffix == ".safetensors" else _pickled(tensors)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(written[1], lambda file: file.write(yaml))
        write_atomically(target, lambda file: file.write(data))
        again = None
        if config.verify:
            again, _, _ = compvis.load(target, written[1], needs=needs_of(tree) | {"null_class": null_class})
    if again is not None:
        error = float((outputs(again) - outputs(model)).abs().max())
        print(f"verified: read again, its outputs differ by at most {error:.1e}")
        if not error <= (0 if dtype == torch.float32 else 0.1):
            raise ValueError(f"{target} computes something else than {config['from']}; do not use it")
    return target


def _pickled(tensors: dict[str, torch.Tensor]) -> bytes:
    buffer = io.BytesIO()
    torch.save({"state_dict": tensors}, buffer)
    return buffer.getvalue()
