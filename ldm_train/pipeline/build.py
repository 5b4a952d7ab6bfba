"""From config sections to objects: the only place where a DictConfig becomes models, losses and data."""

import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf

from ldm_train.checkpoints.native import load_model, read_metadata
from ldm_train.checkpoints.parts import BUILDABLE, build, find_part, targets
from ldm_train.conditioning.text import read_tokenizer, train_tokenizer
from ldm_train.configuration import config_folder
from ldm_train.data.datamodule import Batching, ShardDataModule
from ldm_train.data.prepare.build import build as prepare
from ldm_train.data.shards import INDEX
from ldm_train.models.first_stage import FirstStage
from ldm_train.pipeline.ranks import launch
from ldm_train.training.diffusion_task import BINS
from ldm_train.training.fit import Cadence, Machine, Onlooker

FROM_DATA = "from_data"  # a value that only the data can give: class names, a tokenizer
DERIVING = ("ldm_train.data.masks", "ldm_train.data.degradations")  # what makes fields from images


def plain(section: DictConfig) -> dict[str, Any]:
    return OmegaConf.to_container(section, resolve=True)


def own_parts(config: DictConfig) -> list[str]:
    """What the folders of a run may name beside this package's parts: `trust=` and the parts of the user's own config."""
    sections = ("autoencoder.network", "diffusion.network", "diffusion.schedule", "diffusion.objective",
                "diffusion.conditioning", "sampler", "data.derived", "classifier.network")  # fmt: skip
    trees = [plain(found) for s in sections if (found := OmegaConf.select(config, s)) is not None]
    return [*config.trust, *dict.fromkeys(targets(trees))]


def option_defaults(config: DictConfig) -> dict[str, Any]:
    """What each option counts as where an older run lacks it: the base files' values, and for parts with a `_target_`
    their constructor's."""
    top = yaml.safe_load((config_folder() / "train.yaml").read_text())
    tree = {
        group: yaml.safe_load((config_folder() / group / "base.yaml").read_text())
        for group in ("autoencoder", "diffusion", "data", "classifier")
    }
    tree |= {section: top[section] for section in ("latents", "sampling", "evaluation")}
    for section in {"autoencoder", "diffusion", "classifier", "sampler"} & config.keys():
        tree[section] = _with_signatures(plain(config[section]), tree.get(section, {}))
    return tree


def _with_signatures(node: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    defaults = dict(known)
    if "_target_" in node:
        target = get_object(node["_target_"])
        chain = [c.__init__ for c in reversed(target.__mro__)] if isinstance(target, type) else [target]
        for function in chain:  # subclasses that pass **options on take their base's
            parameters = inspect.signature(function).parameters.values()
            defaults |= {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    for name, value in node.items():
        if isinstance(value, dict):
            inner = defaults.get(name)
            defaults[name] = _with_signatures(value, inner if isinstance(inner, dict) else {})
    return defaults


def machine_of(config: DictConfig, environment: Mapping[str, str]) -> Machine:
    """This process's place, from the config and torchrun's environment variables.

    Raises ValueError where a GPU is asked for and none is there.
    """
    world_size, rank, local_rank, local_world_size = (
        int(environment.get(name, default))
        for name, default in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
    )
    accelerator = config.accelerator
    if accelerator == "auto":
        accelerator = "gpu" if torch.cuda.is_available() else "cpu"
    if accelerator not in ("cpu", "gpu"):
        raise ValueError(f"accelerator is auto, cpu or gpu, not {accelerator!r}")
    if accelerator == "gpu" and torch.cuda.device_count() < min(world_size, local_rank + 1):
        raise ValueError(f"accelerator=gpu, but {torch.cuda.device_count()} GPUs are visible; use accelerator=cpu")
    precision = str(config.precision)
    if precision == "auto":
        precision = "32" if accelerator == "cpu" else "bf16-mixed"
    return Machine(accelerator, precision, world_size, rank, local_rank, local_world_size)


def join_devices(config: DictConfig, module: str, check: Callable[[Machine], None]) -> Machine:
    """This process's place among `config.devices`. Outside torchrun and with more than one it has none: it runs this same
    command once per device, and exits with what came of it. module: the command's, for that. check: raises what can be
    known to be wrong, and makes what all need, before any process is started.

    Raises ValueError for more devices than there are.
    """
    if config.devices > 1 and "WORLD_SIZE" not in os.environ:
        everywhere = {"WORLD_SIZE": str(config.devices), "LOCAL_WORLD_SIZE": str(config.devices)}
        machine = machine_of(config, everywhere)
        gpus = machine.accelerator == "gpu"
        there = torch.cuda.device_count() if gpus else os.cpu_count() or 1
        if config.devices > there:
            kind = "GPUs are visible" if gpus else "CPU cores are there"
            raise ValueError(f"devices={config.devices}, but {there} {kind}; use devices={there}")
        check(Onlooker(*astuple(machine)))
        sys.exit(launch(config.devices, module))
    machine = machine_of(config, os.environ)
    if machine.world_size > 1:
        if machine.accelerator == "gpu":
            torch.cuda.set_device(machine.device)
        if not dist.is_initialized():
            # Ranks wait for each other through whole evaluations, far beyond the default ten minutes.
            backend = "gloo" if machine.accelerator == "cpu" else "nccl"
            dist.init_process_group(backend, timeout=timedelta(days=1))
    return machine


def batching_of(section: DictConfig, machine: Machine) -> Batching:
    return Batching(section.batch_size, section.micro_batch_size, machine.world_size, machine.rank)


def loggers_of(config: DictConfig) -> list[str]:
    return [config.logger] if isinstance(config.logger, str) else list(config.logger)


def cadence_of(section: DictConfig, machine: Machine, config: DictConfig) -> Cadence:
    return Cadence(
        section.val_every,
        section.checkpoint_every,
        section.log_every,
        config.progress and machine.rank == 0,
        config.trace,
    )


def check_best_by(config: DictConfig) -> None:
    """Raises ValueError for a diffusion.best_by that will not be measured, and where evaluate_every measures nothing."""
    by, measured = config.diffusion.best_by, list(config.evaluation.metrics)
    if config.diffusion.evaluate_every and not measured:
        raise ValueError(
            "diffusion.evaluate_every measures evaluation.metrics, and there are none; leave one of them out"
        )
    if by in (None, "loss"):
        return
    if not config.diffusion.evaluate_every:
        raise ValueError(f"diffusion.best_by={by} is measured only with diffusion.evaluate_every=<steps>")
    if by not in measured:
        raise ValueError(f"diffusion.best_by={by} is not measured; choose loss or one of {', '.join(measured)}")


def health_facts(config: DictConfig, stage: str) -> dict[str, Any]:
    """What the health checks must know of a stage's configuration."""
    if stage == "autoencoder":
        return {"max_adaptive_weight": config.autoencoder.loss.get("max_adaptive_weight")}
    if stage != "diffusion":
        return {}
    section = config.diffusion
    settled = max(200, section.max_steps // 20)
    easier = instantiate(section.objective.parameterisation).easier_with_noise
    return {"easier_with_noise": easier, "bins": BINS, "settled": settled}


def stage_data(config: DictConfig, stage: str) -> DictConfig:
    """The data section of a stage: the autoencoder's own options (autoencoder.data) come before the common ones."""
    own = {k: v for k, v in config.autoencoder.data.items() if v is not None} if stage == "autoencoder" else {}
    if "root" in own:  # shares are those of its own roots, and they are not made on the spot
        own = {"weights": None, "balance_classes": False, "source": None} | own
    return OmegaConf.merge(config.data, own) if own else config.data


def ensure_data(data: DictConfig) -> None:
    """Prepares data that needs nothing from outside (data.source) where it is not there yet."""
    if data.source is not None and isinstance(data.root, str) and not (Path(data.root) / INDEX).is_file():
        prepare(instantiate(data.source), data.root, data.per_shard)


def data_module(
    config: DictConfig, stage: str, machine: Machine, fields: tuple[str, ...], trust: Sequence[str] = ()
) -> ShardDataModule:
    """The images for a stage ("autoencoder" or "diffusion")."""
    section, data = config[stage], stage_data(config, stage)
    size = data.image_size if isinstance(data.image_size, int) else tuple(data.image_size)
    return ShardDataModule(
        plain(data)["root"],
        batching_of(section, machine),
        section.max_steps,
        fields,
        size,
        data.crop,
        tuple(data.scale),
        data.flip,
        data.channels,
        data.reader,
        data.train_split,
        data.val_split,
        section.val_images,
        config.num_workers,
        data.max_bad_fraction,
        data.shuffle_buffer,
        config.seed,
        data.remedy,
        build(plain(data.derived), "data.derived", trust, (*BUILDABLE, *DERIVING)),
        plain(data)["weights"],
        data.balance_classes,
        label_counts(config, trust),
    )


def label_counts(config: DictConfig, trust: Sequence[str] = ()) -> dict[str, int | None]:
    """{batch field: how many labels the conditioner or classifier of it knows}, None where the data say so."""
    counts: dict[str, int | None] = {}
    if "classifier" in config and isinstance(config.classifier.network.classes, int):
        counts["class_label"] = config.classifier.network.classes
    for (name, tree), field in zip(config.diffusion.conditioning.conditioners.items(), condition_fields(config, trust)):
        for option in ("classes", "labels"):
            said = tree.get(option)
            if said is None or said == FROM_DATA:
                counts |= {} if said is None else {field: None}
            elif isinstance(said, int) or OmegaConf.is_list(said):
                counts[field] = said if isinstance(said, int) else len(said)
            else:
                raise ValueError(
                    f"diffusion.conditioning.conditioners.{name}.{option} is a number, a list of names, or {FROM_DATA}, not "
                    f"{said!r}"
                )
    return counts


def condition_fields(config: DictConfig, trust: Sequence[str] = ()) -> tuple[str, ...]:
    """The batch fields that the configured conditioners read."""
    conditioners = plain(config.diffusion.conditioning.conditioners)
    where = "diffusion.conditioning.conditioners"
    return tuple(find_part(tree["_target_"], f"{where}.{name}", trust).field for name, tree in conditioners.items())


def conditioner_tree(config: DictConfig, data: ShardDataModule, rehearsal: bool = False) -> dict[str, Any]:
    """The conditioners' config with what comes from the data filled in; it goes into the model folder as it is.

    rehearsal: the tokenizer is of no captions, so that nothing is read through.
    """
    tree = plain(config.diffusion.conditioning.conditioners)
    for name, conditioner in tree.items():
        for option in ("classes", "labels"):
            if conditioner.get(option) != FROM_DATA:
                continue
            if not data.index.get("classes"):
                raise ValueError(
                    f"{data.root}/index.json names no classes for diffusion.conditioning.conditioners.{name}; set its "
                    f"{option}=<number>, or choose diffusion/conditioning=none"
                )
            conditioner[option] = data.index["classes"]
        size = conditioner.get("vocab_size", 0)
        if type(size) is not int or not isinstance(conditioner.get("tokenizer", ""), str):
            raise ValueError(
                f"diffusion.conditioning.conditioners.{name}: tokenizer is {FROM_DATA} or a file, vocab_size a whole number"
            )
        if conditioner.get("tokenizer") == FROM_DATA:
            conditioner.pop("vocab_size")
            captions = [] if rehearsal else data.shards(data.train_split).captions()
            tokenizer = train_tokenizer(captions, size)
            conditioner["tokenizer"] = tokenizer.to_str()
        elif "tokenizer" in conditioner:
            conditioner.pop("vocab_size", None)  # the file's own
            conditioner["tokenizer"] = read_tokenizer(conditioner["tokenizer"]).to_str()
    return tree


def model_tree(
    config: DictConfig, first_stage: dict[str, Any], conditioners: dict[str, Any], data: DictConfig
) -> dict[str, Any]:
    """The whole LatentDiffusion as an instantiable tree."""
    size = [data.image_size] * 2 if isinstance(data.image_size, int) else list(data.image_size)
    factor = 2 ** (len(first_stage["autoencoder"].get("channel_mult", [1])) - 1)
    return {
        "_target_": "ldm_train.latent_diffusion.LatentDiffusion",
        "network": plain(config.diffusion.network),
        "first_stage": first_stage,
        "schedule": plain(config.diffusion.schedule),
        "conditioners": conditioners,
        "parameterisation": plain(config.diffusion.objective.parameterisation),
        "latent_size": [s // factor for s in size],
    }


def latent_size(config: DictConfig, first_stage: FirstStage) -> list[int]:
    """(h, w) of the training images' latents."""
    size = config.data.image_size
    return [s // first_stage.downsample_factor for s in ([size, size] if isinstance(size, int) else size)]


def first_stage_tree(autoencoder_config: dict[str, Any]) -> dict[str, Any]:
    return {"_target_": "ldm_train.models.first_stage.FirstStage", "autoencoder": autoencoder_config}


def pretrained_folder(value: str, runs_dir: str) -> Path:
    """autoencoder.pretrained -> the model folder: a run's name or folder, or a model folder itself.

    Raises FileNotFoundError naming what was looked for.
    """
    candidates = [Path(value), Path(value) / "autoencoder" / "model", Path(runs_dir) / value / "autoencoder" / "model"]
    for folder in candidates:
        if (folder / "model.safetensors").is_file():
            read_metadata(folder)
            return folder
    raise FileNotFoundError(
        f"autoencoder.pretrained={value} is no run with a finished autoencoder and no model folder; looked in "
        + ", ".join(map(str, candidates))
    )


def load_first_stage(folder: Path, trust: Sequence[str] = ()) -> FirstStage:
    return FirstStage(load_model(folder, trust))
