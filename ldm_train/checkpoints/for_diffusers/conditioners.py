"""The conditioners of a model trained with ldm_train: class labels, captions, images and maps as inputs of the
U-Net."""

import re
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from tokenizers import Tokenizer
from torch import nn
from torch.nn import functional as F


class ClassLabel(nn.Module):
    """An embedding for each class and one for "no class", as a vector beside the timestep or as one context token."""

    def __init__(self, classes: list[str], dim: int, slot: str):
        super().__init__()
        self.classes, self.slot = classes, slot
        self.embedding = nn.Embedding(len(classes) + 1, dim)

    def forward(self, labels: list[Any], null: bool, **_: Any) -> dict[str, torch.Tensor]:
        """labels: class names or indices."""
        rows = [len(self.classes) if null else self.index(label) for label in labels]
        embedded = self.embedding(torch.tensor(rows, device=self.embedding.weight.device))
        if self.slot == "vector":
            return {"class_labels": embedded}
        mask = torch.ones(len(rows), 1, device=embedded.device)
        return {"encoder_hidden_states": embedded[:, None], "encoder_attention_mask": mask}

    def index(self, label: Any) -> int:
        if label in self.classes:
            return self.classes.index(label)
        if str(label).isdigit() and int(label) < len(self.classes):
            return int(label)
        raise ValueError(f"unknown class {label!r}; this model knows {', '.join(self.classes)}")


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, head_dim: int):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, heads * head_dim, bias=False) for _ in range(3))
        self.to_out = nn.Sequential(nn.Linear(heads * head_dim, dim))

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        q, k, v = (
            layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer in (self.to_q, self.to_k, self.to_v)
        )
        attended = F.scaled_dot_product_attention(q, k, v, None if mask is None else mask[:, None, None])
        return self.to_out(attended.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """A pre-norm transformer layer in which heads * head_dim need not equal dim."""

    def __init__(self, dim: int, heads: int, head_dim: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = Attention(dim, heads, head_dim)
        self.linear1, self.linear2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        x = x + self.attention(self.norm1(x), mask)
        return x + self.linear2(F.gelu(self.linear1(self.norm2(x))))


class Layers(nn.Module):
    def __init__(self, dim: int, depth: int, heads: int, head_dim: int):
        super().__init__()
        self.layers = nn.ModuleList(Layer(dim, heads, head_dim) for _ in range(depth))

    def forward(self, x: torch.Tensor, src_key_padding_mask: torch.Tensor | None = None) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, None if src_key_padding_mask is None else ~src_key_padding_mask)
        return x


class TokenEncoder(nn.Module):
    def __init__(self, words: int, dim: int, depth: int, heads: int, max_length: int, head_dim: int | None):
        super().__init__()
        self.token_embedding = nn.Embedding(words, dim)
        self.position_embedding = nn.Parameter(torch.zeros(max_length, dim))
        if head_dim is None or heads * head_dim == dim:
            layer = nn.TransformerEncoderLayer(dim, heads, 4 * dim, 0.0, "gelu", batch_first=True, norm_first=True)
            self.transformer: nn.Module = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        else:
            self.transformer = Layers(dim, depth, heads, head_dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        x = self.token_embedding(ids) + self.position_embedding
        return self.norm(self.transformer(x, src_key_padding_mask=None if mask is None else ~mask))


class TrainedText(nn.Module):
    """A text encoder trained with the U-Net: its hidden states, and with `pooled` also their mean beside the
    timestep. learned: words of the user's that stand for several tokens -> these tokens."""

    def __init__(
        self, tokenizer: str, dim: int, depth: int, heads: int, max_length: int, pooled: bool, masked: bool,
        head_dim: int | None, special: list[int], learned: dict[str, list[str]] | None = None,
    ):  # fmt: skip
        super().__init__()
        self.learned = learned or {}
        self.tokenizer = Tokenizer.from_str(tokenizer)
        self.special, self.max_length, self.pooled, self.masked = special, max_length, pooled, masked
        self.encoder = TokenEncoder(self.tokenizer.get_vocab_size(), dim, depth, heads, max_length, head_dim)

    def spelled(self, caption: str) -> str:
        """Returns a caption with every learned word, if it stands alone, replaced by its tokens."""
        if not self.learned:
            return caption
        words = "|".join(map(re.escape, sorted(self.learned, key=len, reverse=True)))
        return re.sub(rf"(?<!\w)({words})(?!\w)", lambda found: " ".join(self.learned[found[0]]), caption)

    def forward(self, captions: list[str], null: bool, **_: Any) -> dict[str, torch.Tensor]:
        pad, start, end = self.special
        device = self.encoder.token_embedding.weight.device
        ids = torch.full((len(captions), self.max_length), pad)
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        texts = [""] * len(captions) if null else [self.spelled(caption or "") for caption in captions]
        for row, encoding in enumerate(self.tokenizer.encode_batch(texts, add_special_tokens=False)):
            tokens = [start, *encoding.ids[: self.max_length - 2], end]
            ids[row, : len(tokens)], mask[row, : len(tokens)] = torch.tensor(tokens), True
        ids, mask = ids.to(device), mask.to(device)
        x = self.encoder(ids, mask if self.masked else None)
        made = {
            "encoder_hidden_states": x,
            "encoder_attention_mask": (mask if self.masked else torch.ones_like(mask)).to(x),
        }
        if self.pooled:
            share = mask[..., None].to(x)
            made["class_labels"] = (x * share).sum(dim=1) / share.sum(dim=1)
        return made


class LowResolution(nn.Module):
    """An image that is `factor` times smaller than the result, resized to the latents."""

    def __init__(self, factor: int, downsample_factor: int, channels: int):
        super().__init__()
        self.factor, self.downsample_factor, self.channels = factor, downsample_factor, channels

    def size(self, image: torch.Tensor) -> tuple[int, int]:
        height, width = (side * self.factor // self.downsample_factor for side in image.shape[-2:])
        return height, width

    def forward(self, image: torch.Tensor, null: bool, **_: Any) -> dict[str, torch.Tensor]:
        if image.shape[-2:] != self.size(image):
            image = F.interpolate(image, self.size(image), mode="bicubic", antialias=True, align_corners=False)
        return {"concat": torch.zeros_like(image) if null else image}


class SemanticMap(nn.Module):
    """A label map (B, H, W) as the share of each label in every latent cell, projected to `channels`."""

    def __init__(self, num_labels: int, channels: int, downsample_factor: int, ignore: int | None):
        super().__init__()
        self.num_labels, self.downsample_factor, self.ignore = num_labels, downsample_factor, ignore
        self.channel_mapper = nn.Conv2d(num_labels, channels, 1, bias=False)

    def size(self, labels: torch.Tensor) -> tuple[int, int]:
        return labels.shape[-2] // self.downsample_factor, labels.shape[-1] // self.downsample_factor

    def forward(self, labels: torch.Tensor, null: bool, **_: Any) -> dict[str, torch.Tensor]:
        weight = self.channel_mapper.weight
        if self.ignore is not None:
            labels = labels.masked_fill(labels == self.ignore, self.num_labels)
        one_hot = F.one_hot(labels.to(weight.device), self.num_labels + 1)[..., :-1].permute(0, 3, 1, 2)
        shares = F.avg_pool2d(one_hot.to(weight), self.downsample_factor)
        return {"concat": self.channel_mapper(torch.zeros_like(shares) if null else shares)}


class MaskedImage(nn.Module):
    """The latents of an image without its hole, and the mask (B, 1, H, W; 1 in the hole) resized to the latents."""

    def __init__(self, hole: float, span: list[float], nearest: bool, first: bool, downsample_factor: int):
        super().__init__()
        self.hole, self.span, self.nearest, self.first = hole, span, nearest, first
        self.downsample_factor = downsample_factor

    def size(self, given: tuple[torch.Tensor, torch.Tensor]) -> tuple[int, int]:
        height, width = (side // self.downsample_factor for side in given[0].shape[-2:])
        return height, width

    def forward(self, given: tuple[torch.Tensor, torch.Tensor], null: bool, encode: Any) -> dict[str, torch.Tensor]:
        image, mask = given
        mask = torch.ones_like(mask) if null else mask
        latents = encode(image.masked_fill(mask > 0.5, self.hole))
        size = latents.shape[-2:]
        small = F.interpolate(mask, size, mode="nearest") if self.nearest else F.adaptive_max_pool2d(mask, size)
        parts = [latents, self.span[0] + (self.span[1] - self.span[0]) * small]
        return {"concat": torch.cat(parts[::-1] if self.first else parts, dim=1)}


KINDS = {
    "class_label": ClassLabel,
    "prompt": TrainedText,
    "low_resolution": LowResolution,
    "segmentation": SemanticMap,
    "masked_image": MaskedImage,
}
DIMS = {"encoder_hidden_states": 1, "encoder_attention_mask": 1, "class_labels": 1, "concat": 1}


class Conditioners(ModelMixin, ConfigMixin):
    """All conditioners of a model. parts: {name: options}, in the order in which their outputs are concatenated;
    `dropped`: whether training sometimes left out this condition. vector: (in, out) widths of a projection of the
    joined vectors."""

    @register_to_config
    def __init__(self, parts: dict[str, dict[str, Any]], vector: list[int] | None = None):
        super().__init__()
        self.dropped = {name: options["dropped"] for name, options in parts.items()}
        made = {n: KINDS[n](**{k: v for k, v in options.items() if k != "dropped"}) for n, options in parts.items()}
        self.conditions = nn.ModuleDict(made)
        self.register_buffer("place", torch.zeros(1))  # diffusers cannot load a model without a tensor
        self.projection = None
        if vector is not None:
            self.projection = nn.Sequential(nn.Linear(*vector), nn.SiLU(), nn.Linear(vector[1], vector[1]))

    def size(self, given: dict[str, Any]) -> tuple[int, int] | None:
        """Returns the latents' size (h, w) if an image or a map determines it, otherwise None."""
        sizes = (
            part.size(given[name]) for name, part in self.conditions.items() if hasattr(part, "size") and name in given
        )
        return next(sizes, None)

    def forward(self, given: dict[str, Any], count: int, null: bool, encode: Any) -> dict[str, torch.Tensor]:
        """given: {name: `count` entries}; other conditions are null. null: make all conditions null, except images and
        maps that training never left out. Raises ValueError for a missing image or map."""
        outputs = []
        for name, part in self.conditions.items():
            spatial = hasattr(part, "size")
            if spatial and name not in given:
                raise ValueError(f"this model needs {name.replace('_', ' ')}")
            out = (null or name not in given) and (self.dropped[name] or not spatial)
            outputs.append(part(given.get(name, [None] * count), null=out, encode=encode))
        joined = {
            key: torch.cat([o[key] for o in outputs if key in o], dim)
            for key, dim in DIMS.items()
            if any(key in o for o in outputs)
        }
        if self.projection is not None:
            joined["class_labels"] = self.projection(joined["class_labels"])
        return joined
