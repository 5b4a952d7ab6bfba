"""Our training as users run it, with Lightning, callbacks and loader, in turns with the steps of other trainers."""

import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning as L

from ldm_train.bench.measuring import Clock
from ldm_train.training.fit import Cadence, Machine, fit
from ldm_train.training.task import Task

OURS = "ours"


class Turns(L.Callback):
    """Times each of our steps, from the end of the last round to its own end, then runs and times the others' steps,
    which are not counted as ours."""

    def __init__(self, clock: Clock, name: str, others: Mapping[str, Callable[[], object]]):
        self.clock, self.name, self.others = clock, name, others

    def on_train_start(self, trainer: L.Trainer, pl_module: Task) -> None:
        self.clock.begin(self.name)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Task, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.clock.end(self.name)
        for name, work in self.others.items():
            self.clock.begin(name)
            work()
            self.clock.end(name)
        self.clock.next_round()
        if self.clock.round < self.clock.rounds:
            self.clock.begin(self.name)


class Repeated(L.LightningDataModule):
    """Yields the same batch, on the host, for every step, so that only the step is measured."""

    def __init__(self, batch: Mapping[str, Any], steps: int):
        super().__init__()
        self.batch, self.steps = batch, steps

    def train_dataloader(self) -> "Repeated":
        return self

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for _ in range(self.steps):
            yield dict(self.batch)


def train_in_turns(
    task: Task,
    batch: Mapping[str, Any],
    batch_size: int,
    machine: Machine,
    clock: Clock,
    others: Mapping[str, Callable[[], object]],
    name: str = OURS,
) -> None:
    """Trains `task` by `fit` for the rounds of the clock, with the others' work after each step."""
    cadence = Cadence(10**9, 10**9, log_every=10**9, progress=False)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(action="ignore"):  # about missing validation
        fit(
            task, Repeated(batch, clock.rounds), Path(folder), clock.rounds, batch_size, batch_size, cadence, machine,
            callbacks=[Turns(clock, name, others)], options={"limit_val_batches": 0},
        )  # fmt: skip
