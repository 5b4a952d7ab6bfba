"""The names that have changed, in one table. Every reader of command lines, runs, recipes and model folders applies it, so that old
ones keep their meaning."""

import re
from collections.abc import Mapping
from typing import Any

PREDICTIONS = {
    "epsilon": "ldm_train.diffusion.parameterisation.Epsilon",
    "v_prediction": "ldm_train.diffusion.parameterisation.VPrediction",
    "sample": "ldm_train.diffusion.parameterisation.Sample",
}

# Options of the commands by their path; a group of that path is renamed with it.
OPTIONS = {
    "diffusion.unet": "diffusion.network",
    "diffusion.objective.prediction_type": "diffusion.objective.parameterisation._target_",
    "evaluation.obedience": "evaluation.adherence",
    "data.obedience": "data.adherence",
    "weak": "weaker_model",
}
# Values of renamed options (by their old path) that have changed too: {old: new}.
VALUES: dict[str, dict[str, str]] = {"diffusion.objective.prediction_type": PREDICTIONS}
# Classes and functions that a file names as `_target_`.
PARTS: dict[str, str] = {}
# Prefixes of the names of a latent diffusion model's weights.
WEIGHTS = {"unet.": "network."}


def argument(text: str) -> str:
    """An argument of the command line in today's names. Texts that are no override are returned unchanged."""
    match = re.fullmatch(r"([+~]*)([\w./@-]+)(?:=(.*))?", text, re.DOTALL)
    if match is None or text.startswith("-"):
        return text
    prefix, name, value = match.groups()
    for old, new in OPTIONS.items():
        if name == old or name.startswith(f"{old}."):
            if value is not None:
                value = ",".join(VALUES.get(old, {}).get(v, v) for v in value.split(",")) if old in VALUES else value
            name = new + name[len(old) :]
        elif name == old.replace(".", "/"):
            name = new.replace(".", "/")
        if value is not None:
            value = value.replace(f"${{{old}.", f"${{{new}.").replace(f"${{{old}}}", f"${{{new}}}")
    return f"{prefix}{name}" + ("" if value is None else f"={value}")


def options(tree: dict[str, Any]) -> dict[str, Any]:
    """A copy of the nested options of a run, or of a part of them from the top, in today's names."""
    tree = {k: _copied(v) for k, v in tree.items()}
    for old, new in OPTIONS.items():
        *way, last = old.split(".")
        owner: Any = tree
        for step in way:
            owner = owner.get(step) if isinstance(owner, dict) else None
        if not isinstance(owner, dict) or last not in owner:
            continue
        value = owner.pop(last)
        if old in VALUES:
            value = VALUES[old].get(value, value) if isinstance(value, str) else value
        target = tree
        *way, last = new.split(".")
        for step in way:
            target = target.setdefault(step, {}) if isinstance(target, dict) else None
        if isinstance(target, dict):  # else the reader of the options reports the invalid value
            target.setdefault(last, value)
    return tree


def _copied(value: Any) -> Any:
    return {k: _copied(v) for k, v in value.items()} if isinstance(value, dict) else value


def recipe(tree: dict[str, Any]) -> dict[str, Any]:
    """The recipe of pictures in today's names."""
    renamed = {("weaker_model_sha256" if k == "weak_sha256" else k): v for k, v in tree.items()}
    return renamed | {"config": options(tree["config"])}


def model(tree: dict[str, Any]) -> dict[str, Any]:
    """The config of a model folder in today's names."""
    if "unet" not in tree or "first_stage" not in tree:
        return tree
    kind = tree.get("prediction_type", "epsilon")
    return {("network" if k == "unet" else k): v for k, v in tree.items() if k != "prediction_type"} | {
        "parameterisation": {"_target_": PREDICTIONS.get(kind, kind) if isinstance(kind, str) else kind}
    }


def weights(state: Mapping[str, Any]) -> dict[str, Any]:
    """A latent diffusion model's weights by today's names."""
    for old, new in WEIGHTS.items():
        state = {(new + k[len(old) :] if k.startswith(old) else k): v for k, v in state.items()}
    return dict(state)


def rename_in_checkpoint(checkpoint: dict[str, Any]) -> None:
    """Gives today's names to the weights in a checkpoint of a latent diffusion model's training."""
    for holder, name in ((checkpoint, "state_dict"), (checkpoint.get("ema", {}), "shadow")):
        if name in holder:
            holder[name] = weights(holder[name])
