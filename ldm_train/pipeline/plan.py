"""The plan printed before anything runs: the work of each stage, the size of its model, and an estimate of the time."""

import time
from functools import cache
from typing import TYPE_CHECKING

import torch
from omegaconf import DictConfig

from ldm_train.evaluation.evaluator import parse_metrics
from ldm_train.images import groups_in_words, has_colours
from ldm_train.pipeline.resume import Step, is_done, made_anew, read_note

if TYPE_CHECKING:
    from ldm_train.pipeline.run import Run

TRAINING_FLOPS = 3  # forward and backward cost about three forward passes

# Dense peak of 16-bit matrix products with 32-bit sums, TFLOP/s, by a part of the device's name (makers' data sheets; the
# first that fits counts).
PEAKS = {
    "B200": 2250, "GH200": 989, "H200": 989, "H100 PCIe": 756, "H100": 989, "H800": 989, "A100": 312, "A800": 312, "L40S": 362,
    "L40": 181, "L4": 121, "A10G": 70, "A10": 125, "A40": 150, "A6000": 155, "RTX 6000 Ada": 364, "RTX 5090": 210,
    "RTX 4090": 165, "RTX 4080": 97, "RTX 3090": 71, "V100": 125, "T4": 65,
}  # fmt: skip


def peak_flops(device: torch.device, precision: str, measured: float) -> float:
    """The FLOP/s that MFU is relative to: the data sheet's for known GPUs in 16 bits, else those of a measured matrix product."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" and precision != "32" else ""
    return next((peak * 1e12 for part, peak in PEAKS.items() if part in name), measured)


@cache
def _rate(device: torch.device) -> float:
    """Measured matmul speed of this device in FLOP/s (a fraction of a second)."""
    size = 1024 if device.type == "cpu" else 8192
    a = torch.randn(size, size, device=device, dtype=torch.float32 if device.type == "cpu" else torch.bfloat16)
    best = 0.0
    for _ in range(5):
        begin = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * size**3 / (time.perf_counter() - begin))
    return best


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def _channels_in_words(config: DictConfig) -> str:
    """How networks for grey and RGB see pictures of other channels, in words."""
    perceptual, evaluation, channels = config.autoencoder.loss.perceptual, config.evaluation, config.data.channels
    seeing = []
    if perceptual is not None and perceptual._target_.startswith("ldm_train."):
        seeing.append("the perceptual distance (autoencoder/loss/perceptual=none leaves it out)")
    for metric in parse_metrics(list(evaluation.metrics), list(evaluation.extractors), evaluation.kinds):
        if evaluation.extractors[metric.extractor]._target_.startswith("ldm_train."):
            seeing.append(metric.name)
    text = f"  {channels} channels: pictures are shown in false colours, the first channel red, the last blue"
    return f"{text}; {groups_in_words(channels)}: {', '.join(seeing)}" if seeing else text


def print_plan(run: "Run", steps: list[Step]) -> dict[str, tuple[float, float]]:
    """Prints one line per stage; sizes on the meta device, so nothing large is built. Returns for each that trains the
    FLOPs of training on one image (three forward passes of its network; the losses' networks and what is frozen are left
    out) and the peak of all devices. Ranks but the first check the plans alone: {}.
    Memory is that of weights, gradients, two Adam moments and the average, in float32; activations come on top."""
    config, machine = run.config, run.machine
    plans = {step.name: run.stages[step.name].plan(run) for step in steps}
    if machine.rank > 0:
        return {}
    print(f"run {run.folder} on {machine.world_size} x {machine.accelerator}, precision {machine.precision}")
    if not has_colours(config.data.channels):
        print(_channels_in_words(config))
    measured = _rate(machine.device)
    peak = peak_flops(machine.device, machine.precision, measured) * machine.world_size
    rate = measured * machine.world_size * 0.4  # training reaches about 40 % of it
    effort = {}
    anew = made_anew(run.order, steps, run.folder, config.restart)
    for step in steps:
        note = None if step.name in anew else read_note(run.folder / step.name)
        state = "new" if note is None else "finished" if is_done(note, step) else "to resume"
        text = f"  {step.name:<12}{state:<10}"
        if plan := plans[step.name]:
            section = config[step.name]
            parameters = sum(p.numel() for p in plan.network.parameters())
            text += f"{plan.begins}, " if plan.begins else ""
            memory = parameters * 4 * (5 if section.ema_decay else 4) / 2**30
            flops, samples = plan.flops * TRAINING_FLOPS, step.steps * section.batch_size
            effort[step.name] = (float(flops), peak)
            text += (
                f"{parameters / 1e6:.1f} M parameters, {flops / 1e9:.1f} GFLOP per image, "
                f"{step.steps} steps x {section.batch_size} = {samples / plan.images:.1f} epochs, "
                f"{memory:.2f} GiB of weights and optimiser, about {_duration(samples * flops / rate)}"
            )
        print(text, flush=True)
    return effort
