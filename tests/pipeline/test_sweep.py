"""Sweeps: shared stages, a job that fails, the table, the plots and the search."""

import csv
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from chains import SMALL, chain, composed
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file
from tiers import tiered

from ldm_train.cli import evaluate, sweep, train
from ldm_train.cli import search as search_command
from ldm_train.configuration import config_folder, plain
from ldm_train.pipeline import search
from ldm_train.pipeline import sweep as sweep_module
from ldm_train.pipeline.training import forward_flops

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def command() -> Callable[..., int]:
    """command("train", override, ...) runs in this process, so that it starts at once; returns its exit status."""
    mains = {"train": train.main, "sweep": sweep.main, "evaluate": evaluate.main, "search": search_command.main}

    def run(name: str, *arguments: str) -> int:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [f"{name}.py", *arguments])
            try:
                mains[name]()
            except SystemExit as error:
                return int(error.code or 0)
            return 0

    return run


@pytest.fixture(scope="module")
def swept(command: Callable[..., int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of three jobs that share their autoencoder; the second fails, as its batch size exceeds the data set."""
    folder = tmp_path_factory.mktemp("sweep")
    options = [o for o in SMALL if not o.startswith("diffusion.batch_size")]
    status = command("train", "-m", *options, f"runs_dir={folder}", f"data_dir={folder}/data", "name=mine",
                     "diffusion.batch_size=8,4096,4", "data.adherence=null", "diffusion.log_every=1")  # fmt: skip
    assert status == 1
    return folder / "mine"


def run_of(swept: Path, batch_size: int) -> Path:
    return swept / f"diffusion.batch_size={batch_size}"


@pytest.mark.chain
@pytest.mark.slow
def test_a_failed_job_is_named_and_the_others_come_to_their_end(swept: Path) -> None:
    assert "exceeds the 64 training images" in json.loads((run_of(swept, 4096) / "failed.json").read_text())["error"]
    for size in (8, 4):
        assert (run_of(swept, size) / "evaluation" / "metrics.json").is_file()
        assert not (run_of(swept, size) / "failed.json").exists()


def test_a_sweep_with_failed_jobs_fails_whatever_else_is_damaged(tmp_path: Path, capsys) -> None:
    config = OmegaConf.create({"name": 5, "runs_dir": str(tmp_path)})
    for job, failed in (("a", "ValueError: no"), ("b", None), ("c", None)):
        (tmp_path / "5" / job / "diffusion").mkdir(parents=True)
        (tmp_path / "5" / job / "config.yaml").write_text("name: 5" if job != "c" else "[")
        if failed:
            (tmp_path / "5" / job / "failed.json").write_text(json.dumps({"error": failed}))
    (tmp_path / "5" / "b" / "diffusion" / "stage.json").write_text("{")
    with pytest.raises(SystemExit):
        sweep_module.Report().on_multirun_end(config)
    said = capsys.readouterr()
    assert "no table or plots of the sweep" in said.out
    assert "1 of 3 jobs failed:\n  a: ValueError: no" in said.err
    later = sweep_module.Report()
    later.start = time.time() + 60  # the job failed in an earlier sweep
    later.on_multirun_end(config)
    assert "failed" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "name", "experiment", "names"),
    [
        (["experiment=a,b", "seed=0,1"], None, "a", ["a", "b"]),
        (["name=x,y"], "x", "a", ["x", "y"]),
        (["seed=0,1"], "mine", "a", ["mine"]),
        (["seed=0,1", "experiment=a"], None, "a", ["a"]),
        ([], None, None, ["run"]),
    ],
)
def test_a_sweep_over_recipes_or_names_is_looked_for_in_each_of_their_folders(
    overrides: list[str], name: str | None, experiment: str | None, names: list[str]
) -> None:
    hydra = {"overrides": {"task": overrides}, "runtime": {"choices": {"experiment": experiment}}}
    assert sweep_module.swept_names(OmegaConf.create({"name": name, "hydra": hydra})) == names


@pytest.mark.chain
@pytest.mark.slow
def test_jobs_share_what_they_have_in_common(swept: Path) -> None:
    weights = [run_of(swept, size) / "autoencoder" / "model" / "model.safetensors" for size in (8, 4)]
    assert weights[0].stat().st_ino == weights[1].stat().st_ino
    assert weights[0].stat().st_nlink == 2
    models = [run_of(swept, size) / "diffusion" / "model" / "model.safetensors" for size in (8, 4)]
    assert models[0].stat().st_ino != models[1].stat().st_ino


@pytest.mark.chain
@pytest.mark.slow
def test_one_table_and_the_plots_are_there_at_the_end(swept: Path) -> None:
    with open(swept / "sweep.csv", newline="") as file:
        rows = {r["diffusion.batch_size"]: r for r in csv.DictReader(file)}
    assert set(rows) == {"8", "4", "4096"} or set(rows) == {"8", "4", ""}
    assert float(rows["8"]["samples.fid_tiny.value"]) > 0
    assert rows["8"]["evaluation"] == "done"
    assert float(rows["8"]["tflop"]) == pytest.approx(2 * float(rows["4"]["tflop"]), rel=1e-3)
    assert any("exceeds the 64 training images" in r["failed"] for r in rows.values())
    with open(swept / "curves.csv", newline="") as file:
        points = list(csv.DictReader(file))
    assert sorted(int(p["step"]) for p in points) == [3, 3, 6, 6]
    assert all(float(p["val/fid_tiny"]) > 0 and float(p["seconds"]) > 0 for p in points)
    with Image.open(swept / "curves.png") as plot:
        assert plot.width > plot.height > 300


@pytest.mark.chain
@pytest.mark.slow
def test_the_printed_table_shows_the_number_that_was_asked_for(
    swept: Path, command: Callable[..., int], capsys
) -> None:
    assert command("sweep", f"dir={swept}", "final=reconstruction.psnr") == 0
    assert "reconstruction.psnr.value " in capsys.readouterr().out
    assert command("sweep", f"dir={swept}", "final=samples.fdi") == 1
    assert "final=samples.fdi is in no run's metrics.json; there are " in capsys.readouterr().err


@pytest.mark.chain
@pytest.mark.slow
def test_speed_against_quality_is_measured_once(swept: Path, command: Callable[..., int], capsys) -> None:
    arguments = (f"dir={swept}", "steps=[1,2]", "n=8", "progress=false", "accelerator=cpu")
    assert command("sweep", *arguments) == 0
    with open(swept / "speed.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [r["num_inference_steps"] for r in rows] == ["1", "2"] * 2
    assert all(float(r["images_per_second"]) > 0 and r["fid_tiny"] for r in rows)
    assert (swept / "speed.png").is_file()
    before = {p: p.stat().st_mtime_ns for p in swept.rglob("evaluations/*.json")}
    assert len(before) == 4
    assert command("sweep", *arguments) == 0
    assert {p: p.stat().st_mtime_ns for p in swept.rglob("evaluations/*.json")} == before
    assert "4096" in capsys.readouterr().out
    assert command("sweep", *arguments, "batch_size=4") == 0  # another speed, of the same samples
    after = {p: p.stat().st_mtime_ns for p in swept.rglob("evaluations/*.json")}
    assert after.keys() == before.keys()
    assert all(after[p] > before[p] and json.loads(p.read_text())["speed"]["batch_size"] == 4 for p in after)


@pytest.mark.chain
@pytest.mark.slow
def test_offline_and_stage_agree_and_settings_never_share_a_file(
    swept: Path, command: Callable[..., int], capsys
) -> None:
    """ldm-evaluate of a run gives the numbers of its evaluation stage; another setting gets another file."""
    run = run_of(swept, 8)
    assert command("evaluate", f"run={run}", "progress=false", f"out={run}/again.json", "accelerator=cpu") == 0
    stage, again = (json.loads((run / p).read_text())["samples"] for p in ("evaluation/metrics.json", "again.json"))
    for name in ("fid_tiny", "kid_tiny"):
        assert again[name]["value"] == pytest.approx(stage[name]["value"], rel=1e-6)
        assert again[name]["reference"] == stage[name]["reference"]
        assert {"extractor", "guidance_scale", "sampler", "num_inference_steps", "seed", "n"} <= set(again[name])
    before = set((run / "evaluations").glob("*.json"))
    for option in ("seed=1", "guidance_scale=1", "guidance_interval=[0,20]"):
        assert command("evaluate", f"run={run}", "progress=false", "accelerator=cpu", option) == 0
    assert len(set((run / "evaluations").glob("*.json")) - before) == 3
    assert command("evaluate", f"run={run}", "progress=false", "accelerator=cpu", "guidance_interval=[8000,9000]") == 1
    assert "guidance_interval=[8000,9000] holds none of the noise levels" in capsys.readouterr().err
    assert (
        command("evaluate", f"run={run}", "progress=false", "accelerator=cpu", "weights=best", "metrics=[fid_tiny]")
        == 0
    )


@pytest.mark.chain
@pytest.mark.slow
def test_an_autoencoder_and_two_sets_of_images_are_measured(
    swept: Path, command: Callable[..., int], tmp_path: Path, capsys
) -> None:
    run, data = run_of(swept, 8), next((swept.parent / "data").iterdir())
    quiet = ("progress=false", "accelerator=cpu", "runs_dir=" + str(swept.parent))
    assert command("evaluate", f"reconstruct={run}", *quiet, f"out={tmp_path}/a.json") == 0
    found = json.loads((tmp_path / "a.json").read_text())
    assert set(found["reconstruction"]) == {"psnr", "ssim", "perceptual"}
    assert {"equivariance_error", "decoder_sensitivity", "spectrum_slope", "ifid_tiny"} <= set(found["latents"])
    model = run / "autoencoder" / "model"
    assert command("evaluate", f"reconstruct={model}", *quiet) == 1
    assert "add data.root= and data.image_size=" in capsys.readouterr().err
    assert command("evaluate", f"reconstruct={model}", f"data.root={data}", "data.image_size=32", *quiet) == 0
    kept = {p.name for p in (run / "evaluations").glob("reconstructions-*.json")}
    for changed in ("predictors=4", "data.image_size=16", f"data.root={data}"):
        options = (f"reconstruct={run}", "metrics=[]", "paired=[psnr]", "n=4", changed, *quiet)
        assert command("evaluate", *options, "+kinds.mine._target_=ldm_train.metrics.kinds.Recall") == 0
    assert len({p.name for p in (run / "evaluations").glob("reconstructions-*.json")} - kept) == 3
    tars = f"images={data}/val-000000.tar", f"against={data}/train-000000.tar"
    assert command("evaluate", *tars, f"export={tmp_path}/r.npz", f"out={tmp_path}/b.json", *quiet) == 0
    assert command("evaluate", tars[0], f"against={tmp_path}/r.npz", f"out={tmp_path}/c.json", *quiet) == 0
    two, one = (json.loads((tmp_path / n).read_text())["images"] for n in ("b.json", "c.json"))
    for name in ("fid_tiny", "kid_tiny"):
        assert one[name]["value"] == pytest.approx(two[name]["value"], rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "choose what to measure: run=<run>"),
        (("run=nowhere",), "nowhere is not a run"),
        (("images=/no/where", "against=/no/where"), "is neither a folder of images nor a tar"),
        (("images=/tmp",), "are measured against="),
        (("run=x", "metrics=fid"), "metrics is a list: metrics=[fid]"),
        (("run=x", "n=many"), "n='many' is not a whole number"),
        (("images=a", "against=b", "metrics=[fidd]"), "unknown metric 'fidd'; choose from"),
    ],
)
def test_what_cannot_be_measured_is_said(
    command: Callable[..., int], tmp_path: Path, capsys, arguments, message
) -> None:
    assert command("evaluate", *arguments, f"runs_dir={tmp_path}") == 1
    assert message in capsys.readouterr().err


def test_a_file_that_is_no_image_is_named(command: Callable[..., int], tmp_path: Path, capsys) -> None:
    (tmp_path / "a.png").write_bytes(b"not an image")
    assert command("evaluate", f"images={tmp_path}", f"against={tmp_path}") == 1
    assert f"{tmp_path}/a.png cannot be read as an image" in capsys.readouterr().err


def test_a_folder_without_runs_is_said(command: Callable[..., int], tmp_path: Path, capsys) -> None:
    assert command("sweep", f"dir={tmp_path}") == 1
    assert "holds no runs" in capsys.readouterr().err


# -- the sweeps over f -------------------------------------------------------------------------------------------------


def test_the_factor_of_a_run_is_its_autoencoders_own_and_counts_patches(tmp_path: Path) -> None:
    network = {"channel_mult": [1, 2, 4], "patch_size": 2}
    (tmp_path / "config.yaml").write_text(json.dumps({"stages": [], "autoencoder": {"network": network}}))
    assert sweep_module.SweptRun(tmp_path).factor == 8
    model = tmp_path / "autoencoder" / "model"
    model.mkdir(parents=True)
    (model / "metadata.json").write_text(json.dumps({"downsample_factor": 16}))
    assert sweep_module.SweptRun(tmp_path).factor == 16


@pytest.mark.parametrize(
    ("experiment", "points"),
    [("shapes_f_sweep", (1, 2, 4, 8)), pytest.param("paper_f_sweep", (1, 2, 4, 8, 16, 32), marks=pytest.mark.slow)],
)
def test_every_point_of_a_sweep_over_f_has_its_factor_and_equal_compute(
    experiment: str, points: tuple[int, ...]
) -> None:
    import torch

    totals = []
    for f in points:
        with initialize_config_dir(str(config_folder()), version_base="1.3"):
            point = f"shapes_f{f}" if experiment.startswith("shapes") else f"f{f}"
            config = compose("train", [f"experiment={experiment}", f"ablation={point}"])
        tree = plain(config.diffusion.network)
        with torch.device("meta"):
            network = instantiate(config.autoencoder.network, _convert_="all")
            unet = instantiate(config.diffusion.network, _convert_="all")
            assert network.downsample_factor == f
            side = config.data.image_size // f
            extra = (
                {"context": torch.empty(1, 1, unet.condition_widths["context"])}
                if unet.condition_widths["context"]
                else {}
            )
            extra |= (
                {"vector": torch.empty(1, unet.condition_widths["vector"])} if unet.condition_widths["vector"] else {}
            )
            flops = forward_flops(
                "diffusion.network", tree, unet, torch.empty(1, unet.in_channels, side, side), torch.empty(1), **extra
            )
        totals.append(flops * config.diffusion.max_steps * config.diffusion.batch_size)
        assert config.diffusion.max_steps % config.diffusion.evaluate_every == 0
    assert max(totals) / min(totals) < 1.02


def test_flops_are_counted_anew_for_another_network_or_input() -> None:
    import torch

    def counted(network: torch.nn.Module, side: int) -> int:
        return forward_flops("network", {"_target_": "mine.Network"}, network, torch.empty(1, 4, side, side))

    class Twice(torch.nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(super().forward(x))

    once = counted(torch.nn.Conv2d(4, 4, 1), 8)
    assert counted(torch.nn.Conv2d(4, 4, 1), 8) == once > 0
    assert counted(torch.nn.Conv2d(4, 4, 1), 16) == 4 * once
    assert counted(Twice(4, 4, 1), 8) == 2 * once


def test_a_damaged_run_is_a_row_of_the_table_among_others(tmp_path: Path) -> None:
    for name in ("good", "bad"):
        stage = tmp_path / name / "diffusion"
        stage.mkdir(parents=True)
        (tmp_path / name / "config.yaml").write_text("stages: []")
        (stage / "metrics.csv").write_text("step,val/loss\n10,0.5\n")
    (tmp_path / "bad/diffusion/stage.json").write_text("{")
    rows = {row["run"]: row for row in sweep_module.gather(sweep_module.read_runs(tmp_path))}
    assert rows["good"]["val/loss"] == "0.5"
    assert "stage.json" in rows["bad"]["failed"]


@pytest.mark.parametrize(
    ("option", "said"),
    [("seed", "seed='abc' is not a whole number"), ("warmup_trials", "warmup_trials='abc' is not a whole number")],
)
def test_options_of_a_search_are_checked_before_it_begins(option: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        search.check(composed("search", f"{option}=abc"), ["gp", "tpe"])


def test_runs_that_differ_in_their_seed_are_averaged() -> None:
    table = [
        {"run": f"{lr}{seed}", "lr": lr, "seed": seed, "samples.fid_tiny.value": value}
        for lr, seed, value in ((0.1, 0, 4.0), (0.1, 1, 6.0), (0.2, 0, 9.0), (0.2, 1, ""))
    ]
    said = sweep_module.over_seeds(table, ["lr", "seed"], sweep_module.final_number(table, None, None))
    assert said == "lr=0.1: samples.fid_tiny.value 5 ± 1.4 over 2 seeds"
    assert sweep_module.over_seeds(table, ["lr"], "samples.fid_tiny.value") == ""
    assert sweep_module.over_seeds(table, ["seed"], None) == ""


def test_a_sweep_names_all_its_points() -> None:
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        for experiment, expected in (("shapes_f_sweep", "shapes_f8"), ("paper_f_sweep", "f32")):
            config = compose("train", [f"experiment={experiment}"], return_hydra_config=True)
            assert config.hydra.sweeper.params.ablation.split(",")[-1] == expected


# -- the search --------------------------------------------------------------------------------------------------------


def test_a_space_says_its_kind() -> None:
    import optuna

    space = search.parse_space({"a": {"b": "log(1e-4,1e-2)"}, "c": "x,y", "d": "int(1,3)", "e": "(0,1)"})
    values = [{k: suggest(t) for k, suggest in space.items()} for t in (optuna.create_study().ask() for _ in range(20))]
    assert all(
        1e-4 <= v["a.b"] <= 1e-2 and v["c"] in ("x", "y") and v["d"] in (1, 2, 3) and 0 <= v["e"] <= 1 for v in values
    )
    for wrong in ("log(0,1)", "(2,1)", "one", "log(a,b)"):
        with pytest.raises(ValueError, match=r"space\.lr="):
            search.parse_space({"lr": wrong})


TRAINS_FOR_EVER = """
import pathlib, sys, time
folder = pathlib.Path(sys.argv[1]) / "diffusion"
folder.mkdir()
(folder / "metrics.csv").write_text("step,val/loss\\n1,9.0\\n")
time.sleep(60)
"""


@tiered(("direction", "reported"), [("minimize", 1.0), ("maximize", -1.0)], fast=1)
def test_a_trial_that_is_worse_than_the_others_were_is_stopped(
    direction: str, reported: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A higher loss is worse whatever the objective's direction."""
    import optuna

    study = optuna.create_study(direction=direction, pruner=optuna.pruners.MedianPruner(n_startup_trials=1))
    good = optuna.trial.create_trial(value=1.0, intermediate_values={1: reported})
    study.add_trial(good)
    trial, started = study.ask(), []

    def popen(command: list[str], **options: Any) -> subprocess.Popen:
        started.append(launch([sys.executable, "-c", TRAINS_FOR_EVER, tmp_path / f"{trial.number:03d}"], **options))
        return started[0]

    launch = subprocess.Popen
    monkeypatch.setattr(search.subprocess, "Popen", popen)
    config = OmegaConf.create(
        {
            "recipe": "quickstart", "trial_logger": "csv", "overrides": [], "prune": "diffusion:val/loss",
            "direction": direction,
        }
    )  # fmt: skip
    with pytest.raises(optuna.TrialPruned):
        search.run_trial(trial, config, {}, tmp_path)
    assert started[0].returncode == -signal.SIGTERM


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ("recipe=nix", "space={diffusion.lr: 'log(1e-4,1e-2)'}"),
            r"no trial could begin: .*experiment/nix.* \(recipe=nix\)",
        ),
        (("space={diffusion.lrr: 'log(1e-4,1e-2)'}",), r"no trial could begin: .*lrr.* \(recipe=quickstart\)"),
        (("space=diffusion.lr",), "space=diffusion.lr is no section"),
    ],
)
def test_a_search_whose_trials_cannot_begin_is_refused(options: tuple[str, ...], said: str, tmp_path: Path) -> None:
    usual = ("recipe=quickstart", f"runs_dir={tmp_path}/runs")
    with pytest.raises(ValueError, match=said):
        search.search(composed("search", *usual, *options))
    assert not (tmp_path / "runs").exists()


def test_a_search_says_which_column_it_cannot_prune_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import optuna

    launch, ended = subprocess.Popen, TRAINS_FOR_EVER.replace("time.sleep(60)", "")
    monkeypatch.setattr(
        search.subprocess,
        "Popen",
        lambda command, **how: launch([sys.executable, "-c", ended, tmp_path / "000"], **how),
    )
    config = OmegaConf.create(
        {
            "recipe": "quickstart",
            "trial_logger": "csv",
            "overrides": [],
            "prune": "diffusion:val/los",
            "direction": "minimize",
        }
    )
    with pytest.raises(ValueError, match=rf"prune=diffusion:val/los is in no row of {tmp_path}/000"):
        search.run_trial(optuna.create_study().ask(), config, {}, tmp_path)


@pytest.mark.slow
def test_a_search_continues_and_finds_the_best(swept: Path, command: Callable[..., int], tmp_path: Path, capfd) -> None:
    """Trials are runs of train.py with the sweep's autoencoder; a failed trial does not end the search."""
    folder = swept.parent
    (tmp_path / "base").symlink_to(run_of(swept, 8))
    options = [o for o in SMALL if not o.startswith(("diffusion.max_steps", "logger", "progress"))]
    overrides = [*options, f"data_dir={folder}/data", f"autoencoder.pretrained={tmp_path}/base", "data.adherence=null",
                 "diffusion.max_steps=4", "diffusion.val_every=2", "stages=[autoencoder,latents,diffusion]"]  # fmt: skip
    arguments = (
        "recipe=quickstart", f"runs_dir={tmp_path}", "name=found", "objective=diffusion:val/loss", "warmup_trials=1",
        "overrides=[" + ",".join(f'"{o}"' for o in overrides) + "]", "space={diffusion.batch_size: '4096,8'}",
        "prune=diffusion:val/loss",
    )  # fmt: skip
    assert command("search", *arguments, "trials=2") == 0
    assert command("search", *arguments, "trials=3") == 0
    said = capfd.readouterr().out
    assert "2 of 3 trials done" in said
    best = json.loads((tmp_path / "found" / "best.json").read_text())
    assert best["params"] == {"diffusion.batch_size": "8"}
    column = search.column(tmp_path / "found" / f"{best['trial']:03d}", "diffusion:val/loss")
    assert best["value"] == min(v for _, v in column)
    assert OmegaConf.load(tmp_path / "found" / f"{best['trial']:03d}" / "config.yaml").diffusion.batch_size == 8
    assert command("search", *arguments[:-2], "space={diffusion.lr: '1,2'}", "trials=3") == 1
    assert "holds another search" in capfd.readouterr().err
    assert command("search", *arguments, "direction=maximize", "trials=3") == 1
    assert "holds a search with direction=minimize; choose name=<new>" in capfd.readouterr().err


@pytest.mark.chain
@pytest.mark.slow
def test_runs_whose_latents_are_scaled_otherwise_share_the_autoencoder_and_no_more(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    short, made = ("stages=[autoencoder,latents,diffusion]", "diffusion.evaluate_every=null"), {}
    for name, options in (("one", ()), ("each", ("latents.per_channel=true",)), ("again", ())):
        run = chain(tmp_path, *short, *options, name=f"s/{name}")
        run.share = True
        run.execute()
        made[name] = {
            stage: load_file(tmp_path / "s" / name / stage / "model" / "model.safetensors")
            for stage in ("autoencoder", "diffusion")
        }
    same = {
        (name, stage): all(torch.equal(made[name][stage][k], v) for k, v in made["one"][stage].items())
        for name in ("each", "again") for stage in ("autoencoder", "diffusion")
    }  # fmt: skip
    assert same == {
        ("each", "autoencoder"): True, ("each", "diffusion"): False, ("again", "autoencoder"): True, ("again", "diffusion"): True,
    }  # fmt: skip
