"""Every config composes, names things that exist, and builds the models its comments promise."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf

from ldm_train.cli.common import check_values, config_folder

EXPERIMENTS = sorted(p.stem for p in (config_folder() / "experiment").glob("*.yaml"))
FILES = sorted(p for p in config_folder().rglob("*.yaml"))


def composed(name: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        return compose(name, overrides=list(overrides))


def targets(tree: Any) -> Iterator[str]:
    if isinstance(tree, dict):
        if "_target_" in tree:
            yield tree["_target_"]
        for value in tree.values():
            yield from targets(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from targets(value)


def on_meta(section: DictConfig) -> torch.nn.Module:
    with torch.device("meta"):
        return instantiate(section, _convert_="all")


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes_whole(experiment: str):
    config = composed("train", f"experiment={experiment}")
    OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    check_values(config)


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(config_folder())))
def test_every_target_exists(file: Path):
    for target in targets(yaml.safe_load(file.read_text())):
        get_object(target)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_models_of_every_experiment_fit_together(experiment: str):
    config = composed("train", f"experiment={experiment}")
    network, unet = on_meta(config.autoencoder.network), on_meta(config.diffusion.unet)
    size = config.data.image_size if isinstance(config.data.image_size, int) else max(config.data.image_size)
    assert size % network.downsample_factor == 0
    assert unet.in_channels == network.latent_channels
    assert network.in_channels == config.data.channels


@pytest.mark.parametrize(
    "group",
    [
        "autoencoder",
        "autoencoder/network",
        "autoencoder/loss",
        "autoencoder/loss/perceptual",
        "data",
        "diffusion/unet",
        "diffusion/objective",
        "diffusion/conditioning",
        "sampler",
    ],
)
def test_every_option_of_a_group_composes(group: str):
    options = sorted(p.stem for p in (config_folder() / group).glob("*.yaml"))
    assert options
    for option in options:
        config = composed("train", "experiment=celebahq_f8", f"{group}={option}", "data.root=somewhere")
        OmegaConf.to_container(config, resolve=True, throw_on_missing=True)


@pytest.mark.parametrize("source", sorted(p.stem for p in (config_folder() / "source").glob("*.yaml")))
def test_every_source_composes(source: str):
    config = composed("prepare", f"source={source}", "path=somewhere", "out=elsewhere")
    OmegaConf.to_container(config, resolve=True, throw_on_missing=True)


def test_sampling_composes():
    OmegaConf.to_container(composed("sample", "run=somewhere"), resolve=True, throw_on_missing=True)


def test_published_sizes():
    # KL-f8, and LDM-8 of the paper's table 13 at 4 latent channels.
    config = composed("train", "experiment=celebahq_f8")
    assert parameters(on_meta(config.autoencoder.network)) == 83_653_863
    assert parameters(on_meta(config.diffusion.unet)) == 257_733_124


@pytest.mark.parametrize(
    "overrides",
    [("experiment=celebahq_f8", "autoencoder=kl_f4"), ("experiment=quickstart", "autoencoder/network=kl_f4")],
)
def test_the_command_line_has_the_last_word(overrides: tuple[str, ...]):
    assert parameters(on_meta(composed("train", *overrides).autoencoder.network)) == 55_312_063
