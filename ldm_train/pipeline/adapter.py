"""The adapter of a diffusion stage: small additions to a trained model, trained instead of all its weights."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig
from torch import nn

from ldm_train.checkpoints.adapters import save_adapter, save_word
from ldm_train.checkpoints.control import save_control
from ldm_train.checkpoints.native import read_metadata, read_tree
from ldm_train.conditioning.base import Conditioner
from ldm_train.conditioning.control import NAME as CONTROL
from ldm_train.conditioning.control import ControlNet
from ldm_train.conditioning.learned_tokens import TextualInversion, check_new, check_rare, reader_of, settle
from ldm_train.conditioning.text import FrozenText, TrainedText
from ldm_train.configuration import plain
from ldm_train.latent_diffusion import LatentDiffusion
from ldm_train.models.lora import LoRA
from ldm_train.pipeline.begin import read_otherwise, what_grows
from ldm_train.pipeline.run import Run

NAME = "adapter"


How = LoRA | TextualInversion | ControlNet


def adapter_of(run: Run) -> How | None:
    """The options of the run's adapter; None if it has none. Raises ValueError if the options are invalid."""
    if not (tree := run.config.diffusion.get("adapter")):
        return None
    try:
        return instantiate(tree, _convert_="all")
    except Exception as error:  # hydra wraps errors of any type
        raise ValueError(f"diffusion.adapter: {error.__cause__ or error}") from error


def check_start(section: DictConfig) -> None:
    """Raises ValueError if diffusion.pretrained, which takes a model as it is, stands beside options of training."""
    beside = [name for name in ("init", "adapter", "frozen", "identifier") if section.get(name)]
    if section.pretrained and beside:
        raise ValueError(
            f"diffusion.pretrained takes a model as it is, so diffusion.{beside[0]} has no effect; to train the model on, set "
            "diffusion.init instead of diffusion.pretrained"
        )


def check_adapter(
    run: Run,
    network_of: Callable[[], nn.Module],
    conditioners: Callable[[], Mapping[str, Conditioner]],
    begun: Path | None,
) -> None:
    """Raises ValueError if the adapter has no model to start from (diffusion.init) or is incompatible with
    diffusion.task, if the run's network or conditioners differ from that model's, or if the adapter's options are
    invalid, match no layer, or name a word that the text encoder already knows.

    network_of, conditioners: build the run's network (on the meta device) and conditioners (without trained weights).
    begun: the model folder of diffusion.init."""
    section = run.config.diffusion
    if (how := adapter_of(run)) is None:
        return
    if begun is None:
        raise ValueError("diffusion.adapter changes a trained model; set diffusion.init=<run or model>")
    if section.task.get("alignment"):
        raise ValueError(
            "diffusion.task.alignment is for a network that trains whole, not for an adapter; leave one out"
        )
    if not isinstance(how, LoRA) and getattr(get_object(section.task._target_), "needs_init", False):
        raise ValueError(
            "a student learns its teacher's steps, not a word or a control; leave diffusion.adapter or diffusion.task out"
        )
    if isinstance(how, LoRA) and how.text_encoder:
        _check_text_encoder(how, conditioners(), getattr(get_object(section.task._target_), "needs_init", False))
    made, theirs, network = conditioners(), read_tree(begun).get("conditioners") or {}, network_of()
    if isinstance(how, ControlNet) and CONTROL not in theirs:  # the adapter brings it
        made = {name: conditioner for name, conditioner in made.items() if name != CONTROL}
    _check_same(made, theirs, section.init)
    if grows := what_grows(network, begun):
        raise ValueError(
            f"diffusion.adapter is of {section.init} as it is, and this run's network has more: {', '.join(grows)}; choose its "
            "options, or train all weights"
        )
    if differing := read_otherwise(run, begun, network, made):
        raise ValueError(
            f"diffusion.adapter is of {section.init} as it is, and this run reads its weights differently; choose the same:\n  "
            + "\n  ".join(differing)
        )
    try:
        if isinstance(how, TextualInversion):
            reader = reader_of(nn.ModuleDict(made))
            check_new(reader, how.token, how.vectors)
            how.first_rows(reader)
        elif isinstance(how, LoRA):
            how.shapes(_parts(how, network, made))
    except ValueError as error:
        raise ValueError(f"diffusion.adapter: {error}") from error


def _check_text_encoder(how: LoRA, conditioners: Mapping[str, Conditioner], student: bool) -> None:
    """Raises ValueError if an adapter of text encoders finds none, or one that cannot be trained. student: the task
    distils from a teacher."""
    named = False
    for name, conditioner in conditioners.items():
        parts = nn.ModuleDict({"conditioners": nn.ModuleDict({name: conditioner})})
        if isinstance(conditioner, FrozenText):
            if student or conditioner.layer == "projected":
                why = "a student and its teacher share it" if student else "layer=projected learns nothing"
                raise ValueError(
                    f"diffusion.adapter: text_encoder=true, but the text encoder {conditioner.path} is frozen: {why}"
                )
            try:
                parts = nn.ModuleDict({"encoders": nn.ModuleDict({name: conditioner.prepare_for_plan()[0]})})
            except FileNotFoundError:  # the encoder's own check reports it
                return
        try:
            named = bool(how.shapes(parts)) or named
        except ValueError:
            continue
    if not named:
        raise ValueError(
            f"diffusion.adapter: text_encoder=true, but targets={how.targets} names no layer of a text encoder of this model; use "
            "targets=all, or leave it out"
        )


def _check_same(ours: Mapping[str, Conditioner], theirs: Mapping[str, Any], init: str) -> None:
    """Raises ValueError if the run's conditioners, or their classes, are not those of the adapted model. theirs: the
    conditioners' section of its config. init: its name, for messages."""
    if list(ours) != list(theirs):
        raise ValueError(
            f"diffusion.adapter: {init} has the conditioners {', '.join(theirs) or 'none'}, this run {', '.join(ours) or 'none'}; "
            + (
                "a model with a control is taken on with diffusion/adapter=control"
                if CONTROL in theirs
                else "choose the same diffusion/conditioning="
            )
        )
    for name, conditioner in ours.items():
        known, here = theirs[name].get("classes"), getattr(conditioner, "names", None)
        known = [str(k) for k in range(known)] if isinstance(known, int) else known
        if known is not None and here is not None and list(known) != list(here):
            raise ValueError(
                f"diffusion.adapter: {init} knows the classes {', '.join(map(str, known))[:200]}, the data {', '.join(here)[:200]}; "
                f"an adapter knows those of its model: diffusion.conditioning.conditioners.{name}.classes="
            )


def check_latents(run: Run, same: bool) -> None:
    """Raises ValueError if the run has an adapter and its latents are not those of the adapted model (same=False)."""
    if adapter_of(run) is not None and not same:
        raise ValueError(
            "diffusion.adapter: the model in diffusion.init knows the latents of another autoencoder than this run's; take that one "
            "too: autoencoder.pretrained=<the same>"
        )


def _parts(how: LoRA, network: nn.Module, conditioners: Mapping[str, Conditioner]) -> nn.ModuleDict:
    parts: dict[str, nn.Module] = {"network": network}
    if how.text_encoder:
        parts["conditioners"] = nn.ModuleDict(conditioners)
    return nn.ModuleDict(parts)


def check_identifier(run: Run, conditioners: Callable[[], Mapping[str, Conditioner]]) -> None:
    """Raises ValueError if diffusion.identifier, the word for a subject, is not a single word or is one that the text
    encoder knows well. conditioners: builds the run's conditioners."""
    if (word := run.config.diffusion.identifier) is None:
        return
    if not word.strip() or len(word.split()) > 1:
        raise ValueError(f"diffusion.identifier={word!r} is not a single word; zqx is one")
    made = nn.ModuleDict(conditioners())
    try:
        check_rare(reader_of(made), word)
    except ValueError as error:
        raise ValueError(f"diffusion.identifier={word}: {error}") from error


def check_frozen(run: Run, begun: Path | None) -> None:
    """Raises ValueError if diffusion.frozen names unknown conditioners, or ones that the model in diffusion.init
    (`begun`) does not provide trained."""
    section = run.config.diffusion
    known = plain(section.conditioning.conditioners)
    if not (frozen := list(section.get("frozen") or [])):
        return
    if adapter_of(run) is not None:
        raise ValueError(
            "diffusion.frozen has no effect beside diffusion/adapter, which leaves all weights as they are; leave it out (for LoRA, "
            "diffusion.adapter.text_encoder says whether the text encoder is adapted)"
        )
    if unknown := [name for name in frozen if name not in known]:
        raise ValueError(f"diffusion.frozen={unknown}: the conditioners are {', '.join(known) or 'none'}")
    if begun is None:
        raise ValueError(
            "diffusion.frozen keeps trained conditioners; set the model that has them with diffusion.init=<run or model>"
        )
    if new := sorted({*frozen} - {*(read_tree(begun).get("conditioners") or {})}):
        raise ValueError(
            f"diffusion.frozen={new}: {section.init} has no such conditioners, so they are not trained yet"
        )


def adapt(run: Run, model: LatentDiffusion) -> None:
    """Attaches the run's adapter, if any, to the model, and freezes the conditioners in diffusion.frozen."""
    for name in run.config.diffusion.get("frozen") or []:
        model.conditioners[name].requires_grad_(False)
    if (how := adapter_of(run)) is None:
        return
    if isinstance(how, LoRA) and how.text_encoder:
        for conditioner in model.conditioners.values():
            conditioner.require()  # loads frozen text encoders, which the adapter also changes
    model.adapt(how, NAME)


def rehearse(run: Run, model: LatentDiffusion) -> list[str]:
    """`adapt` on the meta device. Returns descriptions of the parts whose memory is not counted."""
    how = adapter_of(run)
    frozen = any(isinstance(c, FrozenText) for c in model.conditioners.values())
    if frozen and isinstance(how, TextualInversion):
        return ["a frozen text encoder that learns a word: its activations"]
    if frozen and isinstance(how, LoRA) and how.text_encoder:
        if _of_network(how, model.network):
            with torch.device("meta"):
                model.adapt(replace(how, text_encoder=False), NAME)
        return ["the adapter of a frozen text encoder, and that encoder's activations"]
    with torch.device("meta"):
        adapt(run, model)
    return []


def _of_network(how: LoRA, network: nn.Module) -> bool:
    """Returns True if an adapter changes layers of the network, False if only those of text encoders."""
    try:
        return bool(how.shapes(nn.ModuleDict({"network": network})))
    except ValueError:
        return False


def in_words(run: Run, network: nn.Module) -> list[str]:
    """Describes the run's adapter for the plan; [] without one. network: on the meta device."""
    if (how := adapter_of(run)) is None:
        return []
    if isinstance(how, TextualInversion):
        return [f"learns the word {how.token} ({how.vectors} vectors)"]
    if isinstance(how, ControlNet):
        copy = sum(p.numel() for p in network.control.parameters())  # type: ignore[union-attr]
        return [f"trains a control of {copy / 1e6:.2g} M parameters"]
    if not _of_network(how, network):
        return ["trains an adapter of text encoders alone"]
    with torch.device("meta"):
        pairs = how.attach(nn.ModuleDict({"network": network}))
    return [f"trains an adapter of {sum(p.numel() for p in pairs.parameters()) / 1e6:.2g} M parameters"]


def finish(run: Run, model: LatentDiffusion, base: Path | None, folder: Path, tree: dict[str, Any]) -> None:
    """Writes the trained adapter, if there is one, to `folder`, and makes it part of the model's weights. base: the
    model folder that training started from. tree: the model's config, which gets the tokenizer with a learned word,
    unless the text encoder is a `FrozenText`."""
    if model.adapter is None or base is None:
        return
    how, section = adapter_of(run), run.config.diffusion
    begun = {"base": str(section.init), "base_sha256": read_metadata(base)["sha256"]}
    if isinstance(how, TextualInversion):
        reader = reader_of(model.conditioners)
        if run.machine.rank == 0:
            save_word(folder, how.token, model.adapter["rows"].rows, begun)  # type: ignore[index,union-attr]
        settle(reader)
        if isinstance(reader, TrainedText):
            name = next(name for name, conditioner in model.conditioners.items() if conditioner is reader)
            tree["conditioners"][name]["tokenizer"] = reader.tokenizer.to_str()
    elif run.machine.rank == 0:
        begun |= {"config": plain(section.adapter)}
        if isinstance(how, ControlNet):
            save_control(folder, model, begun)
        else:
            save_adapter(folder, model.adaptable(), NAME, begun)
    model.adapter = None
    if isinstance(how, LoRA):
        model.merge_adapters()
        if (
            how.text_encoder
            and any(isinstance(c, FrozenText) for c in model.conditioners.values())
            and run.machine.rank == 0
        ):
            print(
                f"  the frozen text encoder's part is in {folder} alone; draw with run={section.init} adapters={run.folder}",
                flush=True,
            )
