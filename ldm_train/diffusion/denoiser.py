"""The interface for sampling: denoise(x_t, t) -> pred_x0."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ldm_train.diffusion.parameterisation import Parameterisation
from ldm_train.diffusion.process import NoiseProcess

# (noisy_latents, timesteps (B,), condition) -> network output
Network = Callable[[torch.Tensor, torch.Tensor, dict[str, Any]], torch.Tensor]


class Denoiser:
    """One model under one condition: x_t (B, C, h, w) variance preserving, t a float or (B,) -> pred_x0 float32.

    network: called with (x_t, timesteps, condition); the condition holds context, context_mask, concat, vector, control
    prepare: adds to a condition what the network computes from it alone. Called once, because condition and weights do
        not change during a denoiser's life; not used when gradients are enabled
    """

    def __init__(
        self,
        network: Network,
        schedule: NoiseProcess,
        parameterisation: Parameterisation,
        condition: dict[str, torch.Tensor],
        prepare: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    ):
        self.network, self.schedule, self.parameterisation = network, schedule, parameterisation
        self.condition, self.prepare = condition, prepare
        self._joined: tuple[tuple[Denoiser, ...], dict[str, torch.Tensor]] | None = None
        self._prepared: dict[str, Any] | None = None  # of the joined conditions

    def __call__(self, x_t: torch.Tensor, t: float | torch.Tensor) -> torch.Tensor:
        return self.together([self], x_t, t)[0]

    def shares_model(self, other: object) -> bool:
        """Whether both can be evaluated in one batched call."""
        return isinstance(other, Denoiser) and other.network == self.network and other.schedule is self.schedule

    def _together_with(self, denoisers: tuple["Denoiser", ...]) -> dict[str, Any]:
        """Returns the conditions of several denoisers, concatenated once and prepared once."""
        if self._joined is None or self._joined[0] != denoisers[1:]:
            joined = self.condition
            if len(denoisers) > 1:
                joined = {k: torch.cat([d.condition[k] for d in denoisers]) for k in self.condition}
            self._joined, self._prepared = (denoisers[1:], joined), None
        if self.prepare is None or torch.is_grad_enabled():
            return self._joined[1]
        if self._prepared is None:
            self._prepared = self.prepare(self._joined[1])
        return self._prepared

    @staticmethod
    def together(denoisers: Sequence["Denoiser"], x_t: torch.Tensor, t: float | torch.Tensor) -> list[torch.Tensor]:
        """Returns pred_x0 of several denoisers of one model at the same x_t, from one network call."""
        first, count = denoisers[0], len(denoisers)
        x_t, alpha, sigma = first.schedule.network_view(x_t, t)
        if isinstance(t, torch.Tensor):
            times = t.to(x_t.device, torch.float32).expand(len(x_t)).repeat(count)
        else:
            times = torch.full((count * len(x_t),), float(t), device=x_t.device)
        condition = first._together_with(tuple(denoisers))
        output = first.network(x_t if count == 1 else torch.cat([x_t] * count), times, condition)
        to_pred_x0, x_t = first.parameterisation.to_pred_x0, x_t.float()
        return [to_pred_x0(part, x_t, alpha, sigma) for part in output.float().chunk(count)]
