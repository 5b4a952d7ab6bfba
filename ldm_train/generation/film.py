"""The denoising film: the model's estimate of the picture after each sampling step."""

import io
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ldm_train import images as pictures
from ldm_train.storage import write_atomically

KINDS = ("gif", "mp4", "strip")
MILLISECONDS = 80
FRAMES = 60  # the most grids in the film of a training
LAST_HELD = 12  # frames for which the finished picture is held


def enlarged(image: torch.Tensor) -> Image.Image:
    """Returns an image (C, H, W) as an RGB picture, enlarged by a whole factor to about 256 pixels with hard edges."""
    factor = max(1, 256 // image.shape[-1])
    size = (image.shape[2] * factor, image.shape[1] * factor)
    return pictures.to_pil(image).convert("RGB").resize(size, Image.Resampling.NEAREST)


def save_gif(frames: Sequence[Image.Image], path: Path, milliseconds: int = MILLISECONDS) -> Path:
    def write(file: io.BufferedWriter) -> None:
        options = {"save_all": True, "append_images": frames[1:], "duration": milliseconds, "loop": 0}
        frames[0].save(file, format="GIF", **options)

    write_atomically(path, write)
    return path


def film_of_grids(folder: Path) -> Path | None:
    """Writes samples.gif from a stage's sample grids, which share seeds and conditions and so show the progress of
    training: all, or FRAMES evenly spaced ones. Returns None if there are fewer than two grids."""
    grids = sorted(folder.glob("samples_*.png"))
    if len(grids) < 2:
        return None
    grids = [grids[i] for i in sorted({*np.linspace(0, len(grids) - 1, FRAMES).round().astype(int).tolist()})]
    frames = []
    for grid in grids:
        with Image.open(grid) as picture:
            frames.append(picture.convert("RGB"))
    return save_gif([*frames, *[frames[-1]] * 3], folder / "samples.gif", 400)


def film_path(picture: Path, kind: str) -> Path:
    """Returns the path of a picture's film."""
    return picture.with_suffix(".strip.png" if kind == "strip" else f".{kind}")


class Film:
    """A sampler callback that keeps the estimates of x_0 and decodes them when it is saved.

    decode: latents -> images. kind: "gif", "mp4" (needs imageio with ffmpeg) or "strip", all frames side by side in one
    PNG. frames: the maximum number of frames, evenly spaced. Raises ValueError for another kind, or, naming what to
    install, if ffmpeg is missing.
    """

    def __init__(self, decode: Callable[[torch.Tensor], torch.Tensor], kind: str, frames: int = 24):
        if kind not in KINDS:
            raise ValueError(f"film is one of {', '.join(KINDS)}, not {kind!r}")
        if kind == "mp4":
            try:
                import imageio_ffmpeg  # noqa: F401 - asked for before any work is done
            except ModuleNotFoundError as error:
                raise ValueError("film=mp4 needs `pip install 'ldm-train[video]'`; film=gif needs nothing") from error
        self.decode, self.kind, self.frames = decode, kind, frames
        self.kept: list[torch.Tensor] = []

    def __call__(self, step: int, pred_x0: torch.Tensor) -> None:
        self.kept.append(pred_x0.detach())

    def save(self, paths: Sequence[Path | None]) -> list[Path]:
        """Writes the film of each picture of the batch beside it, named after it; returns the films' paths. paths: of the
        pictures, None for those without a film."""
        last = len(self.kept) - 1
        steps = sorted({round(i * last / max(1, self.frames - 1)) for i in range(self.frames)}) if last >= 0 else []
        frames = torch.stack([self.decode(self.kept[i]).float().cpu() for i in steps], dim=1)  # (B, frames, C, H, W)
        return [self._save(film, path) for film, path in zip(frames, paths, strict=True) if path is not None]

    def _save(self, film: torch.Tensor, path: Path) -> Path:
        if self.kind == "strip":
            return pictures.save_png(pictures.grid(film, columns=len(film)), film_path(path, self.kind))
        shown = [enlarged(f) for f in film]
        shown += [shown[-1]] * LAST_HELD
        path = film_path(path, self.kind)
        if self.kind == "gif":
            return save_gif(shown, path)
        import imageio.v3 as imageio
        import numpy as np

        even = [np.asarray(f)[: f.height // 2 * 2, : f.width // 2 * 2] for f in shown]  # H.264 takes even sides only
        encoded = imageio.imwrite("<bytes>", even, extension=".mp4", fps=1000 // MILLISECONDS, macro_block_size=2)
        write_atomically(path, lambda file: file.write(encoded))
        return path


def denoising_film(model: Any, draw: Callable[..., torch.Tensor], batch: dict[str, Any], path: Path) -> Path:
    """Draws samples under the conditions of a batch and writes the estimates after each step, side by side, as one
    GIF."""
    seeds = list(range(len(batch["key"])))
    decode = partial(model.decode, seeds=seeds)
    film = Film(decode, "gif")
    draw(model, {f: batch[f] for f in model.fields if f in batch}, seeds, film)
    frames = [enlarged(torch.cat(list(decode(x_0).float().cpu()), dim=2)) for x_0 in film.kept]
    return save_gif([*frames, *[frames[-1]] * LAST_HELD], path)
