"""Every diagnosis fires on its fault and not on a healthy run; steps with non-finite gradients are skipped, and
training rewinds after many."""

import json
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import nn
from torch.utils.data import DataLoader

from ldm_train.configuration import config_folder
from ldm_train.training.callbacks import health
from ldm_train.training.fit import Cadence, Machine, fit
from ldm_train.training.task import SKIPS, NotFinite, Task

STEPS = range(25, 1001, 25)
BINS = {"easier_with_noise": True, "bins": 4, "settled": 200}
HEALTHY = {
    "val/active_channels": [1.0], "val/posterior_std": [0.05], "val/latent_std_min": [0.8], "val/latent_std_max": [3.0],
    "train/disc_accuracy": [0.5 + 0.2 * (k % 2) for k in range(len(STEPS))], "train/adaptive_weight": [3.0] * len(STEPS),
    "val/loss_t0": [0.07], "val/loss_t1": [0.03], "val/loss_t2": [0.01], "val/loss_t3": [0.003], "val/ema_moved": [0.4],
    "train/latent_std": [1.01, 0.98, 1.02], "train/data_wait": [0.05, 0.4, 0.03, 0.05, 0.04],
}  # fmt: skip
FAULTS = {
    "posterior_collapse": {"val/active_channels": [0.25]},
    "no_posterior": {"val/posterior_std": [1e-7]},
    "scale_drift": {"val/latent_std_min": [0.01], "val/latent_std_max": [3.0]},
    "discriminator_overpowering": {"train/disc_accuracy": [0.99] * len(STEPS)},
    "discriminator_useless": {"train/disc_accuracy": [0.505] * len(STEPS)},
    "adaptive_weight_at_clamp": {"train/adaptive_weight": [1e4] * len(STEPS)},
    "loss_by_timestep": {"val/loss_t2": [0.5]},
    "ema_not_moving": {"val/ema_moved": [1e-5]},
    "latents_disagree": {"train/latent_std": [5.4, 5.5, 5.6]},
    "data_starving": {"train/data_wait": [0.5, 0.6, 0.7, 0.5, 0.4]},
}


def diagnosed(values: dict[str, list[float]], settings: dict | None = None) -> list[str]:
    """Returns the names of the checks' findings when these values are logged."""
    history = {}
    for key, row in values.items():
        steps = list(STEPS)[: len(row)] if key.startswith("train/") else [1000]
        history[key] = list(zip(steps, row))
    settings = BINS | {"max_adaptive_weight": 1e4} if settings is None else settings
    found = [check(history, settings) for check in health.CHECKS]
    assert all(f is None or (len(f.what) > 20 and len(f.remedy) > 20) for f in found)
    return [f.name for f in found if f is not None]


def test_a_healthy_run_is_left_alone() -> None:
    assert diagnosed(HEALTHY) == []
    assert diagnosed({}) == []
    assert {check.__name__ for check in health.CHECKS} == set(FAULTS)


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_raises_exactly_its_finding(fault: str) -> None:
    assert diagnosed(HEALTHY | FAULTS[fault]) == [fault]


def test_statistics_of_other_data_are_no_fault_of_fine_tuning() -> None:
    settings = BINS | {"max_adaptive_weight": 1e4, "other_statistics": True}
    assert diagnosed(HEALTHY | FAULTS["latents_disagree"], settings) == []


@pytest.mark.parametrize("autoencoder", ["kl_f4_tiny", "vq_f4_tiny"])
def test_the_clamp_is_known_in_the_unit_that_is_logged(autoencoder: str) -> None:
    """KL models log it in sums over C, H, W, VQ models in means."""
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        config = compose("train", [f"autoencoder={autoencoder}", "autoencoder.loss.max_adaptive_weight=1e-3"])
    model, loss = instantiate(config.autoencoder.network), instantiate(config.autoencoder.loss, disc_start=0)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    weight = loss(images, *model(images), model.last_layer, 1000)[1]["adaptive_weight"].item()
    settings = {"max_adaptive_weight": config.autoencoder.loss.max_adaptive_weight}
    assert diagnosed({"train/adaptive_weight": [weight] * len(STEPS)}, settings) == ["adaptive_weight_at_clamp"]
    assert diagnosed({"train/adaptive_weight": [weight / 2] * len(STEPS)}, settings) == []


def test_a_short_lapse_of_the_discriminator_is_none() -> None:
    short = [0.99] * 15 + [0.7] + [0.99] * 19
    assert diagnosed({"train/disc_accuracy": short}) == []


def test_what_is_hard_depends_on_what_is_predicted() -> None:
    rising = {"val/loss_t0": [0.003], "val/loss_t1": [0.01], "val/loss_t2": [0.03], "val/loss_t3": [0.07]}
    assert diagnosed(rising, BINS | {"easier_with_noise": False}) == []
    assert diagnosed(rising) == ["loss_by_timestep"]
    assert diagnosed(rising, BINS | {"easier_with_noise": None}) == []
    assert diagnosed(rising, BINS | {"settled": 2000}) == []  # too early to say


# -- under a trainer ---------------------------------------------------------------------------------------------------


class Line(Task):
    """A linear model y = w x + b; `poison(task, step)` returns True if this step's loss is to be NaN."""

    monitor = None

    def __init__(self, poison=lambda task, step: False, **options):
        super().__init__("line", 0, partial(torch.optim.SGD, lr=0.1), lambda step: 1.0, 0.9, None, 1, **options)
        self.layer, self.poison = nn.Linear(1, 1), poison
        self.seen: list[float] = []

    def trained(self) -> nn.ModuleDict:
        return nn.ModuleDict({"layer": self.layer})

    def averaged(self) -> nn.Module:
        return self.layer

    def groups(self) -> list[dict]:
        return [{"params": list(self.layer.parameters()), "name": "layer"}]

    def training_step(self, batch: dict, batch_idx: int) -> torch.Tensor:
        self.seen.append(float(torch.rand(())))
        loss = (self.layer(batch["x"]) - 1).square().mean()
        self.log_training({"loss": loss.detach()})
        return loss * float("nan") if self.poison(self, self.global_step) else loss


class Data(L.LightningDataModule):
    def __init__(self, steps: int):
        super().__init__()
        self.steps = steps

    def train_dataloader(self) -> DataLoader:
        start = self.trainer.global_step
        samples = [{"x": torch.ones(1), "key": str(k)} for k in range(start, self.steps)]

        def collate(rows: list) -> dict:
            return {"x": torch.stack([r["x"] for r in rows]), "key": [r["key"] for r in rows], "replaced": []}

        loader = DataLoader(samples, batch_size=1, collate_fn=collate)
        return SimpleNamespace(__iter__=None) if not samples else loader


def run(task: Task, folder: Path, steps: int = 60, **options) -> None:
    fit(
        task, Data(steps), folder, steps, 1, steps, Cadence(1000, 20, 10, progress=False), Machine("cpu", "32"), **options
    )  # fmt: skip


class FusedLine(Line):
    """As on an accelerator: a tensor tells the optimiser which steps to skip."""

    def __init__(self, poison=lambda task, step: False):
        super().__init__(poison)
        self.optimizer = partial(torch.optim.AdamW, lr=0.01, fused=True)

    def _leaves_skipping_to(self, optimizer: torch.optim.Optimizer) -> bool:
        return True


@pytest.mark.parametrize("kind", [Line, FusedLine])
def test_a_step_without_a_finite_gradient_changes_nothing(kind: type[Line], tmp_path: Path) -> None:
    before = {}

    def poison(task: Line, step: int) -> bool:
        if step in (7, 8, 9):
            state = task.trainer.optimizers[0].state[task.layer.weight]
            before[step] = [task.layer.weight.item(), *(v.item() for v in state.values() if v is not None)]
        return step in (7, 8)

    task = kind(poison)
    run(task, tmp_path)
    assert before[7] == before[8] == before[9]
    assert len(before[7]) == 1 + 3 * (kind is FusedLine)  # two moments and the step count
    assert task.skipped == 2
    assert task.layer.weight.isfinite().all()
    assert "2.0" in (tmp_path / "metrics.csv").read_text()  # train/skipped_steps


@pytest.mark.parametrize("kind", [Line, FusedLine])
def test_many_in_a_row_rewind_to_the_checkpoint_with_other_random_numbers(
    kind: type[Line], tmp_path: Path, capsys
) -> None:
    task = kind(lambda task, step: task.attempt == 0 and step >= 30)
    run(task, tmp_path)
    said = capsys.readouterr().out
    assert "gradient is not finite at step 39" in said
    assert "rewinding to step 20, attempt 1 of 3" in said
    assert task.attempt == 1
    assert task.global_step == 60
    first, again = task.seen[20:30], task.seen[30 + SKIPS : 40 + SKIPS]
    assert len(task.seen) == 30 + SKIPS + 40
    assert not set(first) & set(again)
    state = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["health"]["attempt"] == 1
    rows = (tmp_path / "metrics.csv").read_text().splitlines()[1:]
    assert [int(r.split(",")[0]) for r in rows] == [10, 20, 30, 40, 50, 60]  # none twice


def test_where_going_back_does_not_help_the_run_ends_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(NotFinite, match=r"line gradient is not finite .* lower line.lr, gradient clipping"):
        run(Line(lambda task, step: step >= 30), tmp_path)
    with pytest.raises(NotFinite):  # nothing to go back to
        run(Line(lambda task, step: True), tmp_path / "new")


def test_a_training_without_finite_gradients_ends_however_seldom_it_logs(tmp_path: Path) -> None:
    seldom = Cadence(1000, 40, 100, progress=False)
    for poison in (
        lambda task, step: step >= 5,
        lambda task, step: 5 <= step < 5 + SKIPS,
    ):  # NaN until the end, or finite again by then
        with pytest.raises(NotFinite):
            fit(FusedLine(poison), Data(60), tmp_path, 60, 1, 60, seldom, Machine("cpu", "32"))
        assert not (tmp_path / "checkpoints/last.ckpt").exists()


def test_findings_are_kept_said_once_and_sent_as_alerts(tmp_path: Path, capsys) -> None:
    class Alerts:
        sent: list[tuple[str, str]] = []

        def log_alert(self, title: str, text: str) -> None:
            self.sent.append((title, text))

    watch = health.Health(tmp_path, {})
    trainer = SimpleNamespace(
        global_step=50, log_every_n_steps=10, loggers=[Alerts()],
        callback_metrics={"val/active_channels": torch.tensor(0.0)},
    )  # fmt: skip
    for _ in range(3):
        watch.on_validation_end(trainer, None)
    assert capsys.readouterr().out.count("health: posterior_collapse at step 50") == 1
    assert [title for title, _ in Alerts.sent] == ["posterior_collapse"]
    kept = json.loads((tmp_path / "health.json").read_text())
    assert kept["posterior_collapse"]["step"] == 50
    resumed = health.Health(tmp_path, {})
    resumed.load_state_dict(watch.state_dict())
    resumed.on_validation_end(trainer, None)
    assert len(Alerts.sent) == 1


def test_an_average_that_does_not_move_is_seen(tmp_path: Path) -> None:
    """Uses the callback's own measurement, with an average that is frozen on purpose, and with one that is not."""
    task = Line()
    task.setup("fit")
    watch, trainer = health.Health(tmp_path, {}), SimpleNamespace(global_step=1)
    for frozen, expected in ((True, "ema_not_moving"), (False, None)):
        watch.history.clear()
        watch._before = None
        for _ in range(3):
            watch.on_validation_start(trainer, task)
            with torch.no_grad():
                task.layer.weight += 1
            if not frozen:
                task.ema.update()
        found = health.ema_not_moving(watch.history, {})
        assert (found.name if found else None) == expected


def test_training_time_leaves_validation_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A validation of 300 s in the middle counts neither as training nor as waiting for data."""
    from ldm_train.training.callbacks.monitor import Monitor

    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    watch = Monitor(1, 1, 1.0)
    trainer = SimpleNamespace(global_step=0, log_every_n_steps=1)
    watch.on_train_start(trainer, None)
    watch.on_validation_start(trainer, None)
    now[0] += 300
    watch.on_validation_end(trainer, None)
    assert watch.state_dict()["seconds"] == 0
    watch.on_train_batch_start(trainer, None, {"key": ["a"], "replaced": []}, 0)
    assert watch._waited == 0
    watch.exclude(-5.0)
    assert watch.state_dict()["seconds"] == 5


def test_writing_a_checkpoint_is_no_waiting_for_data(monkeypatch: pytest.MonkeyPatch) -> None:
    from ldm_train.training.callbacks.monitor import Monitor

    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    watch, trainer = Monitor(1, 1, 1.0), SimpleNamespace(global_step=1, log_every_n_steps=100)
    watch.on_train_start(trainer, None)
    for waited, index in ((0, 0), (3, 1)):
        now[0] += waited
        watch.on_train_batch_start(trainer, None, {"key": ["a"], "replaced": []}, index)
        watch.on_train_batch_end(trainer, SimpleNamespace(accumulate=1), None, None, index)
        now[0] += 60  # another callback writes a checkpoint
        watch.batch_ended()
    assert watch._waited == 3
