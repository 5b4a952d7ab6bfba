"""The training objective: which timesteps, which target, how each sample is weighted."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from ldm_train.diffusion.schedule import NoiseSchedule, expand_to

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def to_pred_x0(
    output: torch.Tensor, x_t: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor, prediction_type: str
) -> torch.Tensor:
    """The network's output as an estimate of x_0, for x_t = alpha x_0 + sigma eps."""
    if prediction_type == "epsilon":
        return (x_t - sigma * output) / alpha
    if prediction_type == "v_prediction":  # v = alpha eps - sigma x_0 (Salimans and Ho 2022)
        return alpha * x_t - sigma * output
    return output


def from_pred_x0(
    pred_x0: torch.Tensor, x_t: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor, prediction_type: str
) -> torch.Tensor:
    """The network's output that `to_pred_x0` makes pred_x0 of."""
    if prediction_type == "epsilon":
        return (x_t - alpha * pred_x0) / sigma
    if prediction_type == "v_prediction":
        return (alpha * x_t - pred_x0) / sigma
    return pred_x0


class DiffusionObjective(nn.Module):
    """Denoising score matching at uniformly drawn timesteps.

    schedule: NoiseSchedule
    prediction_type: "epsilon" (default), "v_prediction" or "sample"
    loss: "l2" (mean squared error) or "l1"
    weighting: "uniform"; "min_snr" (Hang et al. 2023): min(SNR, gamma) / SNR for epsilon, min(SNR, gamma) for sample,
        min(SNR, gamma) / (SNR + 1) for v_prediction, but 1 where the SNR is 0 (zero_terminal_snr's last timestep). There
        the formulas give 0 (0 / 0 for epsilon), and the step that sampling starts from would never be trained; 1 is its
        weight under "uniform", for both of the others, as v = -x_0 there. Or "learned": loss / exp(u_t) + u_t with a
        learned u per timestep (Kendall and Gal 2017; latent diffusion's learn_logvar)
    offset_noise: adds so many standard deviations of noise that is constant over the picture, per channel, so that
        very dark and very bright pictures are learned (0: none)
    stratified: draw each timestep of a global batch from its own slice of [0, T); same expectation, less variance
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        prediction_type: str = "epsilon",
        weighting: str = "uniform",
        min_snr_gamma: float = 5.0,
        stratified: bool = True,
        loss: str = "l2",
        offset_noise: float = 0.0,
    ):
        super().__init__()
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type {prediction_type!r} is none of {', '.join(PREDICTION_TYPES)}")
        if weighting not in ("uniform", "min_snr", "learned"):
            raise ValueError(f"weighting {weighting!r} is none of uniform, min_snr, learned")
        if loss not in ("l1", "l2"):
            raise ValueError(f"diffusion.objective.loss is l1 or l2, not {loss!r}")
        if prediction_type == "epsilon" and schedule.zero_terminal_snr:
            raise ValueError(
                "prediction_type=epsilon cannot learn a schedule with zero_terminal_snr: at its end the noise says "
                "nothing about the image; use diffusion/objective=v"
            )
        self.schedule, self.prediction_type = schedule, prediction_type
        self.weighting, self.min_snr_gamma, self.stratified = weighting, min_snr_gamma, stratified
        self.error = F.l1_loss if loss == "l1" else F.mse_loss
        self.offset_noise = offset_noise
        if weighting == "learned":
            self.uncertainty = nn.Parameter(torch.zeros(schedule.num_train_timesteps))

    def sample_timesteps(
        self, count: int, first: int = 0, total: int | None = None, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """Timesteps (count,) int64 in [0, T): samples first, first + 1, ... of a global batch of `total`."""
        uniform = torch.rand(count, generator=generator, dtype=torch.float64)
        if self.stratified:
            uniform = (torch.arange(first, first + count, dtype=torch.float64) + uniform) / (total or count)
        return (uniform * self.schedule.num_train_timesteps).long()

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return latents
        abar = self.schedule.alphas_cumprod[timesteps]
        return expand_to(abar.sqrt(), noise) * noise - expand_to((1 - abar).sqrt(), noise) * latents

    def draw_noise(self, latents: torch.Tensor) -> torch.Tensor:
        """Training noise like `latents`, from the global generator."""
        noise = torch.randn_like(latents)
        if self.offset_noise:
            noise = noise + self.offset_noise * torch.randn_like(latents[:, :, :1, :1])
        return noise

    def weighted(self, loss: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """What training minimises, from the losses per sample: (B,), (B,) -> (B,)."""
        if self.weighting == "learned":
            uncertainty = self.uncertainty[timesteps]
            return loss / uncertainty.exp() + uncertainty
        return loss * self.weight(timesteps)

    def weight(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Loss weight per sample, (B,) float32."""
        if self.weighting == "uniform":
            return torch.ones(len(timesteps), device=timesteps.device)
        if self.weighting == "learned":
            return (-self.uncertainty.detach()[timesteps]).exp()
        snr = self.schedule.snr[timesteps]
        clipped = snr.clamp(max=self.min_snr_gamma)
        divisor = {"epsilon": snr, "v_prediction": snr + 1, "sample": 1.0}[self.prediction_type]
        return torch.where(snr > 0, clipped / divisor, 1.0).float()

    def forward(
        self,
        predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        latents: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
    ) -> torch.Tensor:
        """Mean error per sample, (B,) float32, unweighted. predict: (noisy_latents, timesteps) -> output."""
        noisy_latents = self.schedule.add_noise(latents, noise, timesteps)
        output = predict(noisy_latents, timesteps)
        error = self.error(output.float(), self.target(latents, noise, timesteps).float(), reduction="none")
        return error.flatten(1).mean(dim=1)
