"""CLIP scores: how well an image fits a caption (Radford et al. 2021), for guidance and for metrics."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from ldm_train.conditioning.base import from_pretrained, loading, place_of
from ldm_train.images import in_threes, mean_over_groups


class ClipScore(nn.Module):
    """A frozen CLIP model. path: its folder (config.json, weights, tokenizer, preprocessor_config.json), or a name that
    transformers can download. Raises FileNotFoundError if it cannot be obtained."""

    def __init__(self, path: str):
        super().__init__()
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

        holds = "config.json, weights, tokenizer and preprocessor_config.json"
        path = place_of(path)
        with loading("CLIP model", path, holds):
            self.model = from_pretrained(CLIPModel, path)
            self.tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
            processor = AutoImageProcessor.from_pretrained(path, trust_remote_code=False)
        self.register_buffer("mean", torch.tensor(processor.image_mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(processor.image_std).view(1, 3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

    @property
    def logit_scale(self) -> float:
        """CLIP's trained factor that converts cosines to logits."""
        return float(self.model.logit_scale.exp())

    @torch.no_grad()
    def texts(self, captions: Sequence[str]) -> torch.Tensor:
        """B captions -> embeddings (B, D) of length 1."""
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            list(captions), padding=True, truncation=True, max_length=length, return_tensors="pt"
        ).to(self.mean.device)
        output = self.model.get_text_features(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        return F.normalize(getattr(output, "pooler_output", output).float(), dim=1)

    def embedded(self, images: torch.Tensor) -> torch.Tensor:
        """images (B, C, H, W) in [-1, 1] -> embeddings (B, D) of length 1, averaged over groups of channels;
        differentiable."""
        side = self.model.config.vision_config.image_size
        seen = F.interpolate(in_threes(images), (side, side), mode="bicubic", antialias=True, align_corners=False)
        output = self.model.get_image_features(pixel_values=((seen + 1) / 2 - self.mean) / self.std)
        features = mean_over_groups(getattr(output, "pooler_output", output).float(), images.shape[1])
        return F.normalize(features, dim=1)

    def forward(self, images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        """images (B, C, H, W) in [-1, 1], texts (B, D) from `texts` -> cosines (B,); differentiable."""
        return (self.embedded(images) * texts).sum(dim=1)
