"""DPM-Solver++ (Lu et al. 2022, arXiv:2211.01095): exponential integrators in half the log-SNR, for pred_x0."""

from math import exp, expm1, inf, log

import torch

from ldm_train.diffusion.guidance import Denoise
from ldm_train.diffusion.process import NoiseProcess
from ldm_train.rng import NoiseSource
from ldm_train.samplers import Callback

KINDS = ("2m", "2s", "sde_2m")


def dpm_solver(
    denoise: Denoise,
    x_t: torch.Tensor,
    timesteps: torch.Tensor,
    schedule: NoiseProcess,
    noise: NoiseSource,
    *,
    kind: str = "2m",
    callback: Callback | None = None,
) -> torch.Tensor:
    """x_s = sigma_s / sigma_t x_t - alpha_s (e^-h - 1) D,  h = lambda_s - lambda_t,  lambda = log(alpha / sigma).

    kind: "2m" extrapolates D from the previous step (algorithm 2 of the paper); "2s" takes steps in pairs, in which the
        first step ends at the midpoint of the second (algorithm 1); "sde_2m" is 2m with fresh noise. Each step takes
        one evaluation. The step to the clean image, where lambda is infinite, is of first order.
    Raises ValueError for another kind.
    The other arguments: see `ldm_train.samplers`.
    """
    if kind not in KINDS:
        raise ValueError(f"sampler.kind is one of {', '.join(KINDS)}, not {kind!r}")
    (alphas, sigmas), times = schedule.coefficients(timesteps), timesteps.tolist()
    lambdas = [log(a / s) if s > 0 else inf for a, s in zip(alphas, sigmas)]
    steps = len(times) - 1

    def move(x: torch.Tensor, d: torch.Tensor, t: int, s: int, stochastic: bool = False) -> torch.Tensor:
        h = lambdas[s] - lambdas[t]
        decay = exp(-h) if stochastic else 1.0
        share = -expm1(-2 * h if stochastic else -h)
        x = sigmas[s] / sigmas[t] * decay * x + alphas[s] * share * d
        if stochastic and sigmas[s] > 0:
            x = x + sigmas[s] * share**0.5 * noise.normal(x.shape[1:], t, x.device)
        return x

    before: torch.Tensor | None = None
    start = x_t  # start of the current pair
    for step in range(steps):
        pred_x0 = denoise(x_t, times[step])
        last = lambdas[step + 1] == inf
        if kind == "2s":
            if step % 2 and not last and before is not None:
                # Complete the pair from its start, with the estimate at this midpoint.
                h = lambdas[step + 1] - lambdas[step - 1]
                ratio = h / (lambdas[step] - lambdas[step - 1])
                x_t = move(start, before + ratio / 2 * (pred_x0 - before), step - 1, step + 1)
            else:
                start, x_t = x_t, move(x_t, pred_x0, step, step + 1)
        else:
            d = pred_x0
            if before is not None and not last:
                ratio = (lambdas[step + 1] - lambdas[step]) / (lambdas[step] - lambdas[step - 1])
                d = pred_x0 + ratio / 2 * (pred_x0 - before)
            x_t = move(x_t, d, step, step + 1, kind == "sde_2m")
        before = pred_x0
        if callback:
            callback(step, pred_x0)
    return x_t
