"""The images of a run: the data of each stage, and the fields that its conditioners need."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from ldm_train.checkpoints.parts import BUILDABLE, build, find_part
from ldm_train.configuration import plain, usual_options
from ldm_train.data.batch import Field
from ldm_train.data.datamodule import Batching, ShardDataModule
from ldm_train.data.prepare.build import build as prepare
from ldm_train.data.shards import INDEX, data_hash, read_index
from ldm_train.training.fit import Machine

FROM_DATA = "from_data"  # stands for a value that comes from the data: class names, a tokenizer
DERIVING = ("ldm_train.data.masks", "ldm_train.data.degradations")  # modules that make fields from images
CONDITIONERS = "diffusion.conditioning.conditioners"


def batching_of(section: DictConfig, machine: Machine) -> Batching:
    return Batching(section.batch_size, section.micro_batch_size, machine.world_size, machine.rank)


def sides(size: Any) -> tuple[int, int]:
    """data.image_size, a side or [height, width], as (height, width)."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def stage_data(config: DictConfig, stage: str) -> DictConfig:
    """The data section of a stage: the autoencoder's own options (autoencoder.data) come before the common ones."""
    own = {k: v for k, v in config.autoencoder.data.items() if v is not None} if stage == "autoencoder" else {}
    if "root" in own:  # data.weights and data.source belong to the common roots
        own = {"weights": None, "balance_classes": False, "source": None} | own
    return OmegaConf.merge(config.data, own) if own else config.data


def ensure_data(data: DictConfig) -> None:
    """Prepares data from a source that needs no files (data.source), if there are none yet."""
    if data.source is not None and isinstance(data.root, str) and not (Path(data.root) / INDEX).is_file():
        prepare(instantiate(data.source), data.root, data.per_shard)


def data_module(
    config: DictConfig, stage: str, machine: Machine, fields: tuple[str, ...], trust: Sequence[str] = ()
) -> ShardDataModule:
    """The images for a stage that has a section in the config."""
    section, data = config[stage], stage_data(config, stage)
    size = data.image_size if isinstance(data.image_size, int) else tuple(data.image_size)
    return instantiate(data.module)(
        plain(data)["root"],
        batching_of(section, machine),
        section.max_steps,
        fields=fields,
        image_size=size,
        crop=data.crop,
        scale=tuple(data.scale),
        flip=data.flip,
        channels=data.channels,
        reader=data.reader,
        train_split=data.train_split,
        val_split=data.val_split,
        val_images=section.val_images,
        num_workers=config.num_workers,
        max_bad_fraction=data.max_bad_fraction,
        shuffle_buffer=data.shuffle_buffer,
        seed=config.seed,
        remedy=data.remedy,
        derive=build(plain(data.derived), "data.derived", trust, (*BUILDABLE, *DERIVING)),
        weights=plain(data)["weights"],
        balance_classes=data.balance_classes,
        labels=label_counts(config, trust),
        own_fields=own_fields(config, trust),
    )


def label_counts(config: DictConfig, trust: Sequence[str] = ()) -> dict[str, int | None]:
    """{batch field: how many labels the conditioner or classifier of it knows}, None where the data set it."""
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
                    f"{CONDITIONERS}.{name}.{option} is a number, a list of names, or {FROM_DATA}, not {said!r}"
                )
    return counts


def own_fields(config: DictConfig, trust: Sequence[str] = ()) -> dict[str, Field]:
    """The fields that the configured conditioners declare beside the package's."""
    trees = plain(config.diffusion.conditioning.conditioners)
    declared = [find_part(tree["_target_"], f"{CONDITIONERS}.{name}", trust).declares for name, tree in trees.items()]
    return {field.name: field for field in declared if field is not None}


def condition_fields(config: DictConfig, trust: Sequence[str] = ()) -> tuple[str, ...]:
    """The batch fields that the configured conditioners read."""
    conditioners = plain(config.diffusion.conditioning.conditioners)
    return tuple(
        find_part(tree["_target_"], f"{CONDITIONERS}.{name}", trust).field for name, tree in conditioners.items()
    )


def data_key(config: DictConfig, stage: str) -> dict[str, Any]:
    """Everything that a stage's images depend on."""
    data = stage_data(config, stage)
    index = read_index(plain(data)["root"], data.remedy)
    used = {k: data[k] for k in ("image_size", "crop", "scale", "flip", "channels", "reader", "shuffle_buffer")}
    if data.reader == "streaming":  # its order depends on the number of its readers
        used["num_workers"] = config.num_workers
    if plain(data)["module"] != usual_options()["data"]["module"]:
        used["module"] = plain(data)["module"]
    content = data_hash(index, data.train_split, data.val_split)
    return OmegaConf.to_container(OmegaConf.create(used)) | {"content": content}


def mixture_key(config: DictConfig, stage: str) -> dict[str, Any]:
    """The options by which training draws from several data sets."""
    data = plain(stage_data(config, stage))
    return {k: data[k] for k in ("weights", "balance_classes")}
