"""Linear multistep in the noise level: Adams-Bashforth with the actual, uneven steps."""

import numpy as np
import torch
from numpy.polynomial.polynomial import Polynomial, polyfromroots

from ldm_train.diffusion.guidance import Denoise
from ldm_train.diffusion.process import NoiseProcess
from ldm_train.rng import NoiseSource
from ldm_train.samplers import Callback


def weights(levels: list[float], step: int, order: int) -> list[float]:
    """Returns the integrals from levels[step] to levels[step + 1] of the Lagrange polynomials through the last `order`
    levels, the newest first."""
    nodes = levels[step - order + 1 : step + 1][::-1]
    integrals = []
    for k, node in enumerate(nodes):
        others = [other for j, other in enumerate(nodes) if j != k]
        # Shifted to the newest node, to keep the numbers small.
        integral = Polynomial(polyfromroots([other - nodes[0] for other in others])).integ()
        scale = float(np.prod([node - other for other in others]))
        integrals.append(float(integral(levels[step + 1] - nodes[0]) - integral(levels[step] - nodes[0])) / scale)
    return integrals


def lms(
    denoise: Denoise,
    x_t: torch.Tensor,
    timesteps: torch.Tensor,
    schedule: NoiseProcess,
    noise: NoiseSource,
    *,
    order: int = 4,
    callback: Callback | None = None,
) -> torch.Tensor:
    """Moves y = x / alpha along the polynomial through the last `order` slopes (y - x_0) / sigma.

    No noise is drawn. Raises ValueError for an order below 1 or above 6: beyond, small errors grow from step to step.
    The other arguments: see `ldm_train.samplers`.
    """
    if not 1 <= order <= 6:
        raise ValueError(f"sampler.order is {order}; it must lie between 1 and 6")
    (alphas, levels), times = schedule.levels(timesteps), timesteps.tolist()
    y, slopes = x_t / alphas[0], list[torch.Tensor]()
    for step in range(len(times) - 1):
        pred_x0 = denoise(y * alphas[step], times[step])
        slopes = [(y - pred_x0) / levels[step], *slopes[: order - 1]]
        for weight, slope in zip(weights(levels, step, len(slopes)), slopes):
            y = y + weight * slope
        if callback:
            callback(step, pred_x0)
    return y * alphas[-1]
