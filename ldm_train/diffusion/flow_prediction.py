"""The parameterisation of rectified flow."""

from torch import Tensor

from ldm_train.diffusion.parameterisation import Coefficient


class FlowPrediction:
    """u = eps - x_0, the direction of the straight path from image to noise (Liu et al. 2022, eq. 1)."""

    easier_with_noise: bool | None = None
    learns_without_signal = True
    any_scale = True

    def target(self, latents: Tensor, noise: Tensor, alpha: Coefficient, sigma: Coefficient) -> Tensor:
        return noise - latents

    def to_pred_x0(self, output: Tensor, x_t: Tensor, alpha: Coefficient, sigma: Coefficient) -> Tensor:
        return (x_t - sigma * output) / (alpha + sigma)

    def from_pred_x0(self, pred_x0: Tensor, x_t: Tensor, alpha: Coefficient, sigma: Coefficient) -> Tensor:
        return (x_t - (alpha + sigma) * pred_x0) / sigma

    def error_ratio(self, snr: Tensor) -> Tensor:
        return (1 + snr.sqrt()).square()
