"""Low-resolution versions of images: bicubic reduction, and degradations in the style of BSRGAN (Zhang et al. 2021):
its operations in random order, but with ranges chosen here."""

import io

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from ldm_train.images import from_uint8, to_pil


def _resized(image: torch.Tensor, size: tuple[int, int], mode: str) -> torch.Tensor:
    return F.interpolate(image[None], size, mode=mode, antialias=mode != "nearest")[0]


class Bicubic:
    """Derives the field `lowres` (C, H/factor, W/factor) by antialiased bicubic reduction."""

    def __init__(self, factor: int = 4):
        self.factor = factor

    def size(self, image: torch.Tensor) -> tuple[int, int]:
        """The reduced (height, width) of an image (C, H, W). Raises ValueError if a side is not divisible by
        `factor`."""
        height, width = image.shape[1:]
        if height % self.factor or width % self.factor:
            raise ValueError(f"an image of {height}x{width} cannot be reduced by {self.factor}")
        return height // self.factor, width // self.factor

    def __call__(self, image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        """image (C, H, W) in [-1, 1] -> (C, h, w) in [-1, 1]."""
        return _resized(image, self.size(image), "bicubic").clamp(-1, 1)


def gaussian_kernel(width: int, sigma_x: float, sigma_y: float, angle: float) -> torch.Tensor:
    """An anisotropic Gaussian kernel (width, width), rotated by `angle` radians, that sums to 1."""
    axis = torch.arange(width, dtype=torch.float64) - (width - 1) / 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    along, across = x * np.cos(angle) + y * np.sin(angle), -x * np.sin(angle) + y * np.cos(angle)
    kernel = torch.exp(-0.5 * ((along / sigma_x) ** 2 + (across / sigma_y) ** 2))
    return (kernel / kernel.sum()).float()


def _compressed(image: torch.Tensor, quality: int) -> torch.Tensor:
    """The image (C, H, W) in [-1, 1], C = 1 or 3, after JPEG compression at the given quality."""
    buffer = io.BytesIO()
    to_pil(image).save(buffer, "JPEG", quality=quality)
    decoded = np.atleast_3d(np.array(Image.open(buffer)))
    return from_uint8(torch.from_numpy(decoded).permute(2, 0, 1))


class BSR:
    """Derives `lowres` by a chain of random blurs, reductions, noise and JPEG compressions in random order.

    light: the milder variant for latent diffusion's super-resolution: one blur instead of two, narrower Gaussians,
    noise of 1 to 2 instead of 1 to 25 grey levels, higher JPEG quality.
    """

    def __init__(self, factor: int = 4, light: bool = False):
        self.factor, self.light = factor, light

    def _blur(self, image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        strongest = self.factor * (0.6 if self.light else 1.0)
        if rng.random() < 0.5:
            sigma_x, sigma_y = rng.uniform(0.1, strongest, 2)
        else:
            sigma_x = sigma_y = rng.uniform(0.1, 0.7 * strongest)
        width = int(2 * rng.integers(3, 11) + 1)
        kernel = gaussian_kernel(width, float(sigma_x), float(sigma_y), float(rng.uniform(0, np.pi)))
        pad = width // 2
        padded = F.pad(image[None], [pad] * 4, mode="reflect" if pad < min(image.shape[1:]) else "replicate")
        return F.conv2d(padded, kernel.expand(len(image), 1, -1, -1), groups=len(image))[0]

    def _noise(self, image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        level = rng.uniform(1, 2 if self.light else 25) / 127.5
        kind = rng.random()
        if kind < 0.4:
            noise = rng.standard_normal(image.shape)
        elif kind < 0.8:  # grey: the same in all channels
            noise = np.broadcast_to(rng.standard_normal((1, *image.shape[1:])), image.shape)
        else:  # speckle: proportional to the signal
            noise = rng.standard_normal(image.shape) * ((image.numpy() + 1) / 2)
        return (image + float(level) * torch.from_numpy(noise.astype(np.float32))).clamp(-1, 1)

    def _jpeg(self, image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        quality = int(rng.integers(80 if self.light else 30, 96))
        if len(image) not in (1, 3):  # JPEG has 1 or 3 channels: compress each channel separately
            return torch.cat([_compressed(channel, quality) for channel in image.split(1)])
        return _compressed(image, quality)

    def __call__(self, image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        """image (C, H, W) in [-1, 1] -> (C, H/factor, W/factor) in [-1, 1]."""
        target = Bicubic(self.factor).size(image)
        modes = ("nearest", "bilinear", "bicubic")
        halfway = float(rng.uniform(1 / self.factor, 1.0)) ** 0.5 if rng.random() < 0.75 else 1.0
        middle = tuple(max(t, round(s * halfway)) for s, t in zip(image.shape[1:], target))

        def shrink(x: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
            return _resized(x, middle, str(rng.choice(modes)))

        steps = [self._blur, shrink, self._noise] if self.light else [self._blur, self._blur, shrink, self._noise]
        if rng.random() < 0.75:
            steps.append(self._jpeg)
        for k in rng.permutation(len(steps)):
            image = steps[k](image, rng)
        image = _resized(image, target, str(rng.choice(modes)))
        return self._jpeg(image, rng)  # as published, the chain always ends with a compression
