"""Randomness as an argument: one noise stream per image when sampling, one reseeding per micro-batch when training."""

import hashlib
import random
from collections.abc import Sequence

import numpy as np
import torch

from ldm_train.devices import to_device


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that is a pure function of `parts`, e.g. (seed, "autoencoder", step, rank)."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded by `derive_seed(*parts)`."""
    return torch.Generator().manual_seed(derive_seed(*parts))


def reseed(*parts: int | str) -> None:
    """Seeds every global generator (torch on all devices, numpy, random).

    Training calls this before each micro-batch with (seed, stage, step, micro-batch, rank). Lightning does not
    checkpoint the generators' states; reseeding makes a resumed run draw the same noise as an uninterrupted one.
    """
    seed = derive_seed(*parts)
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - third-party transforms may still use the global numpy generator
    random.seed(seed)


class NoiseSource:
    """Gaussian noise with one stream per image: image i gets the same noise in a batch of 1 and of 16, on any device.

    seeds: one integer per image. scope: parts that distinguish the streams, see `scoped`.
    """

    def __init__(self, seeds: Sequence[int], scope: Sequence[int | str] = ()):
        self.seeds, self.scope = [int(s) for s in seeds], tuple(scope)

    def __len__(self) -> int:
        return len(self.seeds)

    def normal(self, shape: Sequence[int], step: int | str, device: torch.device | str = "cpu") -> torch.Tensor:
        """Standard normal noise (B, *shape), float32. `step` names the draw: "start", "posterior", or a sampler's step."""
        draws = [torch.randn(*shape, generator=generator(seed, *self.scope, step)) for seed in self.seeds]
        return to_device(torch.stack(draws), device)

    def scoped(self, name: int | str) -> "NoiseSource":
        """The same images with separate noise streams, for a sampler that runs several times."""
        return NoiseSource(self.seeds, (*self.scope, name))


def slerp(a: torch.Tensor, b: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Spherical interpolation of noise (B, ...) by t (B,) in [0, 1] (Shoemake 1985): the result keeps the norm of the
    two Gaussian samples, while linear interpolation would make it smaller."""
    x, y = a.flatten(1).double(), b.flatten(1).double()
    cosine = (x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1))
    angle = torch.acos(cosine.clamp(-1, 1))
    t, sine = t.to(x), angle.sin()
    straight = sine < 1e-6  # equal or opposite: no unique arc
    sine = sine.where(~straight, 1.0)
    first = torch.where(straight, 1 - t, ((1 - t) * angle).sin() / sine)
    second = torch.where(straight, t, (t * angle).sin() / sine)
    return (first[:, None] * x + second[:, None] * y).view_as(a).to(a.dtype)
