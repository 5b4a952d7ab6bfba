"""Feature extractors: images (B, C, H, W) in [-1, 1] -> features (B, D)."""

import torch
from torch import nn

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
        return self.network.embedding(images)
