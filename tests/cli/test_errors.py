"""A user's mistake is answered with one sentence that says what to do, before any work is done."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from omegaconf import OmegaConf
from PIL import Image
from tiers import tiered
from torch.utils.data import DataLoader, Dataset

from ldm_train.cli import prepare
from ldm_train.cli.common import TRACEBACK, run_command
from ldm_train.cli.hints import recipes, suggestions
from ldm_train.configuration import config_folder
from ldm_train.data.files import DataError
from ldm_train.data.prepare.build import build as build_shards
from ldm_train.data.prepare.image_folder import ImageFolder
from ldm_train.data.prepare.shapes import Shapes
from ldm_train.pipeline import machine, train

ROOT = Path(__file__).parents[2]
Command = Callable[..., str]


@pytest.fixture
def fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> Command:
    """fails("train", override, ...) -> the error message with which the command exits. Fails if the status is not 1 or
    there is a traceback."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setenv(TRACEBACK, "0")

    def run(name: str, *arguments: str) -> str:
        # Hydra finds its config by the function's module, so the function itself is called, as main() does.
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        with pytest.raises(SystemExit) as caught:
            run_command({"train": train.train, "prepare": prepare.prepare}[name], name)
        assert caught.value.code == 1
        message = capfd.readouterr().err
        assert "Traceback" not in message
        return message.partition("\nerror: ")[2]

    return run


# Options of a run that would start within seconds if the arguments after them were right.
SMALL = (
    "logger=csv",
    "progress=false",
    "data.source.count=16",
    "data.source.val_count=4",
    "autoencoder.max_steps=1",
    "autoencoder.lr_schedule.warmup_steps=0",
    "autoencoder.batch_size=4",
    "autoencoder.val_images=4",
    "stages=[autoencoder]",
)


# -- the command line ------------------------------------------------------------------------------------------------


@tiered(
    ("override", "meant"),
    [
        ("autoencoder.max_step=3", "did you mean autoencoder.max_steps"),
        ("experiment=quickstrat", "did you mean quickstart?"),
        ("technique=[r1,mun]", "technique=mun: did you mean muon?"),
        ("autoencoder/network=kl_f4_tny", "did you mean kl_f4_tiny"),
        ("lr=1e-3", "did you mean autoencoder.lr or diffusion.lr"),
        ("data.imagesize=64", "did you mean data.image_size"),
        ("dats=shapes", "did you mean data"),
    ],
    fast=4,
)
def test_misspelt_options_are_met_with_what_was_meant(fails: Command, tmp_path: Path, override: str, meant: str):
    message = fails("train", override)
    assert meant in message
    assert "in struct" not in message  # Hydra's own words
    assert "To append" not in message
    assert "search path" not in message
    assert list(tmp_path.iterdir()) == []


def test_known_options_get_no_suggestions():
    assert (
        suggestions("train", ["autoencoder.lr=1", "experiment=quickstart", "data=cifar10", "diffusion/network=tiny"])
        == ""
    )


def test_unknown_options_are_named_with_the_command_that_lists_the_options(fails: Command):
    assert fails("prepare", "sampler=/a/b") == "there is no option sampler\nldm-prepare --help lists the options\n"
    assert "'quickstart' is no option: options are written name=value" in fails("train", "quickstart")
    assert "there is no option lr\nlr: did you mean autoencoder.lr" in fails("train", "lr=1")


@tiered(
    ("override", "sentence"),
    [
        ("autoencoder.lr=abc", "autoencoder.lr='abc' is not a number"),
        ("diffusion.max_steps=2.5", "diffusion.max_steps=2.5 is not a whole number"),
        ("diffusion.batch_size=0", "diffusion.batch_size=0 is below 1"),
        ("autoencoder.max_steps=true", "autoencoder.max_steps=True is not a whole number"),
        ("accelerator=tpu", "accelerator is auto, cpu, gpu or mps, not 'tpu'"),
        ("precision=16", "precision is one of 32, bf16-mixed, 16-mixed, not 16"),
        ("stages=[unet]", "unknown stages ['unet']; choose from autoencoder"),
    ],
    fast=3,
)
def test_impossible_values_are_named(fails: Command, tmp_path: Path, override: str, sentence: str):
    assert sentence in fails("train", *SMALL, f"data_dir={tmp_path}", override)


def test_half_precision_on_a_cpu_is_refused(fails: Command):
    assert "precision=16-mixed needs a CUDA GPU; use precision=32 on a CPU" in fails(
        "train", "accelerator=cpu", "precision=16-mixed"
    )


@tiered(
    ("options", "sentence"),
    [
        (("devices=9999",), "devices=9999, but 2 CPU cores are there; use devices=2"),
        (("devices=2", "autoencoder.batch_size=3"), "batch_size 3 does not split over 2 devices"),
        (("devices=2", "stages=[unet]"), "unknown stages ['unet']"),
        (("devices=2", "restart=unet"), "unknown stages ['unet']"),
        (("devices=2", "precision=16"), "precision is one of 32, bf16-mixed, 16-mixed, not 16"),
        (("devices=2", "autoencoder.data.root=nowhere"), "data folder nowhere does not exist"),
        (("devices=2", "data.image_size=30"), "data.image_size 30x30 is not divisible"),
    ],
    fast=3,
)
def test_with_several_devices_it_is_said_before_any_process_is_started(
    fails: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], sentence: str
):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(machine, "launch", lambda count, module: pytest.fail("processes were started"))
    assert sentence in fails("train", *SMALL, "accelerator=cpu", f"data_dir={tmp_path}", *options)


def test_what_starts_the_processes_of_gpus_checks_their_run_without_a_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(machine, "launch", lambda count, module: 7)
    config, seen = OmegaConf.create({"devices": 2, "engine": None, "accelerator": "gpu", "precision": "16-mixed"}), []
    with pytest.raises(SystemExit, match="7"):
        machine.join_devices(config, "command", seen.append)
    assert (seen[0].precision, seen[0].world_size, seen[0].device.type) == ("16-mixed", 2, "cpu")  # keys hold precision
    config.devices = 3
    with pytest.raises(ValueError, match="devices=3, but 2 GPUs are visible; use devices=2"):
        machine.join_devices(config, "command", seen.append)


def test_a_sweep_over_several_devices_is_refused(fails: Command):
    assert "devices>1 and engine=ray cannot be combined with -m" in fails("train", "-m", "devices=2", "seed=0,1")


# -- data ------------------------------------------------------------------------------------------------------------


def test_missing_data_names_the_command_that_makes_them(fails: Command, tmp_path: Path):
    message = fails("train", "experiment=cifar10_f4", "logger=csv", f"data_dir={tmp_path}")
    root = tmp_path / "cifar10"
    assert f"data folder {root} does not exist; make it with: ldm-prepare source=cifar10 out={root}" in message


def test_a_size_that_the_autoencoder_cannot_halve_is_refused(fails: Command, tmp_path: Path):
    message = fails("train", *SMALL, f"data_dir={tmp_path}", "data.image_size=30")
    assert "data.image_size 30x30 is not divisible by the autoencoder's downsample_factor 4; use 28x28" in message
    assert not (tmp_path / "runs" / "quickstart" / "autoencoder").exists()


def test_a_batch_that_cannot_be_split_is_refused(fails: Command, tmp_path: Path):
    message = fails("train", *SMALL, f"data_dir={tmp_path}", "autoencoder.micro_batch_size=3")
    assert "batch_size 4 does not split over 1 devices with micro_batch_size 3" in message


def test_preparing_asks_for_the_raw_files(fails: Command, tmp_path: Path):
    for source in ("image_folder", "csv", "index"):
        assert "path=<folder, table or archive>" in fails("prepare", f"source={source}", f"out={tmp_path}/out")


def test_a_folder_of_photos_is_no_place_for_drawn_shapes(fails: Command, tmp_path: Path):
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "photos" / "a.jpg")
    message = fails(
        "train", "experiment=quickstart", f"data.root={tmp_path}/photos", f"runs_dir={tmp_path}/runs", "logger=csv"
    )
    assert "photos holds other files (first: a.jpg), not shards" in message
    assert "ldm-prepare source=image_folder path=" in message
    assert [p.name for p in (tmp_path / "photos").iterdir()] == ["a.jpg"]


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("per_shard=-1", "per_shard=-1 is below 1"),
        ("workers=two", "workers='two' is not a whole number"),
        ("source.count=many", "source.count='many' is not a whole number"),
        ("source.count=0", "source.count=0 is below 1"),
    ],
)
def test_counts_of_a_preparation_are_checked(fails: Command, tmp_path: Path, option: str, sentence: str):
    assert sentence in fails("prepare", "source=shapes", f"out={tmp_path}/out", option)
    assert not (tmp_path / "out").exists()


def test_preparing_says_what_is_missing(fails: Command, tmp_path: Path):
    assert "out=<folder> is required" in fails("prepare", "source=shapes")
    message = fails("prepare", "source=image_folder", f"path={tmp_path}/none", f"out={tmp_path}/out")
    assert message == f"path={tmp_path}/none is not a folder; give a folder of images\n"
    assert "did you mean image_folder" in fails("prepare", "source=image_foldr", "path=x", "out=y")
    assert "columns" in fails("prepare", "source=csv", f"path={_table(tmp_path)}", f"out={tmp_path}/out")
    assert not (tmp_path / "out").exists()


def _table(folder: Path) -> Path:
    (folder / "table.csv").write_text("file,text\na.png,a\n")
    return folder / "table.csv"


# -- weights and runs ------------------------------------------------------------------------------------------------


def test_missing_vgg_weights_name_the_way_without_a_download(
    fails: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nothing answers there
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    message = fails("train", *SMALL, f"data_dir={tmp_path}", "autoencoder/loss/perceptual=lpips_vgg")
    assert message.startswith(f"no VGG16 weights at {tmp_path}/hub/hub/checkpoints/vgg16")
    assert "autoencoder/loss/perceptual=tiny" in message
    assert "autoencoder.loss.perceptual.weights=<file>" in message


def test_an_existing_run_is_neither_reused_nor_overwritten(
    fails: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    arguments = ["train.py", *SMALL, f"data_dir={tmp_path}", "name=mine"]
    monkeypatch.setattr(sys, "argv", arguments)
    run_command(train.train, "train")
    run = tmp_path / "runs" / "mine"
    before = (run / "autoencoder" / "model" / "metadata.json").read_bytes()
    message = fails("train", *arguments[1:], "autoencoder.lr=7e-3", "data.flip=true")
    assert "autoencoder.lr: 0.001 -> 0.007" in message
    assert "data.flip: False -> True" in message
    assert "name=<new>" in message
    assert "restart=autoencoder" in message
    assert (run / "autoencoder" / "model" / "metadata.json").read_bytes() == before
    monkeypatch.setattr(sys, "argv", [*arguments, "autoencoder.lr=7e-3", "restart=autoencoder"])
    run_command(train.train, "train")
    assert (run / "autoencoder" / "model" / "metadata.json").read_bytes() != before
    assert [(p / "model" / "metadata.json").read_bytes() for p in (run / ".replaced").iterdir()] == [before]


def test_data_made_with_other_options_are_not_taken_for_what_was_asked(fails: Command, tmp_path: Path):
    build_shards(Shapes(count=16, val_count=4), tmp_path / "data")
    arguments = (*SMALL, f"data.root={tmp_path}/data", f"runs_dir={tmp_path}/runs", "data.source.val_count=8")
    message = fails("train", *arguments)
    assert "data was prepared with data.source.val_count=4, and now val_count 8 is asked for" in message


@tiered(
    ("overrides", "sentence"),
    [
        (("diffusion.batch_size=64",), "diffusion.batch_size=64 exceeds the 16 training images"),
        (("diffusion.schedule.kind=foo",), "unknown beta schedule 'foo'"),
        (("diffusion.objective.weighting=foo",), "weighting 'foo' is not one of"),
        (("diffusion.lr_schedule.schedule=cosin",), "lr_schedule.schedule is constant, cosine or linear, not 'cosin'"),
        (("sampling.spacing=foo",), "unknown spacing 'foo'"),
        (("diffusion.network.channel_mult=[1,2,2,2,2]",), "data.image_size 32x32 gives latents of 8x8"),
        (("data.image_size=4", "data.source.size=32", "autoencoder.loss.discriminator=null"), "use 8x8 or another"),
        (("autoencoder.network=kl_f4",), "a part is chosen with a slash: autoencoder/network=kl_f4"),
        (("logger=wanbd",), "logger=wanbd: did you mean wandb?"),
        (("stages=diffusion",), r"stages is a list: stages=[diffusion]"),
    ],
    fast=4,
)
def test_what_a_later_stage_could_not_do_is_said_before_the_first(
    fails: Command, tmp_path: Path, overrides: tuple[str, ...], sentence: str
):
    message = fails("train", *SMALL[:-1], f"data_dir={tmp_path}", f"runs_dir={tmp_path}/runs", *overrides)
    assert sentence in message
    assert not list(tmp_path.glob("runs/**/checkpoints"))


def test_conditions_that_the_data_lack_are_missed_before_training(fails: Command, tmp_path: Path):
    (tmp_path / "photos").mkdir()
    for i in range(30):
        Image.new("RGB", (32, 32), (8 * i, 0, 0)).save(tmp_path / "photos" / f"{i}.png")
    build_shards(ImageFolder(str(tmp_path / "photos"), val_fraction=0.2), tmp_path / "mine")
    options = ["experiment=cifar10_f4", f"data.root={tmp_path}/mine", "logger=csv", f"runs_dir={tmp_path}/runs"]
    message = fails("train", *options, "autoencoder.batch_size=4", "diffusion.batch_size=4")
    assert "not every sample has a class_label" in message
    assert "diffusion/conditioning=none" in message
    assert not list(tmp_path.glob("runs/**/checkpoints"))


def test_a_later_stage_alone_says_what_it_needs(fails: Command, tmp_path: Path):
    message = fails("train", *SMALL[:-1], f"data_dir={tmp_path}", "stages=[diffusion]", "diffusion.batch_size=4")
    assert "has no finished stage 'latents' yet; run it first: stages=[autoencoder,latents]" in message


def test_an_autoencoder_that_is_not_there_is_named(fails: Command, tmp_path: Path):
    message = fails("train", *SMALL, f"data_dir={tmp_path}", "autoencoder.pretrained=nowhere")
    assert "autoencoder.pretrained=nowhere is not a run with a finished autoencoder" in message
    assert "runs/nowhere/autoencoder/model" in message


@pytest.mark.parametrize("name", ["prepare", "sample", "app"])
def test_help_explains_every_option(name: str):
    text = yaml.safe_load((config_folder() / f"{name}.yaml").read_text())
    explained = text["hydra"]["help"]["template"]
    for option in text:
        assert option in ("defaults", "hydra") or re.search(rf"{option}(=|\.\w+=)", explained), option
    for source in (config_folder() / "source").glob("*.yaml"):
        assert name != "prepare" or f"source={source.stem}" in explained


# -- as a user starts them -------------------------------------------------------------------------------------------


def test_the_commands_leave_with_one_message(tmp_path: Path):
    environment = {k: v for k, v in os.environ.items() if k not in ("HYDRA_FULL_ERROR", TRACEBACK)} | {
        "PYTHONPATH": str(ROOT)
    }
    lines = {
        (str(ROOT / "train.py"), "autoencoder.max_step=3"): "did you mean autoencoder.max_steps",
        ("-m", "ldm_train.cli.prepare", "source=shapes"): "out=<folder> is required",
    }
    running = {
        command: subprocess.Popen(
            [sys.executable, *command], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True
        )
        for command in lines
    }
    for command, sentence in lines.items():
        message = running[command].communicate()[1]
        assert running[command].returncode == 1
        assert sentence in message
        assert "Traceback" not in message
    assert list(tmp_path.iterdir()) == []


class Damaged(Dataset):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> None:
        try:
            raise DataError("the first")
        except DataError as error:
            raise DataError("a.tar is damaged;\ncopy it again") from error


@pytest.mark.parametrize("workers", [0, 1])
def test_what_a_loading_process_says_is_shown_without_its_traceback(
    workers: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
):
    monkeypatch.setattr(sys, "argv", ["bench.py"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setenv(TRACEBACK, "0")
    with pytest.raises(SystemExit):
        run_command(lambda config: list(DataLoader(Damaged(), num_workers=workers)), "bench")
    assert capfd.readouterr().err.strip() == "error: a.tar is damaged;\ncopy it again"


def test_tracebacks_are_there_for_those_who_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.delenv(TRACEBACK, raising=False)
    monkeypatch.setattr(sys, "argv", ["prepare.py", "source=shapes"])
    try:
        with pytest.raises(ValueError, match="out=<folder>"):
            run_command(prepare.prepare, "prepare")
        assert os.environ[TRACEBACK] == "1"  # also in the processes that torchrun starts
    finally:
        os.environ.pop(TRACEBACK, None)


def test_help_lists_every_recipe_once_with_what_it_is():
    listed = [line.split(maxsplit=1) for line in recipes().splitlines() if line.startswith("  ")]
    assert sorted(name for name, _ in listed) == sorted(p.stem for p in (config_folder() / "experiment").glob("*.yaml"))
    assert all(len(text) > 20 for _, text in listed)


def test_help_does_not_wait_for_torch():
    """The commands' modules do not import torch, which takes several seconds, so that --help answers in about one."""
    code = "import sys; import ldm_train.cli.train, ldm_train.cli.sample, ldm_train.cli.evaluate; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
