"""Copies to an accelerator for which the host does not wait; full precision on any device; modules without first weights; memory
that stays with the process."""

import ctypes
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

WITHOUT_FLOAT64 = {"mps"}  # kinds of devices


def device_of(accelerator: str) -> torch.device:
    """The device that `accelerator` (auto, cpu, gpu, mps) means on this machine. Raises ValueError where it is not there."""
    there = {"gpu": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if accelerator == "auto":
        accelerator = next(name for name, available in there.items() if available)
    if accelerator not in there:
        raise ValueError(f"accelerator is auto, cpu, gpu or mps, not {accelerator!r}")
    if not there[accelerator]:
        what = (
            "GPU is visible" if accelerator == "gpu" else "GPU of Apple's is there, or this torch is built without it"
        )
        raise ValueError(f"accelerator={accelerator}, but no {what}; use accelerator=cpu")
    return torch.device({"gpu": "cuda"}.get(accelerator, accelerator))


def multiplies_bfloat16() -> bool:
    """Whether this CPU has matrix units for bfloat16 (Intel's AMX). Others compute it slower than float32, some 100 times."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # older torches have none
    return bool(capabilities.get("amx_bf16"))


def uploaded(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """`tensor` on `device`. From the host to an accelerator it is copied beside what the device computes, from pinned memory: a
    blocking copy would wait for all that was asked of the device before. The source must not be written to afterwards. float64
    becomes float32 on devices that have none."""
    device = torch.device(device)
    if device.type in WITHOUT_FLOAT64 and tensor.dtype == torch.float64:
        tensor = tensor.float()
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
    with torch.device("meta"), Uninitialised(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*copying from a non-meta parameter")  # by parts that bring their weights
        yield


# Parameters of glibc's mallopt, and what it may be told at most.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
LARGEST_MMAP_THRESHOLD = 32 << 20
USUAL_TRIM_THRESHOLD = 2 * LARGEST_MMAP_THRESHOLD  # glibc's own, once it has seen large tensors


@contextmanager
def kept_memory(device: torch.device) -> Iterator[None]:
    """A context in which a process that computes on the CPU keeps the memory it frees: a training step frees all activations,
    and asking the system for them again costs up to a tenth of it (page faults). Afterwards it is given back. Nothing happens
    for accelerators, and without glibc."""
    libc = ctypes.CDLL(None) if device.type == "cpu" and sys.platform == "linux" else None
    if not hasattr(libc, "mallopt") or not hasattr(libc, "malloc_trim"):
        yield
        return
    libc.mallopt(MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)
    libc.mallopt(TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        libc.mallopt(TRIM_THRESHOLD, USUAL_TRIM_THRESHOLD)
        libc.malloc_trim(0)
