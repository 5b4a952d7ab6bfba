"""The interface of a run's stages. One file defines one stage: its name, the stages it needs, its key, cost and work.

A custom stage needs no edit of this package:
`+stage.mine._target_=my_package.MyStage stages=[autoencoder,latents,diffusion,mine]`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from ldm_train.pipeline.memory import Rehearsal
    from ldm_train.pipeline.run import Run


@dataclass(frozen=True)
class Plan:
    """The cost of a stage that trains. The config section of the stage's name must have `batch_size` and `ema_decay`.

    network: the trained network, possibly on the meta device. flops: of one forward pass on one image
    images: number of training images; None if only a plan is asked for and they are not available
    begins: what training starts from, in words. warning: a likely problem, with the remedy
    """

    network: nn.Module
    flops: int
    images: int | None
    begins: str = ""
    warning: str = ""


class Stage:
    """A stage of a run. Subclasses set the attributes and implement `key` and `run`.

    name        its folder below the run's folder, and its name in `stages=[...]`
    needs       the stages whose results it uses
    identity    the entry of its result that identifies the outcome; later stages include it in their keys
    binding     whether stages that need it also use its options: other values are refused even where it is not chosen
    """

    name: str
    needs: tuple[str, ...] = ()
    identity = "sha256"
    binding = False

    def steps(self, run: "Run") -> int:
        """The number of optimiser steps to train; 0 if the stage does not train."""
        return 0

    def key(self, run: "Run") -> dict[str, Any]:
        """Everything that the outcome depends on, as a tree of plain values: equal trees mean equal outcomes. Called
        when the stages it needs are finished."""
        raise NotImplementedError

    def check(self, run: "Run") -> None:
        """Raises errors that can be known before anything runs: ValueError, FileNotFoundError, DataError."""

    def plan(self, run: "Run") -> Plan | None:
        """The cost of training; None for a stage that does not train."""
        return None

    def rehearsal(self, run: "Run") -> "Rehearsal | None":
        """The same training with placeholder data, to predict its memory; None if the stage does not support this."""
        return None

    def run(self, run: "Run", folder: Path) -> dict[str, Any]:
        """Does the work in `folder`, or the rest of it after an interruption. Returns its result as plain values,
        including the entry `identity`."""
        raise NotImplementedError
