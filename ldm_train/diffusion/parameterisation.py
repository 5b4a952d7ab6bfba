"""Parameterisations: what the network predicts. Each class defines its training target and converts an output to an
estimate of x_0.

All of them are written for x_t = alpha x_0 + sigma eps as the network receives it (`NoiseProcess.network_view`). A new
one needs only these attributes and methods:

easier_with_noise           whether the error falls (True) or rises (False) with the noise; None: neither
learns_without_signal       whether x_0 can be recovered when alpha is 0
any_scale                   whether it is also defined when alpha^2 + sigma^2 is not 1
"""

from typing import Protocol

from torch import Tensor

Coefficient = float | Tensor


class Parameterisation(Protocol):
    """The interface. Tensors are (B, C, h, w); alpha and sigma are numbers, or tensors that broadcast to that shape."""

    easier_with_noise: bool | None
    learns_without_signal: bool
    any_scale: bool

    def target(self, latents: Tensor, noise: Tensor, alpha: Coefficient, sigma: Coefficient) -> Tensor:
        """Returns the training target of the network for the input alpha latents + sigma noise."""

    def to_pred_x0(self, output: Tensor, x_t: Tensor, alpha: Coefficient, sigma: Coefficient) -> Tensor:
        """Converts the network's output to an estimate of x_0."""

    def from_pred_x0(self, pred_x0: Tensor, x_t: Tensor, alpha: Coefficient, sigma: Coefficient) -> Tensor:
        """The inverse of `to_pred_x0`: returns the output that gives pred_x0."""

    def error_ratio(self, snr: Tensor) -> Tensor | float:
        """Returns the squared error of the output divided by that of the resulting estimate of x_0."""


class Epsilon:
    """Predicts the noise (Ho et al. 2020)."""

    easier_with_noise: bool | None = True
    learns_without_signal = False
    any_scale = True

    def target(self, latents: Tensor, noise: Tensor, alpha: Coefficient, sigma: Coefficient) -> Tensor:
        return noise

    def to_pred_x0(self, output: Tensor, x_t: Tensor, alpha: Coefficient, sigma: Coefficient) -> Tensor:
        return (x_t - sigma * output) / alpha

    def from_pred_x0(self, pred_x0: Tensor, x_t: Tensor, alpha: Coefficient, sigma: Coefficient) -> Tensor:
        return (x_t - alpha * pred_x0) / sigma

    def error_ratio(self, snr: Tensor) -> Tensor:
        return snr


class VPrediction:
    """v = alpha eps - sigma x_0 (Salimans and Ho 2022), for alpha^2 + sigma^2 = 1."""

    easier_with_noise: bool | None = None
    learns_without_signal = True
    any_scale = False

    def target(self, latents: Tensor, noise: Tensor, alpha: Coefficient, sigma: Coefficient) -> Tensor:
        return alpha * noise - sigma * latents

    def to_pred_x0(self, output: Tensor, x_t: Tensor, alpha: Coefficient, sigma: Coefficient) -> Tensor:
        return alpha * x_t - sigma * output

    def from_pred_x0(self, pred_x0: Tensor, x_t: Tensor, alpha: Coefficient, sigma: Coefficient) -> Tensor:
        return (alpha * x_t - pred_x0) / sigma

    def error_ratio(self, snr: Tensor) -> Tensor:
        return snr + 1


class Sample:
    """Predicts the clean latents themselves."""

    easier_with_noise: bool | None = False
    learns_without_signal = True
    any_scale = True

    def target(self, latents: Tensor, noise: Tensor, alpha: Coefficient, sigma: Coefficient) -> Tensor:
        return latents

    def to_pred_x0(self, output: Tensor, x_t: Tensor, alpha: Coefficient, sigma: Coefficient) -> Tensor:
        return output

    def from_pred_x0(self, pred_x0: Tensor, x_t: Tensor, alpha: Coefficient, sigma: Coefficient) -> Tensor:
        return pred_x0

    def error_ratio(self, snr: Tensor) -> float:
        return 1.0
