"""Metrics, extractors and reference of a run, built from the config's `evaluation` section."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ldm_train.configuration import config_folder, plain
from ldm_train.data.datamodule import ShardDataModule
from ldm_train.data.shards import data_hash
from ldm_train.distributed import gathered, rank
from ldm_train.evaluation.measurement import Reference, collect_reference, reference_from
from ldm_train.images import groups_in_words, has_colours
from ldm_train.metrics.features import Extractor, weights_hash
from ldm_train.metrics.measures import Collected, read_reference
from ldm_train.metrics.metric import REFERENCE, Metric
from ldm_train.metrics.paired import MS_SSIM_SIDE, ms_ssim, psnr, ssim

CACHE = ".references"  # below runs_dir: reference statistics, shared by all runs

PAIRED = {"psnr": psnr, "ssim": ssim, "ms_ssim": ms_ssim}
# Ends of the names of the stages' own columns in metrics.csv whose higher values are better.
HIGHER_IS_BETTER = (*PAIRED, "active_channels", "accuracy", "perplexity", "usage")


def _kinds() -> dict[str, Any]:
    """{kind of metric: its config in conf/metric}."""
    return {f.stem: OmegaConf.to_container(OmegaConf.load(f)) for f in sorted(config_folder().glob("metric/*.yaml"))}


def is_higher_better(column: str) -> bool:
    """Returns True if higher values of a column of metrics.csv (val/psnr, val/recall_tiny) are better; those of losses
    and distances are not, nor those of unknown names."""
    name, kinds = column.rpartition("/")[2], _kinds()
    kind = max((kind for kind in kinds if f"{name}_".startswith(f"{kind}_")), key=len, default=None)
    if kind is None:
        return name.endswith(HIGHER_IS_BETTER)
    return bool(get_class(kinds[kind]["_target_"]).higher_is_better)


def parse_metrics(
    names: Sequence[str], extractors: Sequence[str], own: Mapping[str, Any] | None = None
) -> list[Metric]:
    """Builds metrics from names. A name is `<kind>_<extractor>` (fid_tiny, kid_mine), or a kind alone, which uses the
    network it is published with (fid: Inception). own: `evaluation.kinds`, the user's own kinds. Raises ValueError if a
    kind is not a `Metric` class, and for an unknown name, listing the known ones."""
    kinds = _kinds() | dict(own or {})
    makers = {kind: instantiate(tree, _partial_=True, _convert_="all") for kind, tree in kinds.items()}
    for kind, maker in makers.items():
        if not (isinstance(maker.func, type) and issubclass(maker.func, Metric)):
            raise ValueError(
                f"evaluation.kinds.{kind}: {kinds[kind]['_target_']} is not a class of a metric (metrics/metric.py)"
            )
    published = {kind: maker.func.published_with for kind, maker in makers.items() if maker.func.published_with}
    known = {f"{kind}_{extractor}": (kind, extractor) for kind in sorted(kinds, key=len) for extractor in extractors}
    known |= {kind: (kind, extractor) for kind, extractor in published.items()}
    metrics = []
    for name in names:
        kind, extractor = known.get(name, (None, None))
        if extractor not in extractors:
            tiny = [f"{k}_tiny" for k in ("fid", "kid", "precision", "recall") if "tiny" in extractors]
            raise ValueError(
                f"unknown metric {name!r}; choose from {', '.join([*published, *tiny])}, or <kind>_<extractor> with a kind of "
                f"{', '.join(kinds)} and an extractor of {', '.join(extractors)} (more: evaluation.extractors.<name>)"
            )
        metrics.append(makers[kind](name, kind, extractor))
    return metrics


def check_reference(source: str, splits: Sequence[str], root: str) -> None:
    """Raises FileNotFoundError or ValueError if evaluation.reference is neither a file of statistics nor a split."""
    if source.endswith(".npz"):
        if not Path(source).is_file():
            raise FileNotFoundError(f"evaluation.reference={source}: there is no such file")
    elif source not in splits:
        raise ValueError(
            f"evaluation.reference={source} is neither an .npz file nor a split of {root}, which has {', '.join(splits)}"
        )


class Evaluator:
    """The metrics, extractors (by name), paired metrics and their networks that a config asks for, on `device`.

    Built before training starts, so that a missing weights file is reported then and not after hours. Raises ValueError
    for an unknown metric and FileNotFoundError if weights cannot be obtained.
    """

    def __init__(self, section: DictConfig, device: torch.device):
        if isinstance(section.metrics, str) or isinstance(section.paired, str):
            raise ValueError("metrics and paired are lists: metrics=[fid_tiny,kid_tiny]")
        self.metrics = parse_metrics(list(section.metrics), list(section.extractors), section.get("kinds"))
        self.device, self.section = device, section

        def built(trees: Mapping[str, DictConfig]) -> dict[str, nn.Module]:
            return {name: instantiate(tree, _convert_="all").to(device).eval() for name, tree in trees.items()}

        self.extractors = built({n: section.extractors[n] for n in sorted({m.extractor for m in self.metrics})})
        self.paired = [p for p in section.paired if p != "perceptual" or section.perceptual is not None]
        known = [*PAIRED, "perceptual", "lpips"]
        if unknown := [p for p in self.paired if p not in known]:
            raise ValueError(f"unknown paired metrics: {', '.join(unknown)}; choose from {', '.join(known)}")
        networks = {"perceptual": section.perceptual, "lpips": section.lpips}
        self.networks = built({n: tree for n, tree in networks.items() if tree is not None and n in self.paired})

    @classmethod
    def on_all_ranks(cls, section: DictConfig, device: torch.device) -> "Evaluator":
        """Builds it on rank 0 first, which downloads missing weights, then on the other ranks."""
        if rank() > 0:
            gathered(None)
        made = cls(section, device)
        if rank() == 0:
            gathered(None)
        return made

    @property
    def hashes(self) -> dict[str, str]:
        """By extractor: a hash of its weights and, if it is not of this package, its options."""
        hashes = {name: weights_hash(e)[:12] for name, e in self.extractors.items()}
        own = {name: json.dumps([hashes[name], options], sort_keys=True) for name, options in self.own_options.items()}
        return hashes | {name: hashlib.sha256(text.encode()).hexdigest()[:12] for name, text in own.items()}

    @property
    def own_options(self) -> dict[str, Any]:
        """The options of extractors that are not of this package, whose features may depend on more than weights."""
        own = (name for name, extractor in self.extractors.items() if not isinstance(extractor, Extractor))
        return {name: plain(self.section.extractors[name]) for name in own}

    def seen(self, channels: int) -> dict[str, str]:
        """Describes in words, for each extractor of this package, how it sees pictures with this number of channels;
        empty for grey and RGB."""
        ours = [name for name, extractor in self.extractors.items() if isinstance(extractor, Extractor)]
        return {} if has_colours(channels) else dict.fromkeys(ours, groups_in_words(channels))

    @torch.no_grad()
    def _tried(self, name: str, shape: tuple[int, ...]) -> int:
        """Returns the number of features that an extractor gives for a picture (C, H, W). Raises ValueError if it
        fails."""
        try:
            features = self.extractors[name](torch.zeros(2, *shape, device=self.device))
        except Exception as error:  # it may raise errors of any type
            raise ValueError(
                f"evaluation.extractors.{name} does not take pictures of {shape[0]} channels, {shape[1]}x{shape[2]}: {error}"
            ) from error
        if features.ndim != 2 or len(features) != 2:
            raise ValueError(
                f"evaluation.extractors.{name} makes {tuple(features.shape)} of two pictures, not features (2, D)"
            )
        return features.shape[1]

    def check(self, fields: Sequence[str], counts: Sequence[int], size: Any, channels: int) -> None:
        """Raises ValueError, before anything is drawn, if a metric cannot be measured for a model with these condition
        fields, with these numbers of samples, or on images of this size and number of channels."""
        source, known = str(self.section.reference), None
        if source.endswith(".npz") and Path(source).is_file():
            known = read_reference(source)
        moments_only = known is not None and not len(known.kept()[0])
        for metric in self.metrics:
            metric.check(self.extractors[metric.extractor], fields)
            if min(counts) < metric.least:
                raise ValueError(f"{metric.name} needs at least {metric.least} samples, not {min(counts)}")
            if moments_only and metric.needs_features and REFERENCE in metric.compared_with:
                raise ValueError(f"{metric.name} needs features, and {source} holds mu and sigma only")
        sides = [size, size] if isinstance(size, int) else list(size)
        for name, extractor in self.extractors.items():
            if not isinstance(extractor, Extractor) or known is not None:
                features = self._tried(name, (channels, *sides))
                compared = [m.name for m in self.metrics if m.extractor == name and REFERENCE in m.compared_with]
                if known is not None and compared and features != known.dim:
                    raise ValueError(
                        f"{compared[0]}: {source} has {known.dim} features per image, the extractor {features}; it is of another one"
                    )
        if "ms_ssim" in self.paired and min(sides) < MS_SSIM_SIDE:
            raise ValueError(
                f"ms_ssim needs sides of at least {MS_SSIM_SIDE} pixels, not {min(sides)}; leave it out of paired"
            )

    def check_reference_count(self, split: str, count: int) -> None:
        """Raises ValueError if a split has fewer images (`count`) than a metric needs for comparison."""
        for metric in self.metrics:
            least = min(metric.least, 4)  # an extrapolation asks more of the samples only
            if REFERENCE in metric.compared_with and count < least:
                raise ValueError(
                    f"{metric.name} needs at least {least} images to compare with, and evaluation.reference={split} has {count}; "
                    "set it to another split or a .npz, or prepare more"
                )

    def images_identity(self, data: ShardDataModule, split: str, limit: int | None) -> dict[str, Any]:
        """Returns what identifies the images of a split, transformed as in training but without randomness."""
        return {
            "data": data_hash(data.index, split),
            "split": split,
            "size": data.transform.size,
            "crop": "center",
            "channels": data.channels,
            "images": min(limit or data.count(split), data.count(split)),
        } | ({"chosen": "shuffled"} if limit and limit < data.count(split) else {})

    def reference(self, data: ShardDataModule, runs_dir: str, progress: bool = True) -> Reference:
        """Returns the reference that evaluation.reference names: a .npz file, or a split of the data
        (evaluation.reference_images of it). It also has, in full, the other splits that metrics compare with."""

        def collected(name: str, split: str, limit: int | None) -> Reference:
            wanted = Collected(self.metrics, self.extractors, compared=name)
            identity, cache = self.images_identity(data, split, limit), Path(runs_dir) / CACHE
            loader = partial(data.fixed_loader, split, limit, ("image",))
            return collect_reference(name, wanted, loader, identity, cache, self.device, progress, self.own_options)

        def image_of(name: str, index: int) -> torch.Tensor:
            return data.samples(getattr(data, name), ("image",), random=False, bucketed=False)[(0, index)]["image"]

        source = str(self.section.reference)
        if source.endswith(".npz"):
            reference = reference_from(source, self.metrics)
        else:
            check_reference(source, data.index["splits"], data.root)
            reference = collected(REFERENCE, source, self.section.reference_images)
        sets, hashes = dict(reference.sets), dict(reference.hashes)
        for name in sorted({name for m in self.metrics for name in m.compared_with} - {REFERENCE}):
            other = collected(name, getattr(data, name), None)
            sets |= other.sets
            hashes |= other.hashes
        return Reference(sets, hashes, self.seen(data.channels), image_of)


def sampling_options(config: DictConfig) -> dict[str, Any]:
    """Returns the sampling section, the sampler and its own options, which are recorded beside every metric of
    samples."""
    sampler = plain(config.sampler)
    own = {k: v for k, v in sampler.items() if not k.startswith("_")}
    said = {name: value for name, value in plain(config.sampling).items() if value is not None}
    return said | {"sampler": sampler["_target_"].rpartition(".")[2]} | own
