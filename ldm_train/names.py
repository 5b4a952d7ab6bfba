"""Table of renamed options, classes and weights. Every reader of command lines, runs, recipes and model folders applies
it, so that old files and commands keep working."""

import re
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

PREDICTIONS = {
    "epsilon": "ldm_train.diffusion.parameterisation.Epsilon",
    "v_prediction": "ldm_train.diffusion.parameterisation.VPrediction",
    "sample": "ldm_train.diffusion.parameterisation.Sample",
}

# Command options by their path, {old: new}; a config group with the same path is renamed too.
OPTIONS = {
    "diffusion.unet": "diffusion.network",
    "diffusion.objective.prediction_type": "diffusion.objective.parameterisation._target_",
    "evaluation.obedience": "evaluation.adherence",
    "data.obedience": "data.adherence",
    "diffusion.adapter.begins": "diffusion.adapter.initializer_token",
    "weak": "weaker_model",
}
# Renamed values of renamed options, by the option's old path: {old: new}.
VALUES: dict[str, dict[str, str]] = {"diffusion.objective.prediction_type": PREDICTIONS}
# Renamed prefixes of the weights of a latent diffusion model: {old: new}.
WEIGHTS = {"unet.": "network."}


def argument(text: str) -> str:
    """Translates a command-line argument to current names. Returns texts that are not overrides unchanged."""
    match = re.fullmatch(r"([+~]*)([\w./@-]+)(?:=(.*))?", text, re.DOTALL)
    if match is None or text.startswith("-"):
        return text
    prefix, name, value = match.groups()
    for old, new in OPTIONS.items():
        if name == old or name.startswith(f"{old}."):
            if value is not None and old in VALUES:
                value = ",".join(VALUES[old].get(v, v) for v in value.split(","))
            name = new + name[len(old) :]
        elif name == old.replace(".", "/"):
            name = new.replace(".", "/")
        if value is not None:
            value = value.replace(f"${{{old}.", f"${{{new}.").replace(f"${{{old}}}", f"${{{new}}}")
    return f"{prefix}{name}" + ("" if value is None else f"={value}")


def options(tree: dict[str, Any]) -> dict[str, Any]:
    """Returns a copy of a run's nested options, or of some of their top-level sections, with current names."""
    tree = deepcopy(tree)
    for old, new in OPTIONS.items():
        owner, name = _section(tree, old)
        if name not in owner:
            continue
        value = owner.pop(name)
        if isinstance(value, str):
            value = VALUES.get(old, {}).get(value, value)
        target, name = _section(tree, new, make=True)
        target.setdefault(name, value)
    return tree


def _section(tree: Any, option: str, make: bool = False) -> tuple[dict[str, Any], str]:
    """Returns the section that holds an option, and the option's name in it. If there is no such section, an empty one
    outside the tree is returned; a plain value in its place is reported by the reader of the options. make: create
    missing sections."""
    *way, name = option.split(".")
    for step in way:
        if not isinstance(tree, dict):
            break
        tree = tree.setdefault(step, {}) if make else tree.get(step)
    return (tree if isinstance(tree, dict) else {}), name


def recipe(tree: dict[str, Any]) -> dict[str, Any]:
    """Translates the recipe of sampled images to current names."""
    renamed = {("weaker_model_sha256" if k == "weak_sha256" else k): v for k, v in tree.items()}
    return renamed | {"config": options(tree["config"])}


def model(tree: dict[str, Any]) -> dict[str, Any]:
    """Translates the config of a model folder to current names."""
    if "unet" not in tree or "first_stage" not in tree:
        return tree
    kind = tree.get("prediction_type", "epsilon")
    return {("network" if k == "unet" else k): v for k, v in tree.items() if k != "prediction_type"} | {
        "parameterisation": {"_target_": PREDICTIONS.get(kind, kind) if isinstance(kind, str) else kind}
    }


def weights(state: Mapping[str, Any]) -> dict[str, Any]:
    """Renames a latent diffusion model's weights to current names."""
    for old, new in WEIGHTS.items():
        state = {(new + k[len(old) :] if k.startswith(old) else k): v for k, v in state.items()}
    return dict(state)


def rename_in_checkpoint(checkpoint: dict[str, Any]) -> None:
    """Renames the weights in a checkpoint of a latent diffusion model's training, in place."""
    for holder, name in ((checkpoint, "state_dict"), (checkpoint.get("ema", {}), "shadow")):
        if name in holder:
            holder[name] = weights(holder[name])
