"""Completes the config of a run, possibly from a stranger: checks its values and replaces some by options of the
current command."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ldm_train.configuration import config_folder, default_options, literal
from ldm_train.pipeline.values import RULES
from ldm_train.rules import check
from ldm_train.storage import check_kinds, read_config

# Options of the current command that replace evaluation.<name> and sampling.<name> in the run's config.
EVALUATION = ("metrics", "paired", "reference", "reference_images", "predictors", "batch_size")
SAMPLING = ("num_inference_steps", "guidance_scale", "guidance_interval", "spacing")
# Parts for measuring: built from the current command's config, never from a run's, which may come from a stranger.
BUILT = ("extractors", "kinds", "perceptual", "lpips")
# Options that concern only this machine and the current command.
OWN = ("accelerator", "precision", "num_workers", "progress", "devices", "engine", "max_failures", "runs_dir", "trust")

SECTIONS = ("data", "autoencoder", "diffusion", "latents", "sampling", "evaluation")
NULL = type(None)
# Allowed types of options that accept more than their default's type.
OPEN: dict[str, Sequence[type]] = {
    "data.image_size": (int, list),
    "data.max_bad_fraction": (float,),
    "sampling.guidance_scale": (float,),
    "sampling.guidance_interval": (list,),
    "evaluation.reference_images": (int,),
    "evaluation.restoration": (dict, NULL),
    "autoencoder.loss.perceptual": (dict,),
}
for stage in ("autoencoder", "diffusion"):
    OPEN |= {f"{stage}.lr": (float,), f"{stage}.ema_decay": (float, NULL), f"{stage}.clip_norm": (float, NULL)}
    OPEN |= {f"{stage}.val_images": (int, NULL), f"{stage}.micro_batch_size": (int, NULL)}
# Options of a run's config whose values are checked by the rules of train.py.
RULED = (
    "sampling.guidance_interval",
    *(f"{owner}data.{name}" for owner in ("", "autoencoder.") for name in ("scale", "buckets.max_ratio")),
    *(f"{owner}data.buckets.{name}" for owner in ("", "autoencoder.") for name in ("step", "min_images")),
)
# Options that every run's config must have, however old.
NEEDED = (
    "autoencoder.network._target_", "diffusion.network._target_", "diffusion.schedule._target_", "sampler._target_",
    "diffusion.conditioning.conditioners",
)  # fmt: skip


def run_folder(name: str, runs_dir: str) -> Path:
    """The folder of a run, given as a path or as a name in `runs_dir`. Raises FileNotFoundError, listing the runs there
    are."""
    for folder in (Path(name), Path(runs_dir) / name):
        if (folder / "config.yaml").is_file() and not (folder / "metadata.json").is_file():  # else a model folder
            return folder
    known = [p.parent for p in Path(runs_dir).rglob("config.yaml") if ".replaced" not in p.parts]
    trained = [f for f in known if (f / "diffusion").is_dir() or (f / "autoencoder").is_dir()]
    runs = sorted(str(folder.relative_to(runs_dir)) for folder in trained)
    raise FileNotFoundError(
        f"{name} is not a run (a folder with config.yaml); runs in {runs_dir}: {', '.join(runs) or 'none'}"
    )


def _perceptual_of(tree: dict[str, Any]) -> dict[str, Any] | None:
    """The default config of the perceptual network that a run was trained with, if it is one of this package; otherwise
    None."""
    target = (tree["autoencoder"]["loss"].get("perceptual") or {}).get("_target_")
    for file in sorted(config_folder().glob("autoencoder/loss/perceptual/*.yaml")):
        usual = read_config(file)
        if target is not None and usual.get("_target_") == target:
            return usual
    return None


def _said(tree: dict[str, Any]) -> dict[str, Any]:
    """Returns a copy in which options without a concrete value (`???`, `${...}`) and those in BUILT are null."""
    open_ended = {k for k, v in tree.items() if isinstance(v, str) and ("${" in v or v == "???")} | {*BUILT}
    return {k: None if k in open_ended else _said(v) if isinstance(v, dict) else v for k, v in tree.items()}


def _whole(trained: DictConfig, path: Path) -> dict[str, Any]:
    """Returns a run's config, with default options added that an older run lacks, and the types of its values checked.
    Raises ValueError for a damaged config."""
    tree, usual = OmegaConf.to_container(trained), _said(default_options())
    usual["data"] |= {"derived": {}}
    usual["autoencoder"] |= {"loss": {"perceptual": None}}
    for name in SECTIONS[:-1]:  # evaluation options come from the current command
        if isinstance(tree.get(name, {}), dict):
            tree[name] = usual[name] | tree.get(name, {})
    usual["diffusion"] |= {"conditioning": {"conditioners": {}}, "network": {}, "schedule": {}, "objective": {}}
    kinds = {name: usual[name] for name in SECTIONS} | {"seed": 0, "sampler": {"_target_": ""}}
    check_kinds({"seed": 0} | tree, kinds, f"{path} is damaged", OPEN)
    for where in NEEDED:
        part = tree
        for step in where.split("."):
            if not isinstance(part, dict) or step not in part:
                raise ValueError(f"{path} is damaged: it lacks {where}")
            part = part[step]
    tree["data"]["buckets"] = usual["data"]["buckets"] | tree["data"]["buckets"]
    try:
        check(literal({name: tree[name] for name in ("sampling", "data", "autoencoder")}), {n: RULES[n] for n in RULED})
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if unknown := sorted(set(tree["sampling"]) - set(usual["sampling"])):
        raise ValueError(f"{path} is damaged: sampling.{unknown[0]} is not an option of sampling")
    root = tree["data"]["root"]
    roots = root if isinstance(root, list) else [root]
    if not roots or not all(isinstance(r, str) and r != "???" for r in roots):
        raise ValueError(f"{path} is damaged: data.root is {root!r:.60}, which is not a folder; set data.root=")
    for option, section in (("data.weights", tree), ("autoencoder.data.weights", tree["autoencoder"])):
        weights = section["data"].get("weights")
        if weights is not None and not (isinstance(weights, list) and all(type(w) in (int, float) for w in weights)):
            raise ValueError(f"{path} is damaged: {option} is {weights!r:.60}, which is not a list of numbers")
    for name, conditioner in tree["diffusion"]["conditioning"]["conditioners"].items():
        if not isinstance(conditioner, dict) or "_target_" not in conditioner:
            raise ValueError(f"{path} is damaged: the conditioner {name} is {conditioner!r:.60}, which has no _target_")
    return tree


def with_options(trained: DictConfig, config: DictConfig, path: Path) -> DictConfig:
    """Returns a run's config, read from `path`, with options replaced by those of the current command. The run's config
    supplies plain values and the parts that `parts.build` allows; everything else is built from the current command's
    config. Raises ValueError, naming the file, for values of a wrong type."""
    tree, own, known = _whole(trained, path), OmegaConf.to_container(config, resolve=True), default_options()
    given = {name: value for name, value in own.items() if value is not None}
    usual, recorded = known["evaluation"], tree.get("evaluation", {})
    built = {name: usual[name] for name in BUILT} | {"perceptual": _perceptual_of(tree)}
    for name in BUILT:
        if own[name]:
            built[name] = OmegaConf.to_container(OmegaConf.merge(built[name] or {}, own[name]))
    evaluation = usual | recorded | built | {name: given[name] for name in EVALUATION if name in given}
    if "n" in given:
        evaluation["images"] = given["n"]
    tree |= {"stage": {}, "evaluation": evaluation}  # a measurement runs no stage
    tree["sampling"] |= {name: given[name] for name in SAMPLING if name in given}
    tree |= {name: own[name] for name in OWN}
    if own.get("sampler"):
        tree["sampler"] = own["sampler"]
    tree["data"]["module"] = known["data"]["module"]
    first = {k: v for k, v in tree["autoencoder"]["data"].items() if k in known["autoencoder"]["data"]}
    tree["autoencoder"]["data"] = first
    for name, value in own["data"].items():
        if value is not None:
            tree["data"][name] = value
            if first.get(name) is not None:
                first[name] = value
    return literal(OmegaConf.to_container(OmegaConf.create(tree), resolve=True))
