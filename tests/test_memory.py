"""The plan predicts the memory of a training step, refuses options that do not fit, and proposes options that do."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from measured import allocated, planned, planning
from tiers import tiered

from ldm_train.configuration import differences
from ldm_train.models.autoencoder import AutoencoderKL
from ldm_train.pipeline import budget
from ldm_train.pipeline.budget import Budget, Choice
from ldm_train.pipeline.memory import Tracker
from ldm_train.pipeline.plan import print_plan
from ldm_train.training.callbacks.pace import Pace

OWN = ("autoencoder=kl_f4_tiny", "autoencoder.pretrained=null")
# Batch sizes at which activations take most of the memory: (stage, *overrides).
SMALL = {
    "one pass of both players": ("autoencoder", "experiment=quickstart", "autoencoder.batch_size=32"),
    "latents, captions and classes": ("diffusion", "experiment=quickstart", "diffusion.batch_size=64"),
}
LARGER = {
    "a codebook": ("autoencoder", "experiment=shapes_class", "autoencoder=vq_f4_tiny", "autoencoder.pretrained=null",
                   "autoencoder.batch_size=64"),
    "a transformer": ("diffusion", "experiment=shapes_text", *OWN, "diffusion/network=dit", "diffusion.batch_size=64"),
    "layouts, a wider network": ("diffusion", "experiment=shapes_layout", *OWN, "diffusion.network.channels=96",
                                 "diffusion.batch_size=64"),
    "photos": ("autoencoder", "experiment=clothing_f8_small", "autoencoder.batch_size=32"),
    "latents of photos": ("diffusion", "experiment=clothing_f8_small", "diffusion.batch_size=256"),
    "16 bits": ("autoencoder", "experiment=quickstart", "autoencoder.batch_size=64", "precision=bf16-mixed"),
    "accumulation": ("autoencoder", "experiment=quickstart", "autoencoder.batch_size=128", "autoencoder.micro_batch_size=32"),
    "recomputing, autoencoder": ("autoencoder", "experiment=clothing_f8_small", "autoencoder.batch_size=32",
                                 "+autoencoder.network.activation_checkpointing=true"),
    "recomputing, U-Net": ("diffusion", "experiment=quickstart", "diffusion.batch_size=128",
                           "+diffusion.network.activation_checkpointing=true"),
}  # fmt: skip
CASES = [*SMALL.values(), *(pytest.param(case, marks=pytest.mark.slow) for case in LARGER.values())]


@tiered("case", CASES, fast=1, ids=[*SMALL, *LARGER])
def test_the_plan_knows_the_peak_of_lightnings_own_loop(case: tuple[str, ...]):
    stage, *overrides = case
    run = planning(*overrides)
    expected = planned(run, stage)
    assert expected == pytest.approx(allocated(run, stage), rel=0.15)


def test_what_is_repeated_takes_what_it_took_before():
    """A repeated operation has the same peak and strides each time, also if its result shares memory with an argument
    and its schema does not say so (_unsafe_view)."""
    x, y = torch.empty(2, 16, 32, device="meta"), torch.empty(32, 64, device="meta")
    for operation in (lambda: x @ y, lambda: torch.cat([x, x]), lambda: x.transpose(1, 2) + 1, lambda: x[:, ::2] * 2):
        peaks, strides = [], []
        with Tracker() as tracker:
            for _ in range(3):
                tracker.begin()
                result = operation()
                peaks.append(sum(tracker.peak.values()))
                strides.append(result.stride())
                del result
        assert peaks[0] == peaks[1] == peaks[2] > 0
        assert strides[0] == strides[1] == strides[2]


def test_every_part_is_told_apart():
    run = planning("experiment=quickstart", "technique=[adam]")
    parts = Budget(run, "diffusion").memory(Choice(32, 1, False))
    weights = parts["weights"]
    assert parts["gradients"] == weights  # all weights are trained, in float32
    assert parts["optimiser states"] == pytest.approx(2 * weights, rel=0.01)
    assert parts["averaged weights"] == pytest.approx(weights, rel=0.01)
    assert 0 < parts["frozen networks"] < weights
    doubled = Budget(run, "diffusion").memory(Choice(64, 1, False))
    assert doubled["activations"] == pytest.approx(2 * parts["activations"], rel=0.05)
    assert doubled["weights"] == weights


@tiered("recomputing", [False, True], fast=1)
def test_the_largest_micro_batch_fits_and_the_next_one_does_not(recomputing: bool):
    plan = Budget(planning("experiment=quickstart", "autoencoder.batch_size=16"), "autoencoder")
    memory = 1.001 * plan.peak(Choice(4, 4, recomputing))
    assert plan.largest(memory, recomputing) == Choice(4, 4, recomputing)
    assert plan.peak(Choice(8, 2, recomputing)) > memory
    assert plan.largest(1000, recomputing) is None


def printed(*overrides: str) -> None:
    run = planning("experiment=quickstart", "stages=[autoencoder]", *overrides)
    print_plan(run, run.chosen())


def test_what_is_refused_comes_with_options_that_are_accepted(capsys: pytest.CaptureFixture):
    with pytest.raises(ValueError, match=r"autoencoder: a training step takes .* What fits") as refused:
        printed("memory=0.03")
    proposed = str(refused.value).partition("batch_size: ")[2].split(", or ")
    assert len(proposed) == 2  # without and with recomputed activations
    for options in proposed:
        capsys.readouterr()
        printed("memory=0.03", *options.partition(" (")[0].split())
        assert "fits into 90%" in capsys.readouterr().out


def test_what_nothing_makes_fit_is_said():
    with pytest.raises(ValueError, match="the minimum is"):
        printed("memory=0.004")


def test_a_plan_for_a_gpu_needs_none(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    planning("experiment=quickstart", "accelerator=gpu", "devices=2", "memory=24", "stages=[diffusion]").plan()
    said = capsys.readouterr().out
    assert "on 2 x gpu, precision bf16-mixed" in said
    assert "of 24.00 GiB: fits" in said


def test_a_plan_alone_writes_nothing_and_names_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.chdir(tmp_path)
    planning("experiment=quickstart", "price_per_hour=2", "stages=[autoencoder]").plan()
    said = capsys.readouterr().out
    assert "missing: data folder data/shapes" in said
    assert ", cost " in said
    assert list(tmp_path.iterdir()) == []


def test_what_the_meta_device_cannot_run_is_said_and_refuses_nothing(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    def fail(*values: object) -> None:
        raise RuntimeError("reads a value")

    monkeypatch.setattr(budget, "step_memory", fail)
    monkeypatch.setattr(budget, "_KNOWN", {})
    printed("memory=0.004")
    assert "memory not known beforehand (RuntimeError: reads a value)" in capsys.readouterr().out


def test_recomputing_changes_no_gradient():
    torch.manual_seed(0)
    options = {"z_channels": 4, "channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1, "dropout": 0.5}
    plain, saving = (AutoencoderKL(**options, activation_checkpointing=on) for on in (False, True))
    saving.load_state_dict(plain.state_dict())
    images, gradients = torch.rand(2, 3, 16, 16), []
    for network in (plain, saving):
        torch.manual_seed(1)
        network(images)[0].square().sum().backward()
        gradients.append([p.grad for p in network.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_recomputing_may_change_while_a_stage_is_resumed():
    before, now = (
        {"autoencoder": {"network": {"channels": 8} | more}} for more in ({}, {"activation_checkpointing": True})
    )
    assert differences(before, now, {}) == []
    now["autoencoder"]["network"]["channels"] = 16
    assert differences(before, now, {}) == ["autoencoder.network.channels: 8 -> 16"]


def test_the_first_steps_say_how_long_it_takes_and_what_it_costs(capsys: pytest.CaptureFixture):
    pace = Pace(batch_size=16, price_per_hour=3600.0)
    trainer, said = SimpleNamespace(global_step=100, max_steps=1125), []
    task = SimpleNamespace(stage="diffusion", accumulate=2, device=torch.device("cpu"), print=said.append)
    pace.on_train_start(trainer, task)
    for micro_batch in range(60):
        trainer.global_step += micro_batch % 2
        pace.on_train_batch_end(trainer, task, None, None, micro_batch)
    (line,) = said
    assert line.startswith("diffusion: ")
    assert "images/s in its first steps" in line
    assert ", cost " in line
