"""The card of a model: README.md with metadata for the Hub, its samples and metrics, data, recipe and commands."""

import json
import math
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ldm_train.checkpoints.parts import find_part
from ldm_train.conditioning.base import Conditioner
from ldm_train.data.shards import DataError, read_index
from ldm_train.pipeline.resume import read_note
from ldm_train.storage import read_config, write_atomically

CARD, RECIPE, SAMPLES = "README.md", "training.yaml", "samples.png"
# Example options of ldm-sample, by the field that a model is conditioned on.
EXAMPLES = {
    "caption": "prompts='a few words'",
    "class_label": "classes=[0,1]",
    "lowres": "image=small.png",
    "masked_image": "image=photo.png mask=hole.png",
    "segmentation": "map=labels.png",
}


def _fields(tree: Mapping[str, Any], where: Path) -> list[str]:
    """The batch fields that a model is conditioned on, without those of the user's own conditioners."""
    fields = []
    for options in (tree.get("conditioners") or {}).values():
        with suppress(ValueError):  # the user's own part, which is not imported
            part = find_part(options["_target_"], where)
            fields += [part.field] if issubclass(part, Conditioner) else []
    return fields


def _task(fields: list[str]) -> str:
    """The Hub's name of the task of a model that is conditioned on these fields."""
    if {"lowres", "masked_image", "segmentation", "edges", "depth"} & set(fields):
        return "image-to-image"
    return "text-to-image" if "caption" in fields else "unconditional-image-generation"


PRIVATE = ("logger", "runs_dir", "data_dir", "project", "trace", "text_cache", "callbacks")


def _without_folders(tree: Any) -> Any:
    """A config, for publication: without options of this machine (PRIVATE), paths shortened to their last part."""
    if isinstance(tree, dict):
        return {k: _without_folders(v) for k, v in tree.items() if k not in PRIVATE}
    if isinstance(tree, list):
        return [_without_folders(v) for v in tree]
    return Path(tree).name if isinstance(tree, str) and _is_path(tree) else tree


def _is_path(text: str) -> bool:
    """Whether a text leads to a place on this machine: it is none if it is an address, a model's name on the Hub, or a
    text that has a slash in it."""
    begins = text.startswith(("/", "~", "./", "../", "file:"))
    return begins or ("/" in text and "://" not in text and Path(text).exists())


def _measured(run: Path) -> dict[str, Any]:
    """The metrics.json of a run's evaluation, or {} if that is not finished."""
    note = read_note(run / "evaluation")
    path = run / "evaluation" / "metrics.json"
    return json.loads(path.read_text()) if note and note["finished"] and path.is_file() else {}


def _rows(metrics: Mapping[str, Any]) -> list[tuple[str, str, float, str, int]]:
    """The rows of the card's table: (what was measured, metric, value, 95 % interval, number of images)."""
    rows = []
    for of, measures in metrics.items():
        for name, entry in measures.items() if isinstance(measures, dict) else ():
            if isinstance(entry, dict) and "value" in entry:
                interval = " to ".join(f"{v:.4g}" for v in entry.get("interval") or [])
                value = math.inf if entry["value"] is None else float(entry["value"])  # e.g. PSNR of identical images
                rows.append((of, name, value, interval, int(entry.get("n", 0))))
    for name, shares in metrics.get("adherence", {}).items():
        if isinstance(shares, dict) and "mean" in shares:
            rows.append(("adherence", name.replace("_", " "), float(shares["mean"]), "", 0))
    return rows


def _data(config: Mapping[str, Any]) -> tuple[str, str]:
    """(name of the data, a sentence that describes them)."""
    data = config["data"]
    roots = data["root"] if isinstance(data["root"], list) else [data["root"]]
    name, size = " and ".join(Path(root).name for root in roots), data["image_size"]
    size = size if isinstance(size, list) else [size, size]
    text = f"{name}, at {size[0]}x{size[1]} pixels of {data['channels']} channels"
    with suppress(FileNotFoundError, DataError, KeyError, TypeError):
        split = read_index(data["root"])["splits"][data["train_split"]]
        shards = split["shards"] if isinstance(split, dict) else split
        text += f", {sum(shard['count'] for shard in shards):,} training images"
    return name, text


def _trained(config: Mapping[str, Any]) -> list[str]:
    lines = []
    for stage in ("autoencoder", "diffusion"):
        section = config[stage]
        if section.get("pretrained"):
            lines.append(f"- {stage}: taken from {Path(section['pretrained']).name}")
        elif not section["network"]["_target_"].endswith("Identity"):
            begun = f", begun from {Path(section['init']).name}" if section.get("init") else ""
            network = section["network"]["_target_"].rpartition(".")[2]
            length = (
                f"{section['max_steps']:,} steps" if not section.get("max_time") else f"{section['max_time']} of steps"
            )
            lines.append(
                f"- {stage}: {network}, {length} of {section['batch_size']} images, learning rate "
                f"{section['lr']:g}{begun}"
            )
    return lines


def write_card(
    folder: Path,
    run: Path | None,
    title: str,
    tree: Mapping[str, Any],
    commands: list[str],
    native: bool = True,
    licensed: Path | None = None,
) -> None:
    """Writes README.md into a model's folder. For a whole latent diffusion model whose `run` is given, it has that
    run's samples, metrics and recipe.

    title: the model's name. tree: the config that builds it. commands: lines of Python that load it. native: whether
    the folder is in this package's own format. licensed: an earlier card of the model, whose licence is kept
    """
    whole, fields, data = "first_stage" in tree, _fields(tree, folder), "unknown"
    run, metrics, results = run if whole else None, {}, []
    what = f"A latent diffusion model{' conditioned on ' if fields else ''}{', '.join(fields).replace('_', ' ')}"
    text = [
        f"# {title}",
        "",
        f"{what if whole else 'The autoencoder of latent diffusion models'}, trained with ldm_train.",
    ]
    if run is not None:
        metrics, grid = _measured(run), run / "evaluation" / SAMPLES
        if metrics and grid.is_file():
            shutil.copyfile(grid, folder / SAMPLES)
            text += ["", f"![samples, not picked]({SAMPLES})"]
    text += ["", "## Use", "```python", *commands, "```"]
    if native:
        shell = ["ldm-sample run=<this folder> n=8 " + EXAMPLES.get(next(iter(fields), ""), "")] if whole else []
        own = f" diffusion.init={title}" if whole else ""
        shell += [f"python train.py name=mine autoencoder.pretrained={title}{own}   # and the recipe's options"]
        text += ["```bash", *(line.rstrip() for line in shell), "```"]
    if run is not None:
        config = read_config(run / "config.yaml")
        data, sentence = _data(config)
        recipe = yaml.safe_dump(_without_folders(config), sort_keys=False).encode()
        write_atomically(folder / RECIPE, lambda file: file.write(recipe))
        text += ["", "## Training", f"- data: {sentence}", *_trained(config), f"- every option: {RECIPE}"]
    if rows := _rows(metrics):
        text += ["", "## Measured", "| of | metric | value | 95 % interval | images |", "|---|---|---|---|---|"]
        text += [f"| {of} | {name} | {value:.4g} | {spread} | {n or ''} |" for of, name, value, spread, n in rows]
        text += [
            "",
            "Features named `tiny` are the project's own small network: such numbers compare models on these data only.",
        ]
        for of, name, value, _, _ in rows:
            if of == "samples" and math.isfinite(value):
                results.append(EvalResult(_task(fields), "webdataset", data, name, value))
    before = None
    if licensed is not None:
        with suppress(ValueError, yaml.YAMLError):  # a card that cannot be read names no licence
            before = ModelCard.load(licensed).data.get("license")
    known = before not in (None, "unknown")
    text += ["", "## Licence"]
    text += [f"{before}" if known else "To be filled in by whoever publishes it: here and as `license` above.", ""]
    head = ModelCardData(
        license=before if known else "unknown", library_name="ldm_train" if native else "diffusers", tags=["latent-diffusion", "diffusion"],
        pipeline_tag=_task(fields) if whole else "image-to-image",
        model_name=title if results else None, eval_results=results or None,
    )  # fmt: skip
    card = f"---\n{head.to_yaml()}\n---\n" + "\n".join(text)
    write_atomically(folder / CARD, lambda file: file.write(card.encode()))
