"""Samplers: one function each, all with the same signature.

sampler(denoise, x_t, timesteps, schedule, noise, *, <its own options>, callback=None) -> latents at timesteps[-1]

x_t         (B, C, h, w) at timesteps[0], variance preserving
timesteps   decreasing, (S + 1,)
noise       source of fresh noise; samplers that need none ignore it
callback    called with (step, pred_x0 (B, C, h, w)) after each step
"""

from collections.abc import Callable

import torch

Callback = Callable[[int, torch.Tensor], None]
