"""The config of a run that may come from someone else: its values checked, this command's options in the place of its own."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ldm_train.configuration import config_folder, literal, usual_options
from ldm_train.storage import check_kinds

# Options of this command that replace evaluation.<name> of the run's config.
EVALUATION = ("metrics", "paired", "reference", "reference_images", "predictors", "batch_size")
# Parts that measure: built from this command's own config, never from a run's, which may come from a stranger.
BUILT = ("extractors", "kinds", "perceptual", "lpips")
SAMPLING = ("num_inference_steps", "guidance_scale", "spacing")


SECTIONS = ("data", "autoencoder", "diffusion", "latents", "sampling", "evaluation")
NULL = type(None)
# Types of options that take more than one.
OPEN: dict[str, Sequence[type]] = {
    "data.image_size": (int, list),
    "sampling.guidance_scale": (float,),
    "data.max_bad_fraction": (float,),
    **dict.fromkeys(("autoencoder.lr", "diffusion.lr"), (float,)),
    **{
        f"{stage}.{name}": (float, NULL)
        for stage in ("autoencoder", "diffusion")
        for name in ("ema_decay", "clip_norm")
    },
    **{
        f"{stage}.{name}": (int, NULL)
        for stage in ("autoencoder", "diffusion")
        for name in ("val_images", "micro_batch_size")
    },
    "evaluation.reference_images": (int,),
    "autoencoder.loss.perceptual": (dict,),
    "evaluation.restoration": (dict, NULL),
}
# Options that every run's config must have, old or new.
NEEDED = (
    "autoencoder.network._target_", "diffusion.network._target_", "diffusion.schedule._target_", "sampler._target_",
    "diffusion.conditioning.conditioners",
)  # fmt: skip


def run_folder(name: str, runs_dir: str) -> Path:
    """Raises FileNotFoundError naming the runs there are."""
    for folder in (Path(name), Path(runs_dir) / name):
        if (folder / "config.yaml").is_file() and not (folder / "metadata.json").is_file():  # else a model folder
            return folder
    known = sorted(
        str(p.parent.relative_to(runs_dir)) for p in Path(runs_dir).rglob("config.yaml") if ".replaced" not in p.parts
    )
    runs = [
        k for k in known if (Path(runs_dir) / k / "diffusion").is_dir() or (Path(runs_dir) / k / "autoencoder").is_dir()
    ]
    raise FileNotFoundError(
        f"{name} is no run (a folder with config.yaml); runs in {runs_dir}: {', '.join(runs) or 'none'}"
    )


def _perceptual_of(trained: DictConfig) -> dict[str, Any] | None:
    """The perceptual network of this package that a run was trained with, in its usual form; None where it is another."""
    tree = OmegaConf.select(trained, "autoencoder.loss.perceptual._target_")
    for file in sorted((config_folder() / "autoencoder" / "loss" / "perceptual").glob("*.yaml")):
        usual = OmegaConf.to_container(OmegaConf.load(file))
        if tree is not None and usual.get("_target_") == tree:
            return usual
    return None


def _said(tree: dict[str, Any]) -> dict[str, Any]:
    """A copy in which options without a value of their own (`???`, `${...}`) and networks are null."""
    open_ended = {k for k, v in tree.items() if isinstance(v, str) and ("${" in v or v == "???")} | {*BUILT}
    return {k: None if k in open_ended else _said(v) if isinstance(v, dict) else v for k, v in tree.items()}


def _whole(trained: DictConfig, path: Path) -> DictConfig:
    """A run's config with the usual options where an older run lacks them, the kinds of its values checked."""
    tree, usual = OmegaConf.to_container(trained), _said(usual_options())
    usual["data"] |= {"derived": {}}
    usual["autoencoder"] |= {"loss": {"perceptual": None}}
    for name in SECTIONS[:-1]:  # the evaluation's come from this command
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
    if unknown := sorted(set(tree["sampling"]) - set(usual["sampling"])):
        raise ValueError(f"{path} is damaged: sampling.{unknown[0]} is no option of sampling")
    root = tree["data"]["root"]
    roots = root if isinstance(root, list) else [root]
    if not roots or not all(isinstance(r, str) and r != "???" for r in roots):
        raise ValueError(f"{path} is damaged: data.root is {root!r:.60}, which is no folder; say data.root= yourself")
    for option, section in (("data.weights", tree), ("autoencoder.data.weights", tree["autoencoder"])):
        weights = section["data"].get("weights")
        if weights is not None and not (isinstance(weights, list) and all(type(w) in (int, float) for w in weights)):
            raise ValueError(f"{path} is damaged: {option} is {weights!r:.60}, which is no list of numbers")
    for name, conditioner in tree["diffusion"]["conditioning"]["conditioners"].items():
        if not isinstance(conditioner, dict) or "_target_" not in conditioner:
            raise ValueError(f"{path} is damaged: the conditioner {name} is {conditioner!r:.60}, which has no _target_")
    return OmegaConf.create(tree)


def with_options(trained: DictConfig, config: DictConfig, path: Path) -> DictConfig:
    """The config of a run, read from `path`, this command's options in the place of its own.

    The run supplies plain values and the parts that `parts.build` allows; everything else is built from this command's config.
    Raises ValueError, naming the file, for values of a wrong type.
    """
    trained = _whole(trained, path)
    own = OmegaConf.to_container(config, resolve=True)
    usual = OmegaConf.to_container(OmegaConf.load(config_folder() / "train.yaml").evaluation)
    built = {name: usual[name] for name in BUILT} | {"perceptual": _perceptual_of(trained)}
    plain = {k: v for k, v in trained.get("evaluation", {}).items() if k not in BUILT}
    trained["stage"] = {}  # a measurement runs none
    known = usual_options()
    trained.data["module"] = known["data"]["module"]
    trained.autoencoder.data = {k: v for k, v in trained.autoencoder.data.items() if k in known["autoencoder"]["data"]}
    trained.evaluation = OmegaConf.create({**usual, **plain, **built})
    for name in BUILT:
        if own[name]:
            trained.evaluation[name] = OmegaConf.merge(trained.evaluation[name] or {}, own[name])
    for name in EVALUATION:
        if own[name] is not None:
            trained.evaluation[name] = own[name]
    if own["n"] is not None:
        trained.evaluation.images = own["n"]
    for name in SAMPLING:
        if own[name] is not None:
            trained.sampling[name] = own[name]
    if own.get("sampler"):
        trained.sampler = own["sampler"]
    for name in ("accelerator", "precision", "num_workers", "progress", "devices", "runs_dir", "trust"):
        trained[name] = own[name]
    for name, value in own["data"].items():
        if value is not None:
            trained.data[name] = value
            if trained.autoencoder.data.get(name) is not None:
                trained.autoencoder.data[name] = value
    return literal(OmegaConf.to_container(trained, resolve=True))
