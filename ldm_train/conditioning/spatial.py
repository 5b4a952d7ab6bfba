"""Conditions that are images or maps: label maps, low-resolution images, masked images, depth. They are concatenated to
the latents."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from ldm_train.conditioning.base import Conditioner, enlarged
from ldm_train.devices import to_device
from ldm_train.diffusion.schedule import NoiseSchedule
from ldm_train.models.first_stage import FirstStage
from ldm_train.models.layers import timestep_embedding


class SpatialConditioner(Conditioner):
    """Base class of conditioners on images or maps. It refers to the model's first stage, which is not one of its
    submodules.

    `null_values` and `picture` are for maps, (B, 1, H, W) in [0, 1], unless a subclass overrides them.
    """

    def __init__(self, dropout: float = 0.0):
        super().__init__(dropout)
        self._attached: tuple[FirstStage, ...] = ()  # a tuple hides it from state_dict and optimisers

    def attach(self, first_stage: FirstStage) -> None:
        self._attached = (first_stage,)

    @property
    def first_stage(self) -> FirstStage:
        return self._attached[0]

    @property
    def device(self) -> torch.device:
        return self.first_stage.scale.device

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """Returns the latent size (h, w) of an image. Raises ValueError if the image's size is not divisible by f."""
        f = self.first_stage.downsample_factor
        if height % f or width % f:
            raise ValueError(f"a condition of {height}x{width} pixels is not divisible by downsample_factor {f}")
        return height // f, width // f

    def image_size(self, latent_size: Sequence[int]) -> tuple[int, int]:
        f = self.first_stage.downsample_factor
        return latent_size[0] * f, latent_size[1] * f

    def null_values(self, count: int, latent_size: Sequence[int]) -> torch.Tensor:
        return torch.zeros(count, 1, *self.image_size(latent_size))

    def picture(self, values: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
        return enlarged(values, size) * 2 - 1

    def describe(self, values: Any) -> list[str]:
        return [""] * len(values)


def kept(values: torch.Tensor, drop: torch.Tensor) -> torch.Tensor:
    """Returns `values` (B, ...) with zeros for the dropped samples."""
    return values.masked_fill(to_device(drop, values.device).view(-1, *[1] * (values.ndim - 1)), 0)


def check_labels(labels: torch.Tensor, num_labels: int, ignore: int | None) -> None:
    """Raises ValueError for labels that a model does not have. ignore: an additional label that is allowed."""
    counted = labels if ignore is None else labels[labels != ignore]
    if counted.numel() and (counted.min() < 0 or counted.max() >= num_labels):
        raise ValueError(
            f"label {int(counted.max())} in a segmentation map, this model has {num_labels} labels (0 to {num_labels - 1}); set "
            "the num_labels of its conditioner (diffusion.conditioning.conditioners.<name>.num_labels)"
        )


def coloured(labels: torch.Tensor, num_labels: int) -> torch.Tensor:
    """labels (B, H, W) -> (B, 3, H, W) in [-1, 1]: one colour per label, far from those of neighbouring labels; black
    for 0."""
    hues = torch.arange(num_labels + 1, dtype=torch.float64) * 0.618034 * 2 * torch.pi
    phases = torch.tensor([0.0, 2.094395, 4.188790], dtype=torch.float64)
    palette = torch.cos(hues[:, None] + phases).float()
    palette[0] = -1
    return to_device(palette, labels.device)[labels.clamp(max=num_labels)].permute(0, 3, 1, 2)


class SemanticMap(SpatialConditioner):
    """A label map: the share of each label in every latent cell, projected to `channels` (LDM's SpatialRescaler).

    num_labels: labels are 0 .. num_labels - 1. ignore: a label for "unlabelled", which counts towards no share.
    channels: of the projection. The null condition is an empty map.
    """

    field = "segmentation"

    def __init__(self, num_labels: int, channels: int = 3, ignore: int | None = None, dropout: float = 0.0):
        super().__init__(dropout)
        self.num_labels, self.ignore, self.widths = num_labels, ignore, {"concat": channels}
        self.channel_mapper = nn.Conv2d(num_labels, channels, 1, bias=False)

    def check_labels(self, labels: torch.Tensor) -> None:
        check_labels(labels, self.num_labels, self.ignore)

    def shares(self, labels: torch.Tensor) -> torch.Tensor:
        """labels (B, H, W) -> the average of their one-hot map over each latent cell, (B, num_labels, h, w).

        Raises ValueError for labels that the model does not have.
        """
        self.check_labels(labels)
        counted = labels if self.ignore is None else labels.masked_fill(labels == self.ignore, self.num_labels)
        counted, f = to_device(counted, self.device), self.first_stage.downsample_factor
        h, w = self.latent_size(*labels.shape[1:])
        cells = counted.view(-1, h, f, w, f).permute(0, 1, 3, 2, 4).reshape(-1, h, w, f * f)
        counts = torch.zeros(*cells.shape[:3], self.num_labels + 1, device=self.device)
        counts.scatter_add_(3, cells, torch.ones_like(cells, dtype=counts.dtype))
        return counts[..., : self.num_labels].permute(0, 3, 1, 2) / f**2

    def forward(self, values: torch.Tensor, drop: torch.Tensor) -> dict[str, torch.Tensor]:
        """labels (B, H, W) int64 -> concat (B, channels, h, w)."""
        shares = self.shares(torch.as_tensor(values))
        return {"concat": self.channel_mapper(kept(shares, drop))}

    def picture(self, values: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
        return enlarged(coloured(torch.as_tensor(values), self.num_labels), size)

    def null_values(self, count: int, latent_size: Sequence[int]) -> torch.Tensor:
        return torch.zeros(count, *self.image_size(latent_size), dtype=torch.long)


class LowResolution(SpatialConditioner):
    """A low-resolution image, resized to the latents if its `factor` differs from the first stage's.

    channels: of the image. factor: how much smaller it is. noise_levels: training adds noise of random timesteps below
        this number to it, which makes the model robust to inputs that are not clean (0: none); the level is then added
        to the timestep embedding as `vector` of `vector_dim`, or as the bare number if that is 1 (for a U-Net with
        `vector_classes`).
    """

    field = "lowres"

    def __init__(
        self, channels: int = 3, factor: int = 4, noise_levels: int = 0, vector_dim: int = 256, dropout: float = 0.0
    ):
        super().__init__(dropout)
        self.channels, self.factor, self.noise_levels, self.vector_dim = channels, factor, noise_levels, vector_dim
        self.widths = {"concat": channels} | ({"vector": vector_dim} if noise_levels else {})
        if noise_levels:
            self.noise = NoiseSchedule("scaled_linear", 0.0001, 0.02)

    def forward(self, values: torch.Tensor, drop: torch.Tensor) -> dict[str, torch.Tensor]:
        """images (B, C, h', w') in [-1, 1] -> concat (B, C, h, w), with noise levels also vector (B, vector_dim).

        Noise is added in training mode only; sampling conditions on the clean image at level 0.
        """
        images = to_device(torch.as_tensor(values), self.device)
        size = self.latent_size(images.shape[2] * self.factor, images.shape[3] * self.factor)
        if images.shape[2:] != size:
            images = F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False)
        if not self.noise_levels:
            return {"concat": kept(images, drop)}
        levels = torch.zeros(len(images), dtype=torch.long)
        if self.training:
            levels = torch.randint(self.noise_levels, (len(images),))
        levels = to_device(levels, images.device)
        if self.training:
            images = self.noise.add_noise(images, torch.randn_like(images), levels)
        embedded = levels.float()[:, None] if self.vector_dim == 1 else timestep_embedding(levels, self.vector_dim)
        return {"concat": kept(images, drop), "vector": kept(embedded, drop)}

    def picture(self, values: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
        return enlarged(values, size)

    def null_values(self, count: int, latent_size: Sequence[int]) -> torch.Tensor:
        height, width = self.image_size(latent_size)
        return torch.zeros(count, self.channels, height // self.factor, width // self.factor)


class InpaintingForm(NamedTuple):
    """How the hole and the mask are encoded for the U-Net.

    hole: value of its pixels in the image that is encoded. span: values of the mask outside and inside the hole
    nearest: the mask is resized by nearest neighbour; otherwise a latent cell counts as hole if any of its pixels does
    first: the mask comes before the latents. sampled: training samples latents from the posterior; otherwise it takes
        the mean
    """

    hole: float = -1.0
    span: tuple[float, float] = (0.0, 1.0)
    nearest: bool = False
    first: bool = False
    sampled: bool = False


INPAINTING_FORMS = {
    "covering": InpaintingForm(),  # ours: nearest neighbour can miss a hole, and the latents encode its -1 as a colour
    "ldm": InpaintingForm(span=(-1.0, 1.0), nearest=True),  # CompVis/latent-diffusion, scripts/inpaint.py
    "sd2": InpaintingForm(hole=0.0, nearest=True, first=True, sampled=True),  # LatentInpaintDiffusion; SD 1.5 likewise
}


class MaskedImageCondition(SpatialConditioner):
    """Inpainting: the latents of the image without its hole, and the mask at latent size.

    form: a key of INPAINTING_FORMS; "ldm" and "sd2" are those of the published models. (Sampling takes the posterior's
        mean in all of them, so that an image depends only on its seed.)
    The null condition is an image that is all hole, so a mask of all ones amounts to unconditional sampling.
    """

    field = "masked_image"

    def __init__(self, channels: int = 3, dropout: float = 0.0, form: str = "covering"):
        super().__init__(dropout)
        if form not in INPAINTING_FORMS:
            raise ValueError(
                f"there is no form {form!r} of an inpainting condition; choose {', '.join(INPAINTING_FORMS)}"
            )
        self.channels, self.form = channels, INPAINTING_FORMS[form]

    @property
    def widths(self) -> dict[str, int]:
        return {"concat": self.first_stage.latent_channels + 1}

    def forward(self, values: torch.Tensor, drop: torch.Tensor) -> dict[str, torch.Tensor]:
        """(B, C + 1, H, W), image with the hole at -1 and mask -> concat (B, latent channels + 1, h, w)."""
        values = to_device(torch.as_tensor(values), self.device)
        size = self.latent_size(*values.shape[2:])
        mask = values[:, -1:].masked_fill(to_device(drop, values.device).view(-1, 1, 1, 1), 1.0)
        images = values[:, :-1].masked_fill(mask > 0.5, self.form.hole)
        posterior = self.first_stage.posterior(self.first_stage.encode_moments(images))
        latents = posterior.sample() if self.form.sampled and self.training else posterior.mean
        small = F.interpolate(mask, size, mode="nearest") if self.form.nearest else F.adaptive_max_pool2d(mask, size)
        outside, inside = self.form.span
        parts = [self.first_stage.scaled(latents), outside + (inside - outside) * small]
        return {"concat": torch.cat(parts[::-1] if self.form.first else parts, dim=1)}

    def picture(self, values: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
        return torch.as_tensor(values)[:, :-1].cpu()

    def null_values(self, count: int, latent_size: Sequence[int]) -> torch.Tensor:
        return torch.zeros(count, self.channels + 1, *self.image_size(latent_size))


class DepthMap(SpatialConditioner):
    """Depth maps at latent size, each stretched to [-1, 1] as in SD 2's depth model. The null condition is all 0."""

    field, widths = "depth", {"concat": 1}

    def forward(self, values: torch.Tensor, drop: torch.Tensor) -> dict[str, torch.Tensor]:
        """(B, 1, H, W), any range -> concat (B, 1, h, w)."""
        values = to_device(torch.as_tensor(values), self.device).float()
        size = self.latent_size(*values.shape[2:])
        depth = F.interpolate(values, size, mode="bicubic", align_corners=False)  # not antialiased, as published
        low, high = depth.amin(dim=(2, 3), keepdim=True), depth.amax(dim=(2, 3), keepdim=True)
        return {"concat": kept(2 * (depth - low) / (high - low + 0.001) - 1, drop)}
