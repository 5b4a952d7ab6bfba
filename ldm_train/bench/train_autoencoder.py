"""The stage-1 benchmark: our training step with a single pass, against the published procedure with two, and against
the common one with one forward and two backward passes."""

import copy
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm_train.bench.measuring import Clock, Settings, Table, parameters_in_millions, peak_of
from ldm_train.bench.sizes import AUTOENCODERS, AUTOENCODERS_ON, AutoencoderSize
from ldm_train.bench.turns import train_in_turns
from ldm_train.losses.adversarial import hinge_loss
from ldm_train.losses.autoencoder import AutoencoderLoss
from ldm_train.losses.perceptual import LPIPS, VGG16_FILE, TinyPerceptual
from ldm_train.models.autoencoder import AutoencoderKL
from ldm_train.models.discriminator import PatchDiscriminator
from ldm_train.models.posterior import DiagonalGaussian
from ldm_train.rng import reseed
from ldm_train.training.autoencoder_task import AutoencoderTask
from ldm_train.training.fit import Machine

ADAM = {"lr": 1e-5, "betas": (0.5, 0.9)}
KL, DISC = 1e-6, 0.5  # the published weights of both terms
LIMIT = 1e4  # the largest adaptive weight


def random_lpips() -> LPIPS:
    """Returns LPIPS with a VGG16 of random weights: nothing is downloaded, and a step costs the same."""
    from torchvision.models.vgg import cfgs, make_layers

    reseed("bench", "vgg")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / VGG16_FILE
        torch.save({f"features.{k}": v for k, v in make_layers(cfgs["D"]).state_dict().items()}, path)
        return LPIPS(path)


def build(size: AutoencoderSize) -> tuple[AutoencoderKL, nn.Module, PatchDiscriminator]:
    """Builds (autoencoder, perceptual distance, discriminator)."""
    perceptual = random_lpips() if size.lpips else TinyPerceptual()
    reseed("bench", "weights")
    return AutoencoderKL(**size.network), perceptual, PatchDiscriminator(**size.discriminator)


def our_task(
    autoencoder: AutoencoderKL, perceptual: nn.Module, discriminator: nn.Module, optimizer: Callable, compiled: bool
) -> AutoencoderTask:
    """Returns our stage 1, with both adversarial terms from the first step."""
    loss = AutoencoderLoss(perceptual, discriminator, kl_weight=KL, disc_weight=DISC, disc_start=0)
    if compiled:
        autoencoder.encoder.compile()
        autoencoder.decoder.compile()
    for part in (autoencoder, loss):
        part.to(memory_format=torch.channels_last)
    return AutoencoderTask(autoencoder, loss, seed=0, optimizer=optimizer, lr_factor=lambda step: 1.0)


class Taming:
    """What both peers have in common: the loss of CompVis' LPIPSWithDiscriminator, computed on the graph of the whole
    reconstruction.

    tuned: channels_last. optimizer: parameters -> optimiser, called once for each player.
    """

    def __init__(
        self,
        autoencoder: AutoencoderKL,
        perceptual: nn.Module,
        discriminator: nn.Module,
        images: torch.Tensor,
        machine: Machine,
        optimizer: Callable,
        tuned: bool = False,
    ):
        layout = torch.channels_last if tuned else torch.contiguous_format
        parts = (part.to(machine.device, memory_format=layout) for part in (autoencoder, perceptual, discriminator))
        self.autoencoder, self.perceptual, self.discriminator = parts
        self.images, self.machine = images, machine
        self.generator = optimizer(self.autoencoder.parameters())
        self.critic = optimizer(self.discriminator.parameters())

    def taken(self) -> torch.Tensor:
        return self.images.to(self.machine.device, non_blocking=True)

    def reconstructed(self, images: torch.Tensor) -> tuple[torch.Tensor, DiagonalGaussian]:
        with self.machine.autocast():
            reconstructions, _, posterior = self.autoencoder(images)
        return reconstructions.float(), posterior

    def likelihood(self, images: torch.Tensor, reconstructions: torch.Tensor) -> torch.Tensor:
        """L1 plus the perceptual distance, which is broadcast over the picture, both summed over C, H, W and averaged
        over the batch."""
        distance = self.perceptual(reconstructions, images)
        per_image = (images - reconstructions).abs().flatten(1).sum(dim=1) + distance * images[0].numel()
        return per_image.mean()

    def generator_step(
        self, images: torch.Tensor, reconstructions: torch.Tensor, posterior: DiagonalGaussian
    ) -> torch.Tensor:
        """Computes the autoencoder's loss, its backward pass and its step; returns the loss."""
        nll = self.likelihood(images, reconstructions)
        with self.machine.autocast():
            adversarial = -self.discriminator(reconstructions).float().mean()
        weight = self.autoencoder.last_layer.weight
        (of_nll,) = torch.autograd.grad(nll, weight, retain_graph=True)
        (of_gan,) = torch.autograd.grad(adversarial, weight, retain_graph=True)
        adaptive = (of_nll.norm() / (of_gan.norm() + 1e-4)).clamp(0.0, LIMIT).detach()
        loss = nll + KL * posterior.kl().mean() + DISC * adaptive * adversarial
        self.generator.zero_grad()
        loss.backward()
        self.generator.step()
        return loss.detach()

    def critic_step(self, images: torch.Tensor, reconstructions: torch.Tensor) -> torch.Tensor:
        with self.machine.autocast():
            real, fake = self.discriminator(images), self.discriminator(reconstructions.detach())
        loss = hinge_loss(real.float(), fake.float())
        self.critic.zero_grad()
        loss.backward()
        self.critic.step()
        return loss.detach()


class TwoForwards(Taming):
    """CompVis' training_step under Lightning's two optimisers: each has its own pass through the autoencoder and
    LPIPS."""

    def __call__(self) -> None:
        images = self.taken()
        self.generator_step(images, *self.reconstructed(images))
        reconstructions, _ = self.reconstructed(images)
        self.likelihood(images, reconstructions)  # computed before branching on the optimiser, then unused
        self.critic_step(images, reconstructions)


class TwoBackwards(Taming):
    """One pass through the autoencoder, then a backward pass for each player, as most later trainers do."""

    def __call__(self) -> None:
        images = self.taken()
        reconstructions, posterior = self.reconstructed(images)
        self.generator_step(images, reconstructions, posterior)
        self.critic_step(images, reconstructions)


def measure(settings: Settings, name: str) -> Table:
    """Measures one size. All contenders start from the same weights."""
    size, machine = AUTOENCODERS[name], settings.machine
    count = settings.batch_size or size.batch
    parts = build(size)
    reseed("bench", "images")
    images = torch.rand(count, 3, size.side, size.side) * 2 - 1
    images = images.pin_memory() if machine.accelerator == "gpu" else images
    plain, fused = (partial(torch.optim.Adam, **ADAM, **more) for more in ({}, {"fused": True}))

    def peer(kind: type[Taming], tuned: bool) -> Taming:
        optimizer = fused if tuned else plain
        return kind(*copy.deepcopy(parts), images, machine, optimizer, tuned)

    peak, _ = peak_of(machine)
    others = {
        "CompVis' procedure": peer(TwoForwards, False),
        "one forward, two backwards": peer(TwoBackwards, False),
        "the same, channels_last, fused": peer(TwoBackwards, True),
    }
    batch: dict[str, Any] = {"image": images, "key": [str(i) for i in range(count)], "replaced": []}
    clock = Clock(machine.device, settings.runs)
    train_in_turns(our_task(*copy.deepcopy(parts), fused, False), batch, count, machine, clock, others)
    rows = clock.rows(count, peak)
    if settings.compile:
        ours, tuned = "ours, compiled", "one forward, two backwards, tuned and compiled"
        again, theirs = Clock(machine.device, settings.runs, counted=False), peer(TwoBackwards, True)
        theirs.autoencoder.encoder.compile()
        theirs.autoencoder.decoder.compile()
        task = our_task(*copy.deepcopy(parts), fused, True)
        train_in_turns(task, batch, count, machine, again, {tuned: theirs}, ours)
        rows += again.rows(count, peak, {ours: rows[0].flops, tuned: rows[3].flops})
    losses = "LPIPS and GAN" if size.lpips else "tiny perceptual loss and GAN"
    what = f"{name}: {parameters_in_millions(parts[0])}, {size.side} px, {losses}, batch {count}"
    return Table("train_autoencoder", what, rows)


def train_autoencoder(settings: Settings) -> list[Table]:
    """Measures a training step at each size; see `TwoForwards` and `TwoBackwards` for the peers."""
    return [measure(settings, name) for name in settings.chosen(AUTOENCODERS, **AUTOENCODERS_ON)]
