"""Control images that steer a trained U-Net through a copy of its encoder (ControlNet, Zhang et al. 2023,
arXiv:2302.05543)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ldm_train.conditioning.edges import Edges
from ldm_train.conditioning.spatial import SpatialConditioner, check_labels, coloured, kept
from ldm_train.devices import to_device
from ldm_train.models.first_stage import FirstStage
from ldm_train.models.layers import zero_init
from ldm_train.models.unet import UNet

NAME = "control"  # the conditioner's name in a model
PUBLISHED = (16, 32, 96, 256)  # published widths of the convolutions at f = 8


class ControlPicture(SpatialConditioner):
    """Features of a control image at latent size, for a U-Net with a `Control`. The null condition is all-zero
    features, which an untrained one gives for every image. Subclasses set `field` and implement `seen`.

    width: of the U-Net's first level. factor: the first stage's f. channels: of the control image, 1 or 3
    hidden: widths of its convolutions, all but the first of stride 2; None: as published
    dropout: probability of the null condition in training
    Raises ValueError if `channels` is not supported, or `hidden` does not match `factor`.
    """

    channels_seen: tuple[int, ...] = (1, 3)

    def __init__(
        self, width: int, factor: int, channels: int = 3, hidden: Sequence[int] | None = None, dropout: float = 0.0
    ):
        super().__init__(dropout)
        if channels not in self.channels_seen:
            raise ValueError(
                f"channels={channels}: {self.field} are seen in {' or '.join(map(str, self.channels_seen))} channels"
            )
        halvings = int(math.log2(factor))
        hidden = [PUBLISHED[min(k, 3)] for k in range(halvings + 1)] if hidden is None else list(hidden)
        if 2 ** (len(hidden) - 1) != factor:
            raise ValueError(
                f"hidden={hidden}: latents of f = {factor} need {halvings + 1} widths, all but the first of stride 2"
            )
        self.factor, self.channels, self.widths, self.hidden = factor, channels, {"control": width}, hidden
        self.conv_in = nn.Conv2d(channels, hidden[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for narrow, wide in pairwise(hidden):
            self.blocks.append(nn.Conv2d(narrow, narrow, 3, padding=1))
            self.blocks.append(nn.Conv2d(narrow, wide, 3, padding=1, stride=2))
        self.conv_out = zero_init(nn.Conv2d(hidden[-1], width, 3, padding=1))

    @property
    def options(self) -> dict[str, Any]:
        """The arguments that build another instance of this class, as plain values and without dropout."""
        return {
            "width": self.widths["control"],
            "factor": self.factor,
            "channels": self.channels,
            "hidden": self.hidden,
        }

    def attach(self, first_stage: FirstStage) -> None:
        super().attach(first_stage)
        if self.factor != (f := first_stage.downsample_factor):
            raise ValueError(
                f"the control has factor {self.factor}, the autoencoder {f}; set diffusion.conditioning.conditioners.{NAME}.factor={f}"
            )

    def seen(self, values: torch.Tensor) -> torch.Tensor:
        """Converts entries of the field, on the device, to images (B, 1 or `channels`, H, W) in [0, 1]."""
        raise NotImplementedError

    def check(self, values: torch.Tensor) -> None:
        """Raises ValueError for entries, on the host, that `seen` cannot convert."""

    def forward(self, values: Any, drop: torch.Tensor) -> dict[str, torch.Tensor]:
        """Entries of the field -> control (B, width, h, w)."""
        self.check(values := torch.as_tensor(values))
        pictures = self.seen(to_device(values, self.device))
        self.latent_size(*pictures.shape[2:])
        features = F.silu(self.conv_in(pictures.expand(-1, self.channels, -1, -1)))
        for block in self.blocks:
            features = F.silu(block(features))
        return {"control": kept(self.conv_out(features), drop)}

    def picture(self, values: Any, size: Sequence[int]) -> torch.Tensor:
        return super().picture(self.seen(torch.as_tensor(values).cpu()).expand(-1, 3, -1, -1), size)


class EdgesControl(ControlPicture):
    """Control by edges, (B, 1, H, W) in [0, 1]."""

    field, declares = Edges.name, Edges()

    def seen(self, values: torch.Tensor) -> torch.Tensor:
        return values.float()


class DepthControl(ControlPicture):
    """Control by depth maps, (B, 1, H, W) of any range, each stretched to [0, 1]."""

    field = "depth"

    def seen(self, values: torch.Tensor) -> torch.Tensor:
        low, high = values.amin(dim=(2, 3), keepdim=True), values.amax(dim=(2, 3), keepdim=True)
        return (values.float() - low) / (high - low + 1e-3)


class SegmentationControl(ControlPicture):
    """Control by label maps, (B, H, W) int64 with labels 0 .. num_labels - 1, shown with one colour per label."""

    field, channels_seen = "segmentation", (3,)

    def __init__(
        self, num_labels: int, width: int, factor: int, hidden: Sequence[int] | None = None, dropout: float = 0.0
    ):
        super().__init__(width, factor, 3, hidden, dropout)
        self.num_labels = num_labels

    @property
    def options(self) -> dict[str, Any]:
        return {k: v for k, v in super().options.items() if k != "channels"} | {"num_labels": self.num_labels}

    def check(self, values: torch.Tensor) -> None:
        check_labels(values, self.num_labels, None)

    def check_labels(self, labels: torch.Tensor) -> None:
        self.check(labels)

    def seen(self, values: torch.Tensor) -> torch.Tensor:
        return (coloured(values, self.num_labels) + 1) / 2

    def null_values(self, count: int, latent_size: Sequence[int]) -> torch.Tensor:
        return torch.zeros(count, *self.image_size(latent_size), dtype=torch.long)


PICTURES: dict[str, type[ControlPicture]] = {
    kind.field: kind for kind in (EdgesControl, DepthControl, SegmentationControl)
}


def controlled(network: nn.Module) -> UNet:
    """Returns the network if it can have a `Control`, i.e. is a U-Net. Raises ValueError if it cannot."""
    if not isinstance(network, UNet):
        raise ValueError(f"a control is a copy of a U-Net's encoder, and this network is a {type(network).__name__}")
    return network


@dataclass(frozen=True)
class ControlNet:
    """Trains only the control of a model that has one: the copy of the encoder and the convolutions for the control
    image."""

    def attach(self, parts: nn.ModuleDict, name: str = "adapter") -> nn.ModuleDict:
        """Freezes everything else and returns the modules that train. Raises ValueError for a model without a
        control."""
        parts.requires_grad_(False)
        conditioners: Mapping[str, nn.Module] = parts["conditioners"]  # type: ignore[assignment]
        copy = controlled(parts["network"]).control
        if copy is None or NAME not in conditioners:
            raise ValueError("this model has no control; choose diffusion/adapter=control")
        return nn.ModuleDict({"copy": copy, "picture": conditioners[NAME]}).requires_grad_(True)
