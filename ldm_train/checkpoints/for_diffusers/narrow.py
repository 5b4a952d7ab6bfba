"""diffusers' networks with ldm_train's norms, which have fewer groups in narrow layers."""

import functools
from typing import Any

from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel, VQModel
from torch import nn


def set_groups(network: nn.Module) -> None:
    """Sets the groups of all norms: at least four channels in a group, at most 32 groups. (diffusers has one number for
    all widths.)"""
    for norm in network.modules():
        if isinstance(norm, nn.GroupNorm):
            most = max(1, min(32, norm.num_channels // 4))
            norm.num_groups = next(n for n in range(most, 0, -1) if norm.num_channels % n == 0)


class NarrowAutoencoderKL(AutoencoderKL):
    @functools.wraps(AutoencoderKL.__init__)
    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        set_groups(self)


class NarrowVQModel(VQModel):
    @functools.wraps(VQModel.__init__)
    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        set_groups(self)


class NarrowUNet2DModel(UNet2DModel):
    @functools.wraps(UNet2DModel.__init__)
    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        set_groups(self)


class NarrowUNet2DConditionModel(UNet2DConditionModel):
    @functools.wraps(UNet2DConditionModel.__init__)
    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        set_groups(self)
