"""The recipes, which --help lists beside the options, and did-you-mean suggestions for unknown options and groups."""

import difflib
import re
from contextlib import suppress
from typing import Any

from hydra.errors import HydraException
from omegaconf import DictConfig

from ldm_train.configuration import config_folder


def _keys(config: Any, prefix: str = "") -> list[str]:
    if not isinstance(config, DictConfig):
        return []
    own = [prefix + str(k) for k in config]
    return own + [k for name in config for k in _keys(config._get_node(name), prefix + str(name) + ".")]


def suggestions(config_name: str, overrides: list[str]) -> str:
    """Returns a "did you mean" line for every override whose key or choice is unknown, else an empty string."""
    from hydra import compose, initialize_config_dir

    known, groups = list[str](), set[str]()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        for attempt in ([o for o in overrides if o.startswith("experiment=")], []):
            with suppress(HydraException):
                composed = compose(config_name, overrides=attempt, return_hydra_config=True)
                groups = {name for name in composed.hydra.runtime.choices if not name.startswith("hydra/")}
                known = [name for name in _keys(composed) if not name.startswith("hydra")]
                break
    lines = []
    for override in overrides:
        name, _, value = override.partition("=")
        name = name.lstrip("+~")
        if name in groups or any(g.startswith(name + "/") for g in groups):
            options = sorted(p.stem for p in (config_folder() / name).glob("*.yaml"))
            for choice in value.replace("[", "").replace("]", "").split(","):
                if choice and choice not in options and (close := difflib.get_close_matches(choice, options, 3)):
                    lines.append(f"{name}={choice}: did you mean {' or '.join(close)}?")
        elif name not in known:
            ends = [k for k in known if k.endswith("." + name)]
            if close := list(dict.fromkeys(ends[:3] or difflib.get_close_matches(name, [*known, *groups], 3))):
                lines.append(f"{name}: did you mean {' or '.join(close)}?")
    return "\n".join(lines)


def readable(message: str, config_name: str, overrides: list[str]) -> str:
    """Returns Hydra's message about a command line in our words: unknown options by name, otherwise the message without
    the search path; with what may have been meant, or the command that lists the options."""
    command = "python train.py" if config_name == "train" else f"ldm-{config_name}"
    meant = suggestions(config_name, overrides) or f"{command} --help lists the options"
    if (wrong := re.search(r"Error parsing override '([^']*)'", message)) and "=" not in wrong[1]:
        return f"{wrong[1]!r} is no option: options are written name=value, {command} --help lists them"
    if unknown := re.search(r"Could not override '([^']+)'", message):
        return f"there is no option {unknown[1]}\n{meant}"
    return f"{message.partition('Config search path:')[0].rstrip()}\n{meant}"


# A recipe belongs to the first family with a word that occurs in its name or first line.
FAMILIES = {
    "Classifiers, to guide by": ("classifier_",),
    "On a CPU, in minutes": ("CPU", "quickstart", "shapes_"),
    "The paper's sweep over f": ("sweep over f", "paper_f_sweep"),
    "Stable Diffusion's family": ("sd1", "sd2_", "upscaler_", "unclip_"),
    "From text, boxes, maps, small pictures, holes": ("text2img", "layout_", "semantic_", "superres_", "inpainting_"),
    "Pictures, by class or without any condition": ("",),
}


def recipes() -> str:
    """Returns the recipes by family, each with the first line of its file."""
    by_family: dict[str, list[str]] = {family: [] for family in FAMILIES}
    for path in sorted((config_folder() / "experiment").glob("*.yaml")):
        lines = (line[2:] for line in path.read_text().splitlines() if line.startswith("# ") and "@package" not in line)
        text = next(lines, "").split(". ")[0].split("; ")[0]
        family = next(f for f, words in FAMILIES.items() if any(w in f"{path.stem} {text}" for w in words))
        by_family[family].append(f"  {path.stem:<27} {text}")
    return "\n".join(line for family, members in by_family.items() if members for line in (f"{family}:", *members))
