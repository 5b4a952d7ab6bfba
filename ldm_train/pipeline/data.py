"""The images of a run: the data of each stage, and the fields that the conditioners need."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from ldm_train.checkpoints.parts import BUILDABLE, build, find_part
from ldm_train.configuration import default_options, plain
from ldm_train.data.datamodule import ShardDataModule
from ldm_train.data.order import Batching
from ldm_train.data.prepare.build import build as prepare
from ldm_train.data.prepare.build import check_made_from
from ldm_train.data.prepare.target import Folder
from ldm_train.data.remote import is_address, remote_bytes
from ldm_train.data.shards import FROM_PICTURES, INDEX, DataError, data_hash, read_index
from ldm_train.training.callbacks.clock import UNENDING
from ldm_train.training.fit import Machine

FROM_DATA = "from_data"  # stands for a value that comes from the data: class names, a tokenizer
DERIVING = ("ldm_train.data.masks", "ldm_train.data.degradations")  # modules that make fields from images
CONDITIONERS = "diffusion.conditioning.conditioners"
# Options of `data`: those that determine the images of a stage and their order, and those that mix several data sets.
IMAGES = ("image_size", "crop", "scale", "flip", "channels", "reader", "shuffle_buffer")
MIXTURE = ("weights", "balance_classes")


def batching_of(section: DictConfig, machine: Machine) -> Batching:
    return Batching(section.batch_size, section.micro_batch_size, machine.world_size, machine.rank)


def evaluation_batching(config: DictConfig, machine: Machine) -> Batching:
    """Every rank takes evaluation.batch_size images at a time."""
    world_size = machine.world_size
    return Batching(config.evaluation.batch_size * world_size, None, world_size, machine.rank)


def sides(size: Any) -> tuple[int, int]:
    """data.image_size, which is one side or [height, width], as (height, width)."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that are not null, also in nested sections; sections that this leaves empty are dropped."""
    said = {k: _given(v) if isinstance(v, dict) else v for k, v in options.items()}
    return {k: v for k, v in said.items() if v is not None and (v != {} or options[k] == {})}


def stage_data(config: DictConfig, stage: str) -> DictConfig:
    """The data section of a stage: the autoencoder's own options (autoencoder.data) override the common ones."""
    own = _given(plain(config.autoencoder.data)) if stage == "autoencoder" else {}
    if "root" in own:  # data.weights and data.source belong to the common roots
        own = {"weights": None, "balance_classes": False, "source": None} | own
    return OmegaConf.merge(config.data, own) if own else config.data


def bucketing(data: Mapping[str, Any]) -> dict[str, Any] | None:
    """The options data.buckets; None without buckets: max_ratio 1, or no such section, as in older configs."""
    buckets = data.get("buckets")
    return dict(buckets) if buckets and buckets["max_ratio"] > 1 else None


def check_bucket_step(data: Mapping[str, Any], multiple: int, name: str = "data") -> None:
    """Raises ValueError if the sizes of the buckets are not divisible by `multiple`."""
    if (buckets := bucketing(data)) and buckets["step"] % multiple:
        raise ValueError(
            f"{name}.buckets.step={buckets['step']} gives sizes that these networks do not take: set it to a multiple of {multiple}"
        )


def ensure_data(data: DictConfig) -> None:
    """Prepares the data from data.source, which needs no files, if they do not exist yet. Raises DataError if the
    folder holds data of other options."""
    if data.source is None or not isinstance(data.root, str) or is_address(data.root):
        return
    if not (Path(data.root) / INDEX).is_file():
        if (other := Folder(data.root).foreign()) is not None:
            raise DataError(
                f"data.root={data.root} holds other files (first: {other}), not shards; {FROM_PICTURES.format(root=data.root)}"
            )
        print(f"data.root={data.root} holds no shards yet; they are drawn by data.source", flush=True)
        prepare(instantiate(data.source), data.root, data.per_shard)
        return
    try:
        source = instantiate(data.source)
    except Exception:  # its options need not fit data of the user's own
        return
    check_made_from(source, Path(data.root))


def loaded_steps(section: DictConfig) -> int:
    """The number of optimiser steps that a stage's data loader has batches for."""
    return UNENDING if section.get("max_time") else section.max_steps


def data_module(
    config: DictConfig, stage: str, machine: Machine, fields: tuple[str, ...], trust: Sequence[str]
) -> ShardDataModule:
    """The data module with the images of a stage, which must have a section in the config."""
    section, data = config[stage], plain(stage_data(config, stage))
    declared = [conditioner.declares for conditioner in conditioner_classes(config, trust).values()]
    return instantiate(data["module"])(
        data["root"],
        batching_of(section, machine),
        loaded_steps(section),
        fields=fields,
        val_images=section.val_images,
        num_workers=config.num_workers,
        seed=config.seed,
        derive=build(data["derived"], "data.derived", trust, (*BUILDABLE, *DERIVING)),
        labels=label_counts(config, trust),
        own_fields={field.name: field for field in declared if field is not None},
        **({"shard_cache": data.get("shard_cache")} if _far(data) else {}),
        **({"buckets": buckets} if (buckets := bucketing(data)) else {}),
        **{k: data[k] for k in (*IMAGES, *MIXTURE, "train_split", "val_split", "max_bad_fraction", "remedy")},
    )


def _far(data: dict[str, Any]) -> bool:
    """Returns True if any shard is remote (http, s3, ...)."""
    splits = read_index(data["root"], data["remedy"])["splits"].values()
    return any(remote_bytes(part["shards"]) for part in splits)


def label_counts(config: DictConfig, trust: Sequence[str]) -> dict[str, int | None]:
    """{batch field: number of labels that its conditioner or classifier knows}; None if that comes from the data.
    Raises ValueError for other values."""
    counts: dict[str, int | None] = {}
    if "classifier" in config and isinstance(config.classifier.network.classes, int):
        counts["class_label"] = config.classifier.network.classes
    trees = plain(config.diffusion.conditioning.conditioners)
    for name, conditioner in conditioner_classes(config, trust).items():
        for option in ("classes", "labels"):
            said = trees[name].get(option)
            if said == FROM_DATA:
                counts[conditioner.field] = None
            elif isinstance(said, int | list):
                counts[conditioner.field] = len(said) if isinstance(said, list) else said
            elif said is not None:
                raise ValueError(
                    f"{CONDITIONERS}.{name}.{option} is a number, a list of names, or {FROM_DATA}, not {said!r}"
                )
    return counts


def conditioner_classes(config: DictConfig, trust: Sequence[str]) -> dict[str, Any]:
    """The classes of the configured conditioners by name. Each has the batch `field` that it reads, and may define that
    field in `declares`."""
    trees = plain(config.diffusion.conditioning.conditioners)
    return {name: find_part(tree["_target_"], f"{CONDITIONERS}.{name}", trust) for name, tree in trees.items()}


def data_key(config: DictConfig, stage: str) -> dict[str, Any]:
    """Everything that a stage's images depend on."""
    data = plain(stage_data(config, stage))
    used = {k: data[k] for k in IMAGES}
    if data["reader"] == "streaming":  # its order depends on the number of workers
        used["num_workers"] = config.num_workers
    if data["module"] != default_options()["data"]["module"]:
        used["module"] = data["module"]
    if buckets := bucketing(data):
        used["buckets"] = buckets
    index = read_index(data["root"], data["remedy"])
    return used | {"content": data_hash(index, data["train_split"], data["val_split"])}


def mixture_key(config: DictConfig, stage: str) -> dict[str, Any]:
    """The options by which training mixes several data sets or balances classes."""
    data = plain(stage_data(config, stage))
    return {k: data[k] for k in MIXTURE}
