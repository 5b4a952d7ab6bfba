"""ldm-bench: measures the speed of each kind of work against a peer in the same process."""

import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from omegaconf import DictConfig

from ldm_train.bench import peers
from ldm_train.bench.data import data
from ldm_train.bench.decode import decode
from ldm_train.bench.guide import as_text, facts, in_words, write_guide
from ldm_train.bench.latent_cache import latent_cache
from ldm_train.bench.measuring import Settings, Table, peak_of
from ldm_train.bench.sampling import sampling
from ldm_train.bench.startup import startup
from ldm_train.bench.train_autoencoder import train_autoencoder
from ldm_train.bench.train_unet import train_unet
from ldm_train.pipeline.machine import machine_of
from ldm_train.rules import check, optional, whole
from ldm_train.storage import write_json

KINDS: dict[str, Callable[[Settings], list[Table]]] = {
    "train_unet": train_unet,
    "train_autoencoder": train_autoencoder,
    "sampling": sampling,
    "decode": decode,
    "data": data,
    "latent_cache": latent_cache,
    "startup": startup,
}
ALL = "all"
RULES = {
    **{name: optional(whole(1)) for name in ("runs", "steps", "images", "batch_size", "threads")},
    "workers": optional(whole(0)),
}


def kinds_of(what: str) -> list[str]:
    """Returns the kinds that `what` names. Raises ValueError if it is unknown."""
    if what == ALL:
        return list(KINDS)
    if what not in KINDS:
        raise ValueError(f"what={what} is not measured; what= is one of {', '.join(KINDS)}, or {ALL}")
    return [what]


def settings_of(config: DictConfig) -> Settings:
    """Builds the settings. Raises ValueError for a number out of range, a missing GPU or an unknown precision."""
    check(config, RULES)
    sizes = [config.sizes] if isinstance(config.sizes, str) else config.sizes
    return Settings(
        machine_of(config, {}),
        config.runs,
        config.compile,
        tuple(sizes) if sizes else None,
        config.images,
        config.workers,
        config.batch_size,
        config.steps,
    )


def bench(config: DictConfig) -> list[Table]:
    """Measures `config.what`, prints its tables, and writes them to `out` (JSON) and `guide` (Markdown)."""
    kinds, settings = kinds_of(config.what), settings_of(config)
    if peers.diffusers_version() is None:
        raise ValueError(peers.REMEDY)
    if config.threads:
        torch.set_num_threads(config.threads)
    about = facts(settings.machine, settings.runs, peak_of(settings.machine)[1])
    print(in_words(about), flush=True)
    tables = []
    for kind in kinds:
        for table in KINDS[kind](settings):
            print(f"\n{as_text(table)}", flush=True)
            tables.append(table)
    if config.out:
        write_json(Path(config.out), about | {"tables": [asdict(table) for table in tables]})
    if config.guide:
        command = " ".join(["ldm-bench", *(a for a in sys.argv[1:] if not a.startswith(("guide=", "out=")))])
        write_guide(Path(config.guide), tables, about, command)
    return tables
