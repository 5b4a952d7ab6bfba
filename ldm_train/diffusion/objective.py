"""The training objective: which timesteps, which target, and how each sample is weighted."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from ldm_train.diffusion.parameterisation import Epsilon, Parameterisation
from ldm_train.diffusion.process import NoiseProcess, expand_to

NO_SIGNAL = 1e-3  # alpha / sigma below which an estimate of the image holds nothing but the error of the noise


def check_compatible(parameterisation: Parameterisation, schedule: NoiseProcess) -> None:
    """Raises ValueError for a parameterisation that is not defined for this process, or cannot be learned with it."""
    if not (schedule.variance_preserving or parameterisation.any_scale):
        raise ValueError(
            f"{type(parameterisation).__name__} is defined for variance-preserving processes; use diffusion/objective=flow"
        )
    if schedule.zero_terminal_snr and not parameterisation.learns_without_signal:
        raise ValueError(
            f"{type(parameterisation).__name__} cannot learn a schedule that ends without signal (zero_terminal_snr): there the "
            f"noise says nothing about the image; use diffusion/objective={'v' if schedule.variance_preserving else 'flow'}"
        )


class DiffusionObjective(nn.Module):
    """Denoising score matching at times that the noise process draws.

    schedule: the noise process. parameterisation: what the network predicts (default: the noise)
    loss: "l2" (mean squared error) or "l1"
    weighting: "uniform"; "min_snr" (Hang et al. 2023): min(SNR, gamma) per squared error in x_0, so min(SNR, gamma) /
        SNR for epsilon and min(SNR, gamma) / (SNR + 1) for v, but 1 where the SNR is 0 (the last timestep with
        zero_terminal_snr). There the formulas give 0 (0 / 0 for epsilon), and the step that sampling starts from would
        never be trained; 1 is its weight under "uniform". Or "learned": loss / exp(u_t) + u_t with a learned u per
        timestep (Kendall and Gal 2017; latent diffusion's learn_logvar)
    offset_noise: standard deviation of added noise that is constant over the image, per channel, so that very dark and
        very bright images are learned (0: none)
    input_perturbation: standard deviation of additional noise in the network's input that is not in the target, in
        training only (DDPM-IP, Ning et al. 2023, arXiv:2301.11706, algorithm 1): makes the network robust to its own
        errors (0: none)
    immiscible: number of noises drawn for each image, of which the one nearest to its latents is used (Li et al. 2024,
        arXiv:2406.12303, here for each image separately), so that paths cross less (1: no choice)
    stratified: draw each time of a global batch from its own stratum of the density; same expectation, less variance
    Raises ValueError for invalid options, and for a parameterisation that does not fit the process.
    """

    def __init__(
        self,
        schedule: NoiseProcess,
        parameterisation: Parameterisation | None = None,
        weighting: str = "uniform",
        min_snr_gamma: float = 5.0,
        stratified: bool = True,
        loss: str = "l2",
        offset_noise: float = 0.0,
        input_perturbation: float = 0.0,
        immiscible: int = 1,
    ):
        super().__init__()
        if weighting not in ("uniform", "min_snr", "learned"):
            raise ValueError(f"weighting {weighting!r} is not one of uniform, min_snr, learned")
        if loss not in ("l1", "l2"):
            raise ValueError(f"diffusion.objective.loss is l1 or l2, not {loss!r}")
        self.schedule = schedule
        self.parameterisation: Parameterisation = parameterisation or Epsilon()
        check_compatible(self.parameterisation, schedule)
        self.weighting, self.min_snr_gamma, self.stratified = weighting, min_snr_gamma, stratified
        self.error = F.l1_loss if loss == "l1" else F.mse_loss
        if input_perturbation < 0:
            raise ValueError(f"diffusion.objective.input_perturbation={input_perturbation} is a deviation: at least 0")
        if not isinstance(immiscible, int) or immiscible < 1:
            raise ValueError(f"diffusion.objective.immiscible={immiscible} is a number of noises: 1 or more")
        self.offset_noise, self.input_perturbation, self.immiscible = offset_noise, input_perturbation, immiscible
        if weighting == "learned":
            self.uncertainty = nn.Parameter(torch.zeros(schedule.num_train_timesteps))

    def warning(self) -> str:
        """Returns a warning if the target holds almost no information about the image at the time where sampling
        begins, otherwise an empty string."""
        alpha, sigma = self.schedule.numbers(self.schedule.last_time)
        if self.parameterisation.learns_without_signal or alpha > NO_SIGNAL * sigma:
            return ""
        return (
            f"this schedule ends at a signal-to-noise ratio of {(alpha / sigma) ** 2:.0e}, where sampling begins and where "
            f"{type(self.parameterisation).__name__} says nothing of the picture; diffusion/objective=v or sample does"
        )

    def sample_timesteps(
        self, count: int, part: int = 0, parts: int = 1, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """Draws times (count,) of the process for one of the equal `parts` of a global batch. Stratified times of each
        part spread over all noise levels."""
        uniform = torch.rand(count, generator=generator, dtype=torch.float64)
        if self.stratified:
            strata = torch.arange(part, count * parts, parts, dtype=torch.float64)
            uniform = (strata + uniform) / (count * parts)
        return self.schedule.training_times(uniform)

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        alpha, sigma = (expand_to(v, latents) for v in self.schedule.training_coefficients(timesteps))
        return self.parameterisation.target(latents, noise, alpha, sigma)

    def draw_noise(self, latents: torch.Tensor) -> torch.Tensor:
        """Draws training noise of the shape of `latents`, from the global generator."""
        if self.immiscible > 1:
            choices = torch.randn((self.immiscible, *latents.shape), device=latents.device, dtype=latents.dtype)
            nearest = (choices - latents).flatten(2).square().sum(dim=2).argmin(dim=0)
            noise = choices.gather(0, nearest.view(1, -1, *[1] * (latents.ndim - 1)).expand(1, *latents.shape))[0]
        else:
            noise = torch.randn_like(latents)
        if self.offset_noise:
            noise = noise + self.offset_noise * torch.randn_like(latents[:, :, :1, :1])
        return noise

    def weighted(self, loss: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Returns what training minimises, from the loss and time per sample: (B,), (B,) -> (B,)."""
        if self.weighting == "learned":
            uncertainty = self.uncertainty[timesteps.long()]
            return loss / uncertainty.exp() + uncertainty
        return loss * self.weight(timesteps)

    def weight(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Returns the loss weight per sample, (B,) float32."""
        if self.weighting == "uniform":
            return torch.ones(len(timesteps), device=timesteps.device)
        if self.weighting == "learned":
            return (-self.uncertainty.detach()[timesteps.long()]).exp()
        snr = self.schedule.signal_to_noise(timesteps)
        clipped = snr.clamp(max=self.min_snr_gamma)
        return torch.where(snr > 0, clipped / self.parameterisation.error_ratio(snr), 1.0).float()

    def forward(
        self,
        predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        latents: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
    ) -> torch.Tensor:
        """Returns the mean error per sample, (B,) float32, unweighted. predict: (noisy_latents, timesteps) ->
        output."""
        given = noise
        if self.input_perturbation and self.training:
            given = noise + self.input_perturbation * torch.randn_like(noise)
        noisy_latents = self.schedule.add_noise(latents, given, timesteps)
        output = predict(noisy_latents, timesteps)
        error = self.error(output.float(), self.target(latents, noise, timesteps).float(), reduction="none")
        return error.flatten(1).mean(dim=1)
