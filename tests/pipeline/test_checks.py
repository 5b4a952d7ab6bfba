"""Settings that cannot work are refused before anything is trained, for every stage of a run."""

import random
import re
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from chains import SMALL, composed
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from ldm_train.cli.common import TRACEBACK, USER_ERRORS, run_command
from ldm_train.configuration import config_folder
from ldm_train.pipeline import measure, train
from ldm_train.pipeline import resume as stages
from ldm_train.pipeline.machine import machine_of
from ldm_train.pipeline.run import Run, own_parts

Command = Callable[..., str]


class Begun(Exception):
    """Raised when the first stage would begin."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


# Settings tested through the command line, one of each kind: a name, an added option, a group.
TYPED = ("name=[a]", "+sampler.order=3", "diffusion/conditioning=superres")


@pytest.fixture
def begin(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> Command:
    """begin(override, ..., typed=True) returns the message with which train.py refuses; raises Begun if it would train.
    typed: the overrides go through the command line, which composes the config twice."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setenv(TRACEBACK, "0")

    def advance(*arguments: Any) -> str:
        raise Begun

    monkeypatch.setattr(stages, "advance", advance)

    def run(*overrides: str, typed: bool = True) -> str:
        options = [*SMALL, f"data_dir={data}", *overrides]
        if not typed:
            with pytest.raises(USER_ERRORS) as refused:
                train._train(composed("train", "name=run", *options), tmp_path / "runs/run", sweeping=False)
            return str(refused.value)
        monkeypatch.setattr(sys, "argv", ["train.py", *options])
        with pytest.raises(SystemExit) as caught:
            run_command(train.train, "train")
        assert caught.value.code == 1
        return capfd.readouterr().err.partition("\nerror: ")[2]

    return run


def test_a_run_that_is_right_begins(begin: Command):
    with pytest.raises(Begun):
        begin("name=5")


TEXT = "diffusion/conditioning=text"
CLASSIFIER = "experiment=classifier_shapes autoencoder.pretrained=null stages=[autoencoder,latents,classifier]"
REFUSED = {
    # the first stage
    "autoencoder.batch_size=inf": "autoencoder.batch_size=inf is not a finite number",
    "autoencoder.batch_size=null": "autoencoder.batch_size=null: it needs a whole number",
    "autoencoder.disc_lr=-1": "autoencoder.disc_lr=-1 is below 0",
    "autoencoder.lr_schedule.warmup_steps=-3": "warmup_steps=-3 is below 0",
    "autoencoder.clip_norm=nan": "autoencoder.clip_norm=nan is not a finite number",
    "autoencoder.clip_norm=0": "autoencoder.clip_norm=0 trains nothing; it must be above 0",
    "diffusion.ema_decay=1": "diffusion.ema_decay=1 never takes a step into the average",
    "diffusion.objective.min_snr_gamma=-1": "diffusion.objective.min_snr_gamma=-1 is below 0",
    "diffusion.objective.min_snr_gamma=abc": "diffusion.objective.min_snr_gamma='abc' is not a number",
    "diffusion.lr_schedule.final=abc": "diffusion.lr_schedule.final='abc' is not a number",
    "autoencoder.loss.disc_loss=odd": "disc_loss is 'hinge' or 'vanilla'",
    "autoencoder.loss.discriminator.norm=odd": "discriminator norm is 'group' or 'batch'",
    "autoencoder.loss.discriminator.num_layers=5": "the discriminator cannot look at pictures of 32x32",
    "autoencoder.task.augmentation.equivariance=0.5 autoencoder.loss.discriminator.num_layers=3": "equivariance draws of 32x32",
    "autoencoder.network.z_channels=0": "autoencoder.network does not run on an input of 1x3x32x32",
    "autoencoder.network._target_=os.system": "autoencoder.network asks for os.system",
    "autoencoder.pretrained=nowhere": "autoencoder.pretrained=nowhere is not a run with a finished autoencoder",
    "autoencoder.data=null": "autoencoder.data=None: it is a section",
    "autoencoder.lr_schedule=null": "autoencoder.lr_schedule=None: it is a section",
    "autoencoder.loss.discriminator=false": "autoencoder.loss.discriminator=False: it is a section",
    # the latents
    "latents.per_shard=0": "latents.per_shard=0 is below 1",
    "latents.cache=maybe": "latents.cache='maybe' is neither true nor false",
    "latents=5": "set the options in it: latents.<option>=...",
    "data.crop=random": "data.crop=random is random, one cached encoding cannot stand for it; set latents.cache=false",
    "data.channels=5": "data.channels is 5",
    "data.root=null": "data.root=None is neither a folder of shards",
    "data.max_bad_fraction=abc": "data.max_bad_fraction='abc' is not a number",
    "data.image_size=[32]": "data.image_size=[32] is neither a side in pixels nor [height, width]",
    "data.scale=[2,1]": "data.scale=[2, 1] is not a range of the area kept",
    "data.val_split=none": "has no split 'none'",
    # the second stage
    "diffusion.samples=0": "diffusion.samples=0 is below 1",
    "diffusion.network.in_channels=5": "diffusion.network.in_channels is 5, the first stage's latents have 4 channels",
    "diffusion.network.context_dim=999": "diffusion.network.context_dim is 999, the conditioners",
    "diffusion.network.channels=33": "diffusion.network does not run on an input of 1x4x8x8",
    "diffusion.network.attention_levels=[9]": "attention_levels [9] do not exist",
    "diffusion.optimizer._target_=torch.optim.Nope": "diffusion.optimizer: Error loading 'torch.optim.Nope'",
    "diffusion.optimizer.betas=[2,3]": "diffusion.optimizer: Invalid beta parameter at index 0: 2",
    "diffusion.lr_schedule.schedule=odd": "lr_schedule.schedule is constant, cosine or linear",
    "diffusion.lr_schedule=null": "diffusion.lr_schedule=None: it is a section",
    "diffusion.lr_schedule._target_=builtins.len": "diffusion.lr_schedule is not a schedule of learning rates",
    "diffusion.optimizer=3": "diffusion.optimizer=3: it is a section",
    "diffusion.ema_decay=2": "diffusion.ema_decay=2 is above 1",
    "diffusion.objective.weighting=odd": "weighting 'odd' is not one of",
    "diffusion.schedule.zero_terminal_snr=true": "Epsilon cannot learn a schedule that ends without signal",
    f"{TEXT} diffusion.conditioning.conditioners.text.tokenizer=no.json": "tokenizer no.json is not a file",
    "diffusion.conditioning.conditioners.class_label.classes=2": "knows 2 classes",
    "diffusion/conditioning=superres": "not every sample has a lowres",
    # sampling and evaluation
    "sampler.eta=abc": "sampler: ldm_train.samplers.ddim.ddim does not take its options",
    "+sampler.order=3": "has no option order",
    "sampler._target_=ldm_train.samplers.ddim.nothing": "sampler asks for ldm_train.samplers.ddim.nothing, which is not there",
    "sampling.spacing=odd": "unknown spacing 'odd'",
    "sampling.num_inference_steps=5000": "num_inference_steps is 5000",
    "sampling.guidance_scale=nan": "sampling.guidance_scale=nan is not a finite number",
    "evaluation.reference=missing.npz": "evaluation.reference=missing.npz: there is no such file",
    "evaluation.reference=none": "evaluation.reference=none is neither an .npz file nor a split",
    "evaluation.adherence=abc": "evaluation.adherence=abc is neither null nor a section",
    "evaluation.restoration=true": "evaluation.restoration=True is neither null nor a section",
    "evaluation.extractors.tiny=null": "evaluation.extractors.tiny has no _target_",
    "evaluation.metrics=[odd]": "unknown metric 'odd'; choose from",
    "evaluation.paired=[odd]": "paired metrics: odd; choose",
    "evaluation.metrics=[fid_inf_tiny] evaluation.images=200 diffusion.evaluate_every=null": "needs at least 120 samples, not 16",
    "evaluation.metrics=[memorisation_tiny] data.val_split=train": "memorisation_tiny compares with pictures that training does not see",
    "data.adherence.held_out=0": "evaluation.adherence.held_out=0 is below 1",
    "diffusion.best_by=odd": "diffusion.best_by=odd is not measured",
    # the run
    "name=[a]": "name=['a'] is not the name of a folder",
    "wandb_artifact=true": "wandb_artifact=true uploads the model to W&B, and logger= is without it",
    "trust=5": "trust is a list: trust=[5]",
    "trace=/nowhere/at/all": "trace=/nowhere/at/all: there is no folder /nowhere/at",
    "stages=[evaluation]": "has no finished stage 'diffusion' yet",
    "restart=odd": "unknown stages ['odd']",
    "stages=[autoencoder] restart=export": "restart=export is not in stages=[autoencoder], so nothing would run it again",
    "diffusion/conditioning=edges autoencoder=kl_f8_small autoencoder/loss/perceptual=tiny":
        "the edges have factor 4, the autoencoder 8; set diffusion.conditioning.conditioners.edges.factor=8",
    "diffusion/schedule=linear_flow": "noise says nothing about the image; use diffusion/objective=flow",
    "runs_dir=5": "runs_dir=5 is not text",
    "+sampling.eta=0.5": "sampling.eta is not an option of sampling; those of a sampler are sampler.<option>",
    "data.derived=masks": "a part is chosen with a slash: data/derived=masks",
    "diffusion.schedule=null": "a part is chosen with a slash: diffusion/schedule=",
    "diffusion.conditioning.conditioners.class_label=null": "conditioners.class_label has no _target_",
    "autoencoder.network._target_=null": "autoencoder.network._target_=None: it names a class or function",
    "stage.export=null": "stage.export has no _target_",
    "evaluation.kinds=5": "evaluation.kinds=5: it is a section",
    "+evaluation.kinds.mine=null": "evaluation.kinds.mine has no _target_",
    "+evaluation.kinds.mine._target_=builtins.dict": "evaluation.kinds.mine: builtins.dict is not a class of a metric",
    "stages=[perceptual]": "the stage perceptual needs its section: choose experiment=tiny_perceptual",
    f"{CLASSIFIER} classifier.batch_size=100000": "classifier.batch_size=100000 exceeds the",
    "+stage.mine._target_=ldm_train.pipeline.export.ExportStage": "is not a stage of that name",
    "data.remedy=2.5": "data.remedy=2.5 is not a sentence",
    "trainer.benchmark=0": "trainer.benchmark=0 is neither true nor false",
    "autoencoder.task._target_=abc": "autoencoder.task._target_=abc is a module, where a class or function is meant",
    "diffusion.task._target_=my_package.Mine": "diffusion.task._target_=my_package.Mine cannot be loaded: ",
    "diffusion.task._target_=json.dumps": "is not an ldm_train.training.task.Task",
}  # fmt: skip


def _is_of_values(setting: str) -> bool:
    """Returns True if all overrides set values in sections, which needs none of Hydra's own syntax."""
    return all(re.match(r"[a-z]\w*\.", option) for option in setting.split())


@pytest.mark.parametrize(
    ("setting", "typed"),
    [
        *((setting, setting in TYPED) for setting in REFUSED),
        *(
            pytest.param(setting, True, marks=pytest.mark.slow)
            for setting in REFUSED
            if not _is_of_values(setting) and setting not in TYPED
        ),
    ],
)
def test_a_setting_that_cannot_work_is_named_before_anything_is_made(
    setting: str, typed: bool, begin: Command, tmp_path: Path
):
    assert REFUSED[setting] in begin(*setting.split(), typed=typed)
    assert not [
        p for p in tmp_path.rglob("*") if p.name in ("autoencoder", "latents", "diffusion", "evaluation", "export")
    ]


def test_a_reference_of_another_extractor_is_named_before_training(begin: Command, tmp_path: Path):
    import numpy as np

    np.savez(tmp_path / "other.npz", mu=np.zeros(7), sigma=np.eye(7))
    message = begin("evaluation.reference=other.npz", "evaluation.metrics=[fid_tiny]", typed=False)
    assert "other.npz has 7 features per image, the extractor 128" in message


def _leaves(node: DictConfig, prefix: str = "") -> list[str]:
    found = []
    for key in node:
        value = node._get_node(key)
        found += _leaves(value, f"{prefix}{key}.") if isinstance(value, DictConfig) else [f"{prefix}{key}"]
    return found


ODD = ["abc", -1, 0, None, float("nan"), float("inf"), True, [], [1, 2, 3], {}, "", 1e9, 2.5, "${nothing}", "a/b"]


def test_any_option_with_any_value_is_taken_or_refused_in_words(
    data: Path, tmp_path: Path, request: pytest.FixtureRequest
):
    """Random options of the whole config with odd values (`--fuzz` cases) raise only errors that users are shown."""
    count = request.config.getoption("--fuzz")
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        usual = compose("train", [*SMALL, "name=run", f"runs_dir={tmp_path}", f"data_dir={data}"])
    # Left out: options that say where things are, or that start processes or downloads.
    keys = [
        k for k in _leaves(usual) if not k.startswith(("data_dir", "data.source", "devices", "evaluation.extractors"))
    ]
    cases, unnamed = list(product(keys, ODD)), []
    random.Random(0).shuffle(cases)
    for key, value in cases[:count]:
        config = usual.copy()
        try:
            OmegaConf.update(config, key, value, force_add=True)
            train.check_values(config)
            Run(config, tmp_path / "run", machine_of(config, {}), own_parts(config)).prepare()
        except USER_ERRORS:
            pass
        except Exception as error:
            unnamed.append(f"{key}={value!r}: {type(error).__name__}: {error}")
    assert not unnamed, "\n".join(sorted(set(unnamed)))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("run=a", "against=photos"), r"against= has no effect with run=, .*; set reference=<split or \.npz> for this"),
        (("run=a", "image_size=64"), r"image_size= has no effect with run=, only with images=; set data\.image_size="),
        (("reconstruct=a", "guidance_scale=2"), "guidance_scale= has no effect with reconstruct=, only with run="),
        (("images=a", "against=b", "seed=1"), "seed= has no effect with images=, only with run=; leave it out"),
    ],
)
def test_options_without_effect_on_what_is_measured_are_refused(options: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        measure.check(composed("evaluate", *options))


def test_a_folder_is_no_file_for_metrics(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=rf"out={tmp_path} is a folder; give a file in it, out={tmp_path}/metrics\.json"
    ):
        measure.check(composed("evaluate", "run=a", f"out={tmp_path}"))


def test_options_with_an_effect_on_what_is_measured_are_taken() -> None:
    for options in (
        ("run=a", "seed=1", "reference=train"),
        ("reconstruct=a", "paired=[]"),
        ("images=a", "image_size=8"),
    ):
        measure.check(composed("evaluate", *options))
