"""ldm-bench: speed compared with diffusers in the same process; the two are timed in turns, so that a busy machine slows both."""

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from omegaconf import DictConfig
from tqdm import tqdm

from ldm_train.devices import device_of
from ldm_train.diffusion.denoiser import Denoiser, Network
from ldm_train.diffusion.guidance import classifier_free
from ldm_train.diffusion.parameterisation import Epsilon
from ldm_train.diffusion.schedule import NoiseSchedule
from ldm_train.models.unet import UNet
from ldm_train.rng import NoiseSource, reseed
from ldm_train.samplers.ddim import ddim
from ldm_train.storage import write_json

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012}


def in_turns(
    measured: Mapping[str, Callable[[], object]], runs: int, device: torch.device, progress: str
) -> dict[str, float]:
    """Median seconds of each function, called in turns, after one warm-up round."""
    times: dict[str, list[float]] = {name: [] for name in measured}

    def now() -> float:
        if device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()

    for k in tqdm(range(runs + 1), desc=progress, unit="round", leave=False):
        for name, function in measured.items():
            begin = now()
            function()
            taken = now() - begin
            if k:
                times[name].append(taken)
    return {name: median(values) for name, values in times.items()}


def _diffusers_loop(
    network: Network, condition: dict[str, torch.Tensor], x_t: torch.Tensor, steps: int, scale: float
) -> torch.Tensor:
    """The sampling loop of diffusers' pipelines, with diffusers' own DDIM scheduler."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing", **SCHEDULE
    )
    scheduler.set_timesteps(steps, device=x_t.device)
    for t in scheduler.timesteps:
        inputs = scheduler.scale_model_input(torch.cat([x_t] * 2), t)
        output = network(inputs, t.expand(len(inputs)), condition)
        with_condition, without = output.chunk(2)
        x_t = scheduler.step(without + scale * (with_condition - without), t, x_t, return_dict=False)[0]
    return x_t


@torch.no_grad()
def sampling(config: DictConfig, device: torch.device) -> dict[str, Any]:
    """Times in ms per step: the loop without the network, cached against recomputed keys and values, and a whole step."""
    schedule, b, steps = NoiseSchedule("scaled_linear", **SCHEDULE).to(device), config.batch_size, config.steps
    x_t = NoiseSource(range(b)).normal((4, 16, 16), "start", device)
    times = schedule.timesteps(steps)
    context = torch.randn(2 * b, 77, 768, device=device)
    mask = torch.ones(2 * b, 77, dtype=torch.bool, device=device)
    halves = [{"context": c, "context_mask": m} for c, m in zip(context.chunk(2), mask.chunk(2))]
    joined = {"context": context, "context_mask": mask}
    fixed = torch.randn(2 * b, 4, 16, 16, device=device)
    reseed("bench", "weights")
    unet = UNet(4, 64, (1, 2), 1, (0, 1), num_heads=4, context_dim=768).to(device).eval()

    def nothing(x: torch.Tensor, t: torch.Tensor, condition: dict[str, torch.Tensor]) -> torch.Tensor:
        return fixed  # a network without cost, so that only the loop is timed

    def network(x: torch.Tensor, t: torch.Tensor, condition: dict[str, Any]) -> torch.Tensor:
        return unet(x, t, **condition)

    def keep(condition: dict[str, torch.Tensor]) -> dict[str, Any]:
        return condition | {"context": unet.projected(condition["context"])}

    def ours(network: Network, prepare: Callable[[dict[str, Any]], dict[str, Any]] | None = None) -> torch.Tensor:
        cond, uncond = (Denoiser(network, schedule, Epsilon(), c, prepare) for c in halves)
        return ddim(classifier_free(cond, uncond, 3.0), x_t, times, schedule, NoiseSource(range(b)))

    def theirs(network: Network) -> torch.Tensor:
        return _diffusers_loop(network, joined, x_t, steps, 3.0)

    agreement = float((ours(nothing) - theirs(nothing)).abs().max() / theirs(nothing).abs().max())
    if agreement > 1e-3:
        raise ValueError(f"the two loops do not compute the same ({agreement:.1e} apart); their times say nothing")
    compared = {
        "overhead per step [ms]": {"ours": partial(ours, nothing), "diffusers": partial(theirs, nothing)},
        "keys and values of 77 tokens, per step [ms]": {
            "kept": partial(ours, network, keep),
            "computed": partial(ours, network),
        },
        # diffusers' attention computes keys and values in every step.
        "a whole step with a small text U-Net [ms]": {
            "ours": partial(ours, network, keep),
            "diffusers": partial(theirs, network),
        },
    }
    results = {}
    for title, functions in compared.items():
        seconds = in_turns(functions, config.runs, device, title)
        results[title] = {name: 1000 * value / steps for name, value in seconds.items()}
    return results


def format_table(results: Mapping[str, Mapping[str, float]]) -> str:
    lines = []
    for title, row in results.items():
        (first, a), (second, b) = list(row.items())[:2]
        lines.append(f"{title:<46}{first} {a:9.3f}   {second} {b:9.3f}   ratio {a / b:.2f}")
    return "\n".join(lines)


def bench(config: DictConfig) -> dict[str, Any]:
    if config.what != "sampling":
        raise ValueError(f"what=sampling is what can be measured, not {config.what!r}")
    if config.runs < 1 or config.steps < 1 or config.batch_size < 1:
        raise ValueError("runs, steps and batch_size must be at least 1")
    device = device_of(config.accelerator)
    if config.threads:
        torch.set_num_threads(config.threads)
    try:
        import diffusers
    except ModuleNotFoundError as error:
        raise ValueError("ldm-bench measures against diffusers: pip install diffusers") from error
    name = (
        torch.cuda.get_device_name() if device.type == "cuda" else f"{device.type}, {torch.get_num_threads()} threads"
    )
    print(f"{name}; torch {torch.__version__}, diffusers {diffusers.__version__}; medians of {config.runs}")
    results = sampling(config, device)
    print(format_table(results))
    if config.out:
        write_json(Path(config.out), {"device": name, "torch": torch.__version__, "results": results})
    return results
