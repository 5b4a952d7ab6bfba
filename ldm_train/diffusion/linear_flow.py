"""The straight path between image and noise: x_t = (1 - t) x_0 + t eps (rectified flow, Liu et al. 2022,
arXiv:2209.03003; Lipman et al. 2022, arXiv:2210.02747)."""

import math

import torch

from ldm_train.diffusion.process import NoiseProcess, expand_to, widest


class LinearFlow(NoiseProcess):
    """A rectified flow. Its times are T * t, so that the network gets times on the same scale as in other processes.

    times: how training draws t: "uniform", or "logit_normal" (Esser et al. 2024, arXiv:2403.03206, eq. 19: the logistic
        function of a normal variable), which trains the middle of the path most
    mean, std: of that normal variable
    last: the t at which sampling begins. At t = 1 there is no signal, and samplers that work in the noise level
        `t / (1 - t)` or divide by the signal could not begin there; at 0.999 the noise is 999 times the signal
    num_train_timesteps: T

    Samplers see x_t / sqrt((1 - t)^2 + t^2), which is variance preserving with the same signal-to-noise ratio.
    Raises ValueError for other `times`, a `last` outside (0, 1), and a `std` that is not above 0.
    """

    place: torch.Tensor
    variance_preserving = False
    zero_terminal_snr = True

    def __init__(
        self,
        times: str = "uniform",
        mean: float = 0.0,
        std: float = 1.0,
        last: float = 0.999,
        num_train_timesteps: int = 1000,
    ):
        super().__init__()
        if times not in ("uniform", "logit_normal"):
            raise ValueError(f"diffusion.schedule.times is uniform or logit_normal, not {times!r}")
        if not 0 < last < 1:
            raise ValueError(f"diffusion.schedule.last is a time between 0 and 1, not {last}")
        if std <= 0:
            raise ValueError(f"diffusion.schedule.std is above 0, not {std}")
        self.times, self.mean, self.std = times, mean, std
        self.num_train_timesteps = num_train_timesteps
        self.first_time, self.last_time = 1.0, last * num_train_timesteps

    def _share(self, t: float | torch.Tensor) -> torch.Tensor:
        dtype = widest(t.device) if isinstance(t, torch.Tensor) else torch.float64
        return torch.as_tensor(t, dtype=dtype) / self.num_train_timesteps

    def at(self, t: float | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        noise = self._share(t)
        length = (noise.square() + (1 - noise).square()).sqrt()
        alpha, sigma = (1 - noise) / length, noise / length
        return alpha, sigma, 2 * (alpha.log() - sigma.log())

    def time_of(self, level: float) -> float:
        return self.num_train_timesteps * level / (1 + level)

    def training_times(self, uniform: torch.Tensor) -> torch.Tensor:
        """Float64 in [0, T); logit-normal ones by the inverse of the normal distribution function."""
        if self.times == "logit_normal":
            normal = torch.special.ndtri(uniform.clamp(1e-9, 1 - 1e-9))
            uniform = torch.sigmoid(self.mean + self.std * normal)
        return uniform * self.num_train_timesteps

    def training_coefficients(self, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        noise = self._share(timesteps)
        return 1 - noise, noise

    def network_view(
        self, x_t: torch.Tensor, t: float | torch.Tensor
    ) -> tuple[torch.Tensor, float | torch.Tensor, float | torch.Tensor]:
        if not isinstance(t, torch.Tensor):  # avoids small tensors on the device
            share = float(t) / self.num_train_timesteps
            return math.hypot(share, 1 - share) * x_t, 1 - share, share
        noise = self._share(t)
        length = (noise.square() + (1 - noise).square()).sqrt()
        alpha, sigma = expand_to(1 - noise, x_t), expand_to(noise, x_t)
        return expand_to(length, x_t) * x_t, alpha, sigma

    def timesteps(self, num_inference_steps: int, spacing: str = "trailing") -> torch.Tensor:
        """Returns S + 1 decreasing times that end at 0. spacing: "trailing" starts at T * last and takes even steps;
        "leading" is the same but half a step lower, so that its last time before the final 0 is half a step above 0;
        "linspace" goes evenly from T * last to 1 (t = 0.001 for T = 1000); "karras" as for other processes. Raises
        ValueError for another spacing or a number of steps outside 1..T."""
        steps = num_inference_steps
        if not 1 <= steps <= self.num_train_timesteps:
            raise ValueError(f"num_inference_steps is {steps}; it must lie between 1 and {self.num_train_timesteps}")
        index = torch.arange(steps, dtype=torch.float64)
        if spacing == "trailing":
            times = self.last_time * (1 - index / steps)
        elif spacing == "leading":
            times = self.last_time * (1 - (index + 0.5) / steps)
        elif spacing == "linspace":
            times = torch.linspace(self.last_time, self.first_time, steps, dtype=torch.float64)
        elif spacing == "karras":
            times = self.karras_times(steps)
        else:
            raise ValueError(f"a linear flow has no spacing {spacing!r}; choose trailing, leading, linspace or karras")
        return torch.cat([times, torch.zeros(1, dtype=torch.float64)])
