"""The training objective: which timesteps, which target, how each sample is weighted."""

from collections.abc import Callable

import torch
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


class DiffusionObjective:
    """Denoising score matching at uniformly drawn timesteps.

    schedule: NoiseSchedule
    prediction_type: "epsilon" (default), "v_prediction" or "sample"
    weighting: "uniform", or "min_snr" (Hang et al. 2023): min(SNR, gamma) / SNR for epsilon, min(SNR, gamma) for
        sample, min(SNR, gamma) / (SNR + 1) for v_prediction
    stratified: draw each timestep of a global batch from its own slice of [0, T); same expectation, less variance
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        prediction_type: str = "epsilon",
        weighting: str = "uniform",
        min_snr_gamma: float = 5.0,
        stratified: bool = True,
    ):
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type {prediction_type!r} is none of {', '.join(PREDICTION_TYPES)}")
        if weighting not in ("uniform", "min_snr"):
            raise ValueError(f"weighting {weighting!r} is neither uniform nor min_snr")
        self.schedule, self.prediction_type = schedule, prediction_type
        self.weighting, self.min_snr_gamma, self.stratified = weighting, min_snr_gamma, stratified

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

    def weight(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Loss weight per sample, (B,) float32."""
        if self.weighting == "uniform":
            return torch.ones(len(timesteps), device=timesteps.device)
        snr = self.schedule.snr[timesteps]
        clipped = snr.clamp(max=self.min_snr_gamma)
        if self.prediction_type == "epsilon":
            return torch.where(snr > 0, clipped / snr, 1.0).float()
        return (clipped if self.prediction_type == "sample" else clipped / (snr + 1)).float()

    def __call__(
        self,
        predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        latents: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
    ) -> torch.Tensor:
        """Mean squared error per sample, (B,) float32, unweighted. predict: (noisy_latents, timesteps) -> output."""
        noisy_latents = self.schedule.add_noise(latents, noise, timesteps)
        output = predict(noisy_latents, timesteps)
        error = F.mse_loss(output.float(), self.target(latents, noise, timesteps).float(), reduction="none")
        return error.flatten(1).mean(dim=1)
