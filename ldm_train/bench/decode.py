"""The decoding benchmark: latents to pictures, our decoder against diffusers' with the same weights."""

import torch

from ldm_train.bench.measuring import Clock, Settings, Table, check_agreement, peak_of
from ldm_train.bench.peers import diffusers_autoencoder
from ldm_train.bench.sizes import AUTOENCODERS, AUTOENCODERS_ON
from ldm_train.models.autoencoder import AutoencoderKL
from ldm_train.models.first_stage import FirstStage
from ldm_train.rng import reseed


@torch.no_grad()
def measure(settings: Settings, name: str) -> Table:
    """Measures one size: our FirstStage, as sampling uses it, and diffusers' decoder as shipped and in
    channels_last."""
    size, machine = AUTOENCODERS[name], settings.machine
    count = settings.batch_size or size.batch
    reseed("bench", "weights")
    ours = AutoencoderKL(**size.network).eval()
    shipped, tuned = (diffusers_autoencoder(ours, size.network).eval().to(machine.device) for _ in range(2))
    tuned.to(memory_format=torch.channels_last)
    first = FirstStage(ours).to(machine.device, memory_format=torch.channels_last)
    side = size.side // first.downsample_factor
    latents = torch.randn(count, first.latent_channels, side, side, device=machine.device)
    check_agreement("our decoder and diffusers'", first.decoded(latents), shipped.decode(latents).sample, 1e-2)

    def decoded(model: torch.nn.Module) -> torch.Tensor:
        with machine.autocast():
            return model.decode(latents).sample.float().clamp(-1, 1)

    def by_ours() -> torch.Tensor:
        with machine.autocast():
            return first.decode(latents)

    clock = Clock(machine.device, settings.runs).run(
        {
            "ours": by_ours,
            "diffusers, as shipped": lambda: decoded(shipped),
            "diffusers, tuned": lambda: decoded(tuned),
        },
        f"decode {name}",
    )
    what = f"{name}: latents {first.latent_channels}x{side}x{side} to {size.side} px, batch {count}"
    return Table("decode", what, clock.rows(count, peak_of(machine)[0]))


def decode(settings: Settings) -> list[Table]:
    """Measures decoding a batch at each size."""
    return [measure(settings, name) for name in settings.chosen(AUTOENCODERS, **AUTOENCODERS_ON)]
