"""Adherence on the shapes world: how far a picture shows what its condition says, judged from pixels alone."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from ldm_train.data import shapes_world
from ldm_train.data.samples import collate
from ldm_train.evaluation import impression
from ldm_train.images import from_uint8, to_uint8

ATTRIBUTES = ("colour", "shape", "position", "background")
PLACE = ("x", "y", "r")  # an object's position and size
# The properties of the picture that each condition determines: attributes (share right), box IoU, pixels of label maps.
DETERMINES = {
    "caption": ATTRIBUTES,
    "class_label": ATTRIBUTES[:2],
    "boxes": (*ATTRIBUTES[:3], "box_iou"),
    "segmentation": (*ATTRIBUTES[:3], "box_iou", "pixels", "object_pixels"),
    "reference": ATTRIBUTES,
}


def judged_fields(fields: Sequence[str]) -> tuple[str, ...]:
    """Returns the conditions among `fields` on which adherence is measured: captions alone if there are captions."""
    return ("caption",) if "caption" in fields else tuple(f for f in fields if f in DETERMINES)


def condition(
    fields: Sequence[str], scene: shapes_world.Scene, text: str, image_size: int, rng: np.random.Generator
) -> dict[str, Any]:
    """Returns the batch entries of `fields` that describe a scene. rng: for the shades of rendered pictures."""
    image, labels = shapes_world.render(scene, image_size, rng)
    entries = {
        "caption": text,
        "class_label": int(shapes_world.boxes(scene)[0][4]),
        "boxes": torch.tensor(shapes_world.boxes(scene)),
        "segmentation": torch.from_numpy(labels).long(),
        "reference": from_uint8(torch.from_numpy(image).permute(2, 0, 1)),
    }
    return {field: entries[field] for field in fields}


def random_scenes(combinations: Sequence[tuple], count: int, seed: int) -> list[tuple[str, shapes_world.Scene]]:
    """Returns `count` new (caption, scene) pairs, a function of the seed; the phrasing of captions varies."""
    pairs = []
    for i in range(count):
        rng = np.random.default_rng([seed, 0xCA97, i])
        scene = shapes_world.random_scene(rng, list(combinations))
        texts = shapes_world.captions(scene)
        pairs.append((texts[int(rng.integers(len(texts)))], scene))
    return pairs


def box_iou(a: shapes_world.Object, b: shapes_world.Object) -> float:
    """Intersection over union of two objects' bounding boxes."""
    sides = [max(0.0, min(p + a.r, q + b.r) - max(p - a.r, q - b.r)) for p, q in ((a.x, b.x), (a.y, b.y))]
    shared = sides[0] * sides[1]
    return shared / (4 * a.r**2 + 4 * b.r**2 - shared)


def judge(images: torch.Tensor, scenes: Sequence[shapes_world.Scene]) -> dict[str, np.ndarray]:
    """Judges each image against its scene; returns arrays (B,): each attribute (True if right), "unreadable", x, y, r
    and "bright" (the background, 0 or 1) as read from the image (NaN if unreadable); and, compared with the scene:
    "box_iou", "pixels" (share of pixels with the right label) and "object_pixels" (the same among the object's pixels).

    images (B, 3, H, W) in [-1, 1]. An unreadable picture is wrong in every attribute and every pixel.
    """
    pixels = to_uint8(images).permute(0, 2, 3, 1).numpy()
    rows = []
    for picture, scene in zip(pixels, scenes):
        actual, wanted = shapes_world.read(picture), scene.objects[0]
        drawn, labels = shapes_world.read_labels(picture), shapes_world.render(scene, len(picture))[1]
        same = np.zeros_like(labels, bool) if drawn is None else drawn == labels
        row = {
            "pixels": float(same.mean()),
            "object_pixels": float(same[labels > 0].mean()),
            "unreadable": actual is None,
        }
        if actual is None:
            row |= dict.fromkeys(ATTRIBUTES, False) | dict.fromkeys((*PLACE, "bright"), np.nan) | {"box_iou": 0.0}
        else:
            found = actual.objects[0]
            row |= {a: getattr(found, a) == getattr(wanted, a) for a in ATTRIBUTES[:3]}
            row |= {n: getattr(found, n) for n in PLACE}
            row |= {"background": actual.background == scene.background, "box_iou": box_iou(found, wanted)}
            row |= {"bright": float(shapes_world.BACKGROUNDS[actual.background] > 0.5)}
        rows.append(row)
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def _batch(conditions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    batch = collate([dict(c) for c in conditions])
    batch.pop("replaced")
    return batch


def measure_adherence(
    sample: Callable[[dict[str, Any], list[int]], torch.Tensor],
    fields: Sequence[str],
    world_seed: int,
    image_size: int,
    scenes: int = 256,
    held_out: int = 48,
    seeds: int = 3,
    batch_size: int = 256,
    scene_seed: int = 1,
    reconstruct: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> tuple[dict[str, Any], torch.Tensor, dict[str, Any]]:
    """Measures samples drawn under the conditions of `scenes` new scenes of trained combinations and `held_out` scenes
    of held-out ones, `seeds` times each.

    sample: (fields, seeds) -> images. fields: from `judged_fields`. Returns (table, the first images, their
    conditions). For both kinds of scenes, the table has the properties that the conditions determine (DETERMINES), the
    mean of the attributes, the share of images with "all" of them right, and the share that is "unreadable". For
    captions it has the diversity: the spread of position (x, y) and size (r) within a caption, for samples and for
    pictures of the data. If shapes are determined and `reconstruct` (images -> images through the autoencoder) is
    given, it has the first impression ("impression", see `evaluation.impression`), for captions also with incomplete
    captions.
    """
    excluded = shapes_world.held_out_combinations(world_seed)
    known = [c for c in shapes_world.COMBINATIONS if c not in excluded]
    groups = {
        "trained": random_scenes(known, scenes, scene_seed),
        "held_out": random_scenes(sorted(excluded), held_out, scene_seed + 1),
    }
    determined = list(dict.fromkeys(name for field in fields for name in DETERMINES[field]))
    attributes = [name for name in determined if name in ATTRIBUTES]
    result: dict[str, Any] = {"scenes": scenes, "held_out_scenes": held_out, "seeds": seeds, "fields": list(fields)}
    shown, shown_batch = torch.empty(0), {}
    for group, pairs in groups.items():
        conditions = [
            condition(fields, scene, text, image_size, np.random.default_rng([scene_seed, 0x5CE2E, i]))
            for i, (text, scene) in enumerate(pairs)
        ]
        drawn = _draw(sample, conditions, seeds, batch_size)
        table = judge(drawn, [scene for _, scene in pairs] * seeds)
        result[group] = {name: float(table[name].mean()) for name in determined} | {
            "mean": float(np.mean([table[a].mean() for a in attributes])),
            "all": float(np.all([table[a] for a in attributes], axis=0).mean()),
            "unreadable": float(table["unreadable"].mean()),
        }
        if group == "trained":
            first = min(64, scenes)
            shown, shown_batch = drawn[:first], _batch(conditions[:first])
            if "caption" in fields:
                samples = {n: table[n].reshape(seeds, scenes).T for n in (*PLACE, "bright")}
                samples["background"] = samples.pop("bright")
                result["diversity"] = impression.ratios(samples, _twins(pairs, image_size, seeds))
            if reconstruct is not None and "shape" in attributes:
                result["impression"] = impression.measure_impression(drawn, pairs, reconstruct, scene_seed)
    if "impression" in result and "caption" in fields:
        prompts = [{"caption": text} for text in impression.partial_prompts()]
        drawn = _draw(sample, prompts, impression.PARTIAL_SEEDS, batch_size)
        result["impression"]["partial"] = impression.measure_partial(drawn, known, scene_seed)
    return result, shown, shown_batch


def _draw(
    sample: Callable[[dict[str, Any], list[int]], torch.Tensor],
    conditions: Sequence[dict[str, Any]],
    seeds: int,
    batch_size: int,
) -> torch.Tensor:
    """Draws samples of all conditions in order, `seeds` times."""
    rows = list(conditions) * seeds
    # One seed per (condition, repetition), so that no two pictures share their noise.
    noise = [k // len(conditions) * 1_000_003 + k for k in range(len(rows))]
    parts = [slice(k, k + batch_size) for k in range(0, len(rows), batch_size)]
    return torch.cat([sample(_batch(rows[part]), noise[part]) for part in parts])


def _twins(pairs: list[tuple[str, shapes_world.Scene]], image_size: int, seeds: int) -> impression.Place:
    """Returns position, size and background, as read, of pictures of the data under the same captions: (captions,
    seeds)."""
    drawn = []
    for j in range(seeds):
        for i, (text, scene) in enumerate(pairs):
            wanted = scene.objects[0]
            combination = (wanted.colour, wanted.shape, wanted.position, scene.background)
            rng = np.random.default_rng([0xD17E, i, j])
            twin = shapes_world.random_object(rng, combination)
            while wanted.size in text and twin.size != wanted.size:  # the caption names the size
                twin = shapes_world.random_object(rng, combination)
            drawn.append(shapes_world.render(shapes_world.Scene(scene.background, (twin,)), image_size, rng)[0])
    return impression.places(drawn, len(pairs))


def format_table(result: dict[str, Any]) -> str:
    """Formats the result as a text table, as printed at the end of the quickstart."""
    titles = {"all": "all of them", "box_iou": "box IoU", "object_pixels": "object px"}
    names = list(result["trained"])
    lines = [f"{'adherence':<12}" + "".join(f"{titles.get(n, n):>12}" for n in names)]
    for group, label in (("trained", "trained"), ("held_out", "held out")):
        lines.append(f"{label:<12}" + "".join(f"{result[group][n]:>11.1%} " for n in names))
    if d := result.get("diversity"):
        lines.append(
            f"diversity within a caption, samples / data: position {d['position_ratio']:.2f}, size {d['size_ratio']:.2f}"
        )
    if first := result.get("impression"):
        lines += impression.format_impression(first)
    return "\n".join(lines)
