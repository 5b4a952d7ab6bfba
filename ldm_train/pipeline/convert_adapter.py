"""ldm-convert of an adapter: into one file in the layout of diffusers/PEFT or of kohya, and from these into a folder of ours."""

from pathlib import Path

from omegaconf import DictConfig
from safetensors import SafetensorError, safe_open

from ldm_train.checkpoints.adapters import LAYOUTS, RECORD, WORD, export_adapter, read_adapter, save_adapter
from ldm_train.checkpoints.native import METADATA, find_model, load_latent_diffusion, read_metadata
from ldm_train.models import lora

NAME = "adapter"


def is_adapter(source: Path) -> bool:
    """Whether this is an adapter's folder, or a file of one."""
    if source.suffix != ".safetensors" or not source.is_file():
        return (source / RECORD).is_file()
    try:
        with safe_open(source, framework="pt") as file:
            keys = list(file.keys())
            return bool(keys) and all("lora" in key or key.endswith(".alpha") for key in keys)
    except SafetensorError:
        return False


def convert_adapter(config: DictConfig) -> Path:
    """Raises ValueError or FileNotFoundError naming what cannot be converted; then nothing is written."""
    source, target = Path(config["from"]), Path(config.to)
    if config.format not in ("native", *LAYOUTS):
        raise ValueError(f"format={config.format}: an adapter has the forms native, {', '.join(LAYOUTS)}")
    if (source / WORD).is_file():
        raise ValueError(f"{source} is a learned word; diffusers loads its {WORD} as it is")
    if config.format == "native" and target.suffix == ".safetensors":
        raise ValueError(
            f"to={target}: an adapter of ours is a folder; say format={' or format='.join(LAYOUTS)} for a file"
        )
    if config.format in LAYOUTS and target.suffix != ".safetensors":
        raise ValueError(f"to={target}: an adapter of the layout {config.format} is one file, <name>.safetensors")
    if config.dtype != "float32" or config.verify:
        raise ValueError("dtype= and verify= are for models; an adapter is written in float32")
    if target.exists() and not config.overwrite:
        raise FileExistsError(f"to={target} exists; choose another, or overwrite=true")
    base = Path(config.base) if config.base is not None else source.parent / "model"
    folder = find_model(base)
    if folder is None:
        raise FileNotFoundError(
            f"base={base} is no run and no model folder; name the model that {source} is an adapter of"
        )
    model = load_latent_diffusion(folder)
    pairs, left = read_adapter(source, model)
    lora.attach(model.parts(), pairs, NAME)
    ranks = sorted({pair.rank for pair in pairs.values()})
    print(f"from: {source}, an adapter of {len(pairs)} weights, rank {', '.join(map(str, ranks))}")
    if config.dry_run:
        return target
    if config.format == "native":
        sha256 = read_metadata(folder)["sha256"] if (folder / METADATA).is_file() else None
        save_adapter(target, model.parts(), NAME, {"base": str(base), "base_sha256": sha256, "from": source.name})
    else:
        left += export_adapter(pairs, model, target, config.format)
    for what in left:
        print(f"  left out: {what}")
    print(f"to: {target}")
    return target
