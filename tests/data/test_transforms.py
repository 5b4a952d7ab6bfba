"""Every kind of image file is decoded to what a viewer shows, and no transform distorts it."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_train.data.batch import Depth, Sample
from ldm_train.data.transforms import ImageTransform, decode_image, decode_labels, to_signed_range


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


RAMP = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20


# -- decoding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "value", "most"), [(np.uint8, 255, 255), (np.uint16, 255, 65535), (np.uint16, 9000, 65535)]
)
def test_depth_is_read_by_the_bits_of_its_file_not_by_its_values(kind: type, value: int, most: int):
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8), value, kind)).save(file, "png")
    raw = {"depth.png": file.getvalue()}
    depth = Depth().decode(Sample("a", raw, None, ImageTransform((8, 8)), 3, {}, {}))
    torch.testing.assert_close(depth, torch.full((1, 8, 8), value / most))


def test_colour_keeps_its_pixels():
    array = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    assert torch.equal(
        decode_image(encoded(Image.fromarray(array)), "png", 3), torch.from_numpy(array).permute(2, 0, 1)
    )


def test_grey_becomes_three_equal_channels():
    image = decode_image(encoded(Image.fromarray(RAMP)), "png", 3)
    assert (image == torch.from_numpy(RAMP)).all()
    assert image.shape == (3, 3, 4)


def test_one_channel_is_the_luminance():
    assert torch.equal(decode_image(encoded(Image.fromarray(RAMP)), "png", 1)[0], torch.from_numpy(RAMP))
    green = decode_image(encoded(Image.new("RGB", (4, 3), (0, 255, 0))), "png", 1)
    assert green.shape == (1, 3, 4)
    assert (green == 150).all()  # 0.587 x 255


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("channels", [1, 3])
def test_transparency_lies_over_white(mode: str, channels: int):
    image = Image.new(mode, (2, 1), 0)  # black, transparent
    image.putpixel((1, 0), (0, 0, 0, 255) if mode == "RGBA" else (0, 255))
    pixels = decode_image(encoded(image), "png", channels)
    assert (pixels[:, 0, 0] == 255).all()
    assert (pixels[:, 0, 1] == 0).all()


def test_a_transparent_palette_entry_lies_over_white():
    image = Image.new("P", (2, 1))
    image.putpalette([200, 0, 0, 0, 0, 200])
    image.putpixel((1, 0), 1)
    pixels = decode_image(encoded(image, transparency=0), "png", 3)
    assert pixels[:, 0].T.tolist() == [[255, 255, 255], [0, 0, 200]]


@pytest.mark.parametrize("top", [65535, 200], ids=["bright", "dark"])
def test_sixteen_bits_are_scaled_not_clipped(top: int):
    ramp = np.linspace(0, top, 12).round().astype(np.uint16).reshape(3, 4)
    pixels = decode_image(encoded(Image.fromarray(ramp)), "png", 1)[0]
    assert torch.equal(pixels, torch.from_numpy((ramp / 257).round().astype(np.uint8)))


def test_cmyk_jpeg_has_the_right_colours():
    image = Image.new("RGB", (16, 16), (200, 40, 60)).convert("CMYK")
    pixels = decode_image(encoded(image, "JPEG", quality=100), "jpg", 3).float().mean(dim=(1, 2))
    assert (pixels - torch.tensor([200.0, 40.0, 60.0])).abs().max() < 4


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_exif_rotation_is_applied(format: str):
    array = np.zeros((16, 32, 3), np.uint8)
    array[:, :16] = 250  # bright on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # a viewer turns it by 90 degrees clockwise, so that the top is bright
    pixels = decode_image(encoded(Image.fromarray(array), format, exif=exif, quality=95), format.lower(), 3)
    assert pixels.shape == (3, 32, 16)
    assert pixels[:, :15].float().mean() > 240
    assert pixels[:, 17:].float().mean() < 10


def test_arrays_keep_their_channels_and_floats():
    array = np.random.default_rng(0).uniform(-1, 1, (6, 4, 5)).astype(np.float32)
    assert torch.equal(decode_image(npy(array), "npy", 5), torch.from_numpy(array).permute(2, 0, 1))
    flat = decode_image(npy(array[..., 0]), "npy", 1)
    assert torch.equal(flat, torch.from_numpy(array[None, ..., 0]))


def test_any_float_becomes_float32():
    array = np.random.default_rng(0).uniform(-1, 1, (6, 4, 3))
    for dtype in (">f4", "f2", "f8", "longdouble"):
        pixels = decode_image(npy(array.astype(dtype)), "npy", 3)
        assert pixels.dtype == torch.float32
        assert np.allclose(pixels.permute(1, 2, 0), array, atol=1e-3)


@pytest.mark.parametrize(
    ("data", "extension", "channels", "match"),
    [
        (npy(np.zeros((4, 4, 3), np.float32)), "npy", 5, r"\(4, 4, 3\), expected \(H, W, 5\)"),
        (npy(np.zeros((4, 4, 3), np.uint16)), "npy", 3, "uint16.*uint8 or float"),
        (npy(np.array([{}], dtype=object)), "npy", 3, "allow_pickle"),
        (npy(np.full((4, 4, 3), np.nan, np.float32)), "npy", 3, "not numbers, or outside"),
        (npy(np.full((4, 4, 3), -np.inf, np.float32)), "npy", 3, "not numbers, or outside"),
        (npy(np.full((4, 4, 3), 1.01, np.float16)), "npy", 3, "not numbers, or outside"),
        (npy(np.full((4, 4, 3), 255.0)), "npy", 3, "not numbers, or outside"),
        (npy(np.zeros((4, 4, 3), bool)), "npy", 3, "bool.*uint8 or float"),
        (npy(np.zeros((4, 4, 3), complex)), "npy", 3, "complex128.*uint8 or float"),
        (npy(np.zeros((0, 4, 3), np.uint8)), "npy", 3, r"shape \(0, 4, 3\)"),
        (npy(np.zeros(3, np.uint8)), "npy", 3, r"shape \(3,\)"),
        (npy(np.zeros((4, 4, 3), np.uint8))[:-1], "npy", 3, "npy of 47 bytes for 48"),
        (npy(np.zeros((4, 4, 3), np.uint8)).replace(b"(4, 4, 3), ", b"(9**9, 9,)"), "npy", 3, ""),
        (
            npy(np.zeros((4, 4, 3), np.float32)).replace(b"(4, 4, 3), }" + b" " * 9, b"(4000000, 400000, 3),}"),
            "npy",
            3,
            "4000000",
        ),
        (b"PK\x03\x04" + bytes(200), "npy", 3, "magic"),
        (b"\x80\x04}.", "npy", 3, ""),
        (encoded(Image.new("RGB", (4, 4))), "png", 5, "store arrays as .npy"),
        (b"no picture", "png", 3, "no image: 10 bytes"),
        (encoded(Image.new("RGB", (64, 64), "red"), "JPEG")[:300], "jpg", 3, ""),
    ],
    ids=[
        "channels",
        "dtype",
        "pickle",
        "nan",
        "inf",
        "half",
        "bytes_as_floats",
        "bool",
        "complex",
        "no_rows",
        "one_axis",
        "short",
        "expression",
        "bomb",
        "zip",
        "plain_pickle",
        "five_from_png",
        "garbage",
        "cut_short",
    ],
)
def test_what_is_no_image_is_refused(data: bytes, extension: str, channels: int, match: str):
    with pytest.raises((ValueError, OSError), match=match):
        decode_image(data, extension, channels)


def test_label_maps_keep_their_indices():
    labels = np.random.default_rng(0).integers(0, 200, (5, 4))
    palette = Image.fromarray(labels.astype(np.uint8)).convert("P")
    palette.putpalette(np.random.default_rng(1).integers(0, 256, 768).tolist())  # for display, as in VOC and ADE20K
    for data in (encoded(Image.fromarray(labels.astype(np.uint8))), encoded(palette)):
        assert torch.equal(decode_labels(data)[0], torch.from_numpy(labels))
    wide = labels * 300
    assert torch.equal(decode_labels(encoded(Image.fromarray(wide.astype(np.uint16))))[0], torch.from_numpy(wide))
    with pytest.raises(ValueError, match=r"label map.*RGB"):
        decode_labels(encoded(Image.new("RGB", (4, 4))))


def test_unit_range():
    assert to_signed_range(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1, 1]
    assert to_signed_range(torch.tensor([-1.02, 0.5, 1.02])).tolist() == [
        -1,
        0.5,
        1,
    ]  # resizing can overshoot the range


# -- crop, resize, flip ----------------------------------------------------------------------------------------------

CROPS = ["center", "random", "random_resized"]


def disc(height: int, width: int, radius: int) -> torch.Tensor:
    y, x = torch.meshgrid(torch.arange(height) - height / 2 + 0.5, torch.arange(width) - width / 2 + 0.5, indexing="ij")
    return (255 * (x**2 + y**2 <= radius**2)).to(torch.uint8)[None]


@pytest.mark.parametrize("crop", CROPS)
@pytest.mark.parametrize(
    ("source", "target"), [((90, 160), 32), ((160, 90), 32), ((64, 64), (24, 48)), ((60, 100), (40, 20))]
)
def test_a_circle_stays_a_circle(crop: str, source: tuple[int, int], target):
    transform = ImageTransform(target, crop, scale=(0.8, 1.0))
    plan = transform.plan(*source, np.random.default_rng(0))
    assert abs(plan.height / plan.width - transform.size[0] / transform.size[1]) < 0.03
    full = ImageTransform(target, "center")
    image = full.apply(disc(*source, 12), full.plan(*source, None))[0] > 127
    height, width = image.any(1).sum().item(), image.any(0).sum().item()
    assert image.shape == transform.size
    assert abs(height - width) <= 1


@pytest.mark.parametrize("crop", CROPS)
def test_crops_stay_inside_and_fill_the_target(crop: str):
    rng = np.random.default_rng(0)
    transform = ImageTransform((16, 24), crop, flip=True)
    for _ in range(300):
        height, width = rng.integers(1, 60, 2)
        plan = transform.plan(int(height), int(width), rng)
        assert 0 <= plan.top <= plan.top + plan.height <= height
        assert 0 <= plan.left <= plan.left + plan.width <= width
        assert transform.apply(torch.zeros(1, int(height), int(width), dtype=torch.uint8), plan).shape == (1, 16, 24)


def test_random_crops_reach_every_place():
    rng, transform = np.random.default_rng(0), ImageTransform(8, "random")
    assert {transform.plan(8, 12, rng).left for _ in range(200)} == {0, 1, 2, 3, 4}
    scaled = ImageTransform(8, "random_resized", scale=(0.25, 1.0))
    areas = [p.height * p.width / 40**2 for p in (scaled.plan(40, 40, rng) for _ in range(300))]
    assert 0.22 < min(areas) < 0.35
    assert 0.9 < max(areas) <= 1


@pytest.mark.parametrize("crop", CROPS)
def test_the_plan_is_a_function_of_its_generator(crop: str):
    transform = ImageTransform(8, crop, flip=True)
    plans = [[transform.plan(30, 20, np.random.default_rng([s])) for s in range(20)] for _ in range(2)]
    assert plans[0] == plans[1]
    assert {p.flip for p in plans[0]} == {True, False}


def test_a_checkerboard_becomes_grey():
    board = (torch.arange(64)[:, None] + torch.arange(64)) % 2 * 255
    transform = ImageTransform(16)
    small = transform.apply(board.to(torch.uint8)[None], transform.plan(64, 64, None)).float()
    assert (small - 127.5).abs().max() <= 6


def test_a_picture_of_the_right_size_is_untouched_or_mirrored():
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 16, 16), dtype=np.uint8))
    transform = ImageTransform(16, flip=True)
    for seed in range(8):
        plan = transform.plan(16, 16, np.random.default_rng(seed))
        assert torch.equal(transform.apply(image, plan), image.flip(2) if plan.flip else image)


def test_labels_are_never_mixed():
    labels = torch.tensor([3, 17, 200])[torch.randint(3, (1, 50, 50), generator=torch.Generator().manual_seed(0))]
    transform = ImageTransform(13)
    assert set(transform.apply(labels, transform.plan(50, 50, None), nearest=True).unique().tolist()) <= {3, 17, 200}


def test_only_centre_crops_can_be_cached():
    assert [ImageTransform(8, crop, flip=True).cacheable for crop in CROPS] == [True, False, False]
    assert ImageTransform(8, "random", flip=True).deterministic().plan(20, 30, None).flip is False


def test_an_unknown_crop_is_named():
    with pytest.raises(ValueError, match=r"data\.crop is center, random or random_resized, not 'centre'"):
        ImageTransform(8, "centre")


def test_depth_from_the_command_line_is_read_as_in_training(tmp_path: Path):
    """With all levels of 16 bits; of a picture with colours the grey counts."""
    ramp = np.tile(np.linspace(0, 5000, 64).astype(np.uint16), (64, 1))
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    trained = Depth().decode(
        Sample("a", {"depth.png": (tmp_path / "deep.png").read_bytes()}, None, ImageTransform((64, 64)), 3, {}, {})
    )
    given = Depth().from_words(str(tmp_path / "deep.png"), None, (64, 64), 3)
    torch.testing.assert_close(given, trained, rtol=0, atol=0)
    assert len(given.unique()) == 64
    Image.new("RGB", (8, 8), (51, 51, 51)).save(tmp_path / "grey.png")
    torch.testing.assert_close(
        Depth().from_words(str(tmp_path / "grey.png"), None, (8, 8), 3), torch.full((1, 8, 8), 0.2)
    )


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_labels_of_few_bits_are_the_numbers_in_the_file(bits: int) -> None:
    labels = np.arange(min(2**bits, 16), dtype=np.uint8)
    packed = np.packbits(np.unpackbits(labels[:, None], axis=1)[:, 8 - bits :].reshape(-1))

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", len(labels), 1, bits, 0, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" + packed.tobytes()))
    assert decode_labels(png + chunk(b"IEND", b""))[0, 0].tolist() == labels.tolist()
