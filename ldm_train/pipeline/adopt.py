"""Autoencoders converted, at their first use, from other programs' files or from whole models."""

from collections.abc import Sequence
from pathlib import Path

from ldm_train.checkpoints import compvis
from ldm_train.checkpoints.compvis import FILES
from ldm_train.checkpoints.diffusers import is_diffusers
from ldm_train.checkpoints.diffusers_networks import (
    check_folder_links,
    first_stage_tree,
    load_first_stage,
    weight_files,
)
from ldm_train.checkpoints.native import (
    CONFIG,
    METADATA,
    WEIGHTS,
    load_latent_diffusion,
    read_tree,
    recorded_sampling,
    save_model,
)
from ldm_train.pipeline.resume import NOTE
from ldm_train.storage import files_sha256, read_config
from ldm_train.unclip import ImageEmbeddings

EMBEDDINGS = "ldm_train.unclip.ImageEmbeddings"
ADOPTED = ".adopted"  # the folder below runs_dir that holds converted models


def yaml_beside(path: Path) -> Path:
    """The YAML of a checkpoint: the one with its name, or the only one in its folder. Else raises FileNotFoundError."""
    named = path.with_suffix(".yaml")
    others = sorted(path.parent.glob("[!.]*.yaml"))
    if named.is_file():
        return named
    if (path.parent / METADATA).is_file():
        raise FileNotFoundError(f"{path} is a part of a model folder; give the folder: {path.parent}")
    if path.parent.name == "checkpoints" and (path.parents[1] / NOTE).is_file():
        raise FileNotFoundError(f"{path} is a checkpoint of a training, not a model; give the run: {path.parents[2]}")
    if len(others) == 1:
        return others[0]
    raise FileNotFoundError(
        f"{path} needs the YAML that describes its model: config=<file.yaml>, or {named.name} beside it"
    )


def is_foreign(path: Path) -> bool:
    """Returns True if `path` is a CompVis checkpoint, a diffusers pipeline or a diffusers autoencoder."""
    return (path.suffix in FILES and path.is_file()) or is_diffusers(path) or (path / "config.json").is_file()


def is_whole(folder: Path) -> bool:
    """Returns True if a native model folder holds a whole latent diffusion model, not just an autoencoder."""
    return "first_stage" in read_config(folder / CONFIG)


def adopted_autoencoder(path: Path, cache: Path, trust: Sequence[str] = ()) -> Path:
    """The native model folder, below `cache`, of the autoencoder in `path`, converted at its first use. path: a foreign
    autoencoder, a foreign whole model, or a native whole model.
    Raises FileNotFoundError or ValueError, naming what cannot be converted."""
    native = (path / METADATA).is_file()
    if path.is_file():
        yaml = yaml_beside(path)
        files = [path, yaml]
    elif native:
        files = [path / CONFIG, path / WEIGHTS]
    else:
        check_folder_links(path)
        folder = next((path / name for name in ("vae", "vqvae") if is_diffusers(path) and (path / name).is_dir()), path)
        files = [folder / "config.json", *weight_files(folder)]
    digest = files_sha256(files)
    target = cache / f"{path.stem}-{digest[:12]}"
    if (target / METADATA).is_file():
        return target
    if path.is_file():
        network, tree = compvis.load_autoencoder(path, yaml)
    elif native:
        network = load_latent_diffusion(path, trust).first_stage.autoencoder
        tree = read_tree(path)["first_stage"]["autoencoder"]
    else:
        network, tree = load_first_stage(folder).autoencoder, first_stage_tree(folder)["autoencoder"]
    metadata = {"downsample_factor": network.downsample_factor, "converted_from": path.name}
    save_model(target, network, tree, metadata)
    return target


def adopted_embeddings(folder: Path, cache: Path, trust: Sequence[str] = ()) -> Path:
    """The folder, below `cache`, of an autoencoder whose latents are the image embeddings that a native model is
    conditioned on (see `unclip.ImageEmbeddings`), created at its first use. Raises ValueError if `ImageEmbeddings` does
    not accept the model, e.g. because it is not conditioned on image embeddings."""
    digest = files_sha256(folder / name for name in (CONFIG, WEIGHTS, METADATA))
    target = cache / f"embeddings-{digest[:12]}"
    if (target / METADATA).is_file():
        return target
    model = load_latent_diffusion(folder, trust)
    tree = {"_target_": EMBEDDINGS, "model": read_tree(folder), "sampling": recorded_sampling(folder)}
    try:
        network = ImageEmbeddings(model)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    save_model(target, network, tree, {"downsample_factor": network.downsample_factor, "draws_with": str(folder)})
    return target
