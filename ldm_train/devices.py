"""Device helpers: non-blocking copies to an accelerator, modules without initialised weights, and
keeping freed CPU memory in the process."""

import ctypes
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

WITHOUT_FLOAT64 = {"mps"}  # device types


def device_of(accelerator: str) -> torch.device:
    """The device that `accelerator` (auto, cpu, gpu, mps) means on this machine. Raises ValueError if it is not
    available."""
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
    """Returns True if this CPU has bfloat16 matrix units (Intel AMX). Other CPUs compute bfloat16 more slowly than
    float32, some of them 100 times."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of torch lack the function
    return bool(capabilities.get("amx_bf16"))


def to_device(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Returns `tensor` on `device`. A copy from the host to CUDA uses pinned memory and overlaps with the device's
    work: a blocking copy would wait for all work queued before it. The source must not be written to afterwards.
    float64 becomes float32 on devices without float64."""
    device = torch.device(device)
    if device.type in WITHOUT_FLOAT64 and tensor.dtype == torch.float64:
        tensor = tensor.float()
    if device.type in ("cpu", "mps") or tensor.device.type != "cpu":
        return tensor.to(device)
    if device.type == "cuda" and not tensor.is_pinned():
        tensor = tensor.contiguous().pin_memory()
    return tensor.to(device, non_blocking=True)


class Uninitialised(TorchFunctionMode):
    """A context in which the parameters of new modules are not initialised, for modules whose weights are loaded next.
    Buffers are initialised, because those that no weights file holds are created with the module."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = args[0] if args else (kwargs or {}).get("tensor")
        drawn = getattr(func, "__module__", None) == "torch.nn.init" and isinstance(given, nn.Parameter)
        # Meta tensors have no values to draw, and drawing would take the most time.
        if drawn or (func in (torch.Tensor.uniform_, torch.Tensor.normal_) and given.is_meta):
            return given
        return func(*args, **(kwargs or {}))


@contextmanager
def shapes_only() -> Iterator[None]:
    """A context in which modules are built on the meta device, with shapes but no values."""
    with torch.device("meta"), Uninitialised(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*copying from a non-meta parameter")  # from parts that load their weights
        yield


# Parameters of glibc's mallopt, and its largest M_MMAP_THRESHOLD.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
LARGEST_MMAP_THRESHOLD = 32 << 20
USUAL_TRIM_THRESHOLD = 2 * LARGEST_MMAP_THRESHOLD  # glibc's own value once large tensors have been freed


@contextmanager
def kept_memory(device: torch.device) -> Iterator[None]:
    """A context in which a process that computes on the CPU keeps the memory it frees: a training step frees all
    activations, and requesting their memory again costs up to a tenth of the step's time (page faults). The memory is
    returned to the system at the end. Does nothing for accelerators or without glibc."""
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
