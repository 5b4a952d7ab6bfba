"""What a stage of a run is. One file states one stage: its name, what it needs, what it depends on, what it will cost, its work.

A stage of your own needs no edit here: `+stage.mine._target_=my_package.MyStage stages=[autoencoder,latents,diffusion,mine]`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from ldm_train.pipeline.run import Run


@dataclass(frozen=True)
class Plan:
    """What a stage that trains will cost; its section of the config, of its name, has `batch_size` and `ema_decay`.

    network: what is trained, perhaps on the meta device. flops: of one forward pass on one image. images: training images.
    """

    network: nn.Module
    flops: int
    images: int


class Stage:
    """Subclasses state the attributes and implement `key` and `run`.

    name        its folder below the run's, and its word in `stages=[...]`
    needs       the stages whose results it is made from
    identity    the entry of its result that identifies what it made; later stages have it in their keys
    """

    name: str
    needs: tuple[str, ...] = ()
    identity = "sha256"

    def steps(self, run: "Run") -> int:
        """Optimiser steps it is to train; 0 where it does not train."""
        return 0

    def key(self, run: "Run") -> dict[str, Any]:
        """All that its outcome depends on, as a tree of plain values: equal trees mean equal outcomes. Asked when its turn
        comes, what it needs being finished."""
        raise NotImplementedError

    def check(self, run: "Run") -> None:
        """Raises what can be known to be wrong before anything runs: ValueError, FileNotFoundError, DataError."""

    def plan(self, run: "Run") -> Plan | None:
        """What it will train; None for a stage that does not."""
        return None

    def run(self, run: "Run", folder: Path) -> dict[str, Any]:
        """Does the work in `folder`, or the rest of it after an interruption. Returns what it made as plain values, with
        `identity` among them."""
        raise NotImplementedError
