"""Samplers: one function each, of one signature.

sampler(denoise, x_t, timesteps, schedule, noise, *, <its own options>, callback=None) -> latents at timesteps[-1]

x_t         (B, C, h, w) at timesteps[0], variance preserving
timesteps   falling, (S + 1,)
noise       where fresh noise is drawn from; samplers without any ignore it
callback    called with (step, pred_x0 (B, C, h, w)) after each step
"""

from collections.abc import Callable

import torch

Callback = Callable[[int, torch.Tensor], None]
