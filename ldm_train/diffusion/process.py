"""The interface of noise processes: the signal and noise at each time, and the times of training and sampling."""

import torch
from torch import nn

WITHOUT_FLOAT64 = {"mps"}  # device types


def widest(device: torch.device) -> torch.dtype:
    """Returns float64 if the device supports it, otherwise float32."""
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64


def expand_to(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(B,) -> (B, 1, ..., 1) with the rank, device and dtype of `like`; a scalar stays a scalar."""
    values = values.to(like.device, like.dtype)
    return values if values.ndim == 0 else values.view(-1, *[1] * (like.ndim - 1))


class NoiseProcess(nn.Module):
    """Base class of noise processes. Subclasses set the attributes and implement the methods of the first part; the
    methods that samplers and guidance call are derived from them.

    num_train_timesteps     T: the network gets times on a scale up to T
    first_time, last_time   the times with the least and the most noise at which a step of sampling may start; samplers
                            that divide by the signal need it to be above 0 at last_time
    variance_preserving     whether x_t is alpha x_0 + sigma eps with alpha^2 + sigma^2 = 1 for the network, too
    zero_terminal_snr       whether training reaches a time without signal

    Samplers see every process as variance preserving. If the network was trained on x_t of another scale,
    `network_view` converts it.
    """

    num_train_timesteps: int
    first_time: float
    last_time: float
    variance_preserving = True
    zero_terminal_snr = False

    def __init__(self) -> None:
        super().__init__()
        self._numbers: dict[float, tuple[float, float]] = {}

    # -- implemented by subclasses -----------------------------------------------------------------------------------

    def at(self, t: float | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns (alpha, sigma, log SNR) at a time from the clean image's to T, each float64 with the shape of t;
        alpha^2 + sigma^2 = 1."""
        raise NotImplementedError

    def time_of(self, level: float) -> float:
        """Returns the time at which sigma / alpha is `level`: the inverse of `at`."""
        raise NotImplementedError

    def training_times(self, uniform: torch.Tensor) -> torch.Tensor:
        """Maps uniform numbers (B,) in [0, 1), float64, to training times (B,); increasing, so that strata stay
        strata."""
        raise NotImplementedError

    def training_coefficients(self, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (alpha, sigma), each (B,) float64, of the x_t = alpha x_0 + sigma eps that the network is trained
        on."""
        raise NotImplementedError

    def timesteps(self, num_inference_steps: int, spacing: str = "trailing") -> torch.Tensor:
        """Returns S + 1 decreasing times (float64, CPU) that end at the clean image. Raises ValueError for an unknown
        spacing."""
        raise NotImplementedError

    def network_view(
        self, x_t: torch.Tensor, t: float | torch.Tensor
    ) -> tuple[torch.Tensor, float | torch.Tensor, float | torch.Tensor]:
        """Returns (x_t as the network was trained on it, its alpha, its sigma) for a variance-preserving x_t
        (B, C, h, w)."""
        return x_t, *self.pair(t, x_t.float())

    # -- derived from these -----------------------------------------------------------------------------------------

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Returns x_t = alpha x_0 + sigma eps at training times (B,)   (DDPM, eq. 4)."""
        alpha, sigma = self.training_coefficients(timesteps)
        return expand_to(alpha, latents) * latents + expand_to(sigma, latents) * noise

    def strata(self, indices: torch.Tensor) -> torch.Tensor:
        """Returns the training times in the middle of the strata with indices (B,), of T strata 0 .. T - 1 of their
        density."""
        return self.training_times((indices.double() + 0.5) / self.num_train_timesteps)

    def signal_to_noise(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Returns the SNR at training times (B,), float64."""
        alpha, sigma = self.training_coefficients(timesteps)
        return alpha.square() / sigma.square()

    def numbers(self, t: float) -> tuple[float, float]:
        """Returns (alpha, sigma) of `at` at one time as Python numbers. They are cached, so that a sampler's step
        touches neither small tensors nor the device."""
        if t not in self._numbers:
            alpha, sigma, _ = self.at(t)
            self._numbers[t] = float(alpha), float(sigma)
        return self._numbers[t]

    def pair(
        self, t: float | torch.Tensor, like: torch.Tensor
    ) -> tuple[float, float] | tuple[torch.Tensor, torch.Tensor]:
        """Returns (alpha, sigma) at a time or at times (B,), ready to be multiplied with `like` (B, C, h, w)."""
        if not isinstance(t, torch.Tensor):
            return self.numbers(float(t))
        alpha, sigma, _ = self.at(t)
        return expand_to(alpha, like), expand_to(sigma, like)

    def coefficients(self, timesteps: torch.Tensor) -> tuple[list[float], list[float]]:
        """Returns (alphas, sigmas) at a sampler's times, as numbers. Called once, before the first step."""
        times = timesteps.tolist()
        if new := [t for t in times if t not in self._numbers]:
            alphas, sigmas, _ = (v.tolist() for v in self.at(torch.tensor(new, dtype=torch.float64)))
            self._numbers |= zip(new, zip(alphas, sigmas))
        pairs = [self._numbers[t] for t in times]
        return [alpha for alpha, _ in pairs], [sigma for _, sigma in pairs]

    def levels(self, timesteps: torch.Tensor) -> tuple[list[float], list[float]]:
        """Returns (alphas, noise levels sigma / alpha) at a sampler's times, as numbers.

        Raises ValueError at zero signal: the level is infinite there, and no step can begin at it.
        """
        alphas, sigmas = self.coefficients(timesteps)
        if min(alphas) < 1e-6:
            raise ValueError(
                "this model's schedule ends without signal (zero_terminal_snr), where the noise level is infinite; use "
                "sampler=ddim, dpm_solver or unipc, which need no levels, and spacing=trailing"
            )
        return alphas, [sigma / alpha for alpha, sigma in zip(alphas, sigmas)]

    @property
    def max_level(self) -> float:
        """The noise level that sampling starts from."""
        return self.levels(torch.tensor([self.last_time], dtype=torch.float64))[1][0]

    def karras_times(self, steps: int) -> torch.Tensor:
        """Returns times (S,) whose noise levels are evenly spaced in their 7th root from last_time to first_time
        (Karras et al. 2022, eq. 5)."""
        _, ends = self.levels(torch.tensor([self.last_time, self.first_time], dtype=torch.float64))
        first, last = torch.tensor(ends, dtype=torch.float64) ** (1 / 7)
        levels = (first + torch.linspace(0, 1, steps, dtype=torch.float64) * (last - first)) ** 7
        return torch.tensor([self.time_of(v) for v in levels.tolist()], dtype=torch.float64)
