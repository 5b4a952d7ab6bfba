"""metrics.csv survives a resume: cut at the checkpoint, then continued as if nothing had happened. Also W&B offline."""

import csv
import socket
import threading
from pathlib import Path

import pytest
import wandb

from ldm_train.storage import read_csv
from ldm_train.training.loggers import MetricsCSV, WandbRun


def table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def log(logger: MetricsCSV, first: int, last: int) -> None:
    for step in range(first, last + 1):
        logger.log_metrics({"train/loss": 1 / step, "epoch": 0}, step)
        if step % 4 == 0:
            logger.log_metrics({"val/loss": 2 / step}, step)


def test_one_row_per_step_without_lightnings_epoch(tmp_path: Path):
    log(MetricsCSV(tmp_path / "new" / "metrics.csv"), 1, 9)
    rows = table(tmp_path / "new" / "metrics.csv")
    assert [int(r["step"]) for r in rows] == list(range(1, 10))
    assert set(rows[0]) == {"step", "train/loss", "val/loss"}
    assert (rows[3]["train/loss"], rows[3]["val/loss"]) == ("0.25", "0.5")
    assert rows[4]["val/loss"] == ""


def test_a_killed_and_resumed_log_equals_an_undisturbed_one(tmp_path: Path):
    log(MetricsCSV(tmp_path / "calm.csv"), 1, 14)
    log(MetricsCSV(tmp_path / "killed.csv"), 1, 9)  # the last checkpoint was at 6
    log(MetricsCSV(tmp_path / "killed.csv", start=6), 7, 11)
    log(MetricsCSV(tmp_path / "killed.csv", start=8), 9, 14)
    assert (tmp_path / "killed.csv").read_text() == (tmp_path / "calm.csv").read_text()


def test_a_row_that_a_full_disk_has_cut_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "metrics.csv"
    log(MetricsCSV(path), 1, 9)
    whole = path.read_text()
    path.write_text(whole + "1")  # the beginning of step 10
    log(MetricsCSV(path, start=9), 10, 11)
    assert [row["step"] for row in table(path)] == [str(step) for step in range(1, 12)]
    logger = MetricsCSV(path, start=9)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("csv.DictWriter.writerow", full)
    with pytest.raises(OSError, match=r"could not write .*metrics\.csv: No space left on device; free some space"):
        log(logger, 10, 10)


def test_a_run_from_the_start_replaces_the_file(tmp_path: Path):
    log(MetricsCSV(tmp_path / "metrics.csv"), 1, 9)
    log(MetricsCSV(tmp_path / "metrics.csv", start=0), 1, 2)
    assert [r["step"] for r in table(tmp_path / "metrics.csv")] == ["1", "2"]


def test_new_columns_may_come_later(tmp_path: Path):
    logger = MetricsCSV(tmp_path / "metrics.csv")
    logger.log_metrics({"b": 1}, 1)
    logger.log_metrics({"c": 2, "a": 3}, 2)
    logger.log_metrics({"b": 4}, 3)
    assert (tmp_path / "metrics.csv").read_text().splitlines() == ["step,b,a,c", "1,1,,", "2,,3,2", "3,4,,"]
    resumed = MetricsCSV(tmp_path / "metrics.csv", start=2)
    resumed.log_metrics({"d": 5}, 3)
    assert [r.get("d") for r in table(tmp_path / "metrics.csv")] == ["", "", "5"]


def test_rows_stand_in_the_order_of_steps_also_if_callbacks_log_under_earlier_ones(tmp_path: Path):
    logger = MetricsCSV(tmp_path / "metrics.csv")
    for step, metrics in (
        (1, {"lr-Adam": 0.1}),
        (2, {"loss": 5.0}),
        (1, {"x": 1.0}),
        (4, {"loss": 3.0}),
        (3, {"lr-Adam": 0.2}),
    ):
        logger.log_metrics(metrics, step)
    logger.log_metrics({"val/loss": 2.0}, 4)
    rows = read_csv(tmp_path / "metrics.csv")
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4]
    assert [{k: v for k, v in row.items() if v and k != "step"} for row in rows] == [
        {"lr-Adam": "0.1", "x": "1.0"}, {"loss": "5.0"}, {"lr-Adam": "0.2"}, {"loss": "3.0", "val/loss": "2.0"},
    ]  # fmt: skip


def test_metrics_of_samples_do_not_stand_for_the_validation_that_follows(tmp_path: Path):
    logger = MetricsCSV(tmp_path / "metrics.csv")
    logger.logged = {
        3: {"train/loss", "val/fid_tiny", "val/sampled_images"},
        6: {"val/fid_tiny", "val/loss"},
        9: {"val/score"},
    }
    assert [logger.validated(step) for step in (3, 6, 9, 12)] == [False, True, True, False]


def test_rows_are_appended_not_rewritten(tmp_path: Path):
    logger = MetricsCSV(tmp_path / "metrics.csv")
    logger.log_metrics({"a": 1}, 1)
    before = (tmp_path / "metrics.csv").stat().st_ino
    logger.log_metrics({"a": 2}, 2)
    assert (tmp_path / "metrics.csv").stat().st_ino == before
    assert list(tmp_path.iterdir()) == [tmp_path / "metrics.csv"]


def test_every_row_is_on_disk_at_once(tmp_path: Path):
    logger = MetricsCSV(tmp_path / "metrics.csv")
    for step in range(1, 5):
        logger.log_metrics({"a": step}, step)
        assert table(tmp_path / "metrics.csv")[-1] == {"step": str(step), "a": str(step)}


@pytest.mark.slow
def test_wandb_logs_offline_without_asking_and_goes_on_in_the_same_run(tmp_path: Path, monkeypatch, capsys):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    ids = []
    for steps in ((1, 2), (3,)):
        run = WandbRun(tmp_path, "tests", "mine", {"lr": 1e-3})
        logger = run.stage("diffusion", 8)
        for step in steps:
            logger.log_metrics({"val/loss": 0.5 / step, "epoch": 0}, step)
        assert run.offline
        assert run.run.summary["diffusion/step"] == steps[-1]
        assert run.run.summary["diffusion/images"] == 8 * steps[-1]
        ids.append(run.run.id)
        run.finish()
    assert ids[0] == ids[1]
    assert "upload with: wandb sync" in capsys.readouterr().out
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) >= 1


@pytest.mark.slow
@pytest.mark.parametrize("breaks", [False, True])
def test_a_server_that_does_not_answer_is_named_and_logging_is_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, breaks: bool
):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address, open_ones = f"http://127.0.0.1:{server.getsockname()[1]}", []

        def accept() -> None:
            while True:
                try:
                    open_ones.append(server.accept()[0])
                except OSError:
                    return
                if breaks:
                    open_ones[-1].close()

        threading.Thread(target=accept, daemon=True).start()
        monkeypatch.delenv("WANDB_MODE", raising=False)
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
        monkeypatch.setenv("WANDB_BASE_URL", address)
        wandb.teardown()  # it reads the environment once
        try:
            run = WandbRun(tmp_path, "tests", "mine", {}, timeout=3.0)
            assert run.offline
            run.stage("diffusion", 8).log_metrics({"val/loss": 0.5}, 1)
            run.finish()
        finally:
            wandb.teardown()
    assert open_ones
    said = capsys.readouterr().out
    assert f"W&B: no answer from {address} (" in said
    assert "upload with: wandb sync" in said
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
