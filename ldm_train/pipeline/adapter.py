"""The adapter of a diffusion stage: small additions to a trained model's weights, in the place of all of them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from torch import nn

from ldm_train.checkpoints.adapters import save_adapter, save_word
from ldm_train.checkpoints.native import read_metadata
from ldm_train.conditioning.base import Conditioner
from ldm_train.conditioning.learned_tokens import TextualInversion, check_new, reader_of, settle
from ldm_train.conditioning.text import TrainedText
from ldm_train.configuration import plain
from ldm_train.latent_diffusion import LatentDiffusion
from ldm_train.models.lora import LoRA
from ldm_train.pipeline.run import Run

NAME = "adapter"


def adapter_of(run: Run) -> LoRA | TextualInversion | None:
    """How the run's adapter is made. Raises ValueError for options that cannot be."""
    if not (tree := run.config.diffusion.get("adapter")):
        return None
    try:
        return instantiate(tree, _convert_="all")
    except Exception as error:  # hydra wraps errors of any type
        raise ValueError(f"diffusion.adapter: {error.__cause__ or error}") from error


def check_adapter(run: Run, network: nn.Module, conditioners: Callable[[], Mapping[str, Conditioner]]) -> None:
    """Raises ValueError for an adapter of nothing, and one whose options cannot be, that names no layer of the network, or a word
    that the text encoder knows. conditioners: builds those of the model that it begins from."""
    section = run.config.diffusion
    if (how := adapter_of(run)) is None:
        return
    if not section.init:
        raise ValueError("diffusion.adapter changes a trained model; say which with diffusion.init=<run or model>")
    if section.task.get("alignment"):
        raise ValueError(
            "diffusion.task.alignment is for a network that trains whole, not for an adapter; leave one out"
        )
    try:
        if isinstance(how, TextualInversion):
            reader = reader_of(nn.ModuleDict(conditioners()))
            check_new(reader, how.token, how.vectors)
            how.first_rows(reader)
        else:
            how.shapes(nn.ModuleDict({"network": network}))
    except ValueError as error:
        raise ValueError(f"diffusion.adapter: {error}") from error


def check_frozen(run: Run) -> None:
    """Raises ValueError for conditioners that are to stay as they are, but are none, or were never trained."""
    section = run.config.diffusion
    known = plain(section.conditioning.conditioners)
    if not (frozen := list(section.get("frozen") or [])):
        return
    if unknown := [name for name in frozen if name not in known]:
        raise ValueError(f"diffusion.frozen={unknown}: the conditioners are {', '.join(known) or 'none'}")
    if not section.init:
        raise ValueError(
            "diffusion.frozen keeps trained conditioners; say which model's with diffusion.init=<run or model>"
        )


def adapt(run: Run, model: LatentDiffusion) -> None:
    """Puts the run's adapter, if it has one, on the model, and keeps the conditioners that are to stay as they are."""
    for name in run.config.diffusion.get("frozen") or []:
        model.conditioners[name].requires_grad_(False)
    if (how := adapter_of(run)) is not None:
        model.adapt(how, NAME)


def in_words(run: Run, network: nn.Module) -> list[str]:
    """network: on the meta device."""
    if (how := adapter_of(run)) is None:
        return []
    if isinstance(how, TextualInversion):
        return [f"learns the word {how.token} ({how.vectors} vectors)"]
    with torch.device("meta"):
        pairs = how.attach(nn.ModuleDict({"network": network}))
    return [f"trains an adapter of {sum(p.numel() for p in pairs.parameters()) / 1e6:.2g} M parameters"]


def finish(run: Run, model: LatentDiffusion, base: Path | None, folder: Path, tree: dict[str, Any]) -> None:
    """Writes the trained adapter, if there is one, and makes it part of the model's weights, and a learned word of its tokenizer.
    base: the folder it began from. tree: the model's config."""
    if model.adapter is None or base is None:
        return
    how = adapter_of(run)
    if isinstance(how, TextualInversion):
        reader = reader_of(model.conditioners)
        if run.machine.rank == 0:
            begun = {"base": str(run.config.diffusion.init), "base_sha256": read_metadata(base)["sha256"]}
            save_word(folder, how.token, model.adapter["rows"].rows, begun)  # type: ignore[index,union-attr]
        settle(reader)
        model.adapter = None
        if isinstance(reader, TrainedText):
            name = next(name for name, conditioner in model.conditioners.items() if conditioner is reader)
            tree["conditioners"][name]["tokenizer"] = reader.tokenizer.to_str()
        return
    if run.machine.rank == 0:
        section = run.config.diffusion
        begun = {"base": str(section.init), "base_sha256": read_metadata(base)["sha256"]}
        save_adapter(folder, model.parts(), NAME, begun | {"config": plain(section.adapter)})
    model.merge_adapters()
