"""Prior preservation (DreamBooth): images of a class, drawn by a model, become training data with a loss weight."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from chains import chain, composed
from hydra.utils import instantiate

from ldm_train.checkpoints.native import load_latent_diffusion
from ldm_train.data.batch import FIELDS
from ldm_train.data.datamodule import ShardDataModule
from ldm_train.data.files import DataError
from ldm_train.data.prepare.build import build
from ldm_train.data.prepare.shapes import Subject
from ldm_train.data.shards import read_index
from ldm_train.generation.prior import ClassPictures
from ldm_train.pipeline.diffusion import DiffusionStage
from ldm_train.pipeline.latents import latent_data
from ldm_train.pipeline.run import Run

STAGES = ("stages=[autoencoder,latents,diffusion]", "diffusion.evaluate_every=null")
TEXT = (
    "diffusion/conditioning=text", "diffusion.conditioning.context_dim=32", "diffusion.conditioning.vector_dim=0",
    "diffusion.conditioning.conditioners.text={vocab_size:300,depth:1,max_length:16}",
)  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = chain(tmp_path_factory.mktemp("prior"), *STAGES, *TEXT, name="base")
    run.execute()
    return run


def source(base: Run, **options: object) -> ClassPictures:
    given = {
        "run": "base",
        "prompts": ["a red square", "a blue square"],
        "count": 6,
        "val_count": 1,
        "num_inference_steps": 2,
    }
    return ClassPictures(runs_dir=str(base.folder.parent), accelerator="cpu", **given | {"batch_size": 4} | options)


@pytest.fixture(scope="module")
def shards(base: Run) -> tuple[Path, Path]:
    """The shard folders of the subject's images and of those drawn by the model."""
    folder = base.folder.parent / "data"
    build(Subject(count=3), folder / "subject")
    build(source(base, loss_weight=0.5), folder / "prior")
    return folder / "subject", folder / "prior"


@pytest.mark.chain
def test_the_pictures_are_a_function_of_model_and_number(base: Run) -> None:
    first, second = source(base), source(base)
    whole = list(first.samples("train", range(6)))
    assert [fields["txt"] for _, fields in whole] == [b"a red square", b"a blue square"] * 3
    assert [*second.samples("train", range(3)), *second.samples("train", range(3, 6))] == whole
    assert first.sample("train", 5) == whole[5]


@pytest.mark.chain
def test_they_count_by_their_weight_and_a_subjects_by_one(base: Run, shards: tuple[Path, Path]) -> None:
    roots = [str(path) for path in shards]
    assert not ShardDataModule(roots[0], base.data("diffusion", ("image",)).batching, 1).holds("loss_weight")
    run = chain(
        base.folder.parent, *STAGES, *TEXT, "autoencoder.pretrained=base", "diffusion.init=base", "diffusion.max_steps=2",
        f"data.root=[{','.join(roots)}]", "data.val_split=train", name="subject",
    )  # fmt: skip
    run.execute()
    data, _, count = latent_data(run, "diffusion", run.fields)
    assert count == 9
    batch = data.train.fetch([(0, i) for i in range(count)], random=False)
    weights = dict(zip(batch["key"], batch["loss_weight"].tolist()))
    assert all(weight == (0.5 if "prior" in key else 1.0) for key, weight in weights.items())
    assert sum("prior" in key for key in weights) == 6


def test_the_loss_is_that_of_both_terms(base: Run) -> None:
    """The weighted mean over a batch of n images of the subject and n of the class is half of L + lambda L_prior."""
    run = chain(base.folder.parent, *STAGES, *TEXT, name="base")
    model = load_latent_diffusion(base.folder)
    task = DiffusionStage().task(run, model, base.folder / "unused")
    losses: list[torch.Tensor] = []
    plain = task.objective.weighted
    task.objective.weighted = lambda loss, timesteps: losses.append(plain(loss, timesteps)) or losses[-1]
    task.log_training = lambda logs: None
    task._trainer = SimpleNamespace(world_size=1, global_rank=0, global_step=0)
    task.accumulate = 1
    channels = model.first_stage.autoencoder.moments_per_latent * model.first_stage.latent_channels
    batch = {
        "moments": torch.randn(4, channels, *model.latent_size),
        "caption": ["a zqx square"] * 2 + ["a red square"] * 2,
        "loss_weight": torch.tensor([1.0, 1.0, 0.3, 0.3]),
    }
    total = task.training_step(batch, 0)
    each = losses[0]
    torch.testing.assert_close(total, (each[:2].mean() + 0.3 * each[2:].mean()) / 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"run": ""}, "set source.run="),
        ({"prompts": None}, "set what it draws"),
        ({"classes": "cat"}, "knows no class_label; it takes caption"),
        ({"loss_weight": 0}, "source.loss_weight=0"),
        ({"loss_weight": "heavy"}, "source.loss_weight=heavy"),
        ({"batch_size": 0}, "source.batch_size=0"),
    ],
)
@pytest.mark.chain
def test_what_cannot_be_drawn_is_named(base: Run, options: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        source(base, **options)


@pytest.mark.chain
def test_the_command_writes_shards_of_it(base: Run, tmp_path: Path) -> None:
    config = composed(
        "prepare", "source=dreambooth_prior", "source.run=base", f"source.runs_dir={base.folder.parent}", "source.count=2",
        "source.prompts=a red square", "source.num_inference_steps=2", "source.accelerator=cpu",
    )  # fmt: skip
    build(instantiate(config.source), tmp_path / "out")
    entry = read_index(tmp_path / "out")["splits"]["train"]["shards"][0]
    assert json.dumps(entry).count("loss_weight.txt") == 1


@pytest.mark.parametrize("data", [b"nan", b"-1", b"heavy", b"1001"])
def test_a_weight_that_cannot_be_is_named(data: bytes) -> None:
    with pytest.raises(ValueError, match="loss weight"):
        FIELDS["loss_weight"].check({"loss_weight.txt": data}, None)
