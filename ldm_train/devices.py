"""Copies to an accelerator for which the host does not wait; full precision on any device."""

from contextlib import AbstractContextManager, nullcontext

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
