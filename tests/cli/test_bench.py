"""ldm-bench: every kind runs, contenders compute the same, errors name what cannot be measured. Speed is not tested."""

import copy
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from tiers import tiered
from torch.nn import functional as F

from ldm_train.bench import train_autoencoder, train_unet
from ldm_train.bench.data import Place, place, torchvision_loader, webdataset_loader
from ldm_train.bench.measuring import Clock, Settings, Table, check_agreement, observed
from ldm_train.bench.peers import call_unet, diffusers_unet
from ldm_train.bench.run import KINDS, bench
from ldm_train.bench.sizes import AUTOENCODERS, UNETS
from ldm_train.configuration import config_folder
from ldm_train.losses.autoencoder import AutoencoderLoss
from ldm_train.training.fit import Machine

CPU = Machine("cpu", "32")
BRIEF = ("runs=1", "steps=2", "images=4", "accelerator=cpu", "sizes=[tiny]")


def run(*options: str) -> list[Table]:
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        return bench(compose("bench", [*BRIEF, *options]))


@pytest.fixture
def there() -> Place:
    with place(Settings(CPU, images=4), "tiny") as made:
        yield made


@tiered("kind", [kind for kind in KINDS if kind != "startup"])
def test_every_kind_is_measured_and_written(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tables = run(f"what={kind}", f"out={tmp_path}/bench.json", f"guide={tmp_path}/guide.md")
    assert tables
    assert all(row.seconds > 0 for table in tables for row in table.rows)
    record = json.loads((tmp_path / "bench.json").read_text())
    assert [t["what"] for t in record["tables"]] == [t.what for t in tables]
    assert record["torch"] == torch.__version__
    guide, said = (tmp_path / "guide.md").read_text(), capsys.readouterr().out
    for row in (row for table in tables for row in table.rows):
        assert f"| {row.who} |" in guide
        assert row.who in said
    if kind.startswith("train_"):
        ours, *others = tables[0].rows
        assert ours.against == 1.0
        assert all(row.flops > 0 and row.memory > 0 and row.mfu > 0 and row.first > 0 for row in (ours, *others))


def test_start_up_is_that_of_processes_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldm_train.bench.startup.COMMANDS", {"nothing": ["-c", "pass"]})
    monkeypatch.setattr("ldm_train.bench.startup.PEERS", {})
    (table,) = run("what=startup")
    assert [row.who for row in table.rows] == ["nothing"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("what=everything", "one of train_unet, train_autoencoder, sampling, decode, data, latent_cache, startup, or all"),
        ("runs=0", "runs=0 is below 1"),
        ("steps=2.5", "steps=2.5 is not a whole number"),
        ("precision=8", "precision is one of 32, bf16-mixed"),
        ("accelerator=tpu", "accelerator is auto, cpu, gpu or mps"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_named(option: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(option)


def test_an_unknown_size_and_too_few_pictures_are_named() -> None:
    with pytest.raises(ValueError, match="sizes=huge is not known here; sizes are tiny, small, base, ldm4, sd1"):
        run("what=train_unet", "sizes=huge")
    with pytest.raises(ValueError, match="images=1 is less than a batch of 2"):
        run("what=data", "images=1")


def test_a_disagreement_is_no_measurement() -> None:
    with pytest.raises(ValueError, match="do not compute the same"):
        check_agreement("two", torch.ones(2), torch.tensor([1.0, 1.1]), 1e-3)


def test_flops_and_memory_are_counted() -> None:
    with observed(torch.device("cpu")) as found:
        torch.ones(64, 32) @ torch.ones(32, 16)
    assert found["flops"] == 2 * 64 * 32 * 16
    assert found["memory"] == 4 * (64 * 32 + 32 * 16 + 64 * 16)


def test_rounds_are_compared_with_ours_of_the_same_round() -> None:
    clock = Clock(torch.device("cpu"), runs=3)
    clock.times.update(ours=[1.0, 10.0, 2.0], theirs=[2.0, 20.0, 6.0])
    assert [row.against for row in clock.rows()] == [1.0, 2.0]


def test_diffusers_trainer_has_our_loss() -> None:
    size = UNETS["tiny"]
    unet = train_unet.build_unet(size)
    theirs = diffusers_unet(unet, train_unet.options_of(size), size.latents)
    task = train_unet.our_task(size, unet)
    x, noise, context = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.randn(2, 4, 32)
    times = torch.tensor([3, 900])
    ours = task.objective(lambda x_t, t: task.model.predict(x_t, t, {"context": context}), x, noise, times).mean()
    trainer = train_unet.DiffusersTrainer(theirs, size, train_unet.build_batch(size, 2), CPU, tuned=False)
    noisy = trainer.scheduler.add_noise(x, noise, times)
    torch.testing.assert_close(F.mse_loss(call_unet(theirs, noisy, times, context), noise), ours, rtol=1e-4, atol=1e-5)


def gradients(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters()}


def test_procedures_of_stage_1_share_the_gradients_of_both_players() -> None:
    """One backward pass gives autoencoder and discriminator the gradients that a pass of its own gives each."""
    size = AUTOENCODERS["tiny"]
    parts = train_autoencoder.build(size)
    images = torch.rand(2, 3, size.side, size.side) * 2 - 1
    still = partial(torch.optim.SGD, lr=0.0)
    peer = train_autoencoder.TwoBackwards(*copy.deepcopy(parts), images, CPU, still)
    torch.manual_seed(0)
    peer()
    autoencoder, perceptual, discriminator = parts
    loss = AutoencoderLoss(perceptual, discriminator, kl_weight=train_autoencoder.KL, disc_start=0)
    torch.manual_seed(0)
    loss(images, *autoencoder(images), autoencoder.last_layer, 0)[0].backward()
    for ours, theirs in ((autoencoder, peer.autoencoder), (discriminator, peer.discriminator)):
        expected = gradients(theirs)
        largest = max(float(g.abs().max()) for g in expected.values())
        for name, gradient in gradients(ours).items():
            torch.testing.assert_close(gradient, expected[name], rtol=2e-3, atol=1e-6 * largest)


def test_loaders_give_the_same_pictures(there: Place) -> None:
    def sums(batches) -> list[float]:
        return sorted(float(image.double().sum()) for batch in batches for image in batch)

    ours = sums(batch["image"] for batch in there.data().train_loader(0))
    assert ours == pytest.approx(sums(images for images, _ in torchvision_loader(there)), rel=1e-5, abs=1e-2)
    assert ours == pytest.approx(sums(images for images, _ in webdataset_loader(there)), rel=1e-5, abs=1e-2)
