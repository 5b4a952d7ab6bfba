"""The noise schedule: q(x_t | x_0) = N(alpha_t x_0, sigma_t^2), alpha^2 + sigma^2 = 1 (variance preserving)."""

from collections.abc import Callable

import numpy as np
import torch

from ldm_train.diffusion.process import NoiseProcess, widest


def make_betas(kind: str, beta_start: float, beta_end: float, num_train_timesteps: int) -> torch.Tensor:
    """Returns betas (T,) float64.

    kind: "scaled_linear" is linear in sqrt(beta) (what CompVis calls "linear"), "linear" is linear in beta, "sqrt" is
        the square root of that line (CompVis' "sqrt"), "cosine" has abar_t = cos^2((t / T + 0.008) / 1.008 pi / 2) with
        betas of at most 0.999, and ignores beta_start and beta_end (Nichol and Dhariwal 2021).
    Raises ValueError for another kind, or unless 0 < beta_start <= beta_end < 1.
    """
    if kind == "cosine":
        angle = (torch.arange(num_train_timesteps + 1, dtype=torch.float64) / num_train_timesteps + 0.008) / 1.008
        alphas_cumprod = torch.cos(angle * torch.pi / 2).square()
        return (1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(max=0.999)
    if not 0 < beta_start <= beta_end < 1:
        raise ValueError(f"need 0 < beta_start <= beta_end < 1, got {beta_start} and {beta_end}")
    if kind == "scaled_linear":
        return torch.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps, dtype=torch.float64).square()
    line = torch.linspace(beta_start, beta_end, num_train_timesteps, dtype=torch.float64)
    if kind == "linear":
        return line
    if kind == "sqrt":
        return line.sqrt()
    raise ValueError(f"unknown beta schedule {kind!r}; choose scaled_linear, linear, sqrt or cosine")


def rescale_zero_terminal_snr(betas: torch.Tensor) -> torch.Tensor:
    """Returns betas with sqrt(abar) shifted and scaled so that its last entry is 0 and its first is unchanged   (Lin et
    al. 2023, algorithm 1)."""
    root = torch.cumprod(1 - betas, dim=0).sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    alphas_cumprod = root.square()
    return 1 - torch.cat([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])


class NoiseSchedule(NoiseProcess):
    """A schedule of discrete timesteps: tables in float64, with `at(t)` between their entries. t = -1 is the clean
    image.

    kind, beta_start, beta_end, num_train_timesteps: see `make_betas`. LDM: scaled_linear, 0.0015, 0.0195, 1000.
    zero_terminal_snr: no signal is left at T - 1; not for epsilon prediction, which could not recover the image there.
    """

    def __init__(
        self,
        kind: str = "scaled_linear",
        beta_start: float = 0.0015,
        beta_end: float = 0.0195,
        num_train_timesteps: int = 1000,
        zero_terminal_snr: bool = False,
    ):
        super().__init__()
        self.num_train_timesteps, self.zero_terminal_snr = num_train_timesteps, zero_terminal_snr
        self.first_time, self.last_time = 0.0, num_train_timesteps - 1.0
        betas = make_betas(kind, beta_start, beta_end, num_train_timesteps)
        if zero_terminal_snr:
            betas = rescale_zero_terminal_snr(betas)
        self.betas = betas
        self.host_table = torch.cumprod(1 - betas, dim=0)  # so that sampling reads no numbers back from a device
        self.register_buffer("place", torch.zeros(()), persistent=False)  # tracks the model's device
        self._make_tables()

    place: torch.Tensor

    def _make_tables(self) -> None:
        # The tables follow the model between devices but stay float64, whatever precision the model is cast to; on
        # devices without float64 they are rounded after everything is computed.
        abar = self.host_table
        tables = abar, abar.sqrt(), (1 - abar).sqrt(), abar / (1 - abar)
        there = (t.to(self.place.device, widest(self.place.device)) for t in tables)
        self.alphas_cumprod, self.alphas, self.sigmas, self.snr = there

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "NoiseSchedule":
        before = self.place.device
        super()._apply(fn, recurse)
        if self.place.device != before:
            self._make_tables()
        return self

    def training_times(self, uniform: torch.Tensor) -> torch.Tensor:
        """Integer timesteps 0 .. T - 1, int64."""
        return (uniform * self.num_train_timesteps).long()

    def training_coefficients(self, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """sqrt(abar_t), sqrt(1 - abar_t); timesteps (B,) integer."""
        return self.alphas[timesteps], self.sigmas[timesteps]

    def signal_to_noise(self, timesteps: torch.Tensor) -> torch.Tensor:
        return self.snr[timesteps]

    def at(self, t: float | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns (alpha, sigma, log SNR) at a float time in [-1, T - 1], each float64 with the shape of t.

        Between table entries the log-SNR is linear in t; between the clean image (t = -1) and entry 0, sigma is linear
        in t.
        """
        t = torch.as_tensor(t, dtype=widest(t.device) if isinstance(t, torch.Tensor) else torch.float64)
        table = self.host_table if t.device == self.host_table.device else self.alphas_cumprod
        t = t.to(table.device)
        # Zero signal would have an infinite log-SNR, which cannot be interpolated; 1e-20 is negligible in float32.
        log_snr_table = torch.log(table.clamp(min=1e-20)) - torch.log1p(-table)
        low = t.floor().clamp(0, self.num_train_timesteps - 1).long()
        high = (low + 1).clamp(max=self.num_train_timesteps - 1)
        weight = (t - low).clamp(0, 1)
        log_snr = torch.lerp(log_snr_table[low], log_snr_table[high], weight)
        near_clean = (1 - table[0]).sqrt() * (t + 1).clamp(0, 1)
        sigma = torch.where(t >= 0, torch.sigmoid(-log_snr).sqrt(), near_clean)
        alpha = torch.where(t >= 0, torch.sigmoid(log_snr).sqrt(), (1 - near_clean.square()).sqrt())
        return alpha, sigma, 2 * (alpha.log() - sigma.log())

    def time_of(self, level: float) -> float:
        if level <= 0:
            return -1.0
        table = (1 / self.host_table - 1).sqrt().numpy()
        if level < table[0]:
            first = float((1 - self.host_table[0]).sqrt())
            return level / (1 + level**2) ** 0.5 / first - 1
        return float(np.interp(np.log(level), np.log(table), np.arange(len(table))))

    def timesteps(self, num_inference_steps: int, spacing: str = "trailing") -> torch.Tensor:
        """Returns S + 1 decreasing times (float64, CPU) that end at -1, the clean image.

        spacing: "trailing" starts at T - 1 and takes even steps down; "leading" starts one step lower and includes 0;
            "linspace" includes both ends (Lin et al. 2023, arXiv:2305.08891, table 2); "karras" spaces the noise levels
            of T - 1 .. 0 evenly in their 7th root (Karras et al. 2022, eq. 5), with fractional times; "compvis" is what
            CompVis does: steps of floor(T / S) down to 1, perhaps more than S of them, ending at 0 and not at the clean
            image.
        Raises ValueError for an unknown spacing, a number of steps outside 1..T, and one that "compvis" cannot take.
        """
        total, steps = self.num_train_timesteps, num_inference_steps
        if not 1 <= steps <= total:
            raise ValueError(f"num_inference_steps is {steps}; it must lie between 1 and {total}")
        index = torch.arange(steps, dtype=torch.float64)
        if spacing == "trailing":
            times = (total - index * total / steps).round() - 1
        elif spacing == "leading":
            times = (index.flip(0) * (total // steps)).round()
        elif spacing == "linspace":
            times = torch.linspace(total - 1, 0, steps, dtype=torch.float64).round()
        elif spacing == "karras":
            times = self.karras_times(steps)
        elif spacing == "compvis":
            times = torch.arange(0, total, total // steps, dtype=torch.float64).flip(0) + 1
            if times[0] >= total:
                raise ValueError(
                    f"spacing=compvis cannot take {steps} of {total} steps; take fewer, or another spacing"
                )
            return torch.cat([times, torch.zeros(1, dtype=torch.float64)])
        else:
            raise ValueError(f"unknown spacing {spacing!r}; choose trailing, leading, linspace, karras or compvis")
        return torch.cat([times, torch.tensor([-1.0], dtype=torch.float64)])
