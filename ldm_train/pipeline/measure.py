"""ldm-evaluate: metrics with confidence intervals for a run's samples, for two sets of images, or for an autoencoder
alone."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from ldm_train import names
from ldm_train.checkpoints.native import (
    find_model,
    load_autoencoder,
    load_latent_diffusion,
    meta_autoencoder,
    read_metadata,
)
from ldm_train.checkpoints.parts import targets
from ldm_train.configuration import config_folder, default_options, plain, run_config
from ldm_train.data.loose import image_batches
from ldm_train.devices import to_device
from ldm_train.distributed import gathered, rank
from ldm_train.evaluation.evaluator import Evaluator, sampling_options
from ldm_train.evaluation.measurement import Reference, measure_samples, reference_from
from ldm_train.evaluation.report import evaluate_first_stage, save_pairs
from ldm_train.generation.files import as_list
from ldm_train.generation.job import machine as made_on
from ldm_train.generation.options import check_interval
from ldm_train.latent_diffusion import LatentDiffusion
from ldm_train.metrics.features import weights_hash
from ldm_train.metrics.measures import Collected, check_compared, measure, write_reference
from ldm_train.metrics.metric import REFERENCE
from ldm_train.models.first_stage import FirstStage
from ldm_train.pipeline.data import data_module, evaluation_batching
from ldm_train.pipeline.diffusion import drawer
from ldm_train.pipeline.latents import give_statistics
from ldm_train.pipeline.machine import join_devices, machine_of
from ldm_train.pipeline.run import Run
from ldm_train.pipeline.trained import run_folder, with_options
from ldm_train.rules import check as check_options
from ldm_train.rules import engine, noise_levels, number, optional, whole
from ldm_train.storage import file_sha256, inside, read_record, write_atomically, write_json
from ldm_train.training.callbacks.checkpoint import read_checkpoint
from ldm_train.training.fit import Machine

# A measurement: its metrics, the folder to write them to (None: print only), and the settings that identify it.
Measured = tuple[dict[str, Any], Path | None, dict[str, Any]]
# By option: the rule for its value, if it is given.
RULES = {
    "engine": optional(engine),
    "max_failures": whole(0),
    "guidance_scale": optional(number(0)),
    "guidance_interval": optional(noise_levels),
    **dict.fromkeys(("n", "reference_images"), optional(whole(2))),
    **dict.fromkeys(("seed", "num_workers"), optional(whole(0))),
    **{name: optional(whole(1)) for name in ("batch_size", "devices", "num_inference_steps", "image_size")},
}
DRAWN = ("weights", "seed", "num_inference_steps", "guidance_scale", "guidance_interval", "spacing", "sampler")
# Options that have an effect on some kinds of measurement only, which are chosen by run=, reconstruct= or images=.
KINDS = {
    **dict.fromkeys(DRAWN, ("run",)),
    **dict.fromkeys(("paired", "perceptual", "lpips", "predictors"), ("reconstruct",)),
    **dict.fromkeys(("reference", "reference_images", "data"), ("run", "reconstruct")),
    **dict.fromkeys(("against", "image_size"), ("images",)),
}
INSTEAD = {"against": "reference=<split or .npz>", "image_size": "data.image_size="}


def trained_model(folder: Path) -> Path:
    """The model folder of a run. Raises FileNotFoundError if there is none."""
    if (source := find_model(folder)) is None:
        raise FileNotFoundError(f"{folder} has no trained model yet; finish its diffusion stage")
    return source


def best_checkpoint(folder: Path) -> Path:
    """Path of a run's best.ckpt. Raises FileNotFoundError if there is none."""
    path = folder / "diffusion" / "checkpoints" / "best.ckpt"
    if not path.is_file():
        raise FileNotFoundError(f"weights=best, but there is no {path}")
    return path


def load_weights(folder: Path, which: str, trust: Sequence[str] = ()) -> LatentDiffusion:
    """Loads the model of a run. which="best": with the averaged weights of its diffusion stage's best.ckpt. Raises
    ValueError for any other word than "last" and "best", and for "best" of a run that trained an adapter."""
    model = load_latent_diffusion(trained_model(folder), trust)
    if which == "last":
        return model
    if which != "best":
        raise ValueError(f"weights is last or best, not {which!r}")
    state = read_checkpoint(best_checkpoint(folder))
    names.rename_in_checkpoint(state)
    if any(key.startswith("adapter.") for key in state["state_dict"]):
        raise ValueError(
            f"weights=best: {folder} trained an adapter, and only its last weights are a model; set weights=last"
        )
    trainable, averaged = model.trainable(), state.get("ema", {}).get("shadow", {})
    parts = tuple(f"{name}." for name, _ in trainable.named_children())  # not the objective's, nor an alignment's
    trainable.load_state_dict({k: v for k, v in state["state_dict"].items() if k.startswith(parts)})
    with torch.no_grad():
        for name, parameter in trainable.named_parameters():
            if name in averaged:
                parameter.copy_(averaged[name])
    return model


def export_reference(path: str | None, reference: Reference) -> None:
    if path is None or rank() > 0:
        return
    sets = reference.sets[REFERENCE]
    if len(sets) != 1:
        raise ValueError(f"export={path} is for one extractor, the metrics use {', '.join(sorted(sets))}")
    features = next(iter(sets.values()))
    write_atomically(path, lambda file: write_reference(features, file))
    print(f"reference: {path}")


# -- the three kinds of measurement ------------------------------------------------------------------------------------


def evaluate_run(config: DictConfig, again: bool = True) -> Measured:
    """Measures samples of a run. again: also measure if there is already a file for the same settings."""
    folder = run_folder(config.run, config.runs_dir)
    trained = with_options(run_config(folder), config, folder / "config.yaml")
    trained.evaluation.paired = []  # of reconstructions; their networks need not be there
    source, count = trained_model(folder), trained.evaluation.images
    trust = [*config.trust, *(targets(OmegaConf.to_container(config.sampler)) if config.get("sampler") else ())]

    def prepared(machine: Machine) -> Run:
        run = Run(trained, folder, machine, trust)
        run.check_metrics(count)
        return run

    machine = join_devices(trained, "ldm_train.cli.evaluate", prepared)
    run = prepared(machine)
    tools, data = run.evaluator, run.evaluation_data()
    if not tools.metrics:
        raise ValueError("metrics=[] measures nothing of samples; for example metrics=[fid_tiny]")
    reference = tools.reference(data, config.runs_dir, config.progress)
    export_reference(config.export, reference)
    options = sampling_options(trained) | {"seed": config.seed, "weights": config.weights}
    asked = options | {
        "n": count,
        "metrics": [m.name for m in tools.metrics],
        "model": read_metadata(source)["sha256"],
        "references": reference.hashes,
        "precision": machine.precision,
        "conditions": tools.images_identity(data, trained.data.val_split, count),
        "extractors": tools.hashes,
        **({"kinds": plain(config.kinds)} if config.kinds else {}),
    }
    if config.weights == "best":  # best.ckpt changes while training continues
        asked["weights"] = file_sha256(best_checkpoint(folder))
    results = inside(folder / "evaluations", folder)
    kept = results / file_name(asked)
    on = made_on(machine.device.type, trained.evaluation.batch_size) | {"devices": machine.world_size}
    if not again and kept.is_file():
        earlier = {k: v for k, v in read_record(kept).items() if k != "settings"}
        if on.items() <= earlier["speed"].items():  # otherwise its speed is that of another machine
            return earlier, results, asked
    partial = results / f".{digest(asked)}.partial"
    partial.parent.mkdir(exist_ok=True)
    model = load_weights(folder, config.weights, trust).to(machine.device, memory_format=torch.channels_last)
    if config.guidance_interval is not None and (how := trained.sampling).guidance_scale != 1:
        check_interval("guidance_interval", config.guidance_interval, how.num_inference_steps, how.spacing, model)
    measured = measure_samples(
        model, run.conditions(data, count), drawer(run), reference, tools.metrics, tools.extractors,
        trained.evaluation.batch_size, config.seed, progress=config.progress and machine.rank == 0,
        total=-(-count // machine.world_size), partial=partial, pairs=True,
    )  # fmt: skip
    samples = {m.name: measured.estimates[m.name].as_dict() | reference.details(m) | options for m in tools.metrics}
    if machine.rank == 0:
        for name, rows in measured.pairs.items():
            save_pairs(rows, kept.with_name(f"{kept.stem}-{name}.png"))
    speed = {"images_per_second": measured.count / measured.seconds} if measured.seconds else {}
    return {"samples": samples, "speed": speed | on}, results, asked


def evaluate_autoencoder(config: DictConfig) -> Measured:
    """Measures an autoencoder's reconstructions: of a run, or of a model folder with data.root and data.image_size."""
    given = Path(config.reconstruct)
    if (given / "model.safetensors").is_file():
        folder, model_folder, results = given, given, None
        if config.data.root is None or config.data.image_size is None:
            raise ValueError("a model folder alone does not say on which images: add data.root= and data.image_size=")
        trained = _config_of_folder(config)
    else:
        folder = run_folder(config.reconstruct, config.runs_dir)
        trained = with_options(run_config(folder), config, folder / "config.yaml")
        model_folder, results = folder / "autoencoder" / "model", inside(folder / "evaluations", folder)

    def built(machine: Machine) -> Evaluator:
        return Evaluator.on_all_ranks(trained.evaluation, machine.device)

    machine = join_devices(trained, "ldm_train.cli.evaluate", built)
    tools = built(machine)
    if others := [m.name for m in tools.metrics if m.compared_with != (REFERENCE,)]:
        raise ValueError(f"metrics: {', '.join(others)} says nothing of reconstructions; it is for run=<run>")
    trained.evaluation.images = config.n  # n=null: all images
    data = data_module(trained, "autoencoder", machine, ("image",), config.trust)
    data.batching = evaluation_batching(trained, machine)
    first_stage = FirstStage(load_autoencoder(model_folder, config.trust)).to(machine.device)
    if (folder / "latents" / "statistics.json").is_file():
        give_statistics(folder / "latents", first_stage, trained.latents.per_channel)
    else:
        _give_unit_variance(first_stage, data.fixed_loader(trained.data.val_split, 256), machine)
    reference = tools.reference(data, config.runs_dir, config.progress)
    export_reference(config.export, reference)
    metrics, _ = evaluate_first_stage(
        first_stage, data.fixed_loader(trained.data.val_split, config.n), tools, reference,
        trained.evaluation.predictors, config.progress and machine.rank == 0,
    )  # fmt: skip
    asked = {
        "n": config.n,
        "metrics": [m.name for m in tools.metrics],
        "references": reference.hashes,
        "model": read_metadata(model_folder)["sha256"],
        "paired": list(tools.paired),
        "images": tools.images_identity(data, trained.data.val_split, config.n),
        "extractors": tools.hashes,
        "networks": {n: weights_hash(network)[:12] for n, network in tools.networks.items()},
        "predictors": trained.evaluation.predictors,
        **({"kinds": plain(config.kinds)} if config.kinds else {}),
    }
    return metrics, results, asked


def _give_unit_variance(first_stage: FirstStage, batches: Iterable[dict[str, Any]], machine: Machine) -> None:
    """Scales latents to unit variance on these images, if no latents stage has measured the scale: latent metrics
    assume it."""
    sums = torch.zeros(3, dtype=torch.float64)
    for batch in batches:
        z = (
            first_stage.posterior(first_stage.encode_moments(to_device(batch["image"], machine.device)))
            .mean.cpu()
            .double()
        )
        sums += torch.stack([torch.tensor(float(z.numel())), z.sum(), z.square().sum()]).double()
    count, total, square = sum(gathered(sums)).tolist()
    first_stage.set_statistics((square / count - (total / count) ** 2) ** -0.5)


def _config_of_folder(config: DictConfig) -> DictConfig:
    """The config for an autoencoder without its run: the default options and the perceptual network shipped with the
    package."""
    channels = meta_autoencoder(config.reconstruct, config.trust).in_channels
    before = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_folder()), version_base="1.3"):
            usual = compose("train", ["data=folder", "name=null"])
    finally:
        GlobalHydra.instance().hydra = before
    OmegaConf.set_struct(usual, False)
    usual.data.channels = channels
    usual.autoencoder.loss.perceptual = {"_target_": "ldm_train.losses.perceptual.TinyPerceptual"}
    return with_options(usual, config, config_folder() / "train.yaml")


def evaluate_images(config: DictConfig) -> Measured:
    """Compares two sets of images."""
    if config.against is None:
        raise ValueError("images= are measured against=<folder, tar or .npz>")
    if config.devices > 1 or config.engine is not None:
        raise ValueError("images= are measured on one device, by this process; leave devices= and engine= out")
    extractors = OmegaConf.merge(default_options()["evaluation"]["extractors"], config.extractors)
    section = {"extractors": extractors, "metrics": config.metrics, "kinds": config.kinds}
    machine = machine_of(config, {})
    tools = Evaluator(OmegaConf.create(section | {"paired": [], "perceptual": None, "lpips": None}), machine.device)
    if not tools.metrics:
        raise ValueError("metrics=[] measures nothing of two sets of images; for example metrics=[fid_tiny]")
    for metric in tools.metrics:
        check_compared(metric, {REFERENCE})  # before hours of computing features
    batch_size, seen = config.batch_size or 64, {}

    def collected(option: str, compared: str | None) -> Collected:
        nonlocal seen
        into, position = Collected(tools.metrics, tools.extractors, compared), 0
        sources = [str(s) for s in as_list(config[option], option)]
        limit = config.n if compared is None else None
        batches = image_batches(sources, config.image_size, batch_size)
        for images in tqdm(batches, desc=option, unit="batch", disable=not config.progress):
            images = images[: None if limit is None else limit - position].to(machine.device)
            seen = tools.seen(images.shape[1])
            into.add(images, torch.arange(position, position + len(images)))
            position += len(images)
            if limit is not None and position >= limit:
                break
        return into.gathered()

    if str(config.against).endswith(".npz"):
        reference = reference_from(config.against, tools.metrics)
    else:
        sets = collected("against", REFERENCE).sets
        hashes = {n: hashlib.sha256(s.moments.total.numpy().tobytes()).hexdigest()[:12] for n, s in sets.items()}
        reference = Reference({REFERENCE: sets}, hashes)
    export_reference(config.export, reference)
    estimates = measure(tools.metrics, reference.sets, collected("images", None))
    reference = replace(reference, seen=seen)
    sources = {"images": as_list(config.images, "images"), "against": as_list(config.against, "against")}
    metrics = {"images": {m.name: estimates[m.name].as_dict() | reference.details(m) | sources for m in tools.metrics}}
    asked = {k: plain(config)[k] for k in ("images", "against", "n", "image_size", "metrics", "kinds")}
    return metrics, None, asked | {"extractors": tools.hashes}


# -- output ------------------------------------------------------------------------------------------------------------


def digest(asked: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()[:8]


def file_name(asked: Mapping[str, Any]) -> str:
    """The main settings of a measurement in readable form and a hash, so that different settings never share a name."""
    parts = ["reconstructions" if "paired" in asked else "samples", f"n{asked['n'] or 'all'}"]
    if "sampler" in asked:
        steps, guidance = asked["num_inference_steps"], asked["guidance_scale"]
        parts += [f"{asked['sampler']}{steps}", f"g{guidance:g}", f"s{asked['seed']}"]
    return "-".join([*parts, digest(asked)]) + ".json"


def format_metrics(metrics: Mapping[str, Any]) -> str:
    """Formats one line per metric: value, interval, number of samples, reference."""
    lines = []
    for part, table in metrics.items():
        lines.append(part)
        for name, entry in table.items():
            if not isinstance(entry, dict):
                lines.append(f"  {name:<22}{entry:>12{'' if isinstance(entry, str) else '.4g'}}")
                continue
            interval = "[{:.4g}, {:.4g}]".format(*entry["interval"]) if entry["interval"] else "too few for an interval"
            value = float("inf") if entry["value"] is None else entry["value"]
            line = f"  {name:<22}{value:12.4g}  {interval:<24} n {entry['n']}"
            if "reference" in entry:
                line += f", against {entry['n_reference'] or 'unknown'} images ({entry['reference']})"
            if "channels" in entry:
                line += f", {entry['channels']}"
            lines.append(line)
    return "\n".join(lines)


def check(config: DictConfig) -> None:
    check_options(config, RULES)
    given = [o for o in ("run", "reconstruct", "images") if config[o] is not None]
    if len(given) != 1:
        raise ValueError(
            "choose what to measure: run=<run>, reconstruct=<run or folder>, or images=<folder> against=<folder>"
        )
    if config.get("out") and Path(config.out).is_dir():
        raise ValueError(f"out={config.out} is a folder; give a file in it, out={Path(config.out) / 'metrics.json'}")
    for option in ("metrics", "paired"):
        if not OmegaConf.is_list(config[option]):
            raise ValueError(f"{option} is a list: {option}=[{config[option]}]")
    usual, (kind,) = command_options(), given
    for option, kinds in KINDS.items():
        if kind not in kinds and config.get(option) != usual.get(option):
            remedy = f"; set {INSTEAD[option]} for this" if option in INSTEAD else "; leave it out"
            raise ValueError(f"{option}= has no effect with {kind}=, only with {'= or '.join(kinds)}={remedy}")


def command_options() -> DictConfig:
    """The default options of ldm-evaluate."""
    usual = OmegaConf.load(config_folder() / "evaluate.yaml")
    return OmegaConf.create({k: v for k, v in usual.items() if k not in ("defaults", "hydra")} | {"sampler": None})


def measured_run(config: DictConfig) -> dict[str, Any]:
    """`evaluate` of a run for other commands: an earlier result with the same settings, batch size and machine is read
    from its file."""
    metrics, folder, asked = evaluate_run(config, again=False)
    path = folder / file_name(asked)
    if not path.is_file() or read_record(path)["speed"] != metrics["speed"]:
        write_json(path, metrics | {"settings": asked})
    return metrics


def evaluate(config: DictConfig) -> dict[str, Any]:
    check(config)
    measured = evaluate_run if config.run else evaluate_autoencoder if config.reconstruct else evaluate_images
    metrics, folder, asked = measured(config)
    if rank() > 0:
        return metrics
    print(format_metrics(metrics))
    out = Path(config.out) if config.out else folder / file_name(asked) if folder else None
    if out and HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN and config.out:
        out = out.with_name(f"{out.stem}-{digest(asked)}{out.suffix}")
    if out:
        write_json(out, metrics | {"settings": asked})
        print(f"metrics: {out}")
    return metrics
