"""First-impression metrics on images with known answers: drawn by shapes_world, dented, on grey, or all alike."""

import numpy as np
import pytest
import torch

from ldm_train.data import shapes_world as world
from ldm_train.data.prepare.shapes import Shapes
from ldm_train.evaluation import impression
from ldm_train.evaluation.adherence import format_table, measure_adherence, random_scenes
from ldm_train.images import from_uint8

COMBINATIONS = list(world.COMBINATIONS)


def pictures(scenes: list[world.Scene], seed: int = 0) -> torch.Tensor:
    return from_uint8(torch.from_numpy(impression.drawn_by_the_data(scenes, 32, seed)).permute(0, 3, 1, 2))


def same(images: torch.Tensor) -> torch.Tensor:
    return images


@pytest.mark.parametrize("shape", world.SHAPES)
def test_an_ideal_outline_is_found_wherever_it_is_drawn(shape: str) -> None:
    rng = np.random.default_rng(0)
    for _ in range(8):
        scene = world.random_scene(rng, [c for c in COMBINATIONS if c[1] == shape])
        image, _ = world.render(scene, 32, rng)
        assert world.fidelity(image, shape) > 0.98
        assert all(world.fidelity(image, other) < 0.86 for other in world.SHAPES if other != shape)


def test_a_dent_costs_its_share_of_the_shape() -> None:
    scene = world.Scene("black", (world.Object("red", "square", "center", "large", 0.5, 0.5, 0.25),))
    image, _ = world.render(scene, 32)
    dented = image.copy()
    dented[8:12, 8:24] = image[0, 0]  # the upper quarter of the square's 16 x 16 pixels
    # The square that fits 12 x 16 pixels best lies between the one inside and the one around them.
    assert world.fidelity(dented, "square") == pytest.approx(0.77, abs=0.04)
    assert world.fidelity(np.full((32, 32, 3), 20, np.uint8), "circle") == 0


@pytest.mark.parametrize(
    ("grey", "name"),
    [(0.08, "black"), (0.12, "black"), (0.92, "white"), (0.88, "white"), (0.3, None), (0.7, None), (0.2, None)],
)
def test_a_background_is_one_of_the_datas_only_within_its_shades(grey: float, name: str | None) -> None:
    assert world.background_of(np.full((32, 32, 3), round(grey * 255), np.uint8)) == name


def test_a_coloured_background_is_none_of_the_datas() -> None:
    assert world.background_of(np.tile(np.array([20, 20, 90], np.uint8), (32, 32, 1))) is None


def test_a_third_of_the_captions_of_single_objects_is_incomplete() -> None:
    import json

    _, fields = Shapes(count=4, val_count=1).sample("train", 0)
    record = json.loads(fields["json"])
    scene = record["scene"]
    named = [
        sum(str(v) in text for v in (scene["background"], scene["objects"][0]["position"]))
        for text in record["captions"]
    ]
    assert sum(n < 2 for n in named) * 3 == len(named)
    item = scene["objects"][0]
    assert all(item["colour"] in text and item["shape"] in text for text in record["captions"])


def test_spread_is_the_pooled_deviation_and_leaves_gaps_out() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(400, 5)) * 0.3 + rng.normal(size=(400, 1)) * 9
    assert impression.spread(values) == pytest.approx(0.3, rel=0.03)
    wanted = np.sqrt(np.mean([row.var(ddof=1) for row in values]))
    assert impression.spread(values) == pytest.approx(wanted)
    values[::2, 1] = np.nan
    assert impression.spread(values) == pytest.approx(0.3, rel=0.04)
    values[7] = np.nan
    assert np.isfinite(impression.spread(values))
    assert np.isnan(impression.spread(np.full((3, 4), np.nan)))


def test_pictures_of_the_data_reach_every_ceiling() -> None:
    pairs = random_scenes(COMBINATIONS, 40, 1)
    found = impression.measure_impression(pictures([scene for _, scene in pairs]), pairs, same, 1)
    assert found["shape_fidelity"]["ratio"] == pytest.approx(1, abs=0.005)
    assert found["shape_fidelity"]["ceiling"] > 0.98
    assert found["backgrounds"] == {"samples": 1.0, "ceiling": 1.0}


def partial_scenes(alike: bool) -> list[world.Scene]:
    scenes = []
    for k in range(len(world.CLASSES) * impression.PARTIAL_SEEDS):
        colour, shape = world.CLASSES[k % len(world.CLASSES)].split()
        rng = np.random.default_rng([5, k % len(world.CLASSES) if alike else k])
        scenes.append(world.random_scene(rng, [c for c in COMBINATIONS if c[:2] == (colour, shape)]))
    return scenes


def test_incomplete_prompts_are_judged_by_what_they_say_and_by_their_variety() -> None:
    found = impression.measure_partial(pictures(partial_scenes(alike=False)), COMBINATIONS, 1)
    assert found["right"] > 0.99
    assert found["backgrounds"] == 1
    for name in ("position", "size", "background"):
        assert found[f"{name}_ratio"] == pytest.approx(1, abs=0.15)
    found = impression.measure_partial(pictures(partial_scenes(alike=True)), COMBINATIONS, 1)
    assert found["right"] > 0.99
    assert found["position_ratio"] < 0.1
    assert found["background_ratio"] == 0


def test_grey_backgrounds_are_seen() -> None:
    images = pictures(partial_scenes(alike=False))
    grey = torch.where((images[:, :, :1, :1] - images).abs().amax(dim=1, keepdim=True) < 0.2, torch.zeros(()), images)
    assert impression.measure_partial(grey, COMBINATIONS, 1)["backgrounds"] == 0


def test_a_models_first_impression_stands_beside_adherence() -> None:
    """The sampler draws what the caption says, as the data would, and what it does not name at random."""

    def paint(fields: dict, seeds: list[int]) -> torch.Tensor:
        scenes = []
        for text, seed in zip(fields["caption"], seeds):
            rng = np.random.default_rng([7, seed])
            words = [c for c in COMBINATIONS if c[0] in text and c[1] in text]
            words = [c for c in words if c[2] in text] or words
            words = [c for c in words if c[3] in text] or words
            scenes.append(world.random_scene(rng, words))
        return pictures(scenes)

    table, _, _ = measure_adherence(paint, ("caption",), 0, 32, scenes=24, held_out=4, seeds=2, reconstruct=same)
    assert table["trained"]["all"] == 1
    assert table["impression"]["partial"]["right"] > 0.99
    said = format_table(table)
    assert "shape fidelity 0.99" in said
    assert '"a red circle": right 100.0%' in said


def test_without_an_autoencoder_there_is_no_ceiling_and_no_impression() -> None:
    table, _, _ = measure_adherence(
        lambda fields, seeds: torch.zeros(len(seeds), 3, 32, 32), ("caption",), 0, 32, scenes=4, held_out=2, seeds=1
    )
    assert "impression" not in table
