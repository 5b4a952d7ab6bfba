"""How the benchmarks measure: contenders take turns, so that a busy machine slows all of them, and medians count."""

import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from tqdm import tqdm

from ldm_train.pipeline.plan import peak_flops
from ldm_train.training.fit import Machine


@dataclass(frozen=True)
class Settings:
    """The settings of a benchmark.

    machine: device and precision. runs: timed rounds. compile: also measure compiled networks. sizes: names of
    sizes; each kind knows its own (None: its usual ones). images: number of pictures, for the kinds that read or
    write data. workers: data-loading processes. batch_size: used instead of each size's own. steps: of the sampler.
    """

    machine: Machine
    runs: int = 7
    compile: bool = False
    sizes: tuple[str, ...] | None = None
    images: int = 512
    workers: int = 0
    batch_size: int | None = None
    steps: int = 20

    @property
    def device(self) -> torch.device:
        return self.machine.device

    def chosen(self, known: Mapping[str, object], on_cpu: tuple[str, ...], on_gpu: tuple[str, ...]) -> tuple[str, ...]:
        """Returns the sizes to measure. Raises ValueError if this kind does not know one of them."""
        names = self.sizes or (on_cpu if self.device.type == "cpu" else on_gpu)
        if other := [name for name in names if name not in known]:
            raise ValueError(f"sizes={other[0]} is not known here; sizes are {', '.join(known)}")
        return names


@dataclass
class Row:
    """The measurements of one contender. seconds: median of a round. first: seconds of its first call: compilation,
    choice of kernels, allocation. against: median over the rounds of its time divided by ours in the same round. flops:
    of a round. memory: the most bytes used in a round, beyond what was allocated before it (activations, gradients,
    scratch). waits: share of the time spent waiting for data. None: not measured.
    """

    who: str
    seconds: float
    first: float | None = None
    against: float | None = None
    images_per_second: float | None = None
    flops: float | None = None
    mfu: float | None = None
    memory: int | None = None
    waits: float | None = None


@dataclass
class Table:
    """A table of results. kind: of the benchmark. what: was measured, in words."""

    kind: str
    what: str
    rows: list[Row] = field(default_factory=list)


def by_processor(device: torch.device) -> bool:
    """Returns True if computation is timed by this process's CPU time: one thread on a CPU, which other processes
    interrupt."""
    return device.type == "cpu" and torch.get_num_threads() == 1


def synchronised(device: torch.device) -> float:
    """Waits until the device has finished its work; returns the time in seconds."""
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


class Observer(TorchDispatchMode):
    """Counts FLOPs, as FlopCounterMode does but without its hooks on modules, which do not work with
    torch.autograd.grad; and the bytes of the tensors that operations create, until they are freed: `most` is the
    largest sum (without the scratch memory of kernels)."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.held = self.most = 0
        self._known: weakref.WeakKeyDictionary[torch.UntypedStorage, int] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        rule = flop_registry.get(func._overloadpacket)
        if rule is None and (parts := self._in_parts(func, args, kwargs)) is not NotImplemented:
            return parts
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor):  # tensors from before are not counted
                self._known.setdefault(tensor.untyped_storage(), 0)
        out = func(*args, **kwargs)
        if rule is not None:
            self.flops += rule(*args, **kwargs, out_val=out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._hold(tensor.untyped_storage())
        return out

    def _in_parts(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is torch.ops.prim.device.default:
            return NotImplemented
        with self:
            return func.decompose(*args, **kwargs)

    def _hold(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        size = self._known[storage] = storage.nbytes()
        self.held += size
        self.most = max(self.most, self.held)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.held -= size


@contextmanager
def observed(device: torch.device, counted: bool = True) -> Iterator[dict[str, float]]:
    """A context that yields a dictionary, which afterwards holds the `flops` of what ran in it and the `memory` it
    took, in bytes. If they are not counted, which is impossible for compiled networks, it holds only the memory of a
    GPU."""
    found: dict[str, float] = {}
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    with Observer() if counted else nullcontext() as observer:
        yield found
    if observer is not None:
        found |= {"flops": observer.flops, "memory": observer.most}
    if gpu:
        torch.cuda.synchronize(device)
        found["memory"] = torch.cuda.max_memory_allocated(device) - before


class Clock:
    """Times contenders in rounds: in the first each is timed separately, in the second it is observed, then `runs`
    rounds count.

    Whoever drives the rounds calls `begin` and `end` around each contender's work, and `next_round` after the last;
    `run` does so for functions. counted: whether to count FLOPs, which is impossible for compiled networks. observe:
    False leaves out the second round. waiting: the work may wait for the disk or other processes, so that wall-clock
    time is used.
    """

    def __init__(
        self, device: torch.device, runs: int, counted: bool = True, observe: bool = True, waiting: bool = False
    ):
        self.device, self.counted, self.round = device, counted, 0
        self._watched = 1 if observe else None  # the round that is observed
        self.rounds = runs + (2 if observe else 1)
        self.first: dict[str, float] = {}
        self.times: dict[str, list[float]] = defaultdict(list)
        self.found: dict[str, dict[str, float]] = {}
        self._watching = ExitStack()
        self._since, self._on_the_wall = 0.0, waiting or not by_processor(device)

    def _now(self) -> float:
        return synchronised(self.device) if self._on_the_wall else time.process_time()

    def begin(self, name: str) -> None:
        if self.round == self._watched:
            self.found[name] = self._watching.enter_context(observed(self.device, self.counted))
        self._since = self._now()

    def end(self, name: str) -> None:
        taken = self._now() - self._since
        if self.round == self._watched:
            self._watching.close()
        elif self.round == 0:
            self.first[name] = taken
        elif self.round < self.rounds:
            self.times[name].append(taken)

    def next_round(self) -> None:
        self.round += 1

    def run(self, contenders: Mapping[str, Callable[[], object]], progress: str) -> "Clock":
        """Calls functions without arguments in turns; returns this clock."""
        for _ in tqdm(range(self.rounds), desc=progress, unit="round", leave=False):
            for name, work in contenders.items():
                self.begin(name)
                work()
                self.end(name)
            self.next_round()
        return self

    def rows(
        self, images: int = 0, peak: float | None = None, flops: Mapping[str, float | None] | None = None
    ) -> list[Row]:
        """Returns a row for each contender; the first is ours. images: per round. peak: the FLOP/s that MFU is relative
        to. flops: of contenders whose FLOPs were not counted."""
        (ours, own), rows = next(iter(self.times.items())), []
        for name, times in self.times.items():
            seconds, found = median(times), self.found.get(name, {})
            done = (flops or {}).get(name) or found.get("flops") or None
            rows.append(
                Row(
                    name,
                    seconds,
                    self.first.get(name),
                    1.0 if name == ours else median(a / b for a, b in zip(times, own)),
                    images / seconds if images else None,
                    done,
                    done / seconds / peak if done and peak else None,
                    found.get("memory"),
                )
            )
        return rows


@cache
def _product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Returns the measured FLOP/s of the fastest of several matrix products."""
    size = 1024 if device.type == "cpu" else 8192
    a = torch.randn(size, size, device=device, dtype=dtype)
    best = 0.0
    for _ in range(12):
        begin = time.process_time() if by_processor(device) else synchronised(device)
        a @ a
        end = time.process_time() if by_processor(device) else synchronised(device)
        best = max(best, 2 * size**3 / (end - begin))
    return best


def peak_of(machine: Machine) -> tuple[float, str]:
    """Returns (the FLOP/s that MFU is relative to, where they come from): the data sheet of a known GPU in 16 bits,
    else a measured product."""
    measured = _product_rate(machine.device, torch.float32 if machine.precision == "32" else torch.bfloat16)
    peak = peak_flops(machine.device, machine.precision, measured)
    source = "a measured matrix product" if peak == measured else "its data sheet"
    return peak, f"{peak / 1e12:.3g} TFLOP/s, {source}"


def parameters_in_millions(module: nn.Module) -> str:
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.1f} M parameters"


def check_agreement(what: str, ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    """Raises ValueError if two computations of the same result differ by more than `tolerance` of the largest value."""
    apart = float((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max())
    if not apart <= tolerance:
        raise ValueError(f"{what} do not compute the same ({apart:.1e} apart); their times say nothing")
