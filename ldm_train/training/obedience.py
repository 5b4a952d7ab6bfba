"""Obedience on the shapes world: does the picture show what the caption says? Judged from pixels alone."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from ldm_train.data import shapes_world
from ldm_train.images import to_uint8

ATTRIBUTES = ("colour", "shape", "position", "background")


def caption_scenes(combinations: Sequence[tuple], count: int, seed: int) -> list[tuple[str, shapes_world.Scene]]:
    """`count` fresh (caption, scene) pairs, a function of the seed; phrasings vary."""
    pairs = []
    for i in range(count):
        rng = np.random.default_rng([seed, 0xCA97, i])
        scene = shapes_world.random_scene(rng, list(combinations))
        texts = shapes_world.captions(scene)
        pairs.append((texts[int(rng.integers(len(texts)))], scene))
    return pairs


def judge(images: torch.Tensor, scenes: Sequence[shapes_world.Scene]) -> dict[str, np.ndarray]:
    """Per image: attributes right (bool each), "all" of them, "unreadable", and what was read of x, y, r (NaN if not).

    images (B, 3, H, W) in [-1, 1]. An unreadable picture is wrong in every attribute.
    """
    pixels = to_uint8(images).permute(0, 2, 3, 1).numpy()
    table: dict[str, list] = {name: [] for name in (*ATTRIBUTES, "all", "unreadable", "x", "y", "r")}
    for picture, scene in zip(pixels, scenes):
        found, wanted = shapes_world.read(picture), scene.objects[0]
        right = {a: found is not None and getattr(found.objects[0], a) == getattr(wanted, a) for a in ATTRIBUTES[:3]}
        right["background"] = found is not None and found.background == scene.background
        for name, value in right.items():
            table[name].append(value)
        table["all"].append(all(right.values()))
        table["unreadable"].append(found is None)
        for name in ("x", "y", "r"):
            table[name].append(np.nan if found is None else getattr(found.objects[0], name))
    return {name: np.array(values) for name, values in table.items()}


def spread(values: np.ndarray) -> float:
    """Pooled within-caption standard deviation of (captions, seeds) values; rows with a NaN do not count."""
    complete = values[~np.isnan(values).any(axis=1)]
    return (
        float(np.sqrt(complete.var(axis=1, ddof=1).mean())) if len(complete) and values.shape[1] > 1 else float("nan")
    )


def measure_obedience(
    sample: Callable[[dict[str, Any], list[int]], torch.Tensor],
    world_seed: int,
    image_size: int,
    captions: int = 256,
    held_out: int = 48,
    seeds: int = 3,
    batch_size: int = 256,
    caption_seed: int = 1,
) -> tuple[dict[str, Any], torch.Tensor, list[str]]:
    """Samples `captions` fresh captions of trained combinations and `held_out` of held-out ones, `seeds` times each.

    sample: (fields, seeds) -> images. Returns (table, the first images, their captions). The table has the share of
    right answers per attribute, their mean, and "all" four right, for both kinds of captions, and the diversity: the
    spread of position (x, y) and size (r) within a caption, for samples and for pictures of the data.
    """
    excluded = shapes_world.held_out_combinations(world_seed)
    groups = {
        "trained": caption_scenes([c for c in shapes_world.COMBINATIONS if c not in excluded], captions, caption_seed),
        "held_out": caption_scenes(sorted(excluded), held_out, caption_seed + 1),
    }
    result: dict[str, Any] = {"captions": captions, "held_out_captions": held_out, "seeds": seeds}
    shown, shown_captions = torch.empty(0), []
    for group, pairs in groups.items():
        rows = [(text, scene, seed) for seed in range(seeds) for text, scene in pairs]
        images = []
        for k in range(0, len(rows), batch_size):
            part = rows[k : k + batch_size]
            # One seed per (caption, repetition), so that no two pictures share their noise.
            part_seeds = [seed * 1_000_003 + k + j for j, (_, _, seed) in enumerate(part)]
            images.append(sample({"caption": [text for text, _, _ in part]}, part_seeds))
        drawn = torch.cat(images)
        table = judge(drawn, [scene for _, scene, _ in rows])
        scores = {a: float(table[a].mean()) for a in ATTRIBUTES}
        result[group] = scores | {
            "mean": float(np.mean(list(scores.values()))),
            "all": float(table["all"].mean()),
            "unreadable": float(table["unreadable"].mean()),
        }
        if group == "trained":
            shown, shown_captions = drawn[: min(64, captions)], [text for text, _ in pairs[:64]]
            by_caption = {n: table[n].reshape(seeds, captions).T for n in ("x", "y", "r")}
            result["diversity"] = _diversity(by_caption, pairs, image_size, seeds)
    return result, shown, shown_captions


def _diversity(
    by_caption: dict[str, np.ndarray], pairs: list[tuple[str, shapes_world.Scene]], image_size: int, seeds: int
) -> dict[str, float]:
    """Spread of samples and of data within captions, and their ratio, for position and size."""
    data = {n: np.full((len(pairs), seeds), np.nan) for n in ("x", "y", "r")}
    for i, (text, scene) in enumerate(pairs):
        wanted = scene.objects[0]
        for j in range(seeds):
            rng = np.random.default_rng([0xD17E, i, j])
            combination = (wanted.colour, wanted.shape, wanted.position, scene.background)
            twin = shapes_world.random_object(rng, combination)
            while wanted.size in text and twin.size != wanted.size:  # the caption names the size
                twin = shapes_world.random_object(rng, combination)
            found = shapes_world.read(
                shapes_world.render(shapes_world.Scene(scene.background, (twin,)), image_size, rng)[0]
            )
            for n in ("x", "y", "r"):
                data[n][i, j] = np.nan if found is None else getattr(found.objects[0], n)
    ours = {"position": (spread(by_caption["x"]) + spread(by_caption["y"])) / 2, "size": spread(by_caption["r"])}
    theirs = {"position": (spread(data["x"]) + spread(data["y"])) / 2, "size": spread(data["r"])}
    table = {f"{n}_samples": ours[n] for n in ours} | {f"{n}_data": theirs[n] for n in theirs}
    return table | {f"{n}_ratio": ours[n] / theirs[n] for n in ours}


def format_table(result: dict[str, Any]) -> str:
    """The table people read at the end of the quickstart."""
    lines = [f"{'obedience':<12}" + "".join(f"{a:>12}" for a in (*ATTRIBUTES, "mean", "all four", "unreadable"))]
    for group, label in (("trained", "trained"), ("held_out", "held out")):
        row = [result[group][a] for a in (*ATTRIBUTES, "mean", "all", "unreadable")]
        lines.append(f"{label:<12}" + "".join(f"{v:>11.1%} " for v in row))
    d = result["diversity"]
    lines.append(
        f"diversity within a caption, samples / data: position {d['position_ratio']:.2f}, size {d['size_ratio']:.2f}"
    )
    return "\n".join(lines)
