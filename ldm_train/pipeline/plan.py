"""The plan printed before anything runs: each stage's work, model size, memory per step, time and cost."""

import time
from functools import cache
from typing import TYPE_CHECKING

import torch
from omegaconf import DictConfig

from ldm_train.devices import multiplies_bfloat16
from ldm_train.evaluation.evaluator import parse_metrics
from ldm_train.images import groups_in_words, has_colours
from ldm_train.pipeline.budget import GIB, Budget, in_full, offered
from ldm_train.pipeline.resume import Step, is_done, made_anew, read_note
from ldm_train.pipeline.stage import Plan
from ldm_train.training.callbacks.checkpoint import LAST, steps_done
from ldm_train.training.callbacks.pace import cost, duration
from ldm_train.training.fit import Machine

if TYPE_CHECKING:
    from ldm_train.pipeline.run import Run

REACHED = 0.4  # training reaches about this fraction of the measured speed of matrix products
TRAINING_FLOPS = 3  # a forward and a backward pass cost about three forward passes

# Peak TFLOP/s of dense 16-bit matrix products with 32-bit accumulation, by a part of the device's name (from the
# manufacturers' data sheets; the first match counts).
PEAKS = {
    "B200": 2250, "GH200": 989, "H200": 989, "H100 PCIe": 756, "H100": 989, "H800": 989, "A100": 312, "A800": 312, "L40S": 362,
    "L40": 181, "L4": 121, "A10G": 70, "A10": 125, "A40": 150, "A6000": 155, "RTX 6000 Ada": 364, "RTX 5090": 210,
    "RTX 4090": 165, "RTX 4080": 97, "RTX 3090": 71, "V100": 125, "T4": 65,
}  # fmt: skip


def peak_flops(device: torch.device, precision: str, measured: float) -> float:
    """The FLOP/s that MFU is relative to: the data sheet's value for known GPUs in 16 bits, otherwise `measured`, the
    speed of a matrix product."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" and precision != "32" else ""
    return next((peak * 1e12 for part, peak in PEAKS.items() if part in name), measured)


@cache
def _rate(device: torch.device, dtype: torch.dtype | None = None) -> float:
    """Measures the matrix-product speed of this device in FLOP/s, within a fraction of a second. dtype: by default
    float32 on a CPU and bfloat16 otherwise."""
    size = 1024 if device.type == "cpu" else 8192
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    a = torch.randn(size, size, device=device).to(dtype)
    best = 0.0
    for _ in range(5):
        begin = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * size**3 / (time.perf_counter() - begin))
    return best


def _channels_in_words(config: DictConfig) -> str:
    """Describes how networks for grey and RGB images see images with other numbers of channels."""
    perceptual, evaluation, channels = config.autoencoder.loss.perceptual, config.evaluation, config.data.channels
    seeing = []
    if perceptual is not None and perceptual._target_.startswith("ldm_train."):
        seeing.append("the perceptual distance (autoencoder/loss/perceptual=none leaves it out)")
    for metric in parse_metrics(list(evaluation.metrics), list(evaluation.extractors), evaluation.kinds):
        if evaluation.extractors[metric.extractor]._target_.startswith("ldm_train."):
            seeing.append(metric.name)
    text = f"  {channels} channels: pictures are shown in false colours, the first channel red, the last blue"
    return f"{text}; {groups_in_words(channels)}: {', '.join(seeing)}" if seeing else text


def _budget(run: "Run", stage: str) -> tuple[Budget | None, str]:
    """Returns (the memory budget of a stage, its peak in words). The budget is None if the stage has no rehearsal (no
    words), or if a user's own part does something the meta device cannot (the words say why)."""
    try:
        budget = Budget(run, stage)
        if budget.memory(budget.chosen) is None:
            return None, ""
        return budget, f", {budget.peak(budget.chosen) / GIB:.2f} GiB at the peak of a step"
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0][:120]
        return None, f", memory not known beforehand ({type(error).__name__}: {reason})"


def _device(machine: Machine) -> torch.device | None:
    """The device of training, or None if it is not available."""
    if machine.accelerator == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", machine.local_rank) if torch.cuda.is_available() else None


def _left(run: "Run", stage: str, steps: int, state: str) -> int:
    """The number of optimiser steps still to be done."""
    if state == "finished":
        return 0
    return max(0, steps - (steps_done(run.folder / stage / "checkpoints" / LAST) if state == "to resume" else 0))


def print_plan(run: "Run", steps: list[Step]) -> dict[str, tuple[float, float]]:
    """Prints one line per stage and, with plan=only, the parts of its memory. Models are built on the meta device, so
    nothing large is allocated.

    Returns for each stage that trains, if the device is available: (FLOPs of training on one image, i.e. three forward
    passes of its network, without networks that are frozen or belong to losses; peak FLOP/s of all devices). Ranks
    other than 0 only check the plans and return {}.
    Raises ValueError for a step that needs more memory than there is.
    """
    config, machine = run.config, run.machine
    plans = {step.name: run.stages[step.name].plan(run) for step in steps}
    if machine.rank > 0:
        return {}
    print(f"run {run.folder} on {machine.world_size} x {machine.accelerator}, precision {machine.precision}")
    if machine.accelerator == "cpu" and machine.precision == "32" and multiplies_bfloat16():
        print("  this CPU has matrix units for bfloat16: precision=bf16-mixed trains 1.3 to 1.9 times as fast")
    if not has_colours(config.data.channels):
        print(_channels_in_words(config))
    effort, budgets, device, memory = {}, [], _device(machine), offered(run)
    anew = made_anew(run.order, steps, run.folder, config.restart)
    for step in steps:
        note = None if step.name in anew else read_note(run.folder / step.name)
        state = "new" if note is None else "finished" if is_done(note, step) else "to resume"
        text = f"  {step.name:<12}{state:<10}"
        budget = None
        if plan := plans[step.name]:
            text += f"{plan.begins}, " if plan.begins else ""
            text += _in_words(run, step, plan)
            left, flops = _left(run, step.name, step.steps, state), float(plan.flops * TRAINING_FLOPS)
            if left:
                budget, peak_in_words = _budget(run, step.name)
                text += peak_in_words
            if device is not None:
                fast = torch.bfloat16 if machine.precision == "bf16-mixed" else None
                effort[step.name] = (
                    flops,
                    peak_flops(device, machine.precision, _rate(device, fast)) * machine.world_size,
                )
            if left and device is not None:
                rate = REACHED * _rate(device) * machine.world_size / flops
                seconds = left * config[step.name].batch_size / rate
                text += f", about {rate:.3g} images/s, {duration(seconds)}{cost(config.price_per_hour, seconds)}"
                if (until := config[step.name].get("max_time")) is not None:
                    text += f", ended by the clock after {until}"
        print(text, flush=True)
        if plan and plan.warning and state != "finished":
            print(f"    warning: {plan.warning}", flush=True)
        if budget is not None:
            budgets.append(budget)
            for line in in_full(budget, memory) if run.plans_only else ():
                print(f"    {line}", flush=True)
    for budget in budgets:
        if memory is not None:
            budget.check(memory)
    return effort


def _in_words(run: "Run", step: Step, plan: Plan) -> str:
    """Describes the size of a stage's training."""
    section = run.config[step.name]
    parameters = sum(p.numel() for p in plan.network.parameters())
    epochs = "" if plan.images is None else f" = {step.steps * section.batch_size / plan.images:.1f} epochs"
    return (
        f"{parameters / 1e6:.1f} M parameters, {plan.flops / 1e9:.1f} GFLOP per image, "
        f"{step.steps} steps x {section.batch_size}{epochs}"
    )
