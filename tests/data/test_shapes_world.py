"""The shapes world checks itself: it reads the scenes that it draws, and calls other pictures unreadable."""

from collections import Counter

import numpy as np
import pytest

from ldm_train.data import shapes_world as world
from ldm_train.data.shapes_world import COMBINATIONS, Scene, held_out_combinations, random_scene, read, render


def said(scene: Scene | None) -> tuple | None:
    """Returns what a caption can say about a scene, independent of the order of its objects; None for None."""
    if scene is None:
        return None
    return scene.background, sorted((o.colour, o.shape, o.position, o.size) for o in scene.objects)


@pytest.mark.parametrize(
    ("objects", "size", "count"), [(1, 32, 400), (2, 64, 200), pytest.param(2, 64, 800, marks=pytest.mark.slow)]
)
def test_the_checker_reads_fresh_renders(objects: int, size: int, count: int) -> None:
    rng = np.random.default_rng(2024 + objects)
    wrong = []
    for _ in range(count):
        scene = random_scene(rng, list(COMBINATIONS), objects)
        found = said(read(render(scene, size, rng)[0], objects))
        if found != said(scene):
            wrong.append((said(scene), found))
    assert len(wrong) <= count / 200, wrong  # 99.5 %


def test_the_checker_reads_every_combination_without_shades() -> None:
    rng = np.random.default_rng(1)
    for combination in COMBINATIONS:
        scene = Scene(combination[3], (world.random_object(rng, combination),))
        assert said(read(render(scene, 32)[0])) == said(scene)


def scenes(seed: int, count: int, objects: int = 1) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [random_scene(rng, list(COMBINATIONS), objects) for _ in range(count)]


def test_noise_and_blank_pictures_are_unreadable() -> None:
    rng = np.random.default_rng(0)
    assert all(read(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) is None for _ in range(50))
    for value in (0, 20, 128, 235, 255):
        assert read(np.full((32, 32, 3), value, np.uint8)) is None
        assert read(np.full((32, 32, 3), value, np.uint8), objects=2) is None


def test_two_objects_are_not_one_and_one_is_not_two() -> None:
    assert all(read(render(scene, 64)[0], objects=1) is None for scene in scenes(3, 50, objects=2))
    assert all(read(render(scene, 64)[0], objects=2) is None for scene in scenes(4, 50, objects=1))


def blurred(image: np.ndarray, times: int) -> np.ndarray:
    values = image.astype(np.float64)
    for _ in range(times):
        padded = np.pad(values, ((1, 1), (1, 1), (0, 0)), mode="edge")
        values = sum(padded[i : i + 32, j : j + 32] for i in range(3) for j in range(3)) / 9
    return values.round().astype(np.uint8)


def test_a_blurred_mixture_of_two_scenes_is_unreadable() -> None:
    """Like samples of a model that learned averages: two objects at half strength, blurred. At most 2% are read."""
    pairs = [(a, b) for a, b in zip(scenes(5, 400), scenes(6, 400)) if a.objects[0].position != b.objects[0].position]
    readable = 0
    for a, b in pairs:
        mixture = (render(a, 32)[0].astype(np.float64) + render(b, 32)[0]) / 2
        readable += read(blurred(mixture, 3)) is not None
    assert readable <= 0.02 * len(pairs)


def test_a_wrong_attribute_is_noticed() -> None:
    """Changing the colours or mirroring the pixels changes the answer: the checker does not guess."""
    scene = Scene("black", (world.Object("red", "circle", "center", "large", 0.5, 0.5, 0.19),))
    image, _ = render(scene, 32)
    found = read(image[..., ::-1])
    assert found.objects[0].colour == "blue"
    assert read(image[::-1]).objects[0].shape == "circle"
    triangle = Scene("white", (world.Object("green", "triangle", "top left", "large", 0.29, 0.29, 0.19),))
    moved = read(render(triangle, 32)[0][:, ::-1])
    assert (moved.objects[0].shape, moved.objects[0].position) == ("triangle", "top right")


def test_a_tenth_of_the_combinations_is_held_out_as_a_function_of_the_seed() -> None:
    assert len(COMBINATIONS) == 6 * 3 * 5 * 2
    held = held_out_combinations(0)
    assert len(held) == 18
    assert held < set(COMBINATIONS)
    assert held == held_out_combinations(0)
    assert held != held_out_combinations(1)


def test_scenes_and_pictures_are_a_function_of_the_generator() -> None:
    for objects in (1, 2):
        one, two = (np.random.default_rng(9) for _ in range(2))
        for _ in range(5):
            a, b = (random_scene(rng, list(COMBINATIONS), objects) for rng in (one, two))
            assert a == b
            assert all((x == y).all() for x, y in zip(render(a, 32, one), render(b, 32, two)))


def test_scenes_are_drawn_from_the_allowed_combinations_alone_and_from_all_of_them() -> None:
    held = held_out_combinations(3)
    allowed = [c for c in COMBINATIONS if c not in held]
    rng = np.random.default_rng(0)
    drawn = Counter()
    for _ in range(3000):
        scene = random_scene(rng, allowed)
        drawn.update((o.colour, o.shape, o.position, scene.background) for o in scene.objects)
    assert set(drawn) == set(allowed)
    for _ in range(500):
        scene = random_scene(rng, allowed, objects=2)
        kinds = {(o.colour, o.shape, o.position, scene.background) for o in scene.objects}
        assert not kinds & held
        assert len({o.position for o in scene.objects}) == 2


@pytest.mark.parametrize("objects", [1, 2])
def test_captions_name_every_attribute(objects: int) -> None:
    for scene in scenes(8, 20, objects):
        phrasings = world.captions(scene)
        assert len(set(phrasings)) == len(phrasings) >= 3
        for caption in phrasings:
            assert scene.background in caption
            for o in scene.objects:
                assert all(word in caption for word in (o.colour, o.shape, o.position))
        assert any(all(o.size in caption for o in scene.objects) for caption in phrasings)


def test_boxes_and_label_maps_agree_with_the_pixels() -> None:
    for scene in scenes(10, 30):
        _, labels = render(scene, 128)
        ((x, y, w, h, label),) = world.boxes(scene)
        rows, columns = np.nonzero(labels)
        assert set(np.unique(labels)) == {0, label + 1}
        edges = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) / 128
        tolerance = 3 / 128  # a triangle's apex is thinner than half a pixel
        assert np.abs(edges - [x, y, x + w, y + h]).max() <= tolerance
