"""Starts a network from another model's weights, possibly with more inputs than that model had."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ldm_train import names
from ldm_train.checkpoints.hub import downloaded, is_repo
from ldm_train.checkpoints.native import METADATA, find_model, load_latent_diffusion, read_tree, weight_shapes
from ldm_train.checkpoints.parts import build, whole
from ldm_train.conditioning.class_label import ClassLabel
from ldm_train.configuration import plain
from ldm_train.devices import shapes_only
from ldm_train.errors import in_one_line
from ldm_train.latent_diffusion import LatentDiffusion
from ldm_train.pipeline.adopt import ADOPTED, is_foreign
from ldm_train.pipeline.convert import adopted_model
from ldm_train.pipeline.data import CONDITIONERS
from ldm_train.pipeline.run import Run

Shape = tuple[int, ...]
# Layers that read an input of the network (ends of their names: the input). Only their second dimension may grow.
INPUTS = {
    "input_blocks.0.0.weight": "channels of pictures or maps",
    "attn2.to_k.weight": "width of the context",
    "attn2.to_v.weight": "width of the context",
    "attn1.to_k.weight": "width of the context",
    "attn1.to_v.weight": "width of the context",
    "label_emb.0.0.weight": "width of the vector",
}

# Attributes of modules that may differ: shapes, which are compared by themselves, and what acts in training alone.
NOT_MEANT = {
    *("training", "dropout", "p", "path", "inplace", "activation_checkpointing"),
    *("in_channels", "out_channels", "in_features", "out_features", "num_embeddings", "embedding_dim", "cache_size"),
}

CONTROL = "control."  # prefix of the names in the copy of a U-Net's encoder, see `models/control.py`


def model_folder(value: str, runs_dir: str, option: str) -> Path:
    """The model folder that `value` names: a run's name or folder, a model folder, a model on the Hub, or a foreign
    checkpoint or pipeline (converted at its first use). Raises FileNotFoundError naming the paths that were tried."""
    candidates = [Path(value), Path(runs_dir) / value]
    if is_repo(value) and not candidates[1].exists():
        candidates = [downloaded(value)]
    for candidate in candidates:
        folder = find_model(candidate)
        if folder is not None and (folder / METADATA).is_file():
            return folder
        if is_foreign(candidate):
            return adopted_model(candidate, Path(runs_dir) / ADOPTED)
    raise FileNotFoundError(
        f"{option}={value} is not a run with a trained model, a model folder, a checkpoint or a pipeline of diffusers; looked in "
        f"{', '.join(map(str, candidates))}"
    )


def _network_shapes(folder: Path) -> dict[str, Shape]:
    return {
        name.removeprefix("network."): shape
        for name, shape in names.weights(weight_shapes(folder)).items()
        if name.startswith("network.")
    }


def grown(ours: Mapping[str, Shape], theirs: Mapping[str, Shape], where: Path) -> list[str]:
    """Describes the inputs that a network has and the one it starts from lacks, except a control. ours, theirs: shapes
    of their weights by name. Raises ValueError for any difference that cannot be filled with zeros."""
    more: dict[str, str] = {}
    for name, shape in ours.items():
        before = theirs.get(name)
        if before == shape or (
            before is None and name.startswith(CONTROL) and theirs.get(name.removeprefix(CONTROL), shape) == shape
        ):
            continue
        what = next((words for end, words in INPUTS.items() if name.endswith(end)), None)
        if before is None and name.startswith("label_emb."):
            more["a vector beside the timestep"] = "new"
        elif before and what and (before[0], *before[2:]) == (shape[0], *shape[2:]) and shape[1] > before[1]:
            more[what] = f"{before[1]} -> {shape[1]}"
        else:
            raise ValueError(
                f"diffusion.init={where}: its {name} {'has shape ' + str(before) if before else 'does not exist'}, this run's network "
                f"has {shape}; choose the diffusion/network= that it was trained with (only inputs may grow)"
            )
    if left := sorted(theirs.keys() - ours.keys()):
        if left[0].startswith(CONTROL):
            raise ValueError(
                f"diffusion.init={where} has a control, which this run lacks; take it on with diffusion/adapter=control"
            )
        raise ValueError(
            f"diffusion.init={where} has {left[0]}, which this run's network lacks; choose its diffusion/network="
        )
    return [f"{what} {change} (zeros)" for what, change in more.items()]


def what_grows(network: nn.Module, folder: Path) -> list[str]:
    """`grown` for a network, possibly on the meta device, and the model folder that it starts from."""
    return grown({k: tuple(v.shape) for k, v in network.state_dict().items()}, _network_shapes(folder), folder)


def tokenizers_of(folder: Path, conditioners: dict[str, Any]) -> dict[str, Any]:
    """The conditioners' options with the tokenizers of the model in `folder`, which its embeddings belong to, instead
    of ones made from the data."""
    theirs = read_tree(folder).get("conditioners") or {}
    return {
        name: options | {"tokenizer": theirs[name]["tokenizer"]}
        if "tokenizer" in options and "tokenizer" in theirs.get(name, {}) and "path" not in options
        else options
        for name, options in conditioners.items()
    }


def _meaning(part: nn.Module, name: str) -> dict[str, Any]:
    """The plain attributes of a part and its submodules, by name: heads, layer, ..."""
    return {
        f"{name}.{path}.{key}".replace("..", "."): value
        for path, module in part.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, int | float | str) and not key.startswith("_") and key not in NOT_MEANT
    }


def read_otherwise(run: Run, folder: Path, network: nn.Module, conditioners: Mapping[str, Any]) -> list[str]:
    """Lists what would give the weights of the model in `folder` another meaning in this run: another schedule or
    parameterisation, and options of the network and the conditioners that change no shape. network, conditioners: the
    run's; the former on the meta device."""
    tree = read_tree(folder)
    where = str(folder)
    with shapes_only():
        theirs = _meaning(build(tree["network"], where, run.trust), "diffusion.network")
    ours = _meaning(network, "diffusion.network")
    known = build(tokenizers_of(folder, tree.get("conditioners") or {}), where, run.trust)
    for name in known.keys() & conditioners.keys():
        theirs |= _meaning(known[name], f"{CONDITIONERS}.{name}")
        ours |= _meaning(conditioners[name], f"{CONDITIONERS}.{name}")
    lines = [
        f"{key}: {theirs[key]}, here {ours[key]}" for key in theirs.keys() & ours.keys() if theirs[key] != ours[key]
    ]
    schedules = build(tree["schedule"], where, run.trust), run.part("diffusion.schedule")
    times = [schedule.timesteps(8, "trailing") for schedule in schedules]
    signals = [schedule.coefficients(t) for schedule, t in zip(schedules, times)]
    if type(schedules[0]) is not type(schedules[1]) or not np.allclose(*signals, rtol=1e-4, atol=1e-6):
        lines.append(
            f"diffusion.schedule: {whole(tree['schedule'])}, here {whole(plain(run.config.diffusion.schedule))}"
        )
    kinds = [whole(kind) for kind in (tree["parameterisation"], plain(run.config.diffusion.objective.parameterisation))]
    if kinds[0] != kinds[1]:
        lines.append(f"diffusion.objective.parameterisation: {kinds[0]}, here {kinds[1]}")
    return sorted(lines)


def _into(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    made = torch.zeros_like(ours)
    made[tuple(slice(0, size) for size in theirs.shape)] = theirs
    return made


def _class_rows(ours: ClassLabel, theirs: ClassLabel) -> torch.Tensor:
    """The class embedding, its rows copied by class name; new classes start as zeros. The last row is "no class"."""
    weight, known = torch.zeros_like(ours.embedding.weight), theirs.embedding.weight
    for row, name in enumerate(ours.names):
        if name in theirs.names:
            weight[row] = known[theirs.names.index(name)]
    weight[-1] = known[-1]
    return weight


@torch.no_grad()
def begin_from(model: LatentDiffusion, folder: Path, trust: list[str], say: bool = True) -> LatentDiffusion:
    """Copies the weights of the model in `folder` into `model`: its network and the conditioners that both have. New
    inputs of the network start as zeros; a new conditioner keeps its own initialisation. Returns the loaded model. say:
    print which conditioners are new. Raises ValueError if they do not fit."""
    other = load_latent_diffusion(folder, trust)
    what_grows(model.network, folder)
    theirs = other.network.state_dict()
    for slot in ("concat", "vector"):  # these inputs are joined in order: new ones must come last
        before, now = ([n for n, c in m.conditioners.items() if slot in c.widths] for m in (other, model))
        if now[: len(before)] != before:
            raise ValueError(
                f"diffusion.init={folder}: its conditioners {', '.join(before)} must come first, by these names; this run has "
                f"{', '.join(now) or 'none'}"
            )
    state = {}
    for key, value in model.network.state_dict().items():
        source = key if key in theirs or not key.startswith(CONTROL) else key.removeprefix(CONTROL)
        state[key] = _into(value, theirs[source]) if source in theirs else value
    for key in ("label_emb.0.2.weight", "label_emb.0.2.bias", "label_emb.weight"):
        if key in state and key not in theirs:
            state[key] = torch.zeros_like(state[key])
    model.network.load_state_dict(state)
    known = dict(other.conditioners.items())
    for name, conditioner in model.conditioners.items():
        before = known.get(name)
        if before is None and say:
            print(f"  conditioner {name}: a new one, the model in diffusion.init has none of that name", flush=True)
        if isinstance(conditioner, ClassLabel) and isinstance(before, ClassLabel):
            if conditioner.embedding.weight.shape[1] != before.embedding.weight.shape[1]:
                raise ValueError(f"diffusion.init={folder}: the conditioner {name} has another width there")
            conditioner.embedding.weight.copy_(_class_rows(conditioner, before))
        elif before is not None:
            try:
                conditioner.load_state_dict(before.state_dict())
            except RuntimeError as error:
                raise ValueError(
                    f"diffusion.init={folder}: the conditioner {name} does not fit ({in_one_line(error)})"
                ) from error
    return other
