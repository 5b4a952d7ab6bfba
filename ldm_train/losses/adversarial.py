"""Adversarial terms of stage 1: hinge and vanilla losses, and the adaptive weight of VQGAN (Esser et al. 2021, eq. 7)."""

import torch
from torch import nn
from torch.nn import functional as F

from ldm_train.distributed import mean_over_ranks


def hinge_loss(logits_real: torch.Tensor, logits_fake: torch.Tensor) -> torch.Tensor:
    return 0.5 * (F.relu(1 - logits_real).mean() + F.relu(1 + logits_fake).mean())


def vanilla_loss(logits_real: torch.Tensor, logits_fake: torch.Tensor) -> torch.Tensor:
    return 0.5 * (F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean())


def conv_weight_gradient(conv: nn.Conv2d, features: torch.Tensor, grad_output: torch.Tensor) -> torch.Tensor:
    """Returns d loss / d conv.weight, given the layer's input and d loss / d output; float32, averaged over ranks."""
    gradient = torch.nn.grad.conv2d_weight(
        features.detach().float(), conv.weight.shape, grad_output.float(), stride=conv.stride, padding=conv.padding
    )
    return mean_over_ranks(gradient)


def adaptive_weight(
    conv: nn.Conv2d, features: torch.Tensor, g_rec: torch.Tensor, g_gan: torch.Tensor, limit: float
) -> torch.Tensor:
    """Returns ||grad_W rec|| / (||grad_W gan|| + 1e-4), clamped to [0, limit]; W is the decoder's last convolution.

    g_rec, g_gan: gradients of the two losses with respect to the reconstruction, (B, C, H, W).
    """
    rec = conv_weight_gradient(conv, features, g_rec).norm()
    gan = conv_weight_gradient(conv, features, g_gan).norm()
    return (rec / (gan + 1e-4)).clamp(0.0, limit)
