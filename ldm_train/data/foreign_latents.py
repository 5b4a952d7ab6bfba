"""Latents made by other programs: .npy files by key, or .safetensors files with a tensor per key."""

import math
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from ldm_train.data.files import DataError
from ldm_train.data.offsets import LRUCache

MOST_OPEN = 64  # files
NO_WIDTH = -30.0  # log-variance of a posterior of which only the mean is known


def cache_key(key: str) -> str:
    """A sample's key as a latent cache writes it."""
    return key.replace("/", "_").replace(".", "_")


class ForeignLatents:
    """Reads latents made by another program.

    folder: any number of `<key>.npy` and `.safetensors` files, also in subfolders; keys are those of the images' shards
    (dots and slashes as "_").
    shape: (C, h, w) of the latents. stochastic: the cache holds means and log-variances, (2C, h, w), as for a KL
    autoencoder; a mean alone then becomes a posterior of negligible width. scale: the factor they were multiplied by,
    e.g. 0.18215 for Stable Diffusion.
    Raises DataError, naming the folder, if it holds none, or two of one key.
    """

    def __init__(self, folder: str | Path, shape: tuple[int, int, int], stochastic: bool, scale: float = 1.0):
        self.folder, self.shape, self.stochastic, self.scale = Path(folder), shape, stochastic, scale
        # Key -> file, and the tensor's name in it ("" for .npy).
        self.places: dict[str, tuple[Path, str]] = {}
        for path in sorted(self.folder.rglob("*.npy")):
            self._add(path.stem, path, "")
        for path in sorted(self.folder.rglob("*.safetensors")):
            try:
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118 - no mapping
                        self._add(name, path, name)
            except SafetensorError as error:
                raise DataError(f"{path} cannot be read ({error}); export it again") from error
        # An open file is kept: its header, which names all tensors, may have megabytes.
        self._open = LRUCache(partial(safe_open, framework="pt"), MOST_OPEN)
        if not self.places:
            raise DataError(f"latents.source={folder} holds no .npy and no .safetensors files")

    def _add(self, key: str, path: Path, name: str) -> None:
        other, _ = self.places.setdefault(cache_key(key), (path, name))
        if self.places[cache_key(key)] != (path, name):
            raise DataError(
                f"{other} and {path} both hold latents of {cache_key(key)}; leave one of them in the folder"
            )

    def __call__(self, key: str) -> torch.Tensor:
        """The moments of a sample, (2C or C, h, w) float32. Raises DataError, naming file and key, if they are
        missing, unreadable, of the wrong shape or not finite."""
        if key not in self.places:
            raise DataError(
                f"latents.source={self.folder} has no latents for the sample {key} ({key}.npy, or that key)"
            )
        path, name = self.places[key]
        try:
            if name:
                latents = self._open(path).get_tensor(name).float()
            else:
                latents = torch.from_numpy(np.load(path, allow_pickle=False)).float()
        except (OSError, EOFError, ValueError, TypeError, SafetensorError) as error:
            raise DataError(f"{path}: the latents of {key} cannot be read ({error})") from error
        latents = latents[0] if latents.ndim == 4 and len(latents) == 1 else latents
        channels, *size = self.shape
        wanted = [self.shape, (2 * channels, *size)] if self.stochastic else [self.shape]
        if tuple(latents.shape) not in wanted or not latents.isfinite().all():
            raise DataError(
                f"{path}: the latents of {key} have shape {tuple(latents.shape)}, or values that are not finite; this "
                f"autoencoder's are {' or '.join(map(str, wanted))}"
            )
        mean, logvar = latents[:channels] / self.scale, latents[channels:] - 2 * math.log(self.scale)
        if self.stochastic and not len(logvar):
            logvar = torch.full_like(mean, NO_WIDTH)
        return torch.cat([mean, logvar])

    def verify(
        self, samples: Iterable[tuple[str, torch.Tensor]], encode: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        """Raises DataError if these latents are not this autoencoder's, judged by encoding images (C, H, W), given
        with their keys: if more than 1 % of the values differ by over 3 times the sum of the posterior's standard
        deviation and 5 % of the latents' spread."""
        channels = self.shape[0]
        for key, picture in samples:
            ours, theirs = encode(picture[None])[0].cpu(), self(key)
            width = torch.exp(0.5 * ours[channels:].clamp(-30, 20)) if self.stochastic else torch.zeros(())
            error = (ours[:channels] - theirs[:channels]).abs() / (width + 0.05 * ours[:channels].std())
            if (share := float((error > 3).float().mean())) > 0.01:
                raise DataError(
                    f"latents.source={self.folder}: those of {key} are not this autoencoder's ({share:.0%} of them lie far off); "
                    "check the autoencoder, latents.source_scale, and that the pictures were cut alike"
                )
