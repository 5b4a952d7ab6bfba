"""Learning-rate schedules and weight averaging."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


def lr_multiplier(
    schedule: str, max_steps: int, warmup_steps: int = 0, final: float = 0.0, warmup_start: float = 0.0
) -> Callable[[int], float]:
    """Returns a function: optimiser step, counted from 0 -> factor on the learning rate.

    schedule: "constant", "cosine" or "linear"; the latter two fall to `final` at max_steps. Before that, step n of the
    first W = `warmup_steps` has start + (1 - start) n / W with start = `warmup_start`, so that step W is the first at
    the full rate (latent diffusion's LambdaLinearScheduler and LambdaWarmUpCosineScheduler; published: constant, 10000
    steps from 1e-6). With the default start of 0 the first step changes nothing. Raises ValueError for other schedules.
    """
    if schedule not in ("constant", "cosine", "linear"):
        raise ValueError(f"lr_schedule.schedule is constant, cosine or linear, not {schedule!r}")

    def factor(step: int) -> float:
        if step < warmup_steps:
            return warmup_start + (1 - warmup_start) * step / warmup_steps
        progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
        if schedule == "cosine":
            return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))
        return 1.0 if schedule == "constant" else 1 - (1 - final) * progress

    return factor


def power_of_width(width: float) -> float:
    """Returns the exponent gamma for which the profile t^gamma on [0, 1] has the standard deviation `width`."""
    roots = np.roots([1, 7, 16 - width**-2, 12 - width**-2])
    return float(roots.real.max())


class EMA:
    """Moving average of a module's trainable parameters. Without `width`: exponential, with LDM's warm-up
    min(decay, (1 + n) / (10 + n)). With `width`: the power-function profile whose standard deviation is that share of
    the training so far (Karras et al. 2024, arXiv:2312.02696, eq. 4 and 126); it needs no warm-up, and its span grows
    with the training.

    Parameters keep their names. Buffers are not averaged. Raises ValueError if decay is outside [0, 1) or width outside
    (0, 0.28].
    """

    def __init__(self, module: nn.Module, decay: float, width: float | None = None):
        if not 0 <= decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {decay}")
        if width is not None and not 0 < width <= 0.28:
            raise ValueError(
                f"ema_width={width} is the average's deviation as a share of the training: above 0, up to 0.28"
            )
        self.exponent = None if width is None else power_of_width(width)
        self.decay, self.updates = decay, 0
        self.live = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.shadow = {name: p.detach().clone() for name, p in self.live.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Updates the average; to be called after each optimiser step."""
        self.updates += 1
        if self.exponent is None:
            decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        else:
            decay = (1 - 1 / self.updates) ** (self.exponent + 1)
        moved = [name for name, p in self.live.items() if self.shadow[name].device != p.device]
        self.shadow |= {name: self.shadow[name].to(self.live[name].device) for name in moved}
        torch._foreach_lerp_(list(self.shadow.values()), list(self.live.values()), 1 - decay)

    @torch.no_grad()
    def give(self, weights: dict[str, torch.Tensor]) -> None:
        """Copies weights, given by name, into the module's parameters."""
        for name, value in weights.items():
            self.live[name].copy_(value)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """A context in which the module has the averaged weights; the raw ones are restored at its end."""
        raw = {name: p.detach().clone() for name, p in self.live.items()}
        self.give(self.shadow)
        try:
            yield
        finally:
            self.give(raw)

    def state_dict(self) -> dict:
        return {"updates": self.updates, "shadow": self.shadow}

    def load_state_dict(self, state: dict) -> None:
        if state["shadow"].keys() != self.shadow.keys():
            raise ValueError(f"EMA of other parameters: {sorted(state['shadow'].keys() ^ self.shadow.keys())[:3]} ...")
        self.updates = state["updates"]
        for name, value in state["shadow"].items():
            self.shadow[name].copy_(value)


def clip_by_group(groups: Iterable[dict], max_norm: float | None) -> dict[str, torch.Tensor]:
    """Clips each parameter group's gradient by its own norm, so that e.g. the discriminator's gradient never scales the
    autoencoder's. max_norm None: only measures. Returns the norms before clipping, by group name."""
    norms = {}
    for i, group in enumerate(groups):
        norm = nn.utils.get_total_norm([p.grad for p in group["params"] if p.grad is not None])
        if max_norm is not None:
            nn.utils.clip_grads_with_norm_(group["params"], max_norm, norm)
        norms[group.get("name", str(i))] = norm
    return norms
