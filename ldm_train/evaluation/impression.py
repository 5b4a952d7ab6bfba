"""The first impression of samples of the shapes world: what people see before they read the prompt, judged from pixels
alone."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from ldm_train.data import shapes_world
from ldm_train.images import from_uint8, to_uint8

JUDGED = 128  # pictures whose outline is fitted, which takes about 30 ms each
PARTIAL_SEEDS = 12  # pictures of each prompt that names only colour and shape
Place = dict[
    str, np.ndarray
]  # x, y, r and "background" (brightness 0 or 1) as read, NaN if unreadable: arrays (prompts, seeds)
Pairs = Sequence[tuple[str, shapes_world.Scene]]


def spread(values: np.ndarray) -> float:
    """Returns the pooled standard deviation within the rows of values (prompts, seeds), without NaN values and rows
    with a single value; NaN if no row is left."""
    known = ~np.isnan(values)
    values, known = values[known.sum(axis=1) > 1], known[known.sum(axis=1) > 1]
    if not len(values):
        return float("nan")
    centred = values - np.nanmean(values, axis=1, keepdims=True)
    return float(np.sqrt(np.nansum(centred**2) / (known.sum() - len(values))))


def ratios(samples: Place, data: Place, names: Sequence[str] = ("position", "size")) -> dict[str, float]:
    """Returns the spread within prompts of samples and of pictures of the data, and their ratio, for each of `names`
    (position, size, background)."""

    def spreads(place: Place) -> dict[str, float]:
        position = (spread(place["x"]) + spread(place["y"])) / 2
        return {"position": position, "size": spread(place["r"]), "background": spread(place["background"])}

    ours, theirs = spreads(samples), spreads(data)
    return {
        key: value
        for n in names
        for key, value in (
            (f"{n}_samples", ours[n]),
            (f"{n}_data", theirs[n]),
            (f"{n}_ratio", ours[n] / theirs[n] if theirs[n] else float("nan")),
        )
    }


def places(images: Sequence[np.ndarray], prompts: int) -> Place:
    """Reads x, y, r and background, on which diversity is measured, from pictures (H, W, 3) uint8 in the order: all
    prompts once, then all again, ..."""
    rows = np.full((4, len(images)), np.nan)
    for k, picture in enumerate(images):
        if (scene := shapes_world.read(picture)) is not None:
            item = scene.objects[0]
            rows[:, k] = item.x, item.y, item.r, shapes_world.BACKGROUNDS[scene.background] > 0.5
    return {name: row.reshape(-1, prompts).T for name, row in zip(("x", "y", "r", "background"), rows)}


def as_pictures(images: torch.Tensor) -> np.ndarray:
    """(B, 3, H, W) in [-1, 1] -> (B, H, W, 3) uint8."""
    return to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()


def drawn_by_the_data(scenes: Sequence[shapes_world.Scene], size: int, seed: int) -> np.ndarray:
    """Renders scenes as pictures (B, H, W, 3) uint8 like those of the data, with random shades."""
    rngs = (np.random.default_rng([seed, 0xDA7A, k]) for k in range(len(scenes)))
    return np.stack([shapes_world.render(scene, size, rng)[0] for scene, rng in zip(scenes, rngs)])


def _outlines(images: Sequence[np.ndarray], scenes: Sequence[shapes_world.Scene]) -> float:
    return float(np.mean([shapes_world.fidelity(p, s.objects[0].shape) for p, s in zip(images, scenes)]))


def _backgrounds(images: Sequence[np.ndarray]) -> float:
    return float(np.mean([shapes_world.background_of(picture) is not None for picture in images]))


def measure_impression(
    images: torch.Tensor, pairs: Pairs, reconstruct: Callable[[torch.Tensor], torch.Tensor], seed: int
) -> dict[str, Any]:
    """Measures samples (B, 3, H, W) in [-1, 1] drawn under complete descriptions of the scenes in `pairs`.

    "shape_fidelity": the mean agreement of what is drawn with the ideal outline of the requested shape
    (`shapes_world.fidelity`) on at most JUDGED samples; its ceiling, which is that of pictures of the data through the
    autoencoder (reconstruct: images -> images); and their ratio. "backgrounds": the share of pictures with a background
    that occurs in the data, for samples and for the same ceiling.
    """
    scenes, count = [scene for _, scene in pairs[:JUDGED]], min(JUDGED, len(pairs))
    data = drawn_by_the_data(scenes, images.shape[-1], seed)
    ceiling = as_pictures(reconstruct(from_uint8(torch.from_numpy(data).permute(0, 3, 1, 2))))
    samples = as_pictures(images[:count])
    shape, best = _outlines(samples, scenes), _outlines(ceiling, scenes)
    return {
        "shape_fidelity": {
            "samples": shape,
            "ceiling": best,
            "ratio": shape / best if best else float("nan"),
            "n": count,
        },
        "backgrounds": {"samples": _backgrounds(as_pictures(images)), "ceiling": _backgrounds(ceiling)},
    }


def partial_prompts() -> list[str]:
    """Returns prompts that name only colour and shape, one for each class."""
    return [f"a {name}" for name in shapes_world.CLASSES]


def measure_partial(images: torch.Tensor, combinations: Sequence[tuple], seed: int) -> dict[str, Any]:
    """Measures samples (B, 3, H, W) under `partial_prompts`, all of them PARTIAL_SEEDS times: the share with the right
    colour and shape, the share with a background that occurs in the data, and the diversity relative to pictures of the
    data of these classes. combinations: the trained ones."""
    samples, names = as_pictures(images), shapes_world.CLASSES
    read = [shapes_world.read(picture) for picture in samples]
    right = [
        scene is not None and scene.objects[0].label == k % len(names) for k, scene in enumerate(read)
    ]  # all prompts once, then all again
    scenes = []
    for k in range(len(images)):
        colour, shape = names[k % len(names)].split()
        rng = np.random.default_rng([seed, 0x9A27, k])
        scenes.append(shapes_world.random_scene(rng, [c for c in combinations if c[:2] == (colour, shape)]))
    data = drawn_by_the_data(scenes, images.shape[-1], seed)
    diversity = ratios(places(samples, len(names)), places(data, len(names)), ("position", "size", "background"))
    return {"right": float(np.mean(right)), "backgrounds": _backgrounds(samples), "n": len(images)} | diversity


def format_impression(impression: dict[str, Any]) -> list[str]:
    """Formats the measures as lines of text."""
    shape, ground = impression["shape_fidelity"], impression["backgrounds"]
    lines = [
        f"shape fidelity {shape['samples']:.3f} of {shape['ceiling']:.3f} through the autoencoder ({shape['ratio']:.1%}); "
        f"backgrounds that occur in the data {ground['samples']:.1%}"
    ]
    if p := impression.get("partial"):
        lines.append(
            f'prompts like "a red circle": right {p["right"]:.1%}, backgrounds {p["backgrounds"]:.1%}, diversity position '
            f"{p['position_ratio']:.2f}, size {p['size_ratio']:.2f}, background {p['background_ratio']:.2f}"
        )
    return lines
