"""Tasks, data modules, callbacks, loggers and Trainer options from the config: stock ones and a user's own."""

from pathlib import Path

import lightning as L
import pytest
import torch
from chains import SMALL, chain
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from ldm_train.configuration import config_folder
from ldm_train.data.datamodule import ShardDataModule
from ldm_train.pipeline.sweep import read_rows
from ldm_train.pipeline.values import check_values
from ldm_train.training.diffusion_task import DiffusionTask

COUNTED: list[str] = []


class Count(L.Callback):
    def __init__(self, word: str):
        self.word = word

    def on_train_batch_end(self, *given: object) -> None:
        COUNTED.append(self.word)


class HalfTask(DiffusionTask):
    """Half the loss of the package's task."""

    def training_step(self, batch: dict, batch_idx: int) -> torch.Tensor:
        if self.device.type != "meta":  # the plan rehearses the task on meta
            COUNTED.append("task")
        return super().training_step(batch, batch_idx) / 2


class LoudData(ShardDataModule):
    def train_dataloader(self):
        COUNTED.append("data")
        return super().train_dataloader()


SHORT = (
    "autoencoder.max_steps=2", "diffusion.max_steps=2", "diffusion.log_every=1", "autoencoder.log_every=1",
    "diffusion.evaluate_every=null", "stages=[autoencoder,latents,diffusion]",
)  # fmt: skip


@pytest.mark.chain
@pytest.mark.slow
def test_objects_of_ones_own_and_stock_ones_take_part(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    COUNTED.clear()
    chain(
        tmp_path, *SHORT, "trainer.profiler=simple", "callbacks=learning_rate",
        f"+callbacks.mine={{_target_: {__name__}.Count, word: callback}}",
        "+logger.mine={_target_: lightning.pytorch.loggers.CSVLogger, save_dir: '{folder}/mine', name: '{stage}'}",
        f"diffusion.task._target_={__name__}.HalfTask", f"data.module._target_={__name__}.LoudData",
    ).execute()  # fmt: skip
    assert COUNTED.count("callback") == 4
    assert COUNTED.count("task") == 2
    assert COUNTED.count("data") >= 1
    assert "Profiler Report" in caplog.text
    for stage in ("autoencoder", "diffusion"):
        (path,) = (tmp_path / "run" / "mine" / stage).rglob("metrics.csv")
        ours = read_rows(tmp_path / "run" / stage)
        theirs = read_rows(path.parent)
        assert {r["step"] for r in theirs} == {r["step"] for r in ours}
        assert any(name.startswith("lr-") for name in theirs[0])  # from Lightning's own callback
    lightly = chain(tmp_path, *SHORT, "stages=[autoencoder]", name="plain")
    lightly.execute()
    same = (OmegaConf.load(tmp_path / n / "config.yaml").autoencoder for n in ("run", "plain"))
    assert len({OmegaConf.to_yaml(s) for s in same}) == 1
    weights = [
        torch.load(tmp_path / n / "autoencoder/checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for n in ("run", "plain")
    ]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])  # observers change nothing


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("+trainer.max_steps=5", r"trainer\.max_steps: a stage sets it itself"),
        ("trainer.profiler=odd", "profiler"),
        ("+callbacks.mine._target_=builtins.dict", "callbacks.mine: builtins.dict is not a callback"),
        (
            "+callbacks.mine._target_=lightning.pytorch.callbacks.ModelCheckpoint",
            "saves checkpoints, which training does",
        ),
    ],
)
def test_what_cannot_take_part_is_said_before_training(tmp_path: Path, option: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chain(tmp_path, *SHORT, option).prepare()


@pytest.mark.parametrize("named", ["csv", ["wandb", "tensorboard"], "wandb"])
def test_loggers_by_name_in_a_recipe_mean_what_they_did(named: object, tmp_path: Path) -> None:
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        config = compose("train", [*SMALL, "name=x"])
        chosen = compose("train", [*SMALL[1:], "name=x", f"logger={named}".replace("'", "")])
    OmegaConf.set_struct(config, False)
    config.logger = named
    check_values(config)
    assert config.logger == chosen.logger
    assert set(config.logger) == {*([named] if isinstance(named, str) else named)} - {"csv"}
