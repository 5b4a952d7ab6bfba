"""Formats measurements as tables for the terminal and as Markdown for a performance guide, and collects what they
depend on."""

import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ldm_train.bench.measuring import Row, Table
from ldm_train.bench.peers import diffusers_version
from ldm_train.storage import write_atomically
from ldm_train.training.fit import Machine

# The text before each kind's tables.
INTRODUCTIONS = {
    "train_unet": "**Stage 2, a training step** (cached latents, objective, clipping, AdamW, EMA; ours under Lightning).",
    "train_autoencoder": "**Stage 1, a training step** (perceptual loss, patch GAN, adaptive weight; ours under Lightning).",
    "sampling": "**Sampling, a step**.",
    "decode": "**Decoding a batch of latents**.",
    "data": "**Loading**.",
    "latent_cache": "**The latent cache**.",
    "startup": "**Start-up**.",
}


def _number(value: float | None, form: str = ".3g") -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:{form}}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


COLUMNS: dict[str, Callable[[Row], str]] = {
    "": lambda row: row.who,
    "median": lambda row: _time(row.seconds),
    "first call": lambda row: _time(row.first),
    "times ours": lambda row: "" if row.against is None else f"{row.against:.2f}",
    "images/s": lambda row: _number(row.images_per_second),
    "GFLOP": lambda row: _number(None if row.flops is None else row.flops / 1e9),
    "MFU": lambda row: "" if row.mfu is None else f"{row.mfu:.0%}",
    "memory [MiB]": lambda row: _number(None if row.memory is None else row.memory / 2**20),
    "waits for data": lambda row: "" if row.waits is None else f"{row.waits:.1%}",
}


def _cells(table: Table) -> list[list[str]]:
    """Returns the heads and rows of a table, without empty columns."""
    columns = {head: [show(row) for row in table.rows] for head, show in COLUMNS.items()}
    kept = {head: cells for head, cells in columns.items() if any(cells)}
    return [list(kept), *map(list, zip(*kept.values()))]


def as_text(table: Table) -> str:
    """Formats a table for the terminal."""
    lines = _cells(table)
    widths = [max(map(len, column)) for column in zip(*lines)]
    shown = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines]
    return "\n".join([f"{table.kind}: {table.what}", *(f"  {line}" for line in shown)])


def _as_markdown(table: Table) -> str:
    head, *rows = _cells(table)
    bars = [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows)]
    return "\n".join([f"{table.what[0].upper()}{table.what[1:]}:", "", *bars])


def processor() -> str:
    """Returns the CPU's name and the number of threads in use."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    count = torch.get_num_threads()
    return f"{names[0] if names else platform.machine()}, {count} thread{'s' if count > 1 else ''}"


def versions() -> dict[str, str]:
    known = {"python": platform.python_version(), "torch": torch.__version__, "diffusers": diffusers_version()}
    return {name: version for name, version in known.items() if version}


def facts(machine: Machine, runs: int, peak: str) -> dict[str, Any]:
    """Returns what the numbers depend on apart from the program."""
    gpu = {"gpu": torch.cuda.get_device_name(machine.device)} if machine.accelerator == "gpu" else {}
    return gpu | {"cpu": processor(), "precision": machine.precision, "peak": peak, "runs": runs} | versions()


def in_words(about: Mapping[str, Any]) -> str:
    where = "; ".join(about[name] for name in ("gpu", "cpu") if name in about)
    builds = ", ".join(f"{name} {about[name]}" for name in versions())
    return f"{where}; precision {about['precision']}; peak {about['peak']}; {builds}; medians of {about['runs']} rounds in turns"


def write_guide(path: Path, tables: Sequence[Table], about: Mapping[str, Any], command: str) -> None:
    """Rewrites the guide, with a section for each kind that was measured."""
    parts = [
        "# Performance",
        f"Written by `{command}`: {in_words(about)}.",
        "*Times ours* is a contender's time divided by ours in the same round, as the median over the rounds; above 1, ours is "
        "faster. *First call* includes compilation, the choice of kernels and allocation. *GFLOP* is counted for one round, "
        "and *MFU* is the achieved speed relative to the peak. With one thread of a CPU, times are CPU times, except for "
        "loading, the cache and start-up. *Memory* is the peak in a round beyond weights, optimiser state and batches.",
    ]
    for kind in dict.fromkeys(table.kind for table in tables):
        parts += [INTRODUCTIONS[kind], *(_as_markdown(table) for table in tables if table.kind == kind)]
    text = "\n\n".join(parts) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))
