"""The ledger against effects worked out by hand."""

import csv
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from chains import composed
from hydra.types import RunMode
from omegaconf import OmegaConf
from scipy import stats

from ldm_train.configuration import config_folder
from ldm_train.pipeline import ledger, train
from ldm_train.pipeline.sweep import SweptRun, read_runs
from ldm_train.pipeline.values import check_values


def run(folder: Path, techniques: list[str], seed: int, fid: float, adherence: float, tflop: float = 2.0) -> None:
    (folder / "evaluation").mkdir(parents=True)
    (folder / "diffusion").mkdir()
    config = {"stages": [], "seed": seed, "techniques": dict.fromkeys(techniques, True), "autoencoder": {"network": {}}}
    OmegaConf.save(OmegaConf.create(config), folder / "config.yaml")
    metrics = {"samples": {"fid_tiny": {"value": fid}}, "adherence": {"trained": {"all": adherence}}}
    (folder / "evaluation" / "metrics.json").write_text(json.dumps(metrics))
    with open(folder / "diffusion" / "metrics.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["step", "train/tflop"])
        writer.writeheader()
        writer.writerow({"step": 10, "train/tflop": tflop})


@pytest.fixture
def runs(tmp_path: Path) -> list[SweptRun]:
    base, flow = [20.0, 25.0, 30.0], [10.0, 13.0, 15.0]
    for seed in range(3):
        run(tmp_path / f"base{seed}", [], seed, base[seed], 0.90)
        run(tmp_path / f"flow{seed}", ["flow"], seed, flow[seed], 0.90 + 0.01 * (-1) ** seed, 3.0)
    run(tmp_path / "both0", ["flow", "alignment"], 0, 5.0, 0.99)
    return read_runs(tmp_path)


def test_effects_are_paired_by_seed_with_students_interval(runs: list[SweptRun]) -> None:
    found = ledger.arms(runs)
    assert set(found) == {(), ("flow",), ("alignment", "flow")}
    mean, half, seeds = ledger.effect(ledger.MEASURES[0], found["flow",], found[()])
    shares = [10 / 20 - 1, 13 / 25 - 1, 15 / 30 - 1]
    wanted = stats.t.interval(0.95, 2, loc=sum(shares) / 3, scale=stats.sem(shares))
    assert seeds == 3
    assert (mean - half, mean + half) == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("count", range(2, 14))
def test_quantiles_against_scipys(count: int) -> None:
    values = [0.3 * k**2 for k in range(count)]
    mean, half = ledger.interval(values)
    assert mean == pytest.approx(sum(values) / count)
    assert half == pytest.approx(stats.t.ppf(0.975, count - 1) * stats.sem(values), rel=1e-3)


def test_a_verdict_names_what_is_certain_and_nothing_else(runs: list[SweptRun]) -> None:
    table = {row["technique"]: row for row in ledger.rows(runs)}
    assert table["flow"]["verdict"] == "better: fid_tiny"  # adherence went up and down
    assert table["flow"]["work"] == "1.50"
    assert table["alignment + flow"]["verdict"] == "no difference seen"  # one seed has no interval
    assert table["alignment + flow"]["seeds"] == 1
    assert table["(base)"]["fid_tiny"] == "25.000"


def test_the_table_goes_where_its_marks_are(runs: list[SweptRun], tmp_path: Path) -> None:
    guide = tmp_path / "README.md"
    guide.write_text(f"before\n{ledger.BEGIN}\nold rows\n{ledger.END}\nafter\n")
    ledger.write_table(ledger.markdown(ledger.rows(runs)), guide)
    text = guide.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old rows" not in text
    assert "| flow |" in text
    guide.write_text("no marks")
    with pytest.raises(ValueError, match="no place for the table"):
        ledger.write_table(ledger.markdown(ledger.rows(runs)), guide)
    assert guide.read_text() == "no marks"


def test_without_a_base_or_with_two_runs_of_a_seed_there_is_no_ledger(tmp_path: Path) -> None:
    run(tmp_path / "a", ["flow"], 0, 3.0, 0.9)
    with pytest.raises(ValueError, match=r"technique=\[\]"):
        ledger.rows(read_runs(tmp_path))
    run(tmp_path / "b", ["flow"], 0, 3.0, 0.9)
    with pytest.raises(ValueError, match="same techniques and seed"):
        ledger.rows(read_runs(tmp_path))


def test_options_that_differ_from_the_bases_stand_beneath_the_table(tmp_path: Path, capsys) -> None:
    for seed in range(2):
        run(tmp_path / f"base{seed}", [], seed, 3.0, 0.5)
        run(tmp_path / f"flow{seed}", ["flow"], seed, 3.0, 0.6)
        run(tmp_path / f"same{seed}", ["muon"], seed, 3.0, 0.6)
        config = OmegaConf.load(tmp_path / f"flow{seed}" / "config.yaml")
        own = {"diffusion": {"lr": [0.1, 0.2][seed]}, "logger": "csv"}  # a learning rate typed beside the technique
        OmegaConf.save(OmegaConf.merge(config, own), tmp_path / f"flow{seed}" / "config.yaml")
    assert ledger.other_options(read_runs(tmp_path)) == ["- flow: diffusion.lr=0.1 or 0.2"]
    ledger.ledger(read_runs(tmp_path), tmp_path)
    assert "- flow: diffusion.lr=0.1 or 0.2" in (tmp_path / "ledger.md").read_text()


def test_a_base_of_nothing_right_still_counts(tmp_path: Path) -> None:
    for seed, (base, ours) in enumerate([(0.0, 0.3), (0.0, 0.31), (0.1, 0.2)]):
        run(tmp_path / f"base{seed}", [], seed, 3.0, base)
        run(tmp_path / f"flow{seed}", ["flow"], seed, 3.0, ours)
    found = ledger.arms(read_runs(tmp_path))
    mean, _, seeds = ledger.effect(ledger.MEASURES[1], found["flow",], found[()])
    assert (mean, seeds) == (pytest.approx((0.3 + 0.31 + 0.1) / 3), 3)


def test_too_much_variety_is_no_better_than_too_little() -> None:
    diversity = next(m for m in ledger.MEASURES if m.title == "diversity")
    assert [diversity.of({diversity.key: v}) for v in (0.5, 1.0, 4.0)] == [0.5, 1.0, 0.25]


def test_a_number_that_is_none_is_left_out() -> None:
    assert ledger.Measure("x", "x", "lower").of({"x": math.nan}) is None
    assert ledger.Measure("x", "x", "lower").of({}) is None


@pytest.mark.parametrize("ties", [False, True])
def test_the_rank_correlation_is_scipys_and_its_interval_covers(ties: bool) -> None:
    rng, wanted = np.random.default_rng(0), 0.6
    known = 6 / math.pi * math.asin(wanted / 2)  # Spearman's of normal variables that correlate by `wanted`
    covered = 0
    for _ in range(500):
        x, y = rng.multivariate_normal([0, 0], [[1, wanted], [wanted, 1]], 20).T
        x = x.round() if ties else x
        rho, low, high = ledger.rank_correlation(x, y)
        assert rho == pytest.approx(stats.spearmanr(x, y).statistic)
        covered += low <= known <= high
    assert ties or 0.93 < covered / 500 < 0.99  # of so few it is a little wide
    assert all(map(math.isnan, ledger.rank_correlation([1, 1, 1, 1], [1, 2, 3, 4])))


def test_autoencoders_are_ordered_by_their_predictors_once_each(tmp_path: Path) -> None:
    for number in range(12):
        k = number // 2  # two U-Nets on each of six autoencoders
        folder = tmp_path / f"run{number}"
        run(folder, [], number, 30.0 - k + 0.1 * (number % 2), 0.9 - 0.1 * k)
        path = folder / "evaluation" / "metrics.json"
        metrics = json.loads(path.read_text())
        metrics["latents"] = {
            "spectrum_slope": {"value": -k}, "equivariance_error": {"value": (k * 7) % 6}, "decoder_sensitivity": {"value": k},
            "ifid_tiny": {"value": 9 - k},
        }  # fmt: skip
        metrics |= {"reconstructions": {"fid_tiny": {"value": k}}, "reconstruction": {"psnr": {"value": 20 + k}}}
        path.write_text(json.dumps(metrics))
    table = {row["predictor"]: row for row in ledger.predictions(read_runs(tmp_path))}
    assert table["ifid_tiny"]["autoencoders"] == 6
    assert table["ifid_tiny"]["fid_tiny"].startswith("+1.00")
    assert table["PSNR"]["adherence"].startswith("-1.00")
    rho = stats.spearmanr([(k * 7) % 6 for k in range(6)], [30 - k for k in range(6)]).statistic
    assert table["equivariance error"]["fid_tiny"].startswith(f"{rho:+.2f} [")
    assert "shape fidelity" not in table["PSNR"]  # nobody measured it
    assert ledger.predictions(read_runs(tmp_path)[:10]) == []
    # Another U-Net on the last digits of a known autoencoder, one that is trained otherwise, and one without a predictor.
    for name, change in (("again", {}), ("other", {"diffusion": {"lr": 1}}), ("lacking", {})):
        run(tmp_path / name, [], 20, 1.0, 0.1)
        metrics = json.loads((tmp_path / "run0" / "evaluation" / "metrics.json").read_text())
        metrics["latents"]["ifid_tiny"]["value"] += 1e-9 if name == "again" else 3.0
        if name == "lacking":
            del metrics["latents"]["spectrum_slope"]
        (tmp_path / name / "evaluation" / "metrics.json").write_text(json.dumps(metrics))
        config = OmegaConf.load(tmp_path / name / "config.yaml")
        OmegaConf.save(OmegaConf.merge(config, change), tmp_path / name / "config.yaml")
    table = {row["predictor"]: row for row in ledger.predictions(read_runs(tmp_path))}
    assert table["spectrum slope"]["autoencoders"] == 6
    assert table["ifid_tiny"]["autoencoders"] == 7


TECHNIQUES = sorted(path.stem for path in (config_folder() / "technique").glob("*.yaml"))


@pytest.mark.slow
def test_every_technique_is_recorded_combines_and_is_told_of_in_the_guide() -> None:
    guide = (config_folder() / "technique" / "README.md").read_text()
    recipes = ("ledger", "clothing_f8_small")  # between them every technique changes something
    for name in TECHNIQUES:
        changed = set()
        for recipe in recipes:
            usual = composed("train", f"experiment={recipe}")
            config = composed("train", f"experiment={recipe}", f"technique=[{name}]")
            assert not usual.techniques
            assert dict(config.techniques) == {name: True}
            check_values(config)
            changed |= {k for k in config if config[k] != usual[k]} - {"techniques"}
        assert changed, name
        assert f"`{name}`" in guide
    stage_two = composed("train", "experiment=ledger", "technique=[latent_noise,flow,alignment]")
    assert dict(stage_two.techniques) == {"latent_noise": True, "flow": True, "alignment": True}
    assert stage_two.autoencoder.task.augmentation.noise > 0
    assert stage_two.diffusion.schedule._target_.endswith("LinearFlow")
    assert stage_two.diffusion.task.alignment > 0


@pytest.mark.parametrize(
    ("overrides", "typed", "folder"),
    [
        (["technique=[flow]", "seed=0"], ["technique=[],[flow]", "seed=0,1"], "seed=0,technique=[flow]"),
        (
            ["technique=[flow]", "seed=0"],
            ["technique=[flow]", "seed=0,1"],
            "seed=0,technique=[flow]",
        ),  # goes on with it
        (["technique=[flow]", "seed=2"], ["technique=[flow]", "seed=2"], "seed=2,technique=[flow]"),
        (["lr=1", "seed=2"], ["lr=1,2", "seed=2"], "lr=1"),
    ],
)
def test_a_later_command_goes_on_with_a_ledger(
    overrides: list[str], typed: list[str], folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An arm has the same folder, whichever others were asked for beside it."""
    said = SimpleNamespace(
        mode=RunMode.MULTIRUN,
        runtime=SimpleNamespace(choices={"experiment": "ledger"}),
        overrides=SimpleNamespace(task=["experiment=ledger", *overrides]),
    )
    monkeypatch.setattr(train.HydraConfig, "get", lambda: said)
    monkeypatch.setenv(train.ARGUMENTS, json.dumps(["experiment=ledger", *typed]))
    assert train.run_name(OmegaConf.create({"name": None})) == f"ledger/{folder}"
