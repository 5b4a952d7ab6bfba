"""The memory that a stage's training needs, and the largest micro-batch that fits, also with recomputed activations."""

import inspect
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil
import torch
from hydra.utils import get_object
from omegaconf import OmegaConf, open_dict

from ldm_train.configuration import RECOMPUTING, plain
from ldm_train.pipeline.data import batching_of
from ldm_train.pipeline.memory import PARTS, Rehearsal, step_memory

if TYPE_CHECKING:
    from ldm_train.pipeline.run import Run

GIB = 2**30
# The usable share of memory: libraries need workspaces, an allocator leaves gaps, a GPU keeps its context.
USABLE = 0.9
# Options that do not affect memory.
BESIDE = ("name", "runs_dir", "stages", "memory", "plan", "price_per_hour", "restart")
# A cache: all that a step's memory depends on, as text -> (bytes by part, what is not counted).
_KNOWN: dict[str, tuple[dict[str, int], tuple[str, ...]]] = {}


def offered(run: "Run") -> float | None:
    """Bytes of memory that a device has for training: the option `memory` (GiB) if set, else, on the CPU, each
    process's share of the machine's available memory, and on a GPU its total memory; None if there is no CUDA GPU."""
    machine, said = run.machine, run.config.memory
    if said is not None:
        return float(said) * GIB
    if machine.accelerator == "cpu":
        return psutil.virtual_memory().available / machine.local_world_size
    if not torch.cuda.is_available():
        return None
    return float(torch.cuda.get_device_properties(machine.local_rank).total_memory)


@dataclass(frozen=True)
class Choice:
    """A way to train at a given batch_size: micro-batch, backward passes per step, recomputing of activations."""

    micro: int
    accumulate: int
    recomputing: bool

    def __str__(self) -> str:
        text = f"micro-batch {self.micro}, {self.accumulate} accumulated"
        return f"{text}, activations recomputed" if self.recomputing else text


class Budget:
    """The memory of one stage's training step under different choices. Methods raise the task's own error if it cannot
    be rehearsed."""

    def __init__(self, run: "Run", stage: str):
        self.run, self.stage, self.section = run, stage, run.config[stage]
        batching = batching_of(self.section, run.machine)
        self.share = batching.micro * batching.accumulate  # samples per device and step
        self._named = "activation_checkpointing" in self.section.network
        self._own = bool(self.section.network.get("activation_checkpointing", False))
        self.chosen = Choice(batching.micro, batching.accumulate, self._own)
        self.unknown: tuple[str, ...] = ()
        self._rehearsals: dict[bool, Rehearsal | None] = {}
        tree = {k: v for k, v in plain(run.config).items() if k not in BESIDE}
        tree[stage] = {k: v for k, v in tree[stage].items() if k != "micro_batch_size"}
        tree[stage]["network"] = tree[stage]["network"] | {"activation_checkpointing": None}  # these are in `Choice`
        self._kind = json.dumps([stage, run.machine.accelerator, run.machine.precision, run.machine.world_size, tree])

    def _rehearsal(self, recomputing: bool) -> Rehearsal | None:
        if recomputing not in self._rehearsals:
            whole = self.section.network
            with open_dict(self.section):
                self.section.network = OmegaConf.merge(
                    whole, {"activation_checkpointing": recomputing} if recomputing != self._own else {}
                )
                try:
                    self._rehearsals[recomputing] = self.run.stages[self.stage].rehearsal(self.run)
                finally:
                    self.section.network = whole
        return self._rehearsals[recomputing]

    def memory(self, choice: Choice) -> dict[str, int] | None:
        """Bytes by part at the peak of a step; None for a stage without a rehearsal."""
        machine = self.run.machine
        key = f"{self._kind} {choice}"
        if key not in _KNOWN:
            if (rehearsal := self._rehearsal(choice.recomputing)) is None:
                return None
            last = self.section.max_steps - 1  # by then all terms of the loss are active
            found = step_memory(rehearsal, choice.micro, choice.accumulate, machine, last)
            _KNOWN[key] = found, tuple(rehearsal.unknown)
        found, self.unknown = _KNOWN[key]
        return found

    def peak(self, choice: Choice) -> float:
        return float(sum((self.memory(choice) or {}).values()))

    def can_recompute(self) -> bool:
        """Returns True if the network has the option activation_checkpointing."""
        target = get_object(self.section.network._target_)
        chain = target.__mro__ if isinstance(target, type) else [target]
        return any("activation_checkpointing" in inspect.signature(part).parameters for part in chain[:-1])

    def _choice(self, micro: int, recomputing: bool) -> Choice:
        return Choice(micro, self.share // micro, recomputing)

    def largest(self, memory: float, recomputing: bool) -> Choice | None:
        """The choice with the largest micro-batch that fits into `memory` bytes; None if none fits."""
        sizes = [n for n in range(1, self.share + 1) if self.share % n == 0]
        low, high = -1, len(sizes)  # sizes[low] fits, sizes[high] does not
        points: dict[int, float] = {}
        guess = sizes.index(self.chosen.micro)
        while high - low > 1:
            k = min(max(guess, low + 1), high - 1)
            points[sizes[k]] = self.peak(self._choice(sizes[k], recomputing))
            low, high = (k, high) if points[sizes[k]] <= memory else (low, k)
            guess = _predicted(points, sizes, memory) if len(points) > 1 else (0 if high == k else len(sizes) - 1)
        return self._choice(sizes[low], recomputing) if low >= 0 else None

    def alternatives(self, memory: float) -> list[Choice]:
        """The largest choices that fit into `memory` bytes: without recomputing, and with it if that is larger."""
        found: list[Choice] = []
        for way in [False, True] if self.can_recompute() else [self._own]:
            most = found[0].micro if found else 0
            if most < self.share and (choice := self.largest(memory, way)) is not None and choice.micro > most:
                found.append(choice)
        return found

    def typed(self, choice: Choice) -> str:
        """A choice as options for the command line."""
        words = [f"{self.stage}.micro_batch_size={choice.micro}"]
        if choice.recomputing != self._own:
            plus = "" if self._named else "+"
            words.append(f"{plus}{self.stage}{RECOMPUTING}={str(choice.recomputing).lower()}")
        return f"{' '.join(words)} ({choice.accumulate} accumulated)"

    def table(self) -> Iterator[str]:
        """Lines of text: the peak, its parts, and what is not counted."""
        memory = self.memory(self.chosen) or {}
        yield f"{self.chosen}: {_gib(sum(memory.values()))} at the peak of a step"
        yield ", ".join(f"{part} {_gib(memory[part])}" for part in PARTS if memory.get(part))
        for reason in self.unknown:
            yield f"not counted: {reason}"

    def check(self, memory: float) -> None:
        """Raises ValueError, naming options that fit, if a step needs more than `memory` bytes."""
        if (peak := self.peak(self.chosen)) <= memory:
            return
        said = f"{self.stage}: a training step takes {_gib(peak)} ({self.chosen}), and there are {_gib(memory)}"
        options = [self.typed(choice) for choice in self.alternatives(USABLE * memory)]
        if not options:
            least = self.peak(self._choice(1, self.can_recompute()))
            raise ValueError(
                f"{said}; the minimum is {_gib(least / USABLE)}, at micro-batch 1: choose a smaller network or "
                "data.image_size, more memory, or set memory=<GiB> if there is more than that"
            )
        raise ValueError(f"{said}. What fits, at the same batch_size: {', or '.join(options)}")


def _predicted(points: dict[int, float], sizes: list[int], memory: float) -> int:
    """The index of the largest size that fits into `memory` bytes by the line through the two points nearest to it:
    peaks grow about linearly. points: {size: peak in bytes}."""
    (a, low), (b, high) = sorted(sorted(points.items(), key=lambda point: abs(point[1] - memory))[:2])
    meets = a + (memory - low) * (b - a) / max(high - low, 1.0)
    return sum(size <= meets for size in sizes) - 1


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= 0.1 * GIB else f"{size / 2**20:.1f} MiB"


def in_full(budget: Budget, memory: float | None) -> Iterator[str]:
    """The lines about a stage's memory in a plan. memory: bytes, None if unknown."""
    yield from budget.table()
    if memory is None:
        yield "set memory=<GiB> to see what fits on a GPU that this machine lacks"
        return
    fits = budget.peak(budget.chosen) <= USABLE * memory
    best = budget.alternatives(USABLE * memory)
    needed = bool(best) and best[0].recomputing
    yield (
        f"of {_gib(memory)}: {'fits' if fits else 'does not fit'} into {USABLE:.0%}; largest micro-batch: "
        + ("none" if not best else ", or ".join(map(budget.typed, best)))
        + ("; activations have to be recomputed" if needed else "")
    )
