"""Two ranks with half a batch each get the gradients and adaptive weight of one rank with the whole batch."""

import os
from pathlib import Path

import torch
import torch.distributed as dist
from forked import begun

from ldm_train.losses.autoencoder import AutoencoderLoss
from ldm_train.losses.perceptual import TinyPerceptual
from ldm_train.models.autoencoder import AutoencoderKL
from ldm_train.models.discriminator import PatchDiscriminator


def gradients(images: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Returns both players' gradients at fixed weights, with the posterior's mean decoded, and the adaptive weight."""
    torch.manual_seed(0)
    autoencoder = AutoencoderKL(z_channels=2, channels=16, channel_mult=(1, 2), num_res_blocks=1)
    discriminator = PatchDiscriminator(channels=8, num_layers=2)
    for p in discriminator.parameters():
        torch.nn.init.normal_(p, std=0.15)
    loss = AutoencoderLoss(TinyPerceptual(), discriminator, kl_weight=0.01, disc_start=0)
    rec, features, posterior = autoencoder(images, sample=False)
    scalar, logs = loss(images, rec, features, posterior, autoencoder.decoder.conv_out, 0)
    scalar.backward()
    return [p.grad for p in [*autoencoder.parameters(), *discriminator.parameters()]], logs["adaptive_weight"]


def rank(index: int, folder: str, images: torch.Tensor) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=index, world_size=2)
    found, weight = gradients(images.chunk(2)[index])
    for g in found:
        dist.all_reduce(g)  # what DDP does: the mean over ranks
        g /= 2
    torch.save((found, weight), f"{folder}/{index}.pt")
    dist.destroy_process_group()


def test_two_ranks_equal_one(tmp_path: Path) -> None:
    # The halves differ in contrast, so that an adaptive weight per rank would differ too.
    images = torch.rand(4, 3, 32, 32) * torch.tensor([0.2, 0.4, 1.0, 2.0]).view(4, 1, 1, 1) - 1
    expected, weight = gradients(images)
    processes = [begun(rank, index, str(tmp_path), images) for index in range(2)]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    for index in range(2):
        found, found_weight = torch.load(tmp_path / f"{index}.pt")
        torch.testing.assert_close(found_weight, weight, rtol=1e-5, atol=0)
        scale = max(g.norm() for g in expected)
        assert all((f - e).norm() <= 1e-5 * scale for f, e in zip(found, expected))
