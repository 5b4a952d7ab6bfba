"""Measures the memory that training really takes on the CPU, in Lightning's own loop on random pictures. Two ways that
do not depend on the planner: the allocations that torch's profiler records, and the memory of the process.

python tests/measured.py <stage> <override> ... prints three peaks in MiB: planned, of the allocations, of the process.
"""

import gc
import sys
import tempfile
from pathlib import Path
from typing import Any

import lightning as L
import torch
from chains import composed
from hydra.utils import instantiate

from ldm_train.checkpoints.parts import build
from ldm_train.configuration import plain
from ldm_train.pipeline.budget import Budget
from ldm_train.pipeline.conditioners import conditioner_tree
from ldm_train.pipeline.data import CONDITIONERS
from ldm_train.pipeline.diffusion import first_stage_tree, latent_size, model_tree
from ldm_train.pipeline.machine import planned_machine
from ldm_train.pipeline.run import Run, own_parts
from ldm_train.pipeline.values import check_values
from ldm_train.training.fit import Cadence, Machine, fit
from ldm_train.training.task import Task

STEPS = 2  # in the second, the gradients and optimiser states of the first are in memory


def planning(*overrides: str) -> Run:
    """A run with plan=only: for the memory plan alone."""
    config = composed("train", "plan=only", "accelerator=cpu", *overrides)
    config.name = "measured"
    check_values(config)
    return Run(config, Path(config.runs_dir) / config.name, planned_machine(config), own_parts(config))


def planned(run: Run, stage: str) -> float:
    """Returns the peak that the planner expects, in bytes."""
    budget = Budget(run, stage)
    return budget.peak(budget.chosen)


class Batches(L.LightningDataModule):
    """A data module that gives the same micro-batch `count` times."""

    def __init__(self, batch: dict[str, Any], count: int):
        super().__init__()
        self.batch, self.count, self.resumed = batch, count, None

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader([self.batch] * self.count, batch_size=None)


def train(run: Run, stage: str) -> None:
    """Trains a stage for STEPS steps from random weights, on random data."""
    config, section = run.config, run.config[stage]
    micro = section.micro_batch_size or section.batch_size
    with tempfile.TemporaryDirectory() as folder:
        if stage == "autoencoder":
            network = instantiate(section.network, _convert_="all").to(memory_format=torch.channels_last)
            task: Task = run.stages[stage].task(run, network, instantiate(section.loss, _convert_="all"), Path(folder))
            batch = {"image": torch.rand(micro, config.data.channels, *[config.data.image_size] * 2) * 2 - 1}
        else:
            autoencoder = plain(config.autoencoder.network)
            size = latent_size(config, instantiate(config.autoencoder.network, _convert_="all"))
            conditioners = conditioner_tree(config, run.index(stage), rehearsal=True)
            tree = model_tree(config, first_stage_tree(autoencoder), conditioners, size)
            model = build(tree, CONDITIONERS).to(memory_format=torch.channels_last)
            task = run.stages[stage].task(run, model, Path(folder))
            channels = model.first_stage.latent_channels * model.first_stage.autoencoder.moments_per_latent
            batch = {c.field: c.null_values(micro, size) for c in model.conditioners.values()}
            batch["moments"] = torch.randn(micro, channels, *size)
        batch |= {"key": ["a"] * micro, "replaced": []}
        data = Batches(batch, STEPS * task.accumulate)
        machine, cadence = Machine("cpu", run.machine.precision), Cadence(10**6, 10**6, 10**6, progress=False)
        fit(task, data, Path(folder), STEPS, section.batch_size, section.batch_size, cadence, machine)


def allocated(run: Run, stage: str) -> float:
    """Trains, and returns the peak of the bytes that torch's allocator had handed out."""
    gc.collect()
    options = {"activities": [torch.profiler.ProfilerActivity.CPU], "profile_memory": True}
    with torch.profiler.profile(**options) as profiler:
        train(run, stage)
        gc.collect()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        most = max(most, total)
    return most


def resident(run: Run, stage: str) -> float:
    """Trains, and returns by how many bytes the process grew at most. (Run it in a process of its own, after a short
    training has loaded all libraries, and with MALLOC_MMAP_THRESHOLD_=65536, so that freed memory is returned at
    once.)"""

    def size(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

    gc.collect()
    before = size("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak (VmHWM)
    train(run, stage)
    return size("VmHWM") - before


if __name__ == "__main__":
    which, *chosen = sys.argv[1:]
    run = planning(*chosen)
    expected = planned(run, which)
    train(planning(*chosen, f"{which}.batch_size=1", f"{which}.micro_batch_size=null"), which)
    grown = resident(run, which)
    print(*chosen, which, *(f"{v / 2**20:.1f}" for v in (expected, allocated(run, which), grown)))
