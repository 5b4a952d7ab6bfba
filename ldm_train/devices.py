"""Copies to an accelerator for which the host does not wait; full precision on any device."""

from contextlib import AbstractContextManager, nullcontext

import torch

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
    """A context without autocast."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()
