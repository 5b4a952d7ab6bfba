"""The sampling benchmark: our sampling loop around a U-Net against diffusers' loop around the same."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch

from ldm_train.bench.measuring import Clock, Settings, Table, check_agreement
from ldm_train.diffusion.denoiser import Denoiser, Network
from ldm_train.diffusion.guidance import classifier_free
from ldm_train.diffusion.parameterisation import Epsilon
from ldm_train.diffusion.schedule import NoiseSchedule
from ldm_train.models.unet import UNet
from ldm_train.rng import NoiseSource, reseed
from ldm_train.samplers.ddim import ddim

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012}
SCALE, BATCH = 3.0, 4


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


@dataclass(frozen=True)
class Setup:
    """The start, timesteps and conditions that all loops share, with 77 tokens and guidance. batch: pictures. steps: of
    the sampler."""

    device: torch.device
    batch: int
    steps: int

    @cached_property
    def schedule(self) -> NoiseSchedule:
        return NoiseSchedule("scaled_linear", **SCHEDULE).to(self.device)

    @cached_property
    def start(self) -> torch.Tensor:
        return NoiseSource(range(self.batch)).normal((4, 16, 16), "start", self.device)

    @cached_property
    def joined(self) -> dict[str, torch.Tensor]:
        context = torch.randn(2 * self.batch, 77, 768, device=self.device)
        return {"context": context, "context_mask": torch.ones(context.shape[:2], dtype=torch.bool, device=self.device)}

    def ours(self, network: Network, prepare: Callable[[dict[str, Any]], dict[str, Any]] | None = None) -> torch.Tensor:
        halves = zip(*(v.chunk(2) for v in self.joined.values()))
        cond, uncond = (Denoiser(network, self.schedule, Epsilon(), dict(zip(self.joined, h)), prepare) for h in halves)
        guided = classifier_free(cond, uncond, SCALE)
        times = self.schedule.timesteps(self.steps)
        return ddim(guided, self.start, times, self.schedule, NoiseSource(range(self.batch)))

    def theirs(self, network: Network) -> torch.Tensor:
        return _diffusers_loop(network, self.joined, self.start, self.steps, SCALE)


def _unet(setup: Setup) -> UNet:
    reseed("bench", "weights")
    return UNet(4, 64, (1, 2), 1, (0, 1), num_heads=4, context_dim=768).to(setup.device).eval()


@torch.no_grad()
def sampling(settings: Settings) -> list[Table]:
    """Measures a step of DDIM: the loop without the network, cached against recomputed keys and values, and a whole
    step. Raises ValueError if the two loops do not compute the same, and for steps that do not divide the schedule."""
    if 1000 % settings.steps:
        raise ValueError(
            f"steps={settings.steps} does not divide the schedule's 1000 timesteps: diffusers would round to others than ours; "
            "use 5, 8, 10 or 20"
        )
    setup = Setup(settings.device, settings.batch_size or BATCH, settings.steps)
    fixed, unet = torch.randn(2 * setup.batch, 4, 16, 16, device=setup.device), _unet(setup)

    def nothing(x: torch.Tensor, t: torch.Tensor, condition: dict[str, torch.Tensor]) -> torch.Tensor:
        return fixed  # a network without cost, so that only the loop is timed

    def network(x: torch.Tensor, t: torch.Tensor, condition: dict[str, Any]) -> torch.Tensor:
        with settings.machine.autocast():
            return unet(x, t, **condition).float()

    def keep(condition: dict[str, Any]) -> dict[str, Any]:
        return condition | {"context": unet.projected(condition["context"])}

    check_agreement("our loop and diffusers'", setup.ours(nothing), setup.theirs(nothing), 1e-3)
    compared = {
        "outside the network": {"ours": partial(setup.ours, nothing), "diffusers": partial(setup.theirs, nothing)},
        "keys and values of 77 tokens": {
            "kept": partial(setup.ours, network, keep),
            "computed in full": partial(setup.ours, network),
        },
        # diffusers' attention computes keys and values in every step.
        "with a small text U-Net": {
            "ours": partial(setup.ours, network, keep),
            "diffusers": partial(setup.theirs, network),
        },
    }
    tables = []
    for title, loops in compared.items():
        rows = Clock(setup.device, settings.runs, observe=False).run(loops, f"sampling {title}").rows()
        for row in rows:
            row.seconds /= setup.steps
            if row.first is not None:
                row.first /= setup.steps
        tables.append(Table("sampling", f"a step of guided DDIM, batch {setup.batch}: {title}", rows))
    return tables
