"""A whole training run as users start it: every stage runs, is skipped the second time, is refused if options changed
and continues if more steps are asked for."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from chains import SMALL, chain, composed
from omegaconf import OmegaConf
from PIL import Image

from ldm_train import images as pictures
from ldm_train.checkpoints.native import load_model
from ldm_train.cli import sample as sample_cli
from ldm_train.data.latents import CachedLatents
from ldm_train.data.prepare import build as build_module
from ldm_train.data.prepare.build import build as build_shards
from ldm_train.data.prepare.shapes import Shapes
from ldm_train.data.shards import DataError
from ldm_train.errors import Refused
from ldm_train.generation.sample import sample
from ldm_train.pipeline.resume import read_note, set_aside

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def finished(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(trained, tmp_path_factory.mktemp("chain"), dirs_exist_ok=True))


@pytest.mark.chain
def test_a_run_leaves_everything_the_design_names(finished: Path):
    run = finished / "run"
    for name in (
        "config.yaml",
        "autoencoder/checkpoints/last.ckpt",
        "autoencoder/checkpoints/best.ckpt",
        "autoencoder/model/model.safetensors",
        "autoencoder/metrics.csv",
        "autoencoder/images/reconstructions_0000006.png",
        "latents/index.json",
        "latents/statistics.json",
        "diffusion/images/samples_0000006.png",
        "diffusion/model/config.yaml",
        "evaluation/metrics.json",
        "evaluation/samples.png",
        "export/metadata.json",
    ):
        assert (run / name).is_file(), name
    text = (run / "evaluation" / "metrics.json").read_text()
    metrics = json.loads(text)
    assert not {"NaN", "Infinity"} & set(re.findall(r"\w+", text))  # other programs' JSON has no such numbers
    assert metrics["samples"]["fid_tiny"]["n"] == 8
    assert 0 <= metrics["adherence"]["trained"]["all"] <= metrics["adherence"]["trained"]["mean"] <= 1
    model = load_model(run / "export")
    statistics = json.loads((run / "latents" / "statistics.json").read_text())
    assert model.first_stage.one_scale == pytest.approx(statistics["scale_factor"])


@pytest.mark.chain
def test_distances_measured_while_training_equal_those_of_the_evaluation(finished: Path):
    metrics = json.loads((finished / "run/evaluation/metrics.json").read_text())
    for stage, kind in (("autoencoder", "reconstructions"), ("diffusion", "samples")):
        with open(finished / "run" / stage / "metrics.csv", newline="") as file:
            found = [r for r in csv.DictReader(file) if r["val/fid_tiny"]]
            rows, last = {int(r["step"]): r["val/fid_tiny"] for r in found}, found[-1]
        assert sorted(rows) == [3, 6]
        assert float(rows[max(rows)]) == pytest.approx(metrics[kind]["fid_tiny"]["value"], rel=1e-3)
        if kind == "samples":  # training and evaluation use the same function, so every metric agrees up to rounding
            for name in ("fid_tiny", "kid_tiny", "precision_tiny", "recall_tiny"):
                assert float(last[f"val/{name}"]) == pytest.approx(metrics[kind][name]["value"], rel=1e-6, abs=1e-9)
        assert rows[min(rows)] != rows[max(rows)]


@pytest.mark.chain
def test_the_same_line_again_skips_every_stage(finished: Path):
    before = {p: p.stat().st_mtime_ns for p in (finished / "run").rglob("*.safetensors")}
    chain(finished).execute()
    assert before == {p: p.stat().st_mtime_ns for p in (finished / "run").rglob("*.safetensors")}


@pytest.mark.chain
def test_an_export_whose_key_lacks_the_sampling_options_is_known_by_its_metadata(
    finished: Path, tmp_path: Path, capsys
):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "run" / "export" / "stage.json"
    note = json.loads(path.read_text())
    del note["key"]["sampling"]
    path.write_text(json.dumps(note))
    chain(tmp_path, "stages=[export]").execute()
    assert "export: finished before, skipped" in capsys.readouterr().out
    with pytest.raises(Refused, match=r"settings:\n  sampling.guidance_scale: 3.0 -> 2.5\nChoose .*restart=export"):
        chain(tmp_path, "stages=[export]", "sampling.guidance_scale=2.5").execute()


@pytest.mark.chain
def test_a_changed_option_is_refused_by_name_and_restart_starts_that_stage_anew(finished: Path):
    with pytest.raises(Refused, match=r"(?s)diffusion\.lr: 0\.001 -> 0\.002.*name=<new>.*restart=diffusion"):
        chain(finished, "diffusion.lr=0.002").execute()
    set_aside(finished / "run", ["evaluation"])
    chain(finished).execute()
    assert read_note(finished / "run" / "evaluation")["finished"]
    assert list((finished / "run" / ".replaced").glob("evaluation-*"))


@pytest.mark.slow
def test_more_steps_continue_the_autoencoder_and_later_stages_ask_to_be_made_anew(trained: Path, tmp_path: Path):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.is_file()}
    with pytest.raises(Refused, match=r"(?s)latents, diffusion, evaluation, export were made from it.*restart=latents"):
        chain(tmp_path, "autoencoder.max_steps=9").execute()
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.is_file()}
    chain(tmp_path).execute()  # the original command still works
    chain(tmp_path, "autoencoder.max_steps=9", "restart=latents").execute()
    checkpoint = torch.load(tmp_path / "run/autoencoder/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 9
    assert read_note(tmp_path / "run" / "export")["finished"]
    before = read_note(tmp_path / "run" / "export")["result"]["sha256"]
    chain(tmp_path, "autoencoder.max_steps=9", "diffusion.max_steps=8", "restart=evaluation").execute()
    assert read_note(tmp_path / "run" / "export")["result"]["sha256"] != before
    with pytest.raises(Refused, match=r"sampling.guidance_scale: .* -> 2.5"):  # exported with the model
        chain(tmp_path, "autoencoder.max_steps=9", "diffusion.max_steps=8", "sampling.guidance_scale=2.5").execute()


@pytest.mark.chain
def test_the_record_is_of_what_was_trained_with_what(finished: Path, tmp_path: Path):
    """config.yaml records the new condition of later stages, while the autoencoder's options stay as they were."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    options = ("stages=[latents,diffusion]", "restart=latents", "autoencoder.lr=0.5", "diffusion.evaluate_every=null")
    chain(tmp_path, *options, "diffusion/conditioning=none").execute()
    record = OmegaConf.load(tmp_path / "run" / "config.yaml")
    assert record.diffusion.conditioning.conditioners == {}
    assert record.autoencoder.lr == OmegaConf.load(finished / "run" / "config.yaml").autoencoder.lr


@pytest.mark.chain
def test_a_card_that_shows_an_earlier_evaluation_is_named(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    chain(tmp_path, "evaluation.images=6", "restart=evaluation").execute()
    assert "card is of an earlier evaluation, or of none: restart=export writes it again" in capsys.readouterr().out


@pytest.mark.chain
def test_a_model_is_not_measured_without_the_conditions_it_reads(finished: Path, tmp_path: Path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    with pytest.raises(ValueError, match=r"the model reads .*class_label.* options that it was trained with"):
        chain(tmp_path, "stages=[evaluation]", "restart=evaluation", "diffusion/conditioning=none").execute()


@pytest.mark.slow
@pytest.mark.parametrize("autoencoder", ["vq_f4_tiny", "identity"])
def test_the_chain_runs_on_deterministic_latents(tmp_path: Path, autoencoder: str):
    chain(tmp_path, f"autoencoder={autoencoder}", "data.adherence=null", "evaluation.adherence=null").execute()
    run = tmp_path / "run"
    model = load_model(run / "export")
    channels = model.first_stage.latent_channels
    assert CachedLatents(run / "latents", "train", (), 0).moments(0).shape[0] == channels  # no log-variances stored
    metrics = json.loads((run / "evaluation" / "metrics.json").read_text())
    if autoencoder == "identity":
        assert read_note(run / "autoencoder")["finished"]
        assert metrics["reconstruction"]["ssim"]["value"] == pytest.approx(1, abs=1e-3)
    else:
        with open(run / "autoencoder" / "metrics.csv", newline="") as file:
            logged = [r for r in csv.DictReader(file) if r["val/perplexity"]]
        assert 1 <= float(logged[-1]["val/perplexity"]) <= 256
        assert metrics["reconstruction"]["psnr"]["value"] > 3


CONDITIONS = {
    "layout": ["layout.depth=1", "layout.max_objects=2"],
    "semantic": ["segmentation.num_labels=19"],
    "superres": [],
    "inpainting": [],
    "image_embedding": [],
}
DERIVED = {"superres": "data/derived=bicubic_x4", "inpainting": "data/derived=masks"}


# Maps, masks and pictures are in the slow tier here: in the fast tier test_channels.py has models conditioned on them.
@pytest.mark.slow
@pytest.mark.chain
@pytest.mark.parametrize("conditioning", CONDITIONS)
def test_the_chain_runs_under_every_kind_of_condition(finished: Path, tmp_path: Path, conditioning: str):
    options = [f"diffusion.conditioning.conditioners.{o}" for o in CONDITIONS[conditioning]]
    made = chain(
        tmp_path, f"diffusion/conditioning={conditioning}", DERIVED.get(conditioning, "data/derived=none"), *options,
        "diffusion.max_steps=3", "data.flip=true", f"autoencoder.pretrained={finished}/run",  # it has no condition
    )  # fmt: skip
    made.execute()
    model = load_model(tmp_path / "run" / "export")
    assert tuple(model.network.condition_widths.values()) == {
        "layout": (512, 0, 0), "semantic": (0, 3, 0), "superres": (0, 3, 0), "inpainting": (0, 5, 0), "image_embedding": (0, 0, 256),
    }[conditioning]  # fmt: skip
    metrics = json.loads((tmp_path / "run/evaluation/metrics.json").read_text())
    assert metrics["samples"]["fid_tiny"]["n"] == 8


@pytest.mark.slow
def test_bf16_goes_through_the_whole_chain(tmp_path: Path):
    chain(tmp_path, "precision=bf16-mixed", "data.adherence=null", "evaluation.adherence=null").execute()
    assert read_note(tmp_path / "run" / "export")["finished"]
    for stage in ("autoencoder", "diffusion"):
        checkpoint = torch.load(tmp_path / "run" / stage / "checkpoints/last.ckpt", weights_only=True)
        assert {v.dtype for v in checkpoint["state_dict"].values() if v.is_floating_point()} == {torch.float32}
        assert all(v.isfinite().all() for v in checkpoint["state_dict"].values())


@pytest.mark.chain
@pytest.mark.slow
def test_a_pretrained_autoencoder_takes_the_place_of_stage_one(finished: Path, tmp_path: Path):
    made = chain(tmp_path, f"autoencoder.pretrained={finished}/run", "stages=[autoencoder,latents,diffusion]")
    made.execute()
    ours, theirs = (load_model(f / "run/autoencoder/model").state_dict() for f in (tmp_path, finished))
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert not (tmp_path / "run/autoencoder/checkpoints").exists()


@pytest.mark.chain
@pytest.mark.slow
def test_a_classifier_of_the_same_latents_guides_and_one_of_others_is_refused(finished: Path, tmp_path: Path):
    """Trains a classifier as users do and guides a model without classes with it; the class changes the picture."""
    common = (f"autoencoder.pretrained={finished}/run", f"data_dir={finished}/data")
    small = (
        "classifier.max_steps=4",
        "classifier.batch_size=8",
        "classifier.val_every=2",
        "classifier.checkpoint_every=2",
        "classifier.log_every=1",
    )
    stages = "stages=[autoencoder,latents,classifier]"
    chain(tmp_path, "experiment=classifier_shapes", *common, *small, stages, name="classifier").execute()
    assert (tmp_path / "classifier/classifier/checkpoints/last.ckpt").is_file()
    with open(tmp_path / "classifier/classifier/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert {"train/loss", "train/accuracy", "val/accuracy", "val/accuracy_t3"} <= rows[-1].keys()
    chain(
        tmp_path, "experiment=shapes_unconditional", *common, "diffusion.max_steps=2",
        "stages=[autoencoder,latents,diffusion]", name="model",
    ).execute()  # fmt: skip

    def draw(*options: str) -> torch.Tensor:
        arguments = (
            f"run={tmp_path}/model",
            "n=1",
            f"out={tmp_path}/out",
            "overwrite=true",
            f"runs_dir={tmp_path}",
            *options,
        )
        paths = sample(composed("sample", *arguments))
        with Image.open(paths[0]) as image:
            return pictures.from_uint8(torch.from_numpy(np.array(image)).permute(2, 0, 1))

    guided = [
        draw("guide.classifier=classifier", f"classes=[{name}]", "guide.classifier_scale=200")
        for name in ("red circle", "blue square")
    ]
    assert (guided[0] - guided[1]).abs().max() > 0.02
    with pytest.raises(ValueError, match="unknown class 'cow'; the classifier knows red circle"):
        draw("guide.classifier=classifier", "classes=[cow]")
    path = tmp_path / "classifier/classifier/model/metadata.json"
    metadata = json.loads(path.read_text())
    for key, value, message in (
        ("autoencoder", "0", "trained on another autoencoder"),
        ("scale", [v * 2 for v in metadata["scale"]], "latents of another scale"),
        ("num_train_timesteps", 500, "another noise schedule"),
    ):
        path.write_text(json.dumps(metadata | {key: value}))
        with pytest.raises(ValueError, match=message):
            draw("guide.classifier=classifier", "classes=[0]")


@pytest.mark.chain
def test_samples_carry_their_recipe_and_repeat(finished: Path, tmp_path: Path):
    def draw(out: Path, batch_size: int) -> list[Path]:
        overrides = [f"run={finished}/run", "prompts=a red circle in the center", "n=3", f"out={out}"]
        return sample(composed("sample", *overrides, "num_inference_steps=2", f"batch_size={batch_size}"))

    together, alone = draw(tmp_path / "a", 3), draw(tmp_path / "b", 1)
    assert len(together) == 3
    assert pictures.read_recipe(together[1])["seed"] == 1
    assert pictures.read_recipe(together[1])["condition"] == "a red circle in the center"
    for a, b in zip(together, alone):
        with Image.open(a) as left, Image.open(b) as right:
            difference = torch.tensor(list(left.tobytes())).sub(torch.tensor(list(right.tobytes()))).abs().max()
        assert difference <= 1  # the same noise; batched arithmetic may round to the next grey level
    assert (tmp_path / "a" / "grid.png").is_file()


@pytest.mark.slow
def test_a_changed_micro_batch_size_continues_with_the_same_samples(tmp_path: Path):
    """A run that ended after 5 steps goes on with smaller (or larger) micro-batches, as after running out of memory.
    Every step has the same samples as in an undisturbed run."""

    def keys(name: str) -> dict[int, list[str]]:
        seen: dict[int, list[str]] = {}
        for line in (tmp_path / f"{name}.trace").read_text().splitlines():
            place, _, samples = line.partition("|")
            seen.setdefault(int(place.split()[1]), []).extend(samples.split(","))
        return seen

    common = ["stages=[autoencoder]", "autoencoder.val_every=3", "autoencoder.val_images=4"]
    for name, sizes in (("calm", [8]), ("smaller", [8, 2]), ("larger", [2, 8])):
        for steps, size in zip([5, 11] if len(sizes) == 2 else [11], sizes):
            options = [f"autoencoder.max_steps={steps}", f"autoencoder.micro_batch_size={size}"]
            chain(tmp_path, *common, *options, f"trace={tmp_path}/{name}.trace", name=name).execute()
    assert len(keys("calm")) == 11
    assert keys("calm") == keys("smaller") == keys("larger")
    rows = [
        [r.split(",")[0] for r in (tmp_path / n / "autoencoder/metrics.csv").read_text().splitlines()]
        for n in ("calm", "smaller", "larger")
    ]
    assert rows[0] == rows[1] == rows[2] == ["step", "3", "6", "9"]


@pytest.mark.slow
def test_adherence_is_measured_on_the_condition_there_is(tmp_path: Path, capsys: pytest.CaptureFixture):
    chain(tmp_path, "diffusion/conditioning=class").execute()
    table = json.loads((tmp_path / "run/evaluation/metrics.json").read_text())["adherence"]
    assert table["fields"] == ["class_label"]
    assert "position" not in table["trained"]
    set_aside(tmp_path / "run", ["diffusion", "evaluation", "export"])
    chain(tmp_path, "diffusion/conditioning=none").execute()
    assert "adherence: not measured" in capsys.readouterr().out
    assert "adherence" not in json.loads((tmp_path / "run/evaluation/metrics.json").read_text())


@pytest.mark.slow
def test_several_roots_and_an_autoencoder_with_its_own(tmp_path: Path):
    for seed in (0, 1):
        build_shards(Shapes(size=32, count=24 + 8 * seed, val_count=8, seed=seed), tmp_path / f"shapes{seed}")
    both = f"data.root=[{tmp_path}/shapes0,{tmp_path}/shapes1]"
    own = (f"autoencoder.data.root={tmp_path}/shapes1", "autoencoder.data.image_size=16")
    options = (both, "data.weights=[1,2]", "data.balance_classes=true", *own)
    run = chain(tmp_path, *options)
    run.execute()
    assert run.data("autoencoder", ("image",)).transform.size == (16, 16)
    assert read_note(tmp_path / "run/autoencoder")["finished"]
    assert len(CachedLatents(tmp_path / "run/latents", "train", (), 0)) == 56
    with pytest.raises(Refused, match=r"data\.weights: "):
        chain(tmp_path, both, "data.weights=[1,1]", "data.balance_classes=true", *own).execute()


class Damaged(Shapes):
    """The shapes data set with invalid captions (null) for the training samples in `damaged`."""

    def __init__(self, damaged: range):
        super().__init__(count=64, val_count=16)
        self.damaged = damaged

    def sample(self, split: str, i: int) -> tuple[str, dict[str, bytes]]:
        key, fields = super().sample(split, i)
        return key, fields | ({"json": b'{"captions": [null]}'} if split == "train" and i in self.damaged else {})


@pytest.mark.chain
@pytest.mark.slow
def test_bad_captions_are_named_before_stage_one_and_one_of_them_ends_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(build_module, "check_fields", lambda *_: None)  # as for shards that other tools wrote
    options = (
        "diffusion/conditioning=class_text",
        "stages=[autoencoder,latents,diffusion]",
        "diffusion.evaluate_every=0",
    )
    for name, damaged in (("many", range(5, 7)), ("one", range(5, 6))):
        build_shards(Damaged(damaged), tmp_path / name)
        run = chain(tmp_path, *options, f"data.root={tmp_path / name}", name=f"run_{name}")
        if name == "many":
            with pytest.raises(DataError, match=r"2 of 64 samples could not be read.*max_bad_fraction"):
                run.execute()
            assert not (tmp_path / "run_many" / "autoencoder").exists()
        else:
            run.execute()
            assert read_note(tmp_path / "run_one" / "diffusion")["finished"]
        assert 'cannot be read: train-000000.tar:train_0000005: "captions"' in capsys.readouterr().out


@pytest.mark.chain
def test_a_refused_run_leaves_the_record_of_the_old_one(finished: Path):
    before = (finished / "run/config.yaml").read_bytes()
    with pytest.raises(Refused):
        chain(finished, "autoencoder.lr=0.5").execute()
    assert (finished / "run/config.yaml").read_bytes() == before


@pytest.mark.chain
def test_samples_take_the_runs_own_settings_and_captions_as_typed(finished: Path, tmp_path: Path, monkeypatch):
    caption = "a red circle, in the 'center' (small)"
    monkeypatch.setattr(
        sys, "argv", ["ldm-sample", f"run={finished}/run", f"prompts={caption}", "n=1", f"out={tmp_path}/s"]
    )
    sample_cli.main()
    recipe = json.loads((tmp_path / "s" / "recipe.json").read_text())
    assert recipe["images"][0]["condition"] == caption
    asked = recipe["config"]
    assert (asked["num_inference_steps"], asked["guidance_scale"], asked["sampler"]["eta"]) == (2, 1.5, 0.5)


@pytest.mark.slow
def test_sigterm_saves_and_the_same_line_continues(tmp_path: Path):
    command = [
        sys.executable, str(ROOT / "train.py"), *SMALL, "name=run", f"runs_dir={tmp_path}", f"data_dir={tmp_path}/data",
        f"trace={tmp_path}/trace", "stages=[autoencoder]", "autoencoder.max_steps=400", "autoencoder.checkpoint_every=1000",
        "autoencoder.val_every=1000", "autoencoder.micro_batch_size=4",  # the signal may fall between these
    ]  # fmt: skip
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    trace = tmp_path / "trace"
    while not (trace.is_file() and len(trace.read_text().splitlines()) >= 5):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "run the same command to continue" in output
    done = torch.load(tmp_path / "run/autoencoder/checkpoints/last.ckpt", weights_only=True)["global_step"]
    assert 2 <= done < 400
    made = chain(tmp_path, "stages=[autoencoder]", f"autoencoder.max_steps={done + 2}", "autoencoder.val_every=1000")
    made.execute()  # with whole batches; the interrupted run took each in two micro-batches
    assert torch.load(tmp_path / "run/autoencoder/checkpoints/last.ckpt", weights_only=True)["global_step"] == done + 2
