"""What a run is measured with: metrics, extractors and reference, from the config's `evaluation` section."""

from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import nn

from ldm_train.cli import build
from ldm_train.data.datamodule import ShardDataModule
from ldm_train.data.shards import data_hash
from ldm_train.metrics.measures import parse_metrics
from ldm_train.training.evaluation import check_paired
from ldm_train.training.measurement import Reference, collect_reference, reference_from

CACHE = ".references"  # below runs_dir: reference statistics, shared by all runs


class Instruments:
    """metrics (parsed), extractors by name, paired metrics and their networks, in eval mode on `device`.

    Made before training starts, so that a missing file of weights is named then and not after hours. Raises ValueError
    for a metric that is none and FileNotFoundError for weights that are not to be had.
    """

    def __init__(self, section: DictConfig, device: torch.device):
        if isinstance(section.metrics, str) or isinstance(section.paired, str):
            raise ValueError("metrics and paired are lists: metrics=[fid_tiny,kid_tiny]")
        if unknown := [
            name for name, tree in section.extractors.items() if tree is not None and "_target_" not in tree
        ]:
            raise ValueError(
                f"evaluation.extractors.{unknown[0]} has no _target_: the class or function that makes images features"
            )
        self.metrics = parse_metrics(list(section.metrics), list(section.extractors))
        self.device, self.section = device, section
        needed = {m.extractor for m in self.metrics}
        self.extractors: dict[str, nn.Module] = {
            name: instantiate(section.extractors[name], _convert_="all").to(device) for name in sorted(needed)
        }
        self.paired = [p for p in section.paired if p != "perceptual" or section.perceptual is not None]
        check_paired(self.paired, {"perceptual": nn.Identity(), "lpips": nn.Identity()})
        networks = {"perceptual": section.perceptual, "lpips": section.lpips}
        self.networks: dict[str, nn.Module] = {
            name: instantiate(tree, _convert_="all").to(device)
            for name, tree in networks.items()
            if tree is not None and name in self.paired
        }

    def facts(self, data: ShardDataModule, split: str, limit: int | None) -> dict[str, Any]:
        """What a split's images follow from, as the training transform without its randomness makes them."""
        return {
            "data": data_hash(data.index, split),
            "split": split,
            "size": data.transform.size,
            "crop": "center",
            "channels": data.channels,
            "images": min(limit or data.count(split), data.count(split)),
        }

    def reference(self, data: ShardDataModule, runs_dir: str, progress: bool = True) -> Reference:
        """evaluation.reference: a .npz file, or a split of the data (its first evaluation.reference_images)."""
        source, limit = str(self.section.reference), self.section.reference_images
        if source.endswith(".npz"):
            return reference_from(source, self.metrics)
        if source not in data.index["splits"]:
            raise ValueError(
                f"evaluation.reference={source} is no .npz file and no split of {data.root}, which has "
                f"{', '.join(data.index['splits'])}"
            )
        return collect_reference(
            lambda: data.fixed_loader(source, limit, ("image",)), self.metrics, self.extractors,
            self.facts(data, source, limit), Path(runs_dir) / CACHE, self.device, progress,
        )  # fmt: skip


def sampling_facts(config: DictConfig) -> dict[str, Any]:
    """What is recorded beside every number of samples."""
    sampler = build.plain(config.sampler)
    own = {k: v for k, v in sampler.items() if not k.startswith("_")}
    return build.plain(config.sampling) | {"sampler": sampler["_target_"].rpartition(".")[2]} | own
