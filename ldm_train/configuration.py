"""Configs: the folder that holds them, the config saved by a run, and helpers for nested options."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

import ldm_train
from ldm_train import names
from ldm_train.storage import read_config

RECOMPUTING = ".network.activation_checkpointing"  # option of networks: recomputing trades time for memory
ARGUMENTS = "LDM_TRAIN_ARGUMENTS"  # environment variable: the command line, also for processes that run a sweep's jobs


def config_folder() -> Path:
    """Path of conf/: next to the package in a checkout, inside it in a wheel."""
    package = Path(ldm_train.__file__).parent
    beside = package.parent / "conf"
    return beside if (beside / "train.yaml").is_file() else package / "conf"


def run_config(folder: Path) -> DictConfig:
    """Reads config.yaml of a run folder, which may come from a stranger, as plain values. Raises FileNotFoundError, or
    ValueError if it is not the config of a run or contains an interpolation (runs save their config resolved)."""
    path = folder / "config.yaml"
    tree = read_config(path)
    if not isinstance(tree.get("stages"), list):
        raise ValueError(f"{path} is not the config of a run: it names no stages")

    def check(value: Any) -> None:
        if isinstance(value, dict | list):
            for inner in value.values() if isinstance(value, dict) else value:
                check(inner)
        elif isinstance(value, str) and "${" in value:
            raise ValueError(f"{path} holds {value[:80]!r}; what a run has saved is resolved, this file is not its own")

    check(tree)
    return OmegaConf.create(names.options(tree))


def default_options() -> dict[str, Any]:
    """The default options of data, autoencoder, diffusion, classifier, latents, sampling and evaluation, from the base
    files of conf/."""
    top = read_config(config_folder() / "train.yaml")
    groups = ("autoencoder", "diffusion", "data", "classifier")
    tree = {group: read_config(config_folder() / group / "base.yaml") for group in groups}
    return tree | {section: top[section] for section in ("latents", "sampling", "evaluation")}


def literal(tree: dict[str, Any]) -> DictConfig:
    """Builds a config in which all strings are literal: `${` in a caption is not an interpolation."""

    def escaped(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: escaped(v) for k, v in value.items()}
        if isinstance(value, list):
            return [escaped(v) for v in value]
        # Backslashes before an interpolation escape each other, so each is doubled.
        return re.sub(r"(\\*)\$\{", lambda m: m[1] * 2 + "\\${", value) if isinstance(value, str) else value

    return OmegaConf.create(escaped(tree))


def plain(section: DictConfig) -> dict[str, Any]:
    """Converts a section to plain values, with its interpolations resolved."""
    values = OmegaConf.to_container(section, resolve=True)
    assert isinstance(values, dict)
    return {str(name): value for name, value in values.items()}


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; lists are kept as values."""
    if isinstance(tree, dict):
        return {k: v for name, value in tree.items() for k, v in flatten(value, f"{prefix}{name}.").items()}
    return {prefix[:-1]: tree}


def numbers(tree: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers in nested metrics by their path, e.g. "a/b"; an interval [low, high] becomes the two entries "low"
    and "high"."""
    flat: dict[str, float] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= numbers(value, f"{prefix}{name}/")
        elif name == "interval" and value:
            flat |= {f"{prefix}low": value[0], f"{prefix}high": value[1]}
        elif isinstance(value, int | float) and not isinstance(value, bool):
            flat[f"{prefix}{name}"] = value
    return flat


# Sections whose order matters: conditions are joined, and the optimiser's state is stored, in this order.
ORDERED = ("diffusion.conditioning.conditioners",)


def differences(old: dict[str, Any], new: dict[str, Any], defaults: dict[str, Any]) -> list[str]:
    """Returns a line "option: old -> new" for every difference. An option missing on one side counts as its default, so
    new options do not invalidate old runs. Sections in ORDERED are compared with their order. RECOMPUTING may differ:
    it changes how a result is computed, not the result."""
    before, after, default = flatten(old), flatten(new), flatten(defaults)
    lines = []
    for key in sorted(k for k in before.keys() | after.keys() if not k.endswith(RECOMPUTING)):
        was, now = before.get(key, default.get(key)), after.get(key, default.get(key))
        if was != now:
            lines.append(f"{key}: {was} -> {now}")
    for section in ORDERED:
        was, now = (_names_in(tree, section) for tree in (old, new))
        if was != now and sorted(was) == sorted(now):
            lines.append(f"{section}: {was} -> {now}, another order")
    return lines


def _names_in(tree: Any, section: str) -> list[str]:
    """The names in a section of nested values, in their order; [] if there is no such section."""
    for name in section.split("."):
        tree = tree.get(name) if isinstance(tree, dict) else None
    return list(tree) if isinstance(tree, dict) else []
