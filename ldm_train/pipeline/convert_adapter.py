"""ldm-convert for adapters: a LoRA to one file in the layout of diffusers/PEFT or of kohya, a control to a
ControlNetModel of diffusers, and these to native adapter folders."""

from pathlib import Path

import torch
from omegaconf import DictConfig
from safetensors import SafetensorError, safe_open

from ldm_train.checkpoints.adapters import (
    CONTROL,
    LAYOUTS,
    RECORD,
    WEIGHTS,
    WORD,
    export_adapter,
    read_adapter,
    save_adapter,
)
from ldm_train.checkpoints.control import (
    drop_control,
    export_control,
    is_control_of_diffusers,
    parts_of,
    save_control,
    take_control,
    take_control_of_diffusers,
)
from ldm_train.checkpoints.diffusers_networks import unet_tree
from ldm_train.checkpoints.native import METADATA, find_model, load_latent_diffusion, read_metadata, read_tree
from ldm_train.models import lora
from ldm_train.storage import check_holds_only, write_folder

NAME = "adapter"
THEIRS = ("edges", "depth")  # fields of diffusers' controls; not label maps, whose colours differ between models


def is_adapter(source: Path) -> bool:
    """Returns True if `source` is a native adapter folder, a diffusers control folder, or a LoRA .safetensors file."""
    if source.is_dir() and is_control_of_diffusers(source):
        return True
    if source.suffix != ".safetensors" or not source.is_file():
        return (source / RECORD).is_file()
    try:
        with safe_open(source, framework="pt") as file:
            keys = list(file.keys())
            return bool(keys) and all("lora" in key or key.endswith(".alpha") for key in keys)
    except SafetensorError:
        return False


def convert_adapter(config: DictConfig) -> Path:
    """Converts the adapter in `from`, and returns the path `to`. Raises ValueError, FileNotFoundError or
    FileExistsError, naming what cannot be converted or written; then nothing is written."""
    source, target = Path(config["from"]), Path(config.to)
    if (source / CONTROL).is_file() or is_control_of_diffusers(source):
        return _convert_control(config, source, target)
    if config.format not in ("native", *LAYOUTS):
        raise ValueError(f"format={config.format}: an adapter has the forms native, {', '.join(LAYOUTS)}")
    if (source / WORD).is_file():
        raise ValueError(f"{source} is a learned word; diffusers loads its {WORD} as it is")
    if config.format == "native" and target.suffix == ".safetensors":
        raise ValueError(
            f"to={target}: an adapter of ours is a folder; set format={' or format='.join(LAYOUTS)} for a file"
        )
    if config.format in LAYOUTS and target.suffix != ".safetensors":
        raise ValueError(f"to={target}: an adapter of the layout {config.format} is one file, <name>.safetensors")
    _check_written(config, target, {RECORD, WEIGHTS})
    base, folder = _base(config, source)
    model = load_latent_diffusion(folder)
    pairs, left = read_adapter(source, model)
    lora.attach(model.adaptable(), pairs, NAME)
    ranks = sorted({pair.rank for pair in pairs.values()})
    print(f"from: {source}, an adapter of {len(pairs)} weights, rank {', '.join(map(str, ranks))}")
    if config.dry_run:
        return target
    if config.format == "native":
        sha256 = read_metadata(folder)["sha256"] if (folder / METADATA).is_file() else None
        save_adapter(target, model.adaptable(), NAME, {"base": str(base), "base_sha256": sha256, "from": source.name})
    else:
        left += export_adapter(pairs, model, target, config.format)
    for what in left:
        print(f"  left out: {what}")
    print(f"to: {target}")
    return target


def _check_written(config: DictConfig, target: Path, own: set[str]) -> None:
    """Raises an error if an adapter cannot be written to `target`, or if a folder there holds more than it. own: the
    names of the files of a folder of this kind."""
    if config.dtype != "float32" or config.verify:
        raise ValueError("dtype= and verify= are for models; an adapter is written in float32")
    if target.exists() and not config.overwrite:
        raise FileExistsError(f"to={target} exists; choose another, or overwrite=true")
    check_holds_only(target, lambda path: path.name in own, "such an adapter")


def _base(config: DictConfig, source: Path) -> tuple[Path, Path]:
    """(path of an adapter's base model as given, its model folder). Raises FileNotFoundError if there is none."""
    base = Path(config.base) if config.base is not None else source.parent / "model"
    folder = find_model(base)
    if folder is None:
        raise FileNotFoundError(
            f"base={base} is neither a run nor a model folder; name the model that {source} is an adapter of"
        )
    return base, folder


def _convert_control(config: DictConfig, source: Path, target: Path) -> Path:
    """Converts a native control to one of diffusers, or back."""
    theirs = is_control_of_diffusers(source)
    wanted = "native" if theirs else "diffusers"
    if config.format != wanted:
        raise ValueError(f"format={config.format}: {source} is a control, and can be written as format={wanted}")
    if theirs and config.control not in THEIRS:
        raise ValueError(
            f"control={config.control or 'null'}: set it to what its picture shows, one of {', '.join(THEIRS)}"
        )
    if not theirs and config.control is not None:
        raise ValueError("control= is for a control of diffusers; this one records what its picture shows")
    own = {RECORD, CONTROL} if theirs else {"config.json", "diffusion_pytorch_model.safetensors"}
    _check_written(config, target, own)
    base, folder = _base(config, source)
    model, native = load_latent_diffusion(folder), (folder / METADATA).is_file()
    channels = model.first_stage.latent_channels
    tree = read_tree(folder)["network"] if native else unet_tree(folder / "unet", channels)[0]
    sha256 = read_metadata(folder)["sha256"] if native else None
    drop_control(model)  # a run that trained a control already has one, but the one in `from` is wanted
    if theirs:
        take_control_of_diffusers(source, model, tree, config.control)
    else:
        take_control(source, model)
    parts = parts_of(model)
    print(
        f"from: {source}, a control by {parts['picture'].field} of {sum(p.numel() for p in parts.parameters()) / 1e6:.2g} M parameters"
    )
    if config.dry_run:
        return target
    begun = {"base": str(base), "base_sha256": sha256, "from": source.name}

    def write(partial: Path) -> None:
        if theirs:
            save_control(partial, model, begun)
        else:
            export_control(partial, model, tree, torch.float32)

    write_folder(target, write)
    print(f"to: {target}")
    return target
