"""The contract of a run's stages. One file defines one stage: its name, needed stages, key, cost and work.

A stage of your own needs no edit here: `+stage.mine._target_=my_package.MyStage stages=[autoencoder,latents,diffusion,mine]`.
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
    """The cost of a stage that trains; the section of the config with its name has `batch_size` and `ema_decay`.

    network: the trained network, perhaps on the meta device. flops: of one forward pass on one image. images: training images, None
    where they are not there and only a plan is asked for. begins: what it begins from, in words. warning: what will hardly end
    well, and the remedy
    """

    network: nn.Module
    flops: int
    images: int | None
    begins: str = ""
    warning: str = ""


class Stage:
    """Subclasses state the attributes and implement `key` and `run`.

    name        its folder below the run's, and its word in `stages=[...]`
    needs       the stages whose results it is made from
    identity    the entry of its result that identifies its outcome; later stages have it in their keys
    """

    name: str
    needs: tuple[str, ...] = ()
    identity = "sha256"

    def steps(self, run: "Run") -> int:
        """The number of optimiser steps to train; 0 where it does not train."""
        return 0

    def key(self, run: "Run") -> dict[str, Any]:
        """Everything that its outcome depends on, as a tree of plain values: equal trees mean equal outcomes. Called when the
        stages it needs are finished."""
        raise NotImplementedError

    def check(self, run: "Run") -> None:
        """Raises errors that are known before anything runs: ValueError, FileNotFoundError, DataError."""

    def plan(self, run: "Run") -> Plan | None:
        """The cost of its training; None for a stage that does not train."""
        return None

    def rehearsal(self, run: "Run") -> "Rehearsal | None":
        """The same training with placeholders, by which its memory is known beforehand; None where it is not."""
        return None

    def run(self, run: "Run", folder: Path) -> dict[str, Any]:
        """Does the work in `folder`, or the rest of it after an interruption. Returns its result as plain values, with
        `identity` among them."""
        raise NotImplementedError
