"""Adherence and restoration metrics: a perfect sampler gets full scores, a wrong one loses them where it is wrong,
and baselines equal their definitions."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ldm_train.data import shapes_world
from ldm_train.evaluation.adherence import (
    DETERMINES,
    box_iou,
    format_table,
    judge,
    judged_fields,
    measure_adherence,
    random_scenes,
)
from ldm_train.evaluation.restoration import decibel, inpainting_errors, superresolution_values
from ldm_train.images import from_uint8
from ldm_train.metrics.paired import psnr

SCENES = [scene for _, scene in random_scenes(shapes_world.COMBINATIONS, 40, seed=3)]


def drawn(scenes: list[shapes_world.Scene], size: int = 32) -> torch.Tensor:
    return from_uint8(torch.stack([torch.from_numpy(shapes_world.render(s, size)[0]) for s in scenes])).permute(
        0, 3, 1, 2
    )


def test_drawings_of_the_scenes_themselves_are_right():
    table = judge(drawn(SCENES), SCENES)
    for name in ("colour", "shape", "position", "background"):
        assert table[name].all()
    assert table["box_iou"].min() > 0.7
    assert table["box_iou"].mean() > 0.88
    assert table["pixels"].min() > 0.97
    assert table["object_pixels"].mean() > 0.9


def test_another_scene_is_wrong_where_it_differs():
    scene = SCENES[0]
    other = next(
        s for s in SCENES if s.objects[0].position != scene.objects[0].position and s.background == scene.background
    )
    table = judge(drawn([other]), [scene])
    assert not table["position"][0]
    assert table["background"][0]
    assert table["box_iou"][0] < 0.3
    assert table["object_pixels"][0] < 0.5


def test_noise_is_unreadable_and_wrong_in_every_pixel():
    table = judge(torch.randn(3, 3, 32, 32), SCENES[:3])
    assert table["unreadable"].all()
    assert not table["colour"].any()
    assert table["pixels"].max() == 0
    assert table["box_iou"].max() == 0


def test_iou_of_boxes_in_closed_form():
    a = shapes_world.Object("red", "square", "center", "small", 0.5, 0.5, 0.1)
    b = shapes_world.Object("red", "square", "center", "small", 0.6, 0.5, 0.1)
    assert box_iou(a, a) == pytest.approx(1)
    assert box_iou(a, b) == pytest.approx(0.02 / 0.06)
    assert box_iou(a, shapes_world.Object("red", "square", "center", "small", 0.9, 0.5, 0.1)) == 0


def test_which_conditions_are_judged():
    assert judged_fields(("class_label", "caption")) == ("caption",)
    assert judged_fields(("boxes",)) == ("boxes",)
    assert judged_fields(("lowres",)) == () == judged_fields(())


@pytest.mark.parametrize("field", DETERMINES)
def test_a_painter_that_reads_its_condition_scores_fully(field: str):
    """The sampler draws what one kind of condition says, and everything else at random."""
    rng = np.random.default_rng(0)

    def paint(batch: dict, seeds: list[int]) -> torch.Tensor:
        assert list(batch) == [field]
        assert len(batch[field]) == len(seeds)
        scenes = []
        for value in batch[field]:
            one = shapes_world.random_scene(rng, list(shapes_world.COMBINATIONS))
            o, ground = one.objects[0], one.background
            if field == "caption":
                words = value.replace(",", " ")
                colour, shape = (
                    next(n for n in names if n in words) for names in (shapes_world.COLOURS, shapes_world.SHAPES)
                )
                position = next(n for n in shapes_world.POSITIONS if n in words)
                ground = next(n for n in shapes_world.BACKGROUNDS if n in words)
                o = shapes_world.random_object(rng, (colour, shape, position, ground))
            elif field == "reference":
                found = shapes_world.read(((value + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())
                o, ground = found.objects[0], found.background
            elif field == "class_label":
                o = shapes_world.random_object(rng, (*shapes_world.CLASSES[int(value)].split(), o.position, ground))
            else:
                if field == "boxes":
                    x, y, w, _, label = value[0].tolist()
                    x, y, r = x + w / 2, y + w / 2, w / 2
                else:
                    rows, columns = np.nonzero(value.numpy())
                    label = value.max() - 1
                    x, y = (columns.min() + columns.max() + 1) / 64, (rows.min() + rows.max() + 1) / 64
                    r = (rows.max() - rows.min() + 1) / 64
                colour, shape = shapes_world.CLASSES[int(label)].split()
                o = shapes_world.Object(colour, shape, "", "", x, y, r)
            scenes.append(shapes_world.Scene(ground, (o,)))
        return drawn(scenes)

    table, shown, batch = measure_adherence(paint, (field,), 0, 32, scenes=30, held_out=6, seeds=2, batch_size=16)
    assert table["trained"]["all"] == 1
    assert table["held_out"]["all"] == 1
    if "pixels" in DETERMINES[field]:
        assert table["trained"]["pixels"] > 0.96
        assert table["trained"]["box_iou"] > 0.85
    assert len(shown) == 30 == len(batch[field])
    assert ("diversity" in table) == (field == "caption")
    assert "held out" in format_table(table)


def test_superresolution_knows_its_baseline_and_ceiling():
    images = drawn(SCENES[:6])
    lowres = F.interpolate(images, (8, 8), mode="bicubic", antialias=True).clamp(-1, 1)
    values = superresolution_values(images, lowres, torch.stack([images, images]), lambda x: x * 0.98, None)
    assert torch.isinf(values["psnr_mean"]).all()
    assert values["consistency"].min() > 60
    enlarged = F.interpolate(lowres, (32, 32), mode="bicubic", antialias=True).clamp(-1, 1)
    assert torch.allclose(values["psnr_bicubic"], psnr(enlarged * 0.98, images))
    assert (values["psnr_ceiling"] > 30).all()


def test_inpainting_errors_against_their_definitions():
    images, masks = drawn(SCENES[:4]), torch.zeros(4, 1, 32, 32)
    masks[:, :, 8:20, 4:16] = 1
    samples = images + 0.1 * torch.randn(5, 4, 3, 32, 32)
    errors = inpainting_errors(images, masks, samples, lambda x: x + 0.01)
    assert errors["hole"].tolist() == [12 * 12 * 3] * 4
    assert errors["known"].tolist() == [(1024 - 144) * 3] * 4
    assert torch.allclose(errors["ceiling"], 1e-4 * errors["hole"], rtol=1e-3)
    known = 1 - masks[0]
    fill = torch.stack([images[0][c][known[0] > 0].mean() for c in range(3)])
    wanted = ((fill[:, None, None] - images[0]) * masks[0]).square().sum()
    assert errors["mean_fill"][0] == pytest.approx(float(wanted), rel=1e-4)
    assert errors["mean"].sum() < errors["sample"].sum()  # averaging removes noise
    assert decibel(errors["known_sample"].sum(), errors["known"].sum()) == pytest.approx(26.02, abs=0.3)
