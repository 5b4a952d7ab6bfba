"""Training with a time limit: its schedules end with the time, it is finished then, and it resumes where it was."""

import time
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from ldm_train.training.callbacks.checkpoint import LAST, read_checkpoint
from ldm_train.training.callbacks.clock import UNENDING, Clock, seconds_of
from ldm_train.training.fit import Cadence, Machine, fit
from ldm_train.training.optim import lr_multiplier
from ldm_train.training.task import Task

LENGTH = 1000  # of the schedules, in steps


class Slow(Task):
    """A task whose steps take a fixed time on a fake clock, so that nothing depends on the machine."""

    monitor = None

    def __init__(self, fails_at: int | None = None):
        schedule = lr_multiplier("cosine", LENGTH, warmup_steps=100)
        super().__init__("slow", 0, partial(torch.optim.SGD, lr=1.0), schedule, ema_decay=None)
        self.line, self.fails_at = nn.Linear(1, 1), fails_at
        self.seen: list[tuple[int, float]] = []  # the step of the schedules, and the learning rate

    def trained(self) -> nn.ModuleDict:
        return nn.ModuleDict({"line": self.line})

    def averaged(self) -> nn.Module:
        return self.line

    def groups(self) -> list[dict]:
        return [{"params": list(self.line.parameters()), "name": "line"}]

    def training_step(self, batch: dict, batch_idx: int) -> torch.Tensor:
        if self.global_step == self.fails_at:
            raise RuntimeError("the power is gone")
        self.seen.append((self.schedule_step, self.trainer.optimizers[0].param_groups[0]["lr"]))
        now[0] += 0.25  # a step takes a quarter of a second
        return 0.0 * self.line(torch.ones(1, 1)).sum()

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        self.add("loss", torch.zeros(1))

    def on_validation_epoch_end(self) -> None:
        self.finish_validation()


class Endless(L.LightningDataModule):
    def train_dataloader(self) -> DataLoader:
        return DataLoader([{"key": ["a"], "replaced": []}] * 400, batch_size=None)

    def val_dataloader(self) -> DataLoader:
        return DataLoader([{"key": ["a"]}], batch_size=None)


now = [0.0]


@pytest.fixture(autouse=True)
def turned_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now[0] = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])


def run(task: Task, folder: Path, clock: Clock) -> None:
    cadence = Cadence(1000, 8, 4, progress=False)
    fit(task, Endless(), folder, LENGTH, 1, 400, cadence, Machine("cpu", "32"), clock=clock)


def test_the_clock_ends_training_and_its_schedules_with_it(tmp_path: Path) -> None:
    task = Slow()
    run(task, tmp_path, Clock(10.0, LENGTH))
    assert task.global_step == 40
    steps = [step for step, _ in task.seen]
    assert steps == [int(k / 40 * (LENGTH - 1)) for k in range(40)]
    assert max(lr for _, lr in task.seen) == pytest.approx(1.0, abs=0.03)  # after the warm-up, a tenth of the time
    assert task.seen[-1][1] < 0.02
    assert read_checkpoint(tmp_path / "checkpoints" / LAST)["global_step"] == 40
    assert "val/loss" in (tmp_path / "metrics.csv").read_text().splitlines()[0]  # validated at its end


def test_what_had_its_time_is_loaded_and_not_trained_on(tmp_path: Path) -> None:
    first = Slow()
    run(first, tmp_path, Clock(5.0, LENGTH))
    again = Slow()
    with torch.no_grad():
        again.line.weight.fill_(77)
    run(again, tmp_path, Clock(5.0, LENGTH))
    assert not again.seen
    assert torch.equal(again.line.weight, first.line.weight)


def test_time_spent_before_an_interruption_counts(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="power"):
        run(Slow(fails_at=21), tmp_path, Clock(10.0, LENGTH))
    now[0] += 3600  # switched off for an hour, which does not count
    rest = Slow()
    run(rest, tmp_path, Clock(10.0, LENGTH))
    assert rest.seen[0][0] == int(16 / 40 * (LENGTH - 1))  # resumes from the checkpoint of step 16
    assert rest.seen[0][1] == pytest.approx(lr_multiplier("cosine", LENGTH, warmup_steps=100)(rest.seen[0][0]))
    assert len(rest.seen) == 40 - 16


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("30min", 1800), ("1.5h", 5400), ("0.5 h", 1800)])
def test_times_as_people_write_them(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "30", "half an hour", "-1h", "0s", "1d", "00:30:00"])
def test_what_is_no_time_is_refused_with_examples(text: str) -> None:
    with pytest.raises(ValueError, match=r"write 90s, 30min or 1\.5h"):
        seconds_of(text)


def test_steps_without_end_are_beyond_any_training() -> None:
    assert UNENDING > 500_000
