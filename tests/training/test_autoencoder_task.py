"""Stage 1 under Lightning: it counts optimiser steps, checkpoints what it trains, validates over samples."""

from functools import partial

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch.utils.data import DataLoader

from ldm_train.losses.autoencoder import AutoencoderLoss
from ldm_train.losses.perceptual import TinyPerceptual
from ldm_train.metrics.paired import psnr
from ldm_train.models.autoencoder import AutoencoderKL
from ldm_train.models.discriminator import PatchDiscriminator
from ldm_train.training.autoencoder_task import AutoencoderTask


def build(accumulate: int = 1, ema_decay: float | None = None, **loss) -> AutoencoderTask:
    torch.manual_seed(0)
    return AutoencoderTask(
        AutoencoderKL(z_channels=2, channels=16, channel_mult=(1, 2), num_res_blocks=1),
        AutoencoderLoss(TinyPerceptual(), PatchDiscriminator(channels=8, num_layers=2), **loss),
        seed=1,
        optimizer=partial(torch.optim.Adam, lr=1e-3, betas=(0.5, 0.9)),
        lr_factor=lambda step: 1.0,
        ema_decay=ema_decay,
        clip_norm=1.0,
        accumulate=accumulate,
    )


def loader(batch_size: int, count: int = 16) -> DataLoader:
    images = torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(2)) * 2 - 1
    return DataLoader([{"image": image} for image in images], batch_size=batch_size)


def trainer(**arguments) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **arguments,
    )  # fmt: skip


@pytest.mark.parametrize(("max_steps", "moved"), [(2, False), (3, True)])
def test_disc_start_counts_optimiser_steps_under_accumulation(max_steps: int, moved: bool) -> None:
    task = build(accumulate=2, disc_start=2)
    before = [p.detach().clone() for p in task.loss.discriminator.parameters()]
    autoencoder = [p.detach().clone() for p in task.autoencoder.parameters()]
    run = trainer(max_steps=max_steps, accumulate_grad_batches=2)
    run.fit(task, loader(2))
    assert run.global_step == max_steps
    after = list(task.loss.discriminator.parameters())
    assert any(not torch.equal(p, q) for p, q in zip(before, after)) == moved
    assert all(not torch.equal(p, q) for p, q in zip(autoencoder, task.autoencoder.parameters()))


def test_what_is_logged_is_the_mean_over_the_micro_batches_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def step(task: AutoencoderTask, batch: dict, batch_idx: int) -> torch.Tensor:
        sometimes = {"rare": torch.tensor(8.0)} if batch_idx % 4 == 2 else {}
        task.log_training({"loss": torch.tensor(float(batch_idx))} | sometimes)
        return next(task.autoencoder.parameters()).square().sum()

    monkeypatch.setattr(AutoencoderTask, "training_step", step)
    run = trainer(max_steps=2, accumulate_grad_batches=4, log_every_n_steps=1)
    run.fit(build(accumulate=4), loader(1))
    assert run.logged_metrics["train/loss"] == (4 + 5 + 6 + 7) / 4
    assert run.logged_metrics["train/rare"] == 8


def test_training_repeats_to_the_bit_whatever_was_drawn_before() -> None:
    weights = []
    for seed in (5, 6):
        task = build(disc_start=1, ema_decay=0.9)
        torch.manual_seed(seed)
        trainer(max_steps=3).fit(task, loader(4))
        weights.append({**task.state_dict(), **{f"ema.{k}": v for k, v in task.ema.shadow.items()}})
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


def test_checkpoints_hold_exactly_what_is_trained() -> None:
    task = build()
    parts = {key.split(".")[0] for key in task.state_dict()}
    assert parts == {"autoencoder", "likelihood", "discriminator"}  # and no perceptual network
    grouped = [p for group in task.groups() for p in group["params"]]
    assert len(grouped) == len(set(grouped)) == sum(p.requires_grad for p in task.parameters())
    state = task.state_dict()
    state.pop("discriminator.main.0.weight")
    with pytest.raises(RuntimeError, match=r"Missing key.*discriminator\.main\.0\.weight"):
        task.load_state_dict(state, strict=False)


@pytest.mark.parametrize("batch_size", [3, 16])
def test_validation_means_do_not_depend_on_the_batch_size(batch_size: int) -> None:
    task = build()
    (values,) = trainer().validate(task, loader(batch_size), verbose=False)
    batch = next(iter(loader(16)))["image"]
    with torch.no_grad():
        rec = task.autoencoder(batch, sample=False)[0].clamp(-1, 1)
    assert values["val/psnr"] == pytest.approx(psnr(rec, batch).mean().item(), rel=1e-4)
    distance = task.loss.perceptual(rec, batch).mean().item()
    assert values["val/score"] == pytest.approx((rec - batch).abs().mean().item() + distance, rel=1e-4)
    assert 0 <= values["val/active_channels"] <= 1


def test_validation_judges_the_averaged_weights_and_brings_the_raw_ones_back() -> None:
    task = build(ema_decay=0.5)
    trainer(max_steps=2).fit(task, loader(4))
    raw = {k: v.clone() for k, v in task.autoencoder.state_dict().items()}
    (values,) = trainer().validate(task, loader(16), verbose=False)
    assert all(torch.equal(v, raw[k]) for k, v in task.autoencoder.state_dict().items())
    batch = next(iter(loader(16)))["image"]
    with task.ema.applied(), torch.no_grad():
        averaged = psnr(task.autoencoder(batch, sample=False)[0].clamp(-1, 1), batch).mean().item()
    assert values["val/psnr"] == pytest.approx(averaged, rel=1e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_16_mixed_clips_the_unscaled_gradient(fused: bool) -> None:
    """Loss scaling must not affect clipping: the norms are those of plain float32 training."""

    def norms(precision: list) -> list[float]:
        task = build(disc_start=0)
        task.optimizer = partial(torch.optim.Adam, lr=1e-4, fused=fused)
        logged: list[float] = []
        task.log = lambda name, value, **_: logged.append(float(value)) if "grad_norm" in name else None
        trainer(max_steps=2, plugins=precision, log_every_n_steps=1).fit(task, loader(8))
        return logged

    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    half = norms([MixedPrecision("16-mixed", "cpu", scaler)])
    full = norms([])
    assert len(half) == len(full) == 4
    for ours, theirs in zip(half, full):
        assert ours == pytest.approx(theirs, rel=0.1)
