"""UniPC (Zhao et al. 2023, arXiv:2302.04867): a predictor and a corrector of the same family, with one evaluation per
step."""

from math import expm1, inf, log

import numpy as np
import torch

from ldm_train.diffusion.guidance import Denoise
from ldm_train.diffusion.process import NoiseProcess
from ldm_train.rng import NoiseSource
from ldm_train.samplers import Callback


def unipc(
    denoise: Denoise,
    x_t: torch.Tensor,
    timesteps: torch.Tensor,
    schedule: NoiseProcess,
    noise: NoiseSource,
    *,
    order: int = 2,
    callback: Callback | None = None,
) -> torch.Tensor:
    """Multistep UniPC on pred_x0 with B(h) = e^h - 1 (the paper's B2); the order is lower near both ends.

    Each estimate first corrects the point at which it was taken, then predicts the next one.
    order: 1 to 3. Raises ValueError for another order. No noise is drawn.
    The other arguments: see `ldm_train.samplers`.
    """
    if not 1 <= order <= 3:
        raise ValueError(f"sampler.order of unipc is 1, 2 or 3, not {order}")
    (alphas, sigmas), times = schedule.coefficients(timesteps), timesteps.tolist()
    lambdas = [log(a / s) if s > 0 else inf for a, s in zip(alphas, sigmas)]
    steps = len(times) - 1

    def update(x: torch.Tensor, models: list[torch.Tensor], s: int, now: torch.Tensor | None, p: int) -> torch.Tensor:
        """Moves x from step s to s + 1 at order p. models: estimates at s, s - 1, ...; now: the one at s + 1, for the
        corrector."""
        hh = lambdas[s] - lambdas[s + 1]  # -h, as in the variant for pred_x0
        phi = expm1(hh) if hh > -inf else -1.0
        base = sigmas[s + 1] / sigmas[s] * x - alphas[s + 1] * phi * models[0]
        ratios = [(lambdas[s - k] - lambdas[s]) / -hh for k in range(1, p)]
        differences = [(models[k] - models[0]) / ratios[k - 1] for k in range(1, p)]
        if now is not None:
            ratios, differences = [*ratios, 1.0], [*differences, now - models[0]]
        if not differences:
            return base
        if len(differences) == 1:
            rhos = [0.5]  # the authors' simplification
        else:
            system, right, factorial, phi_k = [], [], 1.0, phi / hh - 1
            for k in range(1, len(differences) + 1):
                system.append([r ** (k - 1) for r in ratios])
                right.append(phi_k * factorial / phi)
                factorial *= k + 1
                phi_k = phi_k / hh - 1 / factorial
            rhos = np.linalg.solve(np.array(system), np.array(right)).tolist()
        correction = sum(rho * d for rho, d in zip(rhos, differences))
        return base - alphas[s + 1] * phi * correction

    models: list[torch.Tensor] = []
    before, used = x_t, 0  # the previous corrected point, and the order of the step from it
    for step in range(steps):
        pred_x0 = denoise(x_t, times[step])
        if step:
            x_t = update(before, models, step - 1, pred_x0, used)
        models = [pred_x0, *models[: order - 1]]
        used = min(order, step + 1, steps - step)
        before, x_t = x_t, update(x_t, models, step, None, used)
        if callback:
            callback(step, pred_x0)
    return x_t
