"""Copies to an accelerator for which the host does not wait; full precision on any device; modules without first weights."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


def uploaded(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """`tensor` on `device`. From the host to an accelerator it is copied beside what the device computes, from pinned memory: a
    blocking copy would wait for all that was asked of the device before. The source must not be written to afterwards."""
    device = torch.device(device)
    if device.type in ("cpu", "mps") or tensor.device.type != "cpu":
        return tensor.to(device)
    if device.type == "cuda" and not tensor.is_pinned():
        tensor = tensor.contiguous().pin_memory()
    return tensor.to(device, non_blocking=True)


def full_precision(device: torch.device) -> AbstractContextManager:
    """A context without autocast. (Of a device that has none, the CPU's is switched off: a rehearsal on the meta device asks that.)"""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type if known else "cpu", enabled=False)


class Uninitialised(TorchFunctionMode):
    """A context in which a module's parameters get no first values, for a module whose weights are loaded next. Buffers get
    theirs: those that no file of weights holds are made with the module."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = args[0] if args else (kwargs or {}).get("tensor")
        drawn = getattr(func, "__module__", None) == "torch.nn.init" and isinstance(given, nn.Parameter)
        # Without values there is nothing to draw, and drawing takes longest.
        if drawn or (func in (torch.Tensor.uniform_, torch.Tensor.normal_) and given.is_meta):
            return given
        return func(*args, **(kwargs or {}))


@contextmanager
def shapes_only() -> Iterator[None]:
    """A context in which modules have shapes only."""
    with torch.device("meta"), Uninitialised():
        yield
