"""Copies to an accelerator for which the host does not wait; full precision on any device; memory that stays with the process."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch


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
    """A context without autocast."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


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
