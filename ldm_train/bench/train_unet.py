"""The stage-2 benchmark: our training step on cached latents, against diffusers' trainers around a U-Net with the same
weights."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ldm_train.bench.measuring import Clock, Settings, Table, check_agreement, parameters_in_millions, peak_of
from ldm_train.bench.peers import call_unet, diffusers_unet
from ldm_train.bench.sizes import UNETS, UNETS_ON, UNetSize
from ldm_train.bench.turns import OURS, train_in_turns
from ldm_train.conditioning.base import Conditioner
from ldm_train.data.batch import Field
from ldm_train.devices import to_device
from ldm_train.diffusion.objective import DiffusionObjective
from ldm_train.diffusion.schedule import NoiseSchedule
from ldm_train.latent_diffusion import LatentDiffusion
from ldm_train.models.autoencoder import AutoencoderKL
from ldm_train.models.first_stage import FirstStage
from ldm_train.models.unet import UNet
from ldm_train.rng import reseed
from ldm_train.training.diffusion_task import DiffusionTask
from ldm_train.training.fit import Machine

BETAS = {"beta_start": 0.00085, "beta_end": 0.012}
DROPPED = 0.1  # share of the conditions that training drops
CLIP = 1.0
ADAM = {"lr": 1e-4, "betas": (0.9, 0.999), "weight_decay": 1e-2}


class Encoded(Conditioner):
    """A conditioner whose context (B, L, dim) is already in the batch, like text encodings that were computed
    beforehand."""

    field = "encoded"
    declares = Field()

    def __init__(self, tokens: int, dim: int):
        super().__init__(DROPPED)
        self.tokens, self.widths = tokens, {"context": dim}
        self.register_buffer("_device", torch.zeros(()), persistent=False)

    def forward(self, values: torch.Tensor, drop: torch.Tensor) -> dict[str, torch.Tensor]:
        kept = to_device(~drop, self._device.device)[:, None, None]
        return {"context": to_device(values, self._device.device) * kept}

    def null_values(self, count: int, latent_size: Any) -> torch.Tensor:
        return torch.zeros(count, self.tokens, self.widths["context"])


def options_of(size: UNetSize) -> dict[str, Any]:
    return {"in_channels": size.latents[0]} | size.network


def build_unet(size: UNetSize) -> UNet:
    """Builds a U-Net with random weights instead of the zeros that it starts with, so that all its parts have an
    effect."""
    reseed("bench", "weights")
    unet = UNet(**options_of(size))
    for parameter in unet.parameters():
        if parameter.ndim > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return unet


def build_batch(size: UNetSize, count: int, pinned: bool = False) -> dict[str, Any]:
    """Returns cached moments (B, 2C, h, w) and, if the size has tokens, their context, on the host."""
    channels, height, width = size.latents
    reseed("bench", "batch")
    moments = torch.randn(count, 2 * channels, height, width)
    moments[:, channels:] -= 5.0  # a narrow posterior, as trained ones are
    batch: dict[str, Any] = {"moments": moments}
    if size.tokens:
        batch["encoded"] = torch.randn(count, size.tokens, size.network["context_dim"])
    batch = {name: tensor.pin_memory() if pinned else tensor for name, tensor in batch.items()}
    return batch | {"key": [str(i) for i in range(count)], "replaced": []}


def our_task(size: UNetSize, unet: UNet, compiled: bool = False) -> DiffusionTask:
    """Returns our stage 2 as in the recipes: epsilon, fused AdamW, clipping, averaged weights, channels_last."""
    channels, height, width = size.latents
    first = FirstStage(AutoencoderKL(channels, 32, (1,), 1, mid_attention=False))  # only its posterior is used
    conditioners = {"encoded": Encoded(size.tokens, size.network["context_dim"])} if size.tokens else {}
    schedule = NoiseSchedule("scaled_linear", **BETAS)
    model = LatentDiffusion(unet, first, schedule, conditioners, latent_size=(height, width))
    model.to(memory_format=torch.channels_last)
    if compiled:
        model.network.compile()
    optimizer = partial(torch.optim.AdamW, fused=True, **ADAM)
    return DiffusionTask(
        model, DiffusionObjective(schedule), seed=0, optimizer=optimizer, lr_factor=lambda step: 1.0, ema_decay=0.9999,
        clip_norm=CLIP,
    )  # fmt: skip


class DiffusersTrainer:
    """A step of diffusers' example trainers (train_unconditional.py, train_text_to_image.py) on cached latents: DDPM
    noise, epsilon, AdamW, clipping, its learning-rate schedule and EMAModel, with autocast instead of accelerate's.

    tuned: channels_last, fused AdamW and an average in one operation for all weights, none of which the examples use.
    """

    def __init__(self, unet: nn.Module, size: UNetSize, batch: dict[str, Any], machine: Machine, tuned: bool):
        from diffusers import DDPMScheduler
        from diffusers.training_utils import EMAModel

        self.unet = unet.to(machine.device, memory_format=torch.channels_last if tuned else torch.contiguous_format)
        self.unet.train()
        self.machine, self.batch = machine, batch
        self.scheduler = DDPMScheduler(beta_schedule="scaled_linear", **BETAS)
        self.optimizer = torch.optim.AdamW(unet.parameters(), **ADAM, fused=tuned or None)
        self.rates = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1.0)
        self.average = EMAModel(unet.parameters(), decay=0.9999, use_ema_warmup=True, foreach=tuned)
        self.average.to(machine.device)

    def __call__(self) -> torch.Tensor:
        device = self.machine.device
        mean, logvar = self.batch["moments"].to(device, non_blocking=True).chunk(2, dim=1)
        latents = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
        noise = torch.randn_like(latents)
        times = torch.randint(0, self.scheduler.config.num_train_timesteps, (len(latents),), device=device)
        context = self.batch.get("encoded")
        if context is not None:
            kept = torch.rand(len(latents), 1, 1, device=device) >= DROPPED
            context = context.to(device, non_blocking=True) * kept
        with self.machine.autocast():
            output = call_unet(self.unet, self.scheduler.add_noise(latents, noise, times), times, context)
        loss = F.mse_loss(output.float(), noise)
        loss.backward()
        nn.utils.clip_grad_norm_(self.unet.parameters(), CLIP)
        self.optimizer.step()
        self.rates.step()
        self.optimizer.zero_grad()
        self.average.step(self.unet.parameters())
        return loss.detach()


@torch.no_grad()
def check_same(size: UNetSize, ours: nn.Module, theirs: nn.Module) -> None:
    """Raises ValueError if the two networks give different outputs."""
    reseed("bench", "agreement")
    x, t = torch.randn(2, *size.latents), torch.tensor([10.0, 700.0])
    context = torch.randn(2, size.tokens, size.network["context_dim"]) if size.tokens else None
    check_agreement("our U-Net and diffusers'", ours(x, t, context), call_unet(theirs, x, t, context), 1e-3)


def measure(settings: Settings, name: str) -> Table:
    """Measures one size; compiled networks are measured after the eager ones, ours against theirs."""
    size, machine = UNETS[name], settings.machine
    count = settings.batch_size or size.batch
    unet = build_unet(size)
    theirs = diffusers_unet(unet, options_of(size), size.latents)
    check_same(size, unet.eval(), theirs.eval())
    batch = build_batch(size, count, pinned=machine.accelerator == "gpu")

    def trainer(tuned: bool, compiled: bool = False) -> Callable[[], torch.Tensor]:
        own = copy.deepcopy(theirs)
        if compiled:
            own.compile()
        return DiffusersTrainer(own, size, batch, machine, tuned)

    peak, _ = peak_of(machine)
    clock = Clock(machine.device, settings.runs)
    others = {"diffusers, as shipped": trainer(False), "diffusers, tuned": trainer(True)}
    train_in_turns(our_task(size, copy.deepcopy(unet).train()), batch, count, machine, clock, others)
    rows = clock.rows(count, peak)
    if settings.compile:
        ours, tuned = f"{OURS}, compiled", "diffusers, tuned and compiled"
        again = Clock(machine.device, settings.runs, counted=False)
        task = our_task(size, copy.deepcopy(unet).train(), compiled=True)
        train_in_turns(task, batch, count, machine, again, {tuned: trainer(True, compiled=True)}, ours)
        rows += again.rows(count, peak, {ours: rows[0].flops, tuned: rows[2].flops})
    shape = "x".join(map(str, size.latents))
    context = f", {size.tokens} tokens" if size.tokens else ""
    return Table("train_unet", f"{name}: {parameters_in_millions(unet)}, latents {shape}{context}, batch {count}", rows)


def train_unet(settings: Settings) -> list[Table]:
    """Measures a training step at each size; see `DiffusersTrainer` for the peer."""
    return [measure(settings, name) for name in settings.chosen(UNETS, **UNETS_ON)]
