"""A training run small enough for tests: every stage takes seconds."""

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from ldm_train.configuration import config_folder
from ldm_train.data.shards import INDEX
from ldm_train.pipeline.data import ensure_data
from ldm_train.pipeline.machine import machine_of
from ldm_train.pipeline.run import Run

SMALL = [
    "logger=csv",
    "progress=false",
    "accelerator=cpu",
    "data.source.count=64",
    "data.source.val_count=16",
    "autoencoder.max_steps=6",
    "autoencoder.batch_size=8",
    "autoencoder.loss.disc_start=3",
    "autoencoder.val_every=3",
    "autoencoder.val_images=8",
    "autoencoder.checkpoint_every=2",
    "diffusion.max_steps=6",
    "diffusion.batch_size=8",
    "diffusion.val_every=3",
    "diffusion.checkpoint_every=2",
    "diffusion.samples=4",
    "diffusion.evaluate_every=3",
    "diffusion.evaluate_images=8",
    "diffusion.network.channels=32",
    "sampling.num_inference_steps=2",
    "evaluation.images=8",
    "evaluation.reference_images=8",
    "evaluation.metrics=[fid_tiny,kid_tiny,precision_tiny,recall_tiny]",
    "data.adherence.scenes=4",
    "data.adherence.held_out=2",
    "data.adherence.seeds=2",
]


@cache
def _chosen(name: str, choices: tuple[str, ...]) -> DictConfig:
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        return compose(name, list(choices))


def composed(name: str, *overrides: str) -> DictConfig:
    """Returns a command's config as Hydra composes it. Files are read once for each choice of groups; values
    are set in a copy."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    choices = [(config_folder() / o.key_or_group).is_dir() for o in parsed]
    config = _chosen(name, tuple(text for text, choice in zip(overrides, choices) if choice)).copy()
    ConfigLoaderImpl._apply_overrides_to_config([o for o, choice in zip(parsed, choices) if not choice], config)
    return config


@cache
def _files(source: str, per_shard: int) -> dict[Path, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        ensure_data(OmegaConf.create({"source": OmegaConf.create(source), "root": folder, "per_shard": per_shard}))
        return {path.relative_to(folder): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def with_data(config: DictConfig) -> DictConfig:
    """Returns the config after making its data as train.py does, but only once for each data.source."""
    data = config.data
    if data.source is not None and isinstance(data.root, str) and not (Path(data.root) / INDEX).is_file():
        for name, content in _files(OmegaConf.to_yaml(data.source, resolve=True), data.per_shard).items():
            (Path(data.root) / name).parent.mkdir(parents=True, exist_ok=True)
            (Path(data.root) / name).write_bytes(content)
    return config


def chain(folder: Path, *overrides: str, name: str = "run") -> Run:
    transformer = {"diffusion/network=prior", "diffusion/network=dit"} & {*overrides}
    small = [o for o in SMALL if not (transformer and o.startswith("diffusion.network."))]
    config = composed("train", *small, f"name={name}", f"runs_dir={folder}", f"data_dir={folder}/data", *overrides)
    with_data(config)
    (folder / name).mkdir(exist_ok=True)
    return Run(config, folder / name, machine_of(config, {}))


def tokenizer(folder: Path) -> Any:
    """A CLIP tokenizer that knows only a few letters; writes its files to `folder`."""
    from transformers import CLIPTokenizer

    words = ["<|startoftext|>", "<|endoftext|>", *(f"{c}{end}" for c in "acdegiort" for end in ("", "</w>"))]
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)
