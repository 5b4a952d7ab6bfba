"""diffusers' networks of the same shape and with the same weights as ours."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ldm_train.checkpoints import diffusers_describe as describe
from ldm_train.checkpoints.diffusers_export import autoencoder_tensors, unet_tensors
from ldm_train.checkpoints.parts import whole

REMEDY = "ldm-bench measures against diffusers: pip install diffusers"


def diffusers_version() -> str | None:
    """Returns the version of diffusers, None if it is not installed."""
    try:
        import diffusers
    except ModuleNotFoundError:
        return None
    return diffusers.__version__


def _built(network: nn.Module, kind: str, config: dict[str, Any]) -> nn.Module:
    import diffusers

    from ldm_train.checkpoints.for_diffusers import narrow

    made = getattr(narrow, f"Narrow{kind}") if describe.is_narrow(network) else getattr(diffusers, kind)
    return made(**config)


def diffusers_unet(network: nn.Module, options: Mapping[str, Any], latents: tuple[int, int, int]) -> nn.Module:
    """Returns diffusers' version of a `UNet`. options: those that `network` was built with. latents: (C, h, w)."""
    tree = whole({"_target_": "ldm_train.models.unet.UNet"} | dict(options))
    kind, config = describe.unet_config(tree, network, list(latents[1:]))
    model = _built(network, kind, config)
    model.load_state_dict(unet_tensors(network.state_dict(), tree["num_res_blocks"]))
    return model


def diffusers_autoencoder(network: nn.Module, options: Mapping[str, Any]) -> nn.Module:
    """Returns diffusers' version of an `AutoencoderKL`. options: those that `network` was built with."""
    tree = whole({"_target_": "ldm_train.models.autoencoder.AutoencoderKL"} | dict(options))
    kind, config = describe.autoencoder_config(tree, network, 1.0)
    model = _built(network, kind, config)
    model.load_state_dict(autoencoder_tensors(network.state_dict(), len(tree["channel_mult"])))
    return model


def call_unet(model: nn.Module, x: torch.Tensor, t: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor:
    return model(x, t).sample if context is None else model(x, t, encoder_hidden_states=context).sample
