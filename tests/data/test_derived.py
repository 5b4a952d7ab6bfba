"""Fields derived from images, and boxes and maps that follow the crop, compared with geometry, PIL and statistics."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_train.data import shapes_world
from ldm_train.data.degradations import BSR, Bicubic, gaussian_kernel
from ldm_train.data.fields import boxes_of
from ldm_train.data.masks import WIDTHS, MaskedImage, masked_image
from ldm_train.data.samples import SampleDecoder, collate
from ldm_train.data.transforms import ImageTransform


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("kind", [*WIDTHS, "border"])
def test_masks_are_never_empty_nor_everything_and_repeat_with_the_seed(kind: str) -> None:
    make = MaskedImage({kind: 1}, most=0.6)
    shares = [make.mask((64, 64), np.random.default_rng(i)).mean() for i in range(60)]
    assert 0 < min(shares) <= max(shares) <= 0.6
    assert np.std(shares) > 0.01
    again = make.mask((64, 64), np.random.default_rng(7))
    assert np.array_equal(again, make.mask((64, 64), np.random.default_rng(7)))


def test_thicker_strokes_cover_more() -> None:
    def covered(kind: str) -> float:
        make = MaskedImage({kind: 1}, most=1.0)
        return float(np.mean([make.mask((128, 128), np.random.default_rng(i)).mean() for i in range(80)]))

    assert covered("thick") > covered("thin") > 0.02


def test_the_hole_is_black_and_the_rest_untouched() -> None:
    image, mask = torch.rand(3, 8, 8) * 2 - 1, torch.zeros(1, 8, 8)
    mask[0, 2:5, 3:7] = 1
    made = masked_image(image, mask)
    assert made.shape == (4, 8, 8)
    assert (made[:3, 2:5, 3:7] == -1).all()
    outside = mask[0] == 0
    assert torch.equal(made[:3, outside], image[:, outside])
    assert torch.equal(made[3:], mask)


def test_unknown_masks_are_named() -> None:
    with pytest.raises(ValueError, match=r"unknown masks \['fat'\]"):
        MaskedImage({"fat": 1})


def test_bicubic_equals_pillow() -> None:
    array = (np.random.default_rng(0).random((32, 48, 3)) * 255).astype(np.uint8)
    image = torch.from_numpy(array).permute(2, 0, 1).float() / 127.5 - 1
    small = Bicubic(4)(image, np.random.default_rng(0))
    expected = np.asarray(Image.fromarray(array).resize((12, 8), Image.Resampling.BICUBIC), float)
    assert np.abs(((small + 1) * 127.5).permute(1, 2, 0).numpy() - expected).max() < 1.1
    with pytest.raises(ValueError, match="30x32 cannot be reduced by 4"):
        Bicubic(4)(torch.zeros(3, 30, 32), np.random.default_rng(0))


@pytest.mark.parametrize("light", [True, False])
def test_bsr_degrades_at_random_and_light_less(light: bool) -> None:
    image = torch.from_numpy(
        shapes_world.render(shapes_world.random_scene(np.random.default_rng(1), shapes_world.COMBINATIONS), 64, np.random.default_rng(2))[0]
    ).permute(2, 0, 1).float() / 127.5 - 1  # fmt: skip
    clean = Bicubic(4)(image, np.random.default_rng(0))
    made = [BSR(4, light)(image, np.random.default_rng(i)) for i in range(12)]
    assert all(m.shape == (3, 16, 16) and m.abs().max() <= 1 for m in made)
    assert torch.equal(made[3], BSR(4, light)(image, np.random.default_rng(3)))
    errors = [float((m - clean).square().mean()) for m in made]
    assert min(errors) > 1e-5
    assert np.mean(errors) < 0.15  # the picture is still recognisable


def test_light_degradations_are_lighter() -> None:
    rng = np.random.default_rng(1)
    picture = shapes_world.render(shapes_world.random_scene(rng, shapes_world.COMBINATIONS), 64, rng)[0]
    image = torch.from_numpy(picture).permute(2, 0, 1).float() / 127.5 - 1
    clean = Bicubic(4)(image, rng)

    def error(light: bool) -> float:
        made = [BSR(4, light)(image, np.random.default_rng(i)) for i in range(60)]
        return float(np.mean([(m - clean).square().mean() for m in made]))

    assert error(True) < 0.8 * error(False)


def test_the_noise_of_light_degradations_is_1_to_2_grey_levels_as_published() -> None:
    grey = torch.zeros(3, 64, 64)  # 0.5 in [0, 1], far from both ends
    drawn = [BSR(4, light=True)._noise(grey, np.random.default_rng(i)).std().item() * 127.5 for i in range(200)]
    assert max(drawn) < 2.1
    assert max(drawn) > 1.8
    assert min(drawn) > 0.45  # noise in proportion to the signal is half as strong at half the signal


def test_a_blur_kernel_has_the_moments_it_names() -> None:
    kernel = gaussian_kernel(41, 3.0, 1.5, 0.0)
    assert kernel.sum().item() == pytest.approx(1, abs=1e-5)
    axis = torch.arange(41.0) - 20
    assert (kernel.sum(0) * axis**2).sum().item() == pytest.approx(9, rel=0.01)
    assert (kernel.sum(1) * axis**2).sum().item() == pytest.approx(2.25, rel=0.01)


@pytest.mark.parametrize("crop", ["center", "random", "random_resized"])
def test_boxes_follow_crop_and_flip(crop: str) -> None:
    """A white rectangle on black: after cropping and flipping, the box matches the white pixels within 1.5 pixels."""
    transform = ImageTransform(64, crop, flip=True, scale=(0.3, 0.9))
    for i in range(20):
        rng = np.random.default_rng(i)
        picture = np.zeros((96, 160, 3), np.uint8)
        top, left, h, w = rng.integers(0, 40), rng.integers(0, 80), rng.integers(20, 50), rng.integers(20, 70)
        picture[top : top + h, left : left + w] = 255
        record = {"boxes": [[left / 160, top / 96, w / 160, h / 96, 3]]}
        raw = {"png": png(picture), "json": json.dumps(record).encode()}
        sample = SampleDecoder(transform, ("image", "boxes"))("k", raw, np.random.default_rng([9, i]))
        seen = (sample["image"].mean(0) > 0).nonzero()
        if not len(sample["boxes"]):
            assert len(seen) < 0.35 * 64 * 64
            continue
        x, y, width, height, label = sample["boxes"][0].tolist()
        assert label == 3
        (y0, x0), (y1, x1) = seen.min(0).values.tolist(), seen.max(0).values.tolist()
        found = np.array([x0, y0, x1 + 1, y1 + 1]) / 64
        assert np.abs(found - [x, y, x + width, y + height]).max() < 1.5 / 64


def test_coco_objects_are_read_and_boxes_outside_refused() -> None:
    record = {"width": 200, "height": 100, "objects": [{"bbox": [20, 10, 100, 50], "category_id": 18}]}
    np.testing.assert_allclose(boxes_of(json.dumps(record).encode()), [[0.1, 0.1, 0.5, 0.5, 17]])
    with pytest.raises(ValueError, match="is not inside the picture"):
        boxes_of(json.dumps({"boxes": [[0.8, 0.1, 0.4, 0.2, 1]]}).encode())
    with pytest.raises(ValueError, match='neither "boxes" nor "objects"'):
        boxes_of(b"{}")


def test_boxes_of_different_numbers_stand_in_one_batch() -> None:
    batch = collate([{"key": "a", "boxes": torch.zeros(2, 5)}, {"key": "b", "boxes": torch.zeros(0, 5)}])
    assert [len(b) for b in batch["boxes"]] == [2, 0]


def test_stored_masks_and_small_pictures_are_cut_like_their_image() -> None:
    picture = np.zeros((32, 64, 3), np.uint8)
    picture[8:24, 40:56] = 255
    mask, small = picture[..., 0], picture[::4, ::4]
    raw = {"png": png(picture), "mask.png": png(mask), "lowres.png": png(small)}
    fields = ("image", "masked_image", "lowres")
    sample = SampleDecoder(ImageTransform(32), fields)("k", raw, None)
    assert (sample["masked_image"][3] > 0).sum() == 16 * 8  # the half of the square inside the centre crop
    assert torch.equal(sample["masked_image"][3] > 0, sample["image"][0] > 0)
    assert sample["lowres"].shape == (3, 8, 8)
    assert torch.equal(sample["lowres"][0] > 0, sample["image"][0, ::4, ::4] > 0)


@pytest.mark.parametrize("width", [336, 340, 342])
def test_small_pictures_are_cut_at_the_same_place_as_their_image_even_between_pixels(width: int) -> None:
    ramp = np.tile(np.arange(width, dtype=np.float32) * (255 / width), (256, 1))
    picture = np.stack([ramp] * 3, axis=2).round().astype(np.uint8)
    half = np.stack([ramp.reshape(128, 2, width // 2, 2).mean(axis=(1, 3))] * 3, axis=2).round().astype(np.uint8)
    sample = SampleDecoder(ImageTransform(256), ("image", "lowres"))(
        "k", {"png": png(picture), "lowres.png": png(half)}, None
    )
    again = torch.nn.functional.avg_pool2d(sample["image"], 2)
    assert (sample["lowres"] - again)[..., 1:-1].abs().max() < 1.0 / 127.5


def test_derived_fields_are_a_function_of_seed_and_key() -> None:
    raw = {"png": png((np.random.default_rng(0).random((32, 32, 3)) * 255).astype(np.uint8))}
    decoder = SampleDecoder(ImageTransform(32), ("image", "masked_image"), derive={"masked_image": MaskedImage()})
    one, two = (decoder("k", raw, None)["masked_image"] for _ in range(2))
    assert torch.equal(one, two)
    assert not torch.equal(one, decoder("other", raw, None)["masked_image"])
    drawn = [decoder("k", raw, np.random.default_rng(i))["masked_image"] for i in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_masks_of_small_pictures_can_all_be_drawn():
    make, rng = MaskedImage(), np.random.default_rng(0)
    shares = [make.mask((32, 32), rng).mean() for _ in range(3000)]
    assert 0 < min(shares) <= max(shares) <= make.most
