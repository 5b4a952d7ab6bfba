"""Edges: a field and its conditioner that no other part of the package refers to."""

import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from chains import chain
from PIL import Image
from scipy import ndimage

import ldm_train
from ldm_train.conditioning.edges import EdgeMap, Edges, edges_of
from ldm_train.data.batch import FIELDS
from ldm_train.data.samples import SampleDecoder, collate
from ldm_train.data.transforms import ImageTransform

KNOWN = FIELDS | {"edges": Edges()}


def png(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, format="PNG")
    return file.getvalue()


def test_edges_are_the_gradient_of_the_brightness() -> None:
    image = torch.rand(3, 9, 7) * 2 - 1
    grey = image.mean(dim=0).double().numpy()
    expected = np.hypot(*(ndimage.sobel(grey, axis, mode="nearest") / 4 for axis in (0, 1))) / 2
    torch.testing.assert_close(edges_of(image)[0].double(), torch.from_numpy(expected.clip(0, 1)), rtol=1e-5, atol=1e-6)
    step = torch.ones(3, 4, 4)
    step[:, :, :2] = -1
    assert edges_of(step)[0, 1].tolist() == [0, 1, 1, 0]


def test_stored_edges_are_cut_with_their_picture_and_missing_ones_are_made_from_it() -> None:
    rng = np.random.default_rng(0)
    picture, edges = rng.integers(0, 256, (24, 32, 3), np.uint8), rng.integers(0, 256, (24, 32), np.uint8)
    decoder = SampleDecoder(ImageTransform(16, "random", flip=True), ("image", "edges"), known=KNOWN)
    raw = {"png": png(picture)}
    made = decoder("k", raw, np.random.default_rng(1))
    torch.testing.assert_close(made["edges"], edges_of(made["image"]))
    both = raw | {"edges.png": png(edges)}
    grey = SampleDecoder(decoder.transform, ("image",), channels=1)("k", {"png": png(edges)}, np.random.default_rng(1))
    torch.testing.assert_close(
        decoder("k", both, np.random.default_rng(1))["edges"], (grey["image"] + 1) / 2, rtol=0, atol=2e-2
    )
    batch = collate([made, decoder("l", raw, np.random.default_rng(2))], KNOWN)
    assert batch["edges"].shape == (2, 1, 16, 16)
    with pytest.raises(ValueError, match=r"image of .* but edges of"):
        decoder("k", raw | {"edges.png": png(edges[:20])}, np.random.default_rng(1))


def test_each_cell_of_the_latents_sees_its_pixels() -> None:
    conditioner, values = EdgeMap(4), torch.zeros(2, 1, 8, 8)
    conditioner.attach(SimpleNamespace(scale=torch.ones(1), downsample_factor=4))
    values[0, 0, 5, 2] = 1
    told = conditioner(values, torch.tensor([False, True]))["concat"]
    assert told.shape == (2, 16, 2, 2)
    assert told[0, :, 1, 0].sum() == told[0].sum() == 1
    assert (told[1] == -1).all()


@pytest.mark.slow
def test_a_model_of_edges_trains_and_samples_without_a_word_elsewhere(tmp_path: Path) -> None:
    from ldm_train.cli import sample as command

    chain(tmp_path, "diffusion/conditioning=edges", "evaluation.adherence=null").execute()
    model = ldm_train.load(str(tmp_path / "run"))
    assert model.fields == ("edges",)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)).save(tmp_path / "p.png")
    arguments = ["ldm-sample", f"run={tmp_path}/run", f"fields.edges={tmp_path}/p.png", "n=2", f"out={tmp_path}/out"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", arguments)
        command.main()
    drawn = sorted((tmp_path / "out").glob("0*.png"))
    assert len(drawn) == 2
