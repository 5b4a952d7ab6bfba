"""Feature extractors: images (B, C, H, W) in [-1, 1] -> features (B, D)."""

import torch
from torch import nn
from torch.nn import functional as F

from ldm_train.losses.perceptual import load_tiny


class TinyEval(nn.Module):
    """The shipped `tiny_eval` network, never used in a loss. Its numbers are called fid_tiny and kid_tiny, never fid.

    Images are resized to 64 pixels first; one channel is repeated.
    """

    name = "tiny"

    def __init__(self):
        super().__init__()
        self.network = load_tiny("tiny_eval")

    def train(self, mode: bool = True) -> "TinyEval":
        return super().train(False)  # frozen, also inside a task that trains

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        images = images.float()
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        if images.shape[-2:] != (64, 64):
            images = F.interpolate(images, (64, 64), mode="bilinear", antialias=True, align_corners=False)
        return self.network.pooled(images)
