"""Predicts the memory of a training step, by part, without using it: the stage's own task runs a step on torch's meta
device, whose tensors have shapes but no values. The live memory is counted storage by storage, so no formula has to
know the networks."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ldm_train.training.fit import Machine
from ldm_train.training.task import Task

aten = torch.ops.aten
WEIGHTS, GRADIENTS, STATES, AVERAGES = "weights", "gradients", "optimiser states", "averaged weights"
FROZEN, INPUTS, ACTIVATIONS, TEMPORARIES = "frozen networks", "inputs", "activations", "temporaries"
PARTS = (WEIGHTS, GRADIENTS, STATES, AVERAGES, FROZEN, INPUTS, ACTIVATIONS, TEMPORARIES)
# Functions called by networks that autocast computes in 16 bits, and those that a GPU's autocast computes in float32 (a
# CPU's leaves their dtype unchanged). Attention is in float32 on a CPU, see `attend`.
IN_16_BITS = [
    (F, n) for n in ("linear", "conv1d", "conv2d", "conv3d", "conv_transpose2d", "scaled_dot_product_attention")
]
IN_16_BITS += [(torch, n) for n in ("matmul", "bmm", "baddbmm", "addmm", "einsum")] + [(torch.Tensor, "__matmul__")]
IN_FLOAT32 = [
    (F, n) for n in ("group_norm", "layer_norm", "softmax", "log_softmax", "interpolate", "mse_loss", "l1_loss")
]


@dataclass
class Rehearsal:
    """The training of a stage with placeholder data, from which the memory of a step is known before it runs.

    task: the stage's own task, which is moved to the meta device
    shapes: batch field on the device -> its shape for one sample. conditions: count -> the fields that stay on the host
    beside: further networks on the device that are not part of the task
    unknown: one message for each network whose size is not known, saying why
    """

    task: Task
    shapes: dict[str, Sequence[int]]
    conditions: Callable[[int], dict[str, Any]] = lambda count: {}
    beside: Sequence[nn.Module] = ()
    unknown: Sequence[str] = ()

    def __post_init__(self) -> None:
        for module in (self.task, *self.beside):
            module.to("meta")
        self.task.train()


@cache
def _is_in_place(func: Any) -> bool:
    """Returns True if an operation only writes new values into its first argument."""
    name = func.overloadpacket.__name__
    return name.endswith("_") and (torch.Tag.pointwise in func.tags or name.startswith("_foreach_") or name == "copy_")


@cache
def _is_fresh(func: Any) -> bool:
    """Returns True if an operation's results share no memory with its arguments, according to its schema."""
    return all(value.alias_info is None for value in (*func._schema.arguments, *func._schema.returns))


def _signature(value: Any) -> Any:
    """The properties of an argument that determine the shapes of an operation's results, as a hashable key."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype, value.device.type
    if isinstance(value, list | tuple):
        return tuple(map(_signature, value))
    return type(value), value  # 1 == 1.0 == True


def _shape_of_fresh(tensor: Any) -> tuple | None:
    """(size, stride, dtype) of a meta tensor that fills its whole storage; None for any other value."""
    if not isinstance(tensor, torch.Tensor) or not tensor.is_meta or tensor.storage_offset():
        return None
    most = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride())) + 1 if tensor.numel() else 0
    whole = most * tensor.element_size() == tensor.untyped_storage().nbytes()
    return (tensor.shape, tensor.stride(), tensor.dtype) if whole else None


class Tracker(TorchDispatchMode):
    """Counts the bytes of live tensors on the meta device, by part, and keeps the counts at the moment of the peak.

    phase: the part that new tensors are counted as. (The MemTracker of torch.distributed._tools does the same per
    module, but it rejects a network that is called twice from outside, and does not know frozen networks and averages.)
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase = TEMPORARIES
        self.alive: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self._total = self._most = 0
        self._known: dict[int, tuple[str, int, weakref.ref]] = {}  # storage address -> its part, bytes, reference
        self._results: dict[Any, tuple | None] = {}  # shapes of results by operation and arguments, see `_run`

    def belongs(self, part: str, tensors: Iterable[Any]) -> None:
        """Counts tensors as a part, whatever they were counted as before."""
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                self._add(tensor, part)
                address = tensor.untyped_storage()._cdata
                before, size, alive = self._known[address]
                self._known[address] = (part, size, alive)
                self.alive[before] -= size
                self.alive[part] += size

    def begin(self) -> None:
        """Restarts the peak from what is currently alive."""
        self.peak, self._most = self.alive.copy(), self._total

    def _add(self, tensor: torch.Tensor, part: str) -> None:
        storage = tensor.untyped_storage()
        if (address := storage._cdata) not in self._known:
            size = storage.nbytes()
            self._known[address] = (part, size, weakref.ref(storage, lambda _: self._remove(address)))
            self.alive[part] += size
            self._total += size

    def _remove(self, address: int) -> None:
        part, size, _ = self._known.pop(address)
        self.alive[part] -= size
        self._total -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is aten._local_scalar_dense and args[0].is_meta:
            return True if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1  # finite: yes
        if _is_in_place(func) and all(t.is_meta for t in tree_leaves(args[0])):
            # It allocates nothing, and running it would take most of the time here.
            return args[0] if isinstance(args[0], torch.Tensor) else None
        result = self._run(func, args, kwargs or {})
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                self._add(tensor, self.phase)
        if self._total > self._most:
            self.begin()
        return result

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Returns the result of an operation. Layers repeat: if the operation had arguments of the same shapes before,
        a tensor like the earlier result is created, which is much faster than running the operation."""
        if not _is_fresh(func):
            return func(*args, **kwargs)
        try:
            key = func, _signature(args), _signature(tuple(sorted(kwargs.items())))
            known = self._results.get(key)
        except TypeError:  # an unhashable argument
            return func(*args, **kwargs)
        if known is not None:
            made = [torch.empty_strided(size, stride, dtype=dtype, device="meta") for size, stride, dtype in known]
            return made[0] if len(func._schema.returns) == 1 else tuple(made)
        result = func(*args, **kwargs)
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        results = result if isinstance(result, tuple) else (result,)
        shapes = [_shape_of_fresh(t) for t in results]
        # Not cached for operations such as _unsafe_view, whose result shares its argument's memory against the schema.
        shared = None in shapes or any(t.untyped_storage()._cdata in given for t in results)
        self._results[key] = None if shared else tuple(shapes)
        return result


class Kernels:
    """Provides what the meta device lacks: attention without the matrix of all pairs, and autocast. Autocast is
    emulated, and on whenever the CPU's autocast is enabled.

    gpu: emulate a GPU's autocast, which computes more operations in float32.
    """

    def __init__(self, gpu: bool):
        self.gpu = gpu
        # id of a weight -> (the weight, its copy in 16 bits), until the forward pass ends.
        self.cast: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @contextmanager
    def installed(self) -> Iterator[None]:
        with ExitStack() as stack:
            attention = partial(_attention, widened=not self.gpu)
            stack.enter_context(patch.object(F, "scaled_dot_product_attention", attention))
            for owner, name in IN_16_BITS:
                stack.enter_context(patch.object(owner, name, self._under(self._lowered, getattr(owner, name))))
            for owner, name in IN_FLOAT32 if self.gpu else ():
                stack.enter_context(patch.object(owner, name, self._under(_raised, getattr(owner, name))))
            yield

    def _under(
        self, convert: Callable[[torch.Tensor], torch.Tensor], function: Callable[..., Any]
    ) -> Callable[..., Any]:
        def converted(*args: Any, **kwargs: Any) -> Any:
            if torch.is_autocast_enabled("cpu"):
                args, kwargs = tree_map_only(torch.Tensor, convert, (args, kwargs))
            return function(*args, **kwargs)

        return converted

    def _lowered(self, tensor: torch.Tensor) -> torch.Tensor:
        dtype = torch.get_autocast_dtype("cpu")
        if tensor.dtype != torch.float32 or not tensor.is_meta:
            return tensor
        if not (tensor.is_leaf and tensor.requires_grad):
            return tensor.to(dtype)
        if id(tensor) not in self.cast:
            self.cast[id(tensor)] = tensor, tensor.to(dtype)
        return self.cast[id(tensor)][1]


_attend = F.scaled_dot_product_attention


def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: Any = None, *args: Any, widened: bool, **kwargs: Any
) -> Any:
    if not q.is_meta:
        return _attend(q, k, v, attn_mask, *args, **kwargs)
    if widened and q.dtype in (torch.bfloat16, torch.float16):
        dtype = q.dtype
        q, k, v = (t.float() for t in (q, k, v))
        return _attention(q, k, v, attn_mask, widened=False).to(dtype)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype)
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=attn_mask)[0]


def _raised(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


@contextmanager
def _rehearsing(kernels: Kernels) -> Iterator[None]:
    """A context in which ranks do not communicate and the state of the random generators is restored at the end."""
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(patch.object(dist, "is_initialized", lambda: False))
        stack.enter_context(kernels.installed())
        yield


def _unfused(optimizer: torch.optim.Optimizer, gpu: bool) -> torch.optim.Optimizer:
    """Sets up an optimiser so that the meta device can run it: one parameter at a time, which needs as little memory as
    a fused one. GPU optimisers that are not fused update all parameters at once and make copies of all of them
    (foreach)."""
    for group in optimizer.param_groups:
        if group.get("foreach", False) is None:
            group["foreach"] = gpu and not group.get("fused")
        if "fused" in group:
            group["fused"] = False
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
    return optimizer


def step_memory(rehearsal: Rehearsal, micro: int, accumulate: int, machine: Machine, step: int) -> dict[str, int]:
    """Returns the bytes by part at the peak of an optimiser step in the middle of a training.

    micro: samples per device and backward pass. accumulate: backward passes per step. step: number of the step, because
    a loss may have terms that are off at other steps.
    """
    task, tracker, kernels = rehearsal.task, Tracker(), Kernels(machine.accelerator == "gpu")
    task.accumulate = accumulate
    task._trainer = SimpleNamespace(
        world_size=machine.world_size, global_rank=0, global_step=step, log_every_n_steps=step + 2,
        precision_plugin=None, optimizers=[],
    )  # fmt: skip
    task.setup("fit")  # creates its averaged weights
    optimizer = _unfused(task.new_optimizer(), kernels.gpu)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    for module in (task, *rehearsal.beside):
        tracker.belongs(FROZEN, (*module.parameters(), *module.buffers()))
    tracker.belongs(WEIGHTS, (*task.trained().parameters(), *task.trained().buffers()))
    tracker.belongs(AVERAGES, task.ema.shadow.values() if task.ema is not None else ())
    handles = [p.register_post_accumulate_grad_hook(lambda p: tracker.belongs(GRADIENTS, [p.grad])) for p in trained]
    try:
        with _rehearsing(kernels), tracker:
            _step(rehearsal, optimizer, tracker, kernels, micro, machine)
    finally:
        for handle in handles:
            handle.remove()
        for parameter in trained:
            parameter.grad = None
    return {part: tracker.peak[part] for part in PARTS}


def _step(
    rehearsal: Rehearsal,
    optimizer: torch.optim.Optimizer,
    tracker: Tracker,
    kernels: Kernels,
    micro: int,
    machine: Machine,
) -> None:
    """Runs one step in Lightning's order: the gradients of the previous step are kept until this step's forward pass is
    done; with accumulation, or with the gradient buckets of several ranks, they are kept all the time."""
    task, trained = rehearsal.task, [p for group in optimizer.param_groups for p in group["params"]]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    tracker.belongs(GRADIENTS, (p.grad for p in trained))
    tracker.belongs(STATES, tree_leaves(list(optimizer.state.values())))
    tracker.phase = INPUTS
    batch: dict[str, Any] = {n: torch.zeros(micro, *shape, device="meta") for n, shape in rehearsal.shapes.items()}
    batch |= rehearsal.conditions(micro) | {"key": [""] * micro, "replaced": []}
    tracker.begin()
    tracker.phase = ACTIVATIONS
    dtype = torch.float16 if machine.precision == "16-mixed" else torch.bfloat16
    with torch.autocast("cpu", dtype, enabled=machine.precision != "32"):
        loss = task.training_step(batch, task.accumulate - 1) / task.accumulate
    kernels.cast.clear()
    tracker.phase = TEMPORARIES
    if task.accumulate == 1 and machine.world_size == 1:
        optimizer.zero_grad()
    loss.backward()
    task.configure_gradient_clipping(optimizer)
    optimizer.step()
    if task.ema is not None:
        task.ema.update()
