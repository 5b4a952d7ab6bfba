"""The parameterisation of rectified flow."""


class FlowPrediction:
    """u = eps - x_0, the direction of the straight path from picture to noise (Liu et al. 2022, eq. 1)."""

    easier_with_noise = None
    learns_without_signal = True
    any_scale = True

    def target(self, latents, noise, alpha, sigma):
        return noise - latents

    def to_pred_x0(self, output, x_t, alpha, sigma):
        return (x_t - sigma * output) / (alpha + sigma)

    def from_pred_x0(self, pred_x0, x_t, alpha, sigma):
        return (x_t - (alpha + sigma) * pred_x0) / sigma

    def error_ratio(self, snr):
        return (1 + snr.sqrt()).square()
