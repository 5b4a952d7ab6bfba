"""The adapter of a diffusion stage: small additions to a trained model's weights, in the place of all of them."""

from pathlib import Path

import torch
from hydra.utils import instantiate
from torch import nn

from ldm_train.checkpoints.adapters import save_adapter
from ldm_train.checkpoints.native import read_metadata
from ldm_train.configuration import plain
from ldm_train.latent_diffusion import LatentDiffusion
from ldm_train.models.lora import LoRA
from ldm_train.pipeline.run import Run

NAME = "adapter"


def adapter_of(run: Run) -> LoRA | None:
    """How the run's adapter is made. Raises ValueError for options that cannot be."""
    if not (tree := run.config.diffusion.get("adapter")):
        return None
    try:
        return instantiate(tree, _convert_="all")
    except Exception as error:  # hydra wraps errors of any type
        raise ValueError(f"diffusion.adapter: {error.__cause__ or error}") from error


def check_adapter(run: Run, network: nn.Module) -> None:
    """Raises ValueError for an adapter of nothing, and one whose options cannot be or that names no layer of the network."""
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
        how.shapes(nn.ModuleDict({"network": network}))
    except ValueError as error:
        raise ValueError(f"diffusion.adapter: {error}") from error


def adapt(run: Run, model: LatentDiffusion) -> None:
    """Puts the run's adapter, if it has one, on the model."""
    if (how := adapter_of(run)) is not None:
        model.adapt(how, NAME)


def in_words(run: Run, network: nn.Module) -> list[str]:
    """network: on the meta device."""
    if (how := adapter_of(run)) is None:
        return []
    with torch.device("meta"):
        pairs = how.attach(nn.ModuleDict({"network": network}))
    return [f"trains an adapter of {sum(p.numel() for p in pairs.parameters()) / 1e6:.2g} M parameters"]


def finish(run: Run, model: LatentDiffusion, base: Path | None, folder: Path) -> None:
    """Writes the trained adapter, if there is one, and makes it part of the model's weights. base: the folder it began from."""
    if model.adapter is None or base is None:
        return
    if run.machine.rank == 0:
        section = run.config.diffusion
        begun = {"base": str(section.init), "base_sha256": read_metadata(base)["sha256"]}
        save_adapter(folder, model.parts(), NAME, begun | {"config": plain(section.adapter)})
    model.merge_adapters()
