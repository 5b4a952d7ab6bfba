"""The plan printed before anything runs: what each stage will do, how large the models are, how long it may take."""

import time
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch.utils.flop_counter import FlopCounterMode

from ldm_train.checkpoints.parts import build as build_part
from ldm_train.images import groups_in_words, has_colours
from ldm_train.metrics.measures import parse_metrics
from ldm_train.pipeline import build
from ldm_train.pipeline import resume as stages

TRAINING_FLOPS = 3  # forward and backward cost about three forward passes

# Dense peak of 16-bit matrix products with 32-bit sums, TFLOP/s, by a part of the device's name (makers' data sheets; the
# first that fits counts).
PEAKS = {
    "B200": 2250, "GH200": 989, "H200": 989, "H100 PCIe": 756, "H100": 989, "H800": 989, "A100": 312, "A800": 312, "L40S": 362,
    "L40": 181, "L4": 121, "A10G": 70, "A10": 125, "A40": 150, "A6000": 155, "RTX 6000 Ada": 364, "RTX 5090": 210,
    "RTX 4090": 165, "RTX 4080": 97, "RTX 3090": 71, "V100": 125, "T4": 65,
}  # fmt: skip


def peak_flops(device: torch.device, precision: str, measured: float) -> float:
    """FLOP/s that MFU is in relation to: the data sheet's for known GPUs in 16 bits, else a measured matrix product."""
    if device.type == "cuda" and precision != "32":
        name = torch.cuda.get_device_name(device)
        for part, peak in PEAKS.items():
            if part in name:
                return peak * 1e12
    return measured


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


def _flops(option: str, module: torch.nn.Module, *inputs: Any, **named: Any) -> int:
    """Of one forward pass. Raises ValueError, naming the option, for a network that does not run."""
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module(*inputs, **named)
    except (RuntimeError, TypeError, IndexError, ZeroDivisionError) as error:
        shapes = ", ".join("x".join(map(str, i.shape)) for i in inputs)
        raise ValueError(f"{option} does not run on an input of {shapes}: {str(error).splitlines()[0]}") from error
    return counter.get_total_flops()


def _size(data: DictConfig) -> tuple[int, int]:
    return (data.image_size,) * 2 if isinstance(data.image_size, int) else tuple(data.image_size)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def _channels_in_words(config: DictConfig) -> str:
    """How what knows grey and RGB only sees pictures of other channels."""
    perceptual, evaluation = config.autoencoder.loss.perceptual, config.evaluation
    seeing = []
    if perceptual is not None and perceptual._target_.startswith("ldm_train."):
        seeing.append("the perceptual distance (autoencoder/loss/perceptual=none leaves it out)")
    for metric in parse_metrics(list(evaluation.metrics), list(evaluation.extractors)):
        if evaluation.extractors[metric.extractor]._target_.startswith("ldm_train."):
            seeing.append(metric.name)
    text = (
        f"  {config.data.channels} channels: pictures are shown in false colours, the first channel red, the last blue"
    )
    return f"{text}; {groups_in_words(config.data.channels)}: {', '.join(seeing)}" if seeing else text


def print_plan(chain: Any, todo: list[stages.Stage]) -> dict[str, tuple[float, float]]:
    """Prints one line per stage; sizes on the meta device, so nothing large is built. Returns for each that trains the
    FLOPs of training on one image (three forward passes of its network; the losses' networks and what is frozen are left
    out) and the peak of all devices.

    What can be wrong with the config is found here, before hours of training. Memory is that of weights, gradients, two
    Adam moments and the average, in float32; activations come on top.
    """
    config, machine = chain.config, chain.machine
    data = config.data
    height, width = _size(data)
    print(f"run {chain.folder} on {machine.world_size} x {machine.accelerator}, precision {machine.precision}")
    if not has_colours(data.channels):
        print(_channels_in_words(config))
    lines = {}
    with torch.device("meta"):
        network = build_part(build.plain(config.autoencoder.network), "autoencoder.network", chain.trust).eval()
        f = network.downsample_factor
        for name, part in (("data", data), ("autoencoder.data", build.stage_data(config, "autoencoder"))):
            h, w = _size(part)
            if h % f or w % f:
                raise ValueError(
                    f"{name}.image_size {h}x{w} is not divisible by the autoencoder's downsample_factor {f}; use "
                    f"{max(f, h // f * f)}x{max(f, w // f * f)} or another autoencoder"
                )
        lines["autoencoder"] = (network, _flops("autoencoder.network", network, torch.empty(1, data.channels, h, w)))
        denoiser = build_part(build.plain(config.diffusion.network), "diffusion.network", chain.trust)
        schedule = build_part(build.plain(config.diffusion.schedule), "diffusion.schedule", chain.trust)
        instantiate(config.diffusion.objective, schedule)
        sizes = {"context": (77, -1), "concat": (-1, height // f, width // f), "vector": (-1,)}
        extra = {
            slot: torch.empty(1, *(denoiser.condition_widths[slot] if n < 0 else n for n in shape))
            for slot, shape in sizes.items()
            if denoiser.condition_widths[slot]
        }
        g = f * denoiser.size_multiple
        if height % g or width % g:
            raise ValueError(
                f"data.image_size {height}x{width} gives latents of {height // f}x{width // f}, and this network takes "
                f"multiples of {denoiser.size_multiple}; use "
                f"{max(g, height // g * g)}x{max(g, width // g * g)} or another diffusion/network"
            )
        latent = torch.empty(1, denoiser.in_channels, height // f, width // f)
        lines["diffusion"] = (denoiser, _flops("diffusion.network", denoiser, latent, torch.empty(1), **extra))
    measured = _rate(machine.device)
    peak = peak_flops(machine.device, machine.precision, measured) * machine.world_size
    rate = measured * machine.world_size * 0.4  # what training reaches of it, roughly
    effort = {}
    anew = stages.STAGES[stages.STAGES.index(config.restart) :] if config.restart else ()
    for stage in todo:
        note = None if stage.name in anew else stages.read_note(chain.folder / stage.name)
        state = (
            "new"
            if note is None
            else ("finished" if note["finished"] and note["steps"] >= stage.steps else "to resume")
        )
        text = f"  {stage.name:<12}{state:<10}"
        if stage.name in lines and stage.steps:
            module, flops = lines[stage.name]
            section = config[stage.name]
            parameters = sum(p.numel() for p in module.parameters())
            memory = parameters * 4 * (5 if section.ema_decay else 4) / 2**30
            seconds = stage.steps * section.batch_size * flops * TRAINING_FLOPS / rate
            effort[stage.name] = (float(flops * TRAINING_FLOPS), peak)
            fields = ("image", *chain.fields) if stage.name == "diffusion" else ("image",)
            module_data = chain.data(stage.name, fields)
            images = module_data.count(module_data.train_split)
            if section.batch_size > images:
                raise ValueError(
                    f"{stage.name}.batch_size={section.batch_size} exceeds the {images} training images of {module_data.root}; "
                    "lower it or prepare more data"
                )
            text += (
                f"{parameters / 1e6:.1f} M parameters, {flops * TRAINING_FLOPS / 1e9:.1f} GFLOP per image, "
                f"{stage.steps} steps x {section.batch_size} = {stage.steps * section.batch_size / images:.1f} epochs, "
                f"{memory:.2f} GiB of weights and optimiser, about {_duration(seconds)}"
            )
        print(text, flush=True)
    return effort
