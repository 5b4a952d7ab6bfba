"""The meta device used instead of a GPU, to find out without one what would wait for the device or mix devices."""

import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.fx.experimental import _config as config
from torch.utils._python_dispatch import TorchDispatchMode

from ldm_train import devices
from ldm_train.diffusion import process

aten = torch.ops.aten
# Operations whose result has a size that depends on values on the device.
SIZED_BY_VALUES = (aten.nonzero, aten.masked_select, aten.bincount, aten._unique2, aten.repeat_interleave)
COPIES = (aten._to_copy, aten.copy_)


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _group_norm(x: torch.Tensor, weight: Any, bias: Any, n: int, c: int, size: int, groups: int, eps: float) -> Any:
    return torch.empty_like(x), x.new_empty((n, groups)), x.new_empty((n, groups))


def _group_norm_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    mean: Any,
    rstd: Any,
    weight: Any,
    n: int,
    c: int,
    size: int,
    groups: int,
    wanted: list[bool],
) -> Any:
    made = (torch.empty_like(x), x.new_empty(c), x.new_empty(c))
    return tuple(tensor if is_wanted else None for tensor, is_wanted in zip(made, wanted))


def _layer_norm(x: torch.Tensor, shape: Sequence[int], weight: Any, bias: Any, eps: float) -> Any:
    outer = (*x.shape[: x.ndim - len(shape)], *(1 for _ in shape))
    return torch.empty_like(x), x.new_empty(outer), x.new_empty(outer)


def _vector_norm(x: torch.Tensor, ord: float = 2, dim: Any = None, keepdim: bool = False, **options: Any) -> Any:
    return x.new_empty(()) if dim is None else aten.linalg_vector_norm(x, ord, dim, keepdim, **options)


# Operations for which the meta device finds the shapes in a hundred small steps; these functions are faster.
SHAPED = {
    aten.native_group_norm: _group_norm, aten.native_group_norm_backward: _group_norm_backward, aten.native_layer_norm: _layer_norm,
    aten.linalg_vector_norm: _vector_norm,
}  # fmt: skip

# Elementwise operations: if all arguments have the same shape and dtype, so has the result.
ALIKE = {
    *(aten.add, aten.sub, aten.mul, aten.div, aten.sqrt, aten.square, aten.silu, aten.silu_backward, aten.gelu, aten.neg),
    *(aten.gelu_backward, aten.relu, aten.threshold_backward, aten.abs, aten.exp),
}  # fmt: skip


def _like_all(given: Sequence[torch.Tensor]) -> bool:
    """Returns True if these floating-point tensors agree in device, dtype, shape and strides, so that the result of an
    elementwise operation does too."""
    kinds = {(t.device, t.dtype, t.shape, t.stride()) for t in given}
    return len(kinds) == 1 and given[0].is_floating_point()


@contextmanager
def without_float64() -> Iterator[None]:
    """A context in which the meta device has no float64, like Apple's. Move models to the device inside it."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (devices, process):
            patch.setattr(module, "WITHOUT_FLOAT64", {"mps", "meta"})
        yield


class Watched(TorchDispatchMode):
    """Records in `waits` each place in the package where the host waits for the meta device: values that it reads,
    results whose size it must know, and blocking copies in either direction. Reads with no new work for the device
    between them count as one wait, since the device has finished everything by then. Raises AssertionError if an
    operation mixes devices (CPU tensors without dimensions may join any) and, under `without_float64`, if float64 is on
    the device."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self._idle = False

    def __enter__(self) -> "Watched":
        self._assumed = config.patch(meta_nonzero_assume_all_nonzero=True)  # else these operations would fail
        self._assumed.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._assumed.__exit__(*error)

    def _place(self) -> str:
        frames = [f for f in traceback.extract_stack() if "/ldm_train/" in f.filename and "/tests/" not in f.filename]
        return f"{frames[-1].filename.partition('/ldm_train/')[2]}: {frames[-1].line}" if frames else "outside"

    def _wait(self, what: str) -> None:
        if self._idle and what.endswith("is read"):
            return
        self._idle = True
        place = self._place()
        self.waits.append(f"{what} at {place}")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = self._done(func, args, kwargs or {})
        there = [t for t in _tensors((args, list((kwargs or {}).values()), made)) if t.is_meta]
        if "meta" in devices.WITHOUT_FLOAT64 and any(t.dtype == torch.float64 for t in there):
            # torch.quantile itself computes ranks in float64; what it does on a device without float64 is up to torch.
            assert "torch.quantile(" in self._place(), f"{func} has float64 on the device at {self._place()}"
        returned = [t for t in _tensors([made]) if t.is_meta]
        if returned and not all(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns):
            self._idle = False  # the device was given work: the result is more than a view
        return made

    def _done(self, func: Any, args: Any, kwargs: Any) -> Any:
        packet = func.overloadpacket
        given = [*_tensors(args), *_tensors(kwargs.values())]
        there = [t for t in given if t.is_meta]
        if packet is aten._local_scalar_dense and there:
            self._wait("a value is read")
            dtype = there[0].dtype
            return False if dtype == torch.bool else 1 if not dtype.is_floating_point else 0.5
        if packet is aten._to_copy:
            target = torch.device(kwargs.get("device") or args[0].device)
            if target.type == "cpu" and args[0].is_meta:
                self._wait("a tensor is read")
                return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
            if target.type == "meta" and not args[0].is_meta and args[0].numel() and not kwargs.get("non_blocking"):
                self._wait("a blocking copy to the device")
            return func(*args, **kwargs)
        if packet is aten.copy_:
            into, source = args[0], args[1]
            blocking = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
            if into.is_meta != source.is_meta and source.ndim and blocking:
                self._wait("a blocking copy")
            return into if into.is_meta or source.is_meta else func(*args, **kwargs)
        if there and packet in SIZED_BY_VALUES:
            self._wait(f"{packet} sizes its result by values")
        if there and packet in (aten.index, aten.index_put, aten.index_put_):
            indices = list(_tensors(args[1]))
            if any(t.dtype == torch.bool for t in indices):
                self._wait("indexing by a mask")
            if any(not t.is_meta for t in indices):
                self._wait("indexing by an index on the host")
            given = [t for t in given if not any(t is i for i in indices)]
        mixed = [t for t in given if not t.is_meta and t.ndim]
        assert not (there and mixed), f"{func} mixes devices: {[(t.device.type, tuple(t.shape)) for t in given]}"
        if there and packet in SHAPED:
            return SHAPED[packet](*args, **kwargs)
        if there and (packet in ALIKE or packet is aten.pow) and not kwargs and _like_all(given):
            return torch.empty_like(given[0])
        return func(*args, **kwargs)
