"""ldm-convert: converts a model from one format to another."""

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from ldm_train.checkpoints import compvis
from ldm_train.checkpoints.compvis import FILES
from ldm_train.checkpoints.diffusers import diffusers_metadata, is_diffusers, read_pipeline, usual_sampling
from ldm_train.checkpoints.diffusers_networks import check_folder_links, first_stage_tree, load_first_stage
from ldm_train.checkpoints.hub import REPO, downloaded, is_repo, upload
from ldm_train.checkpoints.native import METADATA, find_model, load_model, read_metadata, read_tree
from ldm_train.conditioning.text import read_tokenizer
from ldm_train.configuration import config_folder
from ldm_train.latent_diffusion import LatentDiffusion
from ldm_train.pipeline.adopt import yaml_beside
from ldm_train.pipeline.card import CARD, write_card
from ldm_train.pipeline.convert_adapter import convert_adapter, is_adapter
from ldm_train.pipeline.formats import DTYPES, FORMS, Model, check_target, outputs
from ldm_train.rules import Rule, check, either, flag, list_of, one_of, optional, text, whole
from ldm_train.storage import files_sha256

RULES: dict[str, Rule] = {
    **dict.fromkeys(("from", "to"), text("a path; give from=<model> to=<folder or file>")),
    **dict.fromkeys(("config", "tokenizer"), optional(text("a file"))),
    "base": optional(text("a run or model folder")),
    "text_encoder": optional(text("a folder or name")),
    "format": one_of(*FORMS, "kohya"),
    "weights": optional(one_of("averaged", "live")),
    "labels": optional(either(whole(1), list_of(str))),
    "null_class": optional(flag),
    "dtype": one_of(*DTYPES),
    "repo": optional(text("a name, <organisation or user>/<name>")),
    **dict.fromkeys(("verify", "dry_run", "overwrite", "private", "encoders"), flag),
}
HUB = "hub"  # instead of a path
OF_FILES = (
    "config",
    "weights",
    "tokenizer",
    "text_encoder",
    "labels",
    "null_class",
)  # options that describe checkpoint files


def read(config: DictConfig) -> tuple[Model, compvis.Report | None]:
    """The model in `from`, and for a CompVis checkpoint the report of which tensors were mapped. Raises
    FileNotFoundError if there is none."""
    source, metadata = Path(config["from"]), dict[str, Any]()
    if source.suffix in FILES:
        if not source.is_file():
            raise FileNotFoundError(f"from={source}: there is no such file")
        labels = OmegaConf.to_container(config.labels) if OmegaConf.is_list(config.labels) else config.labels
        needs = {"labels": labels, "tokenizer": _tokenizer(config.tokenizer), "null_class": config.null_class}
        needs["text_encoder"] = config.text_encoder
        yaml = Path(config.config) if config.config is not None else yaml_beside(source)
        model, described, report = compvis.load(source, yaml, config.weights, needs)
        metadata = {"converted_from": source.name}
        if described.latent:
            parts = described.tree.get("conditioners", {}).values()
            captions = any(part["_target_"].startswith("ldm_train.conditioning.text.") for part in parts)
            metadata["sampling"] = usual_sampling(captions) | {"spacing": "compvis"}  # that of the published scripts
        elif given := [
            option for option in OF_FILES if option not in ("config", "weights") and config[option] is not None
        ]:
            raise ValueError(f"{given[0]}= is for whole models, and {source} holds an autoencoder; leave it out")
        if (classes := described.tree.get("conditioners", {}).get("class_label")) is not None:
            metadata["null_class"] = described.class_rows == classes["classes"] + 1
        named = [Path(config.text_encoder)] if config.text_encoder is not None else []
        return Model(model, described.tree, metadata, _folders(config, *named)), report
    if is_repo(source):
        source = downloaded(str(source))
    if is_diffusers(source):
        module, tree = read_pipeline(source)
        metadata = {"sampling": diffusers_metadata(source)["sampling"], "converted_from": source.name}
        return Model(module, tree, metadata), None
    if (source / "config.json").is_file():
        check_folder_links(source)
        tree = first_stage_tree(source)["autoencoder"]
        module = load_first_stage(source).autoencoder
        metadata = {"downsample_factor": module.downsample_factor, "converted_from": source.name}
        metadata["scale_factor"] = first_stage_tree(source)["scale_factor"]  # of the latents, for diffusers
        return Model(module, tree, metadata), None
    folder = native_folder(source)
    metadata = {k: v for k, v in read_metadata(folder).items() if k not in ("sha256", "config_sha256")}
    return Model(load_model(folder), read_tree(folder), metadata, _folders(config, folder)), None


def _folders(config: DictConfig, *folders: Path) -> list[Path]:
    """The folders from which encoders may be copied: those given, or any folder with encoders=true."""
    return [Path("/")] if config.encoders else list(folders)


def _tokenizer(value: str | None) -> str | None:
    """`tokenizer` as `compvis.load` takes it: a folder's absolute path (CLIP's), or the JSON of a file's tokenizer."""
    if value is None:
        return None
    return str(Path(value).resolve()) if Path(value).is_dir() else read_tokenizer(value).to_str()


def native_folder(source: Path) -> Path:
    """The native model folder of `from`: that of a run, or of its autoencoder if it has no other yet, or `from` itself.
    Raises FileNotFoundError if there is none."""
    for folder in (find_model(source), source / "autoencoder" / "model"):
        if folder is not None and (folder / METADATA).is_file():
            return folder
    raise FileNotFoundError(
        f"from={source} is not a checkpoint ({', '.join(FILES[:2])}), a run with a finished model or a model folder"
    )


def _published(config: DictConfig) -> Path:
    """Writes the model and its card into a temporary folder, and uploads that (a dry run does neither). Returns the
    path that the folder had. Raises ValueError if `repo` is not <owner>/<name>."""
    if config.repo is None or REPO.fullmatch(config.repo) is None or "@" in config.repo:
        raise ValueError(f"to=hub needs repo=<organisation or user>/<name>, not {config.repo}")
    form, (_, name) = config.format, config.repo.split("/")
    with TemporaryDirectory() as scratch:
        folder, one_file = Path(scratch) / name, form in ("compvis", "single_file")
        target = folder / f"{name}.safetensors" if one_file else folder
        model = _converted(OmegaConf.merge(config, {"to": str(target.resolve())}))
        if config.dry_run:
            print(f"dry run: this and its card would go to {config.repo}{' (private)' if config.private else ''}")
            return folder
        source = Path(config["from"])
        run = source if (source / "config.yaml").is_file() and (source / "diffusion").is_dir() else None
        lines = _opening(folder, config.repo, form, isinstance(model.module, LatentDiffusion))
        cards = [source / "export" / CARD, source / CARD] if source.is_dir() else []
        licensed = next((card for card in cards if card.is_file()), None)
        write_card(folder, run, config.repo, model.tree, lines, form == "native", licensed)
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            print(f"  {path.stat().st_size / 1e6:10,.1f} MB  {path.relative_to(folder)}")
        print(f"uploaded: {upload(folder, config.repo, config.private, f'ldm_train: {source.name}')}")
        return folder


def _opening(folder: Path, repo: str, form: str, whole: bool) -> list[str]:
    """Lines of Python, for the card, that load the published model. whole: it is not just an autoencoder."""
    if form == "native":
        drawn = ["images = model.sample({}, seeds=[0, 1, 2, 3])"] if whole else []
        opened = (
            f'model = ldm_train.load("{repo}")' if whole else "# its folder is autoencoder.pretrained= of a training"
        )
        return ["import ldm_train", opened, *drawn]
    if form == "diffusers":
        code = ", trust_remote_code=True" if any(folder.rglob("*.py")) else ""
        kind = "DiffusionPipeline" if whole else json.loads((folder / "config.json").read_text())["_class_name"]
        kind = "AutoModel" if code and not whole else kind  # which finds the class in the folder
        return [f"from diffusers import {kind}", f'model = {kind}.from_pretrained("{repo}"{code})']
    return ["from huggingface_hub import hf_hub_download", f'hf_hub_download("{repo}", "{folder.name}.safetensors")']


@cache
def adopted_model(path: Path, place: Path) -> Path:
    """The native model folder, below `place`, of a whole model's checkpoint or pipeline, converted at its first use.
    Raises FileNotFoundError or ValueError, naming what cannot be converted."""
    if path.is_file():
        files = [path, yaml_beside(path)]
    else:
        check_folder_links(path)
        files = sorted(
            p for p in path.rglob("*") if p.is_file() and p.suffix in (".json", ".safetensors", ".bin", ".txt")
        )
    digest = files_sha256(files)
    target = place / f"{path.stem}-{digest[:12]}-model"
    if (target / METADATA).is_file():
        return target
    config = OmegaConf.load(config_folder() / "convert.yaml")
    try:
        model, _ = read(OmegaConf.merge(config, {"from": str(path), "to": str(target)}))
    except ValueError as error:
        raise ValueError(
            f"{error}. ldm-convert from={path} takes such options, and makes a model folder of it"
        ) from error
    if not isinstance(model.module, LatentDiffusion):
        raise ValueError(f"{path} holds an autoencoder alone")
    FORMS["native"](model, target, DTYPES["float32"]).write()
    return target


def convert(config: DictConfig) -> Path:
    """Converts `from` to `to`, and returns the path written. Raises ValueError, FileNotFoundError or FileExistsError,
    naming what cannot be converted or written, before anything is written; ValueError if verify=true finds that the
    written model differs."""
    check(config, RULES, tuple(RULES))
    _check_effects(config)
    if is_adapter(Path(config["from"])):
        return convert_adapter(config)
    if config.format == "kohya" or config.base is not None:
        raise ValueError(
            f"from={config['from']} is not an adapter; format=kohya and base= are for those (<run>/diffusion/adapter)"
        )
    if config.to == HUB:
        return _published(config)
    _converted(config)
    return Path(config.to)


def _check_effects(config: DictConfig) -> None:
    """Raises ValueError for options that have no effect on this conversion."""
    adapter = is_adapter(Path(config["from"]))
    if config.to == HUB and adapter:
        raise ValueError(
            f"to=hub publishes models, and from={config['from']} is an adapter; convert it to a folder, and upload that with "
            "`hf upload <repo> <folder>`"
        )
    if (of_hub := [o for o in ("repo", "private") if config[o]]) and config.to != HUB:
        raise ValueError(f"{of_hub[0]}= has an effect only with to=hub; leave it out")
    of_file = [option for option in OF_FILES if config[option] is not None]
    if of_file and Path(config["from"]).suffix not in FILES:
        raise ValueError(
            f"{of_file[0]}= describes a checkpoint file ({', '.join(FILES)}), and from={config['from']} is not one; leave it out"
        )
    if config.encoders and (adapter or (config.format != "native" and config.to != HUB)):
        raise ValueError("encoders= has an effect only with format=native and a whole model; leave it out")
    if config.control is not None and not adapter:
        raise ValueError("control= says what the image of a ControlNetModel of diffusers shows; leave it out")


def _converted(config: DictConfig) -> Model:
    target, dtype = Path(config.to), DTYPES[config.dtype]
    check_target(config.format, target, dtype)
    if target.exists() and not config.overwrite:
        raise FileExistsError(f"to={target} exists; choose another, or overwrite=true")
    model, report = read(config)
    size = sum(parameter.numel() for parameter in model.module.parameters())
    print(f"from: {config['from']}, {type(model.module).__name__} of {size:,} parameters")
    if report is not None:
        print(f"  {report}")
    if config.repo is not None and (named := model.elsewhere()):
        raise ValueError(
            f"{config['from']} names the encoder {named[0]} of this machine; encoders=true publishes it with the model"
        )
    form = FORMS[config.format](model, target, dtype)
    if (there := [path for path in form.files if path.exists()]) and not config.overwrite:
        raise FileExistsError(f"{there[0]} exists; choose another to=, or overwrite=true")
    print(f"to: {form.says}")
    if config.dry_run:
        return model
    form.write()
    if config.verify:
        expected, computed = outputs(model.module), form.again()
        error = float(
            torch.stack([(computed[name] - expected[name]).abs().max() for name in computed]).max()
        )  # max keeps NaN
        print(f"verified: read again, its outputs differ by at most {error:.1e}")
        if not error <= (form.tolerance if dtype == torch.float32 else 0.1):
            raise ValueError(f"{target} computes something else than {config['from']}; do not use it")
    if form.hint:
        print(form.hint)
    return model
