"""Pictures with five channels that are not square work in every step, from .npy files to samples; measures that take
three channels say which groups of channels they were given."""

import csv
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from chains import composed
from PIL import Image

from ldm_train import images as pictures
from ldm_train.cli.common import run_command
from ldm_train.cli.prepare import prepare
from ldm_train.data.loose import image_batches
from ldm_train.generation.sample import sample
from ldm_train.pipeline.machine import machine_of
from ldm_train.pipeline.measure import evaluate
from ldm_train.pipeline.run import Run
from ldm_train.pipeline.train import train

# The recipe of the README, reduced so that every stage takes seconds; no option here depends on the number of channels.
SMALL = [
    "experiment=clothing_f8_small", "logger=csv", "progress=false", "accelerator=cpu", "autoencoder.max_steps=4",
    "autoencoder.batch_size=8", "autoencoder.loss.disc_start=2", "autoencoder.val_every=2",
    "autoencoder.log_every=1", "autoencoder.val_images=4", "autoencoder.network.channel_mult=[1,1,2,2]",
    "autoencoder.loss.discriminator.channels=16",
    "diffusion.max_steps=4", "diffusion.batch_size=8", "diffusion.val_every=2", "diffusion.val_images=4", "diffusion.samples=2",
    "diffusion.network.channels=32", "sampling.num_inference_steps=2", "evaluation.images=4", "evaluation.predictors=4",
]  # fmt: skip
FIVE = ["data.channels=5", "data.image_size=[32,48]"]
GROUPS = "mean over channels 1-3, 3-5"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with prepared data, data/: discs and stripes in five bands, (5, 32, 48)."""
    folder, rng = tmp_path_factory.mktemp("five"), np.random.default_rng(0)
    y, x = np.mgrid[:32, :48]
    for i in range(32):
        disc = (y - rng.uniform(8, 24)) ** 2 + (x - rng.uniform(8, 40)) ** 2 < 50
        shape, spectrum = (
            (disc, [-0.9, -0.5, 0, 0.5, 0.9]) if i % 2 else ((x + y + i) // 6 % 2 == 0, [0.9, 0.5, 0, -0.5, -0.9])
        )
        array = np.where(shape, np.reshape(spectrum, (5, 1, 1)), -0.2).astype(np.float32)
        path = folder / "raw" / ("disc" if i % 2 else "stripes") / f"{i}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, array)
    prepare(composed("prepare", "source=image_folder", f"path={folder}/raw", f"out={folder}/data", "val_fraction=0.2"))
    return folder


def chain(folder: Path, name: str, *overrides: str) -> Path:
    config = composed(
        "train", *SMALL, *FIVE, f"name={name}", f"runs_dir={folder}", f"data.root={folder}/data", *overrides
    )
    (folder / name).mkdir(exist_ok=True)
    Run(config, folder / name, machine_of(config, {})).execute()
    return folder / name


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    return chain(folder, "run")


@pytest.mark.chain
def test_a_run_trains_and_measures_and_says_what_sees_groups(run: Path):
    with open(run / "autoencoder" / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert {"val/psnr", "val/perceptual", "val/fid_tiny", "train/disc", "train/adaptive_weight"} <= set(rows[0])
    metrics = json.loads((run / "evaluation" / "metrics.json").read_text())
    assert metrics["samples"]["fid_tiny"]["channels"] == metrics["reconstructions"]["kid_tiny"]["channels"] == GROUPS
    assert metrics["reconstruction"]["perceptual"]["channels"] == GROUPS
    assert "channels" not in metrics["reconstruction"]["psnr"]  # PSNR takes any number of channels
    for name in ("evaluation/samples.png", "evaluation/denoising.gif", "diffusion/images/samples_0000004.png"):
        with Image.open(run / name) as image:
            assert np.ptp(np.asarray(image.convert("RGB")).astype(int), axis=2).max() > 10, f"{name} has no colours"


def draw(run: Path, *options: str) -> list[Path]:
    return sample(composed("sample", f"run={run}", "accelerator=cpu", *options))


@pytest.mark.chain
def test_samples_lose_nothing_continue_and_are_drawn_again(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    options = ("n=2", "classes=[disc]", "film=gif", f"out={tmp_path}/out")
    paths = draw(run, *options)
    assert "their 5 channels are in the .npy files, (H, W, 5)" in capsys.readouterr().out
    arrays = [np.load(p.with_suffix(".npy")) for p in paths]
    for path, array in zip(paths, arrays):
        assert (array.shape, array.dtype) == ((32, 48, 5), np.float32)
        assert -1 <= array.min() < array.max() <= 1
        with Image.open(path) as image:
            assert np.array_equal(np.array(image), np.array(pictures.to_pil(torch.from_numpy(array).permute(2, 0, 1))))
        assert path.with_suffix(".gif").is_file()
    draw(run, *options)
    assert "2 pictures were there already" in capsys.readouterr().out
    for damage in (
        lambda p: p.unlink(),
        lambda p: p.write_bytes(p.read_bytes()[:99]),
        lambda p: np.save(p, arrays[0] * 0),
    ):
        damage(paths[1].with_suffix(".npy"))
        draw(run, *options)
        assert "already" not in capsys.readouterr().out
        assert all(np.array_equal(np.load(p.with_suffix(".npy")), a) for p, a in zip(paths, arrays))
    sample(composed("sample", f"recipe={tmp_path}/out", f"out={tmp_path}/again", f"run={run}"))
    assert "2 of 2 pictures are identical" in capsys.readouterr().out
    draw(run, *options, "seed=5", "overwrite=true")
    assert sorted(p.name for p in (tmp_path / "out").glob("*.npy")) == ["00000_seed5.npy", "00001_seed6.npy"]
    (batch,) = image_batches([str(tmp_path / "out")])  # the arrays, without the grid and the false-colour PNGs
    assert batch.shape == (2, 5, 32, 48)


@pytest.mark.chain
@pytest.mark.parametrize(
    "options",
    [
        ["task=reconstruct"],
        ["strength=0.5"],
        ["invert=true", "invert_iterations=1"],
        ["mask={mask}"],
        ["extend=[0,16,0,0]"],
        ["task=interpolate", "n=2", "image=[{image},{image}]"],
    ],
    ids=["reconstruct", "img2img", "invert", "inpaint", "outpaint", "interpolate"],
)
def test_tasks_that_begin_from_a_picture_take_arrays(run: Path, folder: Path, tmp_path: Path, options: list[str]):
    array = np.load(folder / "raw" / "disc" / "1.npy").transpose(1, 2, 0)
    np.save(tmp_path / "in.npy", array)
    mask = np.zeros((32, 48), np.uint8)
    mask[8:16, 8:16] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    named = [o.format(image=tmp_path / "in.npy", mask=tmp_path / "mask.png") for o in options]
    image = [] if any(o.startswith("image=") for o in named) else [f"image={tmp_path}/in.npy"]
    path = draw(run, *image, *named, f"out={tmp_path}/out")[0]
    found = np.load(path.with_suffix(".npy"))
    assert found.shape == ((32, 64, 5) if "extend=[0,16,0,0]" in options else (32, 48, 5))
    if "mask={mask}" in options:
        assert np.array_equal(found[mask == 0], array[mask == 0])  # bit for bit the values of the file


@pytest.mark.chain
def test_ldm_evaluate_measures_runs_models_and_folders(
    run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    quiet = ("progress=false", "accelerator=cpu", f"runs_dir={folder}")
    stage = json.loads((run / "evaluation" / "metrics.json").read_text())
    again = evaluate(composed("evaluate", f"run={run}", f"out={tmp_path}/a.json", *quiet))
    assert again["samples"]["fid_tiny"]["value"] == pytest.approx(stage["samples"]["fid_tiny"]["value"], rel=1e-6)
    assert f", {GROUPS}\n" in capsys.readouterr().out
    rebuilt = evaluate(composed("evaluate", f"reconstruct={run}", f"out={tmp_path}/b.json", *quiet))
    model = f"reconstruct={run}/autoencoder/model"
    alone = evaluate(
        composed("evaluate", model, f"data.root={folder}/data", "data.image_size=[32,48]", "metrics=[]", *quiet)
    )
    for name in ("psnr", "ssim", "perceptual"):
        values = [found["reconstruction"][name]["value"] for found in (alone, rebuilt)]
        assert values[0] == pytest.approx(values[1], rel=1e-4)
    assert alone["reconstructions"] == {}
    assert {"psnr", "ssim", "perceptual"} == set(alone["reconstruction"])
    draw(run, "n=4", f"out={tmp_path}/drawn")
    shutil.copytree(folder / "raw" / "disc", tmp_path / "disc")
    for path in (tmp_path / "disc").glob("*.npy"):
        np.save(path, np.load(path).transpose(1, 2, 0))
    sets = (f"images={tmp_path}/drawn", f"against={tmp_path}/disc", "metrics=[kid_tiny]")
    found = evaluate(composed("evaluate", *sets, *quiet))["images"]["kid_tiny"]
    assert (found["n"], found["n_reference"], found["channels"]) == (4, 16, GROUPS)
    for measured in (f"run={run}", "images=a against=b"):
        with pytest.raises(ValueError, match=r"metrics=\[\] measures nothing"):
            evaluate(composed("evaluate", *measured.split(), "metrics=[]", *quiet))


@pytest.mark.chain
@pytest.mark.slow
def test_a_run_may_measure_no_distances_and_know_no_perceptual_term(folder: Path, capsys: pytest.CaptureFixture):
    parts = ("autoencoder/loss/perceptual=none", "evaluation.metrics=[]", "diffusion/conditioning=none")
    run = chain(folder, "plain", *parts, "data.reader=streaming", "latents.cache=false", "data.crop=random_resized")
    assert "the perceptual distance" not in capsys.readouterr().out
    with open(run / "autoencoder" / "metrics.csv") as file:
        columns = next(csv.reader(file))
    assert "val/psnr" in columns
    assert not {"val/fid_tiny", "val/perceptual"} & set(columns)
    metrics = json.loads((run / "evaluation" / "metrics.json").read_text())
    assert metrics["samples"] == metrics["reconstructions"] == {}
    assert set(metrics["reconstruction"]) == {"psnr", "ssim"}
    assert (run / "evaluation" / "samples.png").is_file()
    assert draw(run, f"out={run}/drawn")


@pytest.mark.chain
@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        pytest.param("superres", ["data/derived=bsr_x4"], marks=pytest.mark.slow),
        ("inpainting", ["data/derived=masks"]),
        pytest.param(
            "image_embedding", ["diffusion.evaluate_every=2", "diffusion.evaluate_images=4"], marks=pytest.mark.slow
        ),
    ],
)
def test_conditions_made_of_the_picture_have_five_channels(run: Path, folder: Path, kind: str, parts: list[str]):
    own = [f"diffusion/conditioning={kind}", f"autoencoder.pretrained={run}", *parts, "evaluation.restoration.images=2"]
    made = chain(folder, kind, *own)
    metrics = json.loads((made / "evaluation" / "metrics.json").read_text())
    assert ("restoration" in metrics) == (kind != "image_embedding")


class Spectral(torch.nn.Module):
    """A user's own feature extractor: the mean of each channel. It takes five channels only."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean(dim=(2, 3)) @ torch.eye(5, device=images.device)


def own_extractor(*overrides: str) -> list[str]:
    return ["+evaluation.extractors.mine._target_=test_channels.Spectral", "evaluation.metrics=[fid_mine]", *overrides]


@pytest.mark.chain
@pytest.mark.slow
def test_an_extractor_of_ones_own_sees_all_channels(run: Path, folder: Path):
    made = chain(folder, "mine", f"autoencoder.pretrained={run}", *own_extractor())
    found = json.loads((made / "evaluation" / "metrics.json").read_text())["samples"]["fid_mine"]
    assert "channels" not in found
    assert found["value"] > 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.channels=3"], r"holds \.npy pictures of 5 channels, data\.channels is 3; set data\.channels=5"),
        (
            own_extractor("data.channels=4", "data.root={grey}"),
            r"extractors\.mine does not take pictures of 4 channels, 32x48",
        ),
        (
            ["data.channels=5", "data.root={rgb}"],
            r"\.png files \(.*\), which have 1 or 3 channels, data\.channels is 5",
        ),
        (
            ["evaluation.metrics=[]", "diffusion.evaluate_every=2"],
            r"diffusion\.evaluate_every measures evaluation\.metrics",
        ),
        (
            ["diffusion.network.channel_mult=[1,1,1]"],
            r"latents of 4x6, and this network takes multiples of 4; use 32x32",
        ),
    ],
    ids=["channels", "extractor", "png", "no_metrics", "halvings"],
)
def test_what_does_not_fit_the_channels_is_said_before_training(
    folder: Path, tmp_path: Path, overrides: list[str], message: str
):
    for name, save in {
        "grey": lambda path: np.save(path.with_suffix(".npy"), np.zeros((32, 48, 4), np.uint8)),
        "rgb": lambda path: Image.new("RGB", (48, 32)).save(path.with_suffix(".png")),
    }.items():
        for i in range(32):
            (tmp_path / name / "raw" / "cat").mkdir(parents=True, exist_ok=True)
            save(tmp_path / name / "raw" / "cat" / f"{i}")
        if f"{{{name}}}" in "".join(overrides):
            paths = (f"path={tmp_path}/{name}/raw", f"out={tmp_path}/{name}/data", "val_fraction=0.3")
            prepare(composed("prepare", "source=image_folder", *paths))
    named = [
        o.format(grey=tmp_path / "grey" / "data", rgb=tmp_path / "rgb" / "data") if "{" in o else o for o in overrides
    ]
    with pytest.raises(ValueError, match=message):
        chain(folder, f"refused-{abs(hash(message))}", *named)
    assert not (folder / f"refused-{abs(hash(message))}" / "autoencoder").exists()


@pytest.mark.parametrize("value", ["null", "none"])
def test_no_perceptual_term_may_be_called_either_way(
    folder: Path, tmp_path: Path, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """The options as typed on the command line, where Hydra itself does not take null for a config group."""
    seen: list = []
    monkeypatch.setattr(sys, "argv", ["train.py", *SMALL, *FIVE, f"autoencoder/loss/perceptual={value}"])

    def keep(config) -> None:
        seen.append(config)

    keep.__module__ = train.__module__
    run_command(keep, "train")
    assert seen[0].autoencoder.loss.perceptual is None
    assert seen[0].evaluation.perceptual is None
