"""Measures of a first stage's latents that predict the quality of a diffusion model before it is trained.

Reconstruction error ranks autoencoders badly for generation; these do better (the shape of the spectrum, equivariance,
the decoder's tolerance, decoded interpolations), and each takes seconds.
"""

import torch

from ldm_train.models.first_stage import FirstStage

NOISE = 0.1  # standard deviations of the (unit-variance) latents


def spectrum_slope(latents: torch.Tensor) -> torch.Tensor:
    """Slope of log power over log frequency of latents (B, C, h, w) -> (B,): about -2 for natural pictures, 0 for white
    noise. A flat spectrum has no coarse-to-fine order that diffusion could follow (Skorokhodov et al. 2025).

    The line is fitted by least squares to radial means over rings one frequency wide, from 1 to the Nyquist frequency
    of the shorter side. Raises ValueError for sides below 8, which have fewer than four rings.
    """
    height, width = latents.shape[2:]
    if min(height, width) < 8:
        raise ValueError(f"a spectrum needs latents of at least 8 x 8, not {height} x {width}")
    latents = latents.cpu().double()
    x = latents - latents.mean(dim=(2, 3), keepdim=True)
    power = torch.fft.fft2(x).abs().square().mean(dim=1)
    rows, columns = (torch.fft.fftfreq(n, 1 / n, dtype=torch.float64) for n in (height, width))
    shortest = min(height, width)
    radius = ((rows[:, None] / height) ** 2 + (columns[None] / width) ** 2).sqrt() * shortest
    rings = torch.arange(1, shortest // 2 + 1)
    means = torch.stack([power[:, radius.round() == r].mean(dim=1) for r in rings], dim=1).clamp(min=1e-20).log()
    position = rings.double().log()
    position = position - position.mean()
    return (means * position).sum(dim=1) / position.square().sum()


def _halved(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.interpolate(x, scale_factor=0.5, mode="bilinear", antialias=True, align_corners=False)


@torch.no_grad()
def equivariance_error(first_stage: FirstStage, latents: torch.Tensor) -> torch.Tensor:
    """Mean squared difference between decoding transformed latents and transforming decoded pictures, over the variance of
    the pictures, for a quarter turn and half the size (Kouzelis et al. 2025). latents (B, C, h, w) scaled -> (B,)."""
    images = first_stage.decode(latents)
    variance = images.var(dim=(1, 2, 3)).clamp(min=1e-6)
    changes = [lambda x: x.rot90(1, (2, 3))]
    if min(latents.shape[2:]) >= 4 and all(n % 2 == 0 for n in latents.shape[2:]):
        changes.append(_halved)
    errors = [
        (first_stage.decode(change(latents)) - change(images)).square().mean(dim=(1, 2, 3)) / variance
        for change in changes
    ]
    return torch.stack(errors).mean(dim=0)


@torch.no_grad()
def decoder_sensitivity(first_stage: FirstStage, latents: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """How much the decoder amplifies a small error of the latents: relative squared change of the
    picture over that of the latents, at noise of 0.1 standard deviations. latents, noise (B, C, h, w) -> (B,)."""
    images = first_stage.decode(latents)
    change = (first_stage.decode(latents + NOISE * noise) - images).square().mean(dim=(1, 2, 3))
    return change / images.var(dim=(1, 2, 3)).clamp(min=1e-6) / NOISE**2


def nearest_neighbours(latents: torch.Tensor) -> torch.Tensor:
    """Returns the index of the nearest other latent for each latent: (N, C, h, w) -> (N,)."""
    flat = latents.flatten(1).float()
    distances = torch.cdist(flat, flat)
    return distances.fill_diagonal_(float("inf")).argmin(dim=1)
