"""Measures a model against a reference, in the same way for the training loop, the evaluation stage and
ldm-evaluate."""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ldm_train import images as pictures
from ldm_train.devices import to_device
from ldm_train.distributed import gathered, rank, world_size
from ldm_train.errors import first_line
from ldm_train.latent_diffusion import LatentDiffusion
from ldm_train.metrics.distribution import Estimate
from ldm_train.metrics.features import weights_hash
from ldm_train.metrics.measures import Collected, compared, measure, read_reference, write_reference
from ldm_train.metrics.metric import REFERENCE, Metric
from ldm_train.metrics.sets import KEPT, UNKNOWN, FeatureSet
from ldm_train.rng import derive_seed
from ldm_train.storage import read_tensors, write_atomically

SHOWN = 36  # samples kept as pictures
SAVE_EVERY = 60.0  # seconds between saves of the state from which an interrupted measurement continues

# (model, fields, seeds) -> images
Draw = Callable[..., torch.Tensor]


def seeds_of(keys: Sequence[str], seed: int = 0) -> list[int]:
    """Returns the seeds of measured samples, derived from the keys of their conditions."""
    return [derive_seed("evaluation", *([seed] if seed else []), key) for key in keys]


def indices_of(position: int, count: int) -> torch.Tensor:
    """Returns the indices in the whole set of `count` samples from `position` of this rank's share; samples are dealt
    to the ranks in turn."""
    return torch.arange(position, position + count) * world_size() + rank()


@dataclass(frozen=True)
class Reference:
    """The image sets that samples are compared with. sets: features by the set's name (see `Metric.compared_with`) and
    extractor. hashes: the hash of each set, by extractor for the reference, by <set>/<extractor> for splits. seen: by
    extractor, how extractors of three channels saw pictures with other numbers of channels, in words. image_of: (a
    split's name in `compared_with`, an index) -> its picture.
    """

    sets: dict[str, dict[str, FeatureSet]]
    hashes: dict[str, str]
    seen: dict[str, str] = field(default_factory=dict)
    image_of: Callable[[str, int], torch.Tensor] | None = None

    def details(self, metric: Metric) -> dict[str, Any]:
        """Returns what is recorded beside a metric: its extractor, the reference's hash and number of images."""
        details: dict[str, Any] = {"extractor": metric.extractor}
        if metric.extractor in self.seen:
            details["channels"] = self.seen[metric.extractor]
        if metric.compared_with:
            name = metric.compared_with[0]
            details["reference"] = self.hashes[_key(name, metric.extractor)]
            features = self.sets[name][metric.extractor]
            n = len(features.kept()[0]) if metric.needs_features else features.groups[0].count
            details["n_reference"] = n if n != UNKNOWN else None
        return details

    def table(self, metrics: Sequence[Metric], estimates: Mapping[str, Estimate]) -> dict[str, dict[str, Any]]:
        """Returns the estimates as they are recorded, each with its `details`."""
        return {m.name: estimates[m.name].as_dict() | self.details(m) for m in metrics}


def _key(name: str, extractor: str) -> str:
    return extractor if name == REFERENCE else f"{name}/{extractor}"


def reference_from(path: str | Path, metrics: Sequence[Metric]) -> Reference:
    """Reads a file of statistics as the reference of the one extractor that the metrics use. Raises ValueError if they
    use several."""
    names = {m.extractor for m in metrics if REFERENCE in m.compared_with}
    if len(names) > 1:
        raise ValueError(f"{path} is of one extractor, but the metrics use {', '.join(sorted(names))}; ask for one's")
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]
    return Reference({REFERENCE: {n: read_reference(path) for n in names}}, dict.fromkeys(names, digest))


@torch.no_grad()
def collect_reference(
    name: str,
    wanted: Collected,
    loader: Callable[[], Iterable[dict[str, Any]]],
    identity: Mapping[str, Any],
    cache: Path,
    device: torch.device,
    progress: bool = True,
    options: Mapping[str, Any] | None = None,
) -> Reference:
    """Collects features of real images, transformed as in training, and keeps them in `cache` under a hash of
    everything they depend on.

    name: of the set (see `Metric.compared_with`). wanted: what to collect, still empty. loader: () -> batches of this
    rank's share, called only if the cache lacks them. identity: all that the images depend on (content hash of the
    data, split, transform, number); the extractors' weights are added, and `options`, by extractor.
    """
    hashes = {}
    for extractor, network in wanted.extractors.items():
        depends_on = [dict(identity), extractor, weights_hash(network)]
        if wanted.keep[extractor] != KEPT:
            depends_on.append(wanted.keep[extractor])
        if extractor in (options or {}):
            depends_on.append(options[extractor])
        text = json.dumps(depends_on, sort_keys=True, default=str)
        hashes[extractor] = hashlib.sha256(text.encode()).hexdigest()[:12]
    paths = {extractor: cache / f"{extractor}-{digest}.npz" for extractor, digest in hashes.items()}
    there = gathered([path.is_file() for path in paths.values()])[0]  # rank 0 decides for all
    if not all(there):
        position = 0
        for batch in tqdm(loader(), desc=name.removesuffix("_split"), unit="batch", disable=not progress):
            images = to_device(batch["image"], device)
            wanted.add(images, indices_of(position, len(images)))
            position += len(images)
        wanted.gathered()
        if rank() == 0:
            cache.mkdir(parents=True, exist_ok=True)
            for extractor, path in paths.items():
                write_atomically(path, lambda file, e=extractor: write_reference(wanted.sets[e], file))
        gathered(None)  # no rank reads before the files are written
    sets = {extractor: read_reference(path) for extractor, path in paths.items()}
    return Reference({name: sets}, {_key(name, extractor): digest for extractor, digest in hashes.items()})


def _saved(partial: Path, empty: Mapping[str, Any], made: Collected) -> dict[str, Any] | None:
    """Restores `made` from the file of an interrupted measurement and returns the saved state. Returns None, so that
    everything is measured again, if the batch size differs or the file is damaged."""
    try:
        saved = read_tensors(partial)
        state = saved["state"]
        if state.keys() != empty.keys() or any(not isinstance(state[k], type(v)) for k, v in empty.items()):
            raise ValueError("it holds something else")
        if state["batch_size"] == empty["batch_size"]:
            made.restore(saved["made"])
            return state
    except Exception as error:  # on damaged data unpicklers raise errors of any type
        print(f"{partial} cannot be continued from ({first_line(error)}); measured again from its start", flush=True)
    return None


@dataclass
class Measured:
    """The result of `measure_samples`. estimates: by metric. images: the first samples, beside those conditions that
    can be shown as pictures; captions: their descriptions. seconds: of sampling, on the slowest rank. count: samples on
    all ranks. pairs: by metric, N samples and then the N pictures of the data that `Metric.pairs` matches to them (2 N,
    C, H, W).
    """

    estimates: dict[str, Estimate]
    images: torch.Tensor
    captions: list[str]
    seconds: float
    count: int
    pairs: dict[str, torch.Tensor] = field(default_factory=dict)


def _parts(
    model: LatentDiffusion, batches: Iterable[dict[str, Any]], size: int
) -> Iterator[tuple[list[str], torch.Tensor, dict[str, Any]]]:
    """Yields (keys, indices in the whole set, conditions) of this rank's share, at most `size` samples at a time.
    Raises ValueError if the batches lack a field that the model reads."""
    position = 0
    for batch in batches:
        if missing := sorted(set(model.fields) - batch.keys()):
            raise ValueError(
                f"the model reads {', '.join(missing)}, which the configured diffusion/conditioning does not: use the "
                "options that it was trained with"
            )
        for k in range(0, len(batch["key"]), size):
            keys = batch["key"][k : k + size]
            yield keys, indices_of(position, len(keys)), {f: batch[f][k : k + size] for f in model.fields}
            position += len(keys)


@torch.no_grad()
def measure_samples(
    model: LatentDiffusion,
    batches: Iterable[dict[str, Any]],
    draw: Draw,
    reference: Reference,
    metrics: Sequence[Metric],
    extractors: Mapping[str, nn.Module],
    batch_size: int,
    seed: int = 0,
    progress: bool = True,
    total: int | None = None,
    partial: Path | None = None,
    pairs: bool = False,
) -> Measured:
    """Draws and measures one sample under the conditions of each entry of `batches` (this rank's share). Its seed is a
    function of its key, so samples and numbers are the same for any batch size and number of ranks.

    extractors: name -> module (images -> features). total: of this rank's share, for the progress bar. partial: a file,
    unique to the job, from which an interrupted measurement continues; it is removed at the end.
    """
    made = Collected(metrics, extractors)
    state: dict[str, Any] = {"done": 0, "batch_size": batch_size, "images": [], "captions": [], "seconds": 0.0}
    if partial is not None:
        partial = partial.with_name(f"{partial.name}.{rank()}-{world_size()}")
        if partial.is_file():
            state = _saved(partial, state, made) or state
    saved_at, done = time.monotonic(), 0
    bar = tqdm(total=total, desc="samples", unit="img", disable=not progress)
    for keys, indices, condition in _parts(model, batches, batch_size):
        done += len(keys)
        if done > state["done"]:
            begin = time.perf_counter()
            images = draw(model, condition, seeds=seeds_of(keys, seed)).to(model.device)
            if images.is_cuda:
                torch.cuda.synchronize()
            state["seconds"] += time.perf_counter() - begin
            state["done"] = done
            made.add(images, indices, condition)
            if (room := SHOWN - len(state["captions"])) > 0:
                both = pictures.beside(model.picture(condition, images.shape[2:]), images.cpu())
                state["images"].append(both[:room])
                state["captions"] += model.describe(condition, len(images))[:room]
            if partial is not None and time.monotonic() - saved_at > SAVE_EVERY:
                whole = {"state": state, "made": made.state()}
                write_atomically(partial, lambda file, whole=whole: torch.save(whole, file))
                saved_at = time.monotonic()
        bar.update(len(keys))
    bar.close()
    estimates = measure(metrics, reference.sets, made.gathered())
    shown_pairs = _pairs(model, batches, draw, reference, made, seed) if pairs else {}
    if partial is not None and partial.is_file():
        partial.unlink()
    shown = torch.cat(state["images"]) if state["images"] else torch.empty(0)
    seconds, count = max(gathered(state["seconds"])), sum(gathered(state["done"]))
    return Measured(estimates, shown, state["captions"], seconds, count, shown_pairs)


def _pairs(
    model: LatentDiffusion,
    batches: Iterable[dict[str, Any]],
    draw: Draw,
    reference: Reference,
    made: Collected,
    seed: int,
) -> dict[str, torch.Tensor]:
    """Returns `Measured.pairs`, on every rank. The samples are drawn again, which is possible as their seeds follow
    from their keys."""
    pairs = {}
    for metric in made.metrics:
        matches = metric.pairs(made.sets[metric.extractor], *compared(metric, reference.sets))
        if not matches:
            continue
        wanted, drawn = {sample for sample, _ in matches}, {}
        for keys, indices, condition in _parts(model, batches, 1):
            if (index := int(indices)) in wanted:
                (drawn[index],) = draw(model, condition, seeds=seeds_of(keys, seed)).cpu()
        drawn = {index: image for part in gathered(drawn) for index, image in part.items()}
        real = [reference.image_of(metric.compared_with[0], index) for _, index in matches]
        pairs[metric.name] = torch.stack([*(drawn[sample] for sample, _ in matches), *real])
    return pairs
