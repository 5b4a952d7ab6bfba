"""Draws the missing pictures of a job, batch by batch, and saves them."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from tqdm import tqdm

from ldm_train import images as pictures
from ldm_train.generation.drawing import Drawing
from ldm_train.generation.film import Film, film_path
from ldm_train.generation.job import SHOWN, Job
from ldm_train.generation.requests import Request
from ldm_train.samplers import Callback

# Called after each step of a batch with its requests, a latent decoder, the step and the estimate of x_0.
Watch = Callable[[list[Request], Callable[[torch.Tensor], torch.Tensor], int, torch.Tensor], None]
Parts = dict[int, list[Request]]  # batches of requests, by number


def drawn_here(
    job: Job, drawing: Drawing, only: int | None, watch: Watch | None, parts: Parts
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yields (number, pictures) of each part, drawn in this process, and writes the films that are asked for. only:
    film this one picture only."""
    for k, part in parts.items():
        decode = partial(drawing.decode, seeds=[r.seed for r in part])
        film = Film(decode, drawing.config.film) if drawing.config.film else None
        seen = watch and partial(watch, part, decode)
        yield k, drawing(part, _all_of(film, seen), seen)
        if film:
            film.save([job.folder / r.name if only in (None, r.number) else None for r in part])


def _filmed(job: Job, part: list[Request], film: str | None) -> bool:
    """Returns True if no films are asked for or all films of a part exist."""
    return film is None or all(film_path(job.folder / r.name, film).is_file() for r in part)


def _all_of(*callbacks: Callback | None) -> Callback | None:
    """Combines callbacks into one that calls those that are not None; None if there are none."""
    there = [callback for callback in callbacks if callback is not None]
    return (lambda step, pred_x0: [callback(step, pred_x0) for callback in there]) if there else None


def run_job(
    job: Job,
    config: DictConfig,
    drawn: Callable[[Parts], Iterator[tuple[int, torch.Tensor]]],
    only: int | None,
    recipe_before: dict[str, Any] | None,
) -> list[Path]:
    """Draws what is missing, batch by batch; returns the pictures' paths. drawn: parts -> their pictures, in any order.
    only: keep only this one picture."""
    size, begin = config.batch_size, time.perf_counter()
    parts = {k: job.wanted[k * size : (k + 1) * size] for k in range(-(-len(job.wanted) // size))}
    if only is not None:
        parts = {k: part for k, part in parts.items() if any(r.number == only for r in part)}
    shown: dict[int, torch.Tensor] = {}
    with tqdm(total=sum(map(len, parts.values())), unit="img") as progress:
        todo: Parts = {}
        for k, part in parts.items():
            made = job.done(part) if only is None and _filmed(job, part, config.film) else None
            if made is None:
                todo[k] = part
                continue
            progress.update(len(part))
            if k * size < SHOWN:
                shown[k] = made
        continued = sum(len(part) for k, part in parts.items() if k not in todo)
        for k, made in drawn(todo) if todo else ():
            kept = [(r, image) for r, image in zip(todo[k], made) if only in (None, r.number)]
            made = torch.stack([image for _, image in kept])
            job.save([r for r, _ in kept], made)
            progress.update(len(made))
            if k * size < SHOWN or only is not None:
                shown[k] = made
    new = sum(map(len, todo.values()))
    grid_of = torch.cat([shown[k] for k in sorted(shown)])
    texts = [r.text for r in job.wanted][: len(grid_of)]
    if only is not None:
        texts = [job.wanted[only].text]
    columns = config.n if any(texts) and 1 < config.n <= 16 else None
    grid = job.close(pictures.grid(grid_of, columns, texts if any(texts) else None))
    if continued:
        print(f"{continued} pictures were there already")
    rate = f", {new / (time.perf_counter() - begin):.2f} images/s" if new else ""
    print(f"{len(job.digests)} pictures in {job.folder}{rate}; all of them: {grid}{job.colours}")
    if recipe_before and (agreement := job.agreement(recipe_before)):
        print(agreement)
    return [job.folder / r.name for r in job.wanted if r.name in job.digests]
