"""Image embeddings from a frozen vision encoder as a condition, for variations of an image (as in unCLIP)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from ldm_train.conditioning.base import Conditioner, enlarged, from_pretrained, loading, place_of
from ldm_train.devices import to_device
from ldm_train.diffusion.schedule import NoiseSchedule
from ldm_train.images import in_threes, mean_over_groups
from ldm_train.losses.perceptual import load_tiny
from ldm_train.models.layers import timestep_embedding


class TinyVision(nn.Module):
    """The package's own `tiny_eval` network: (B, C, H, W) in [-1, 1] -> (B, 1, dim). Needs no download."""

    def __init__(self):
        super().__init__()
        self.network = load_tiny("tiny_eval")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network.embedding(images)[:, None]


class PretrainedVision(nn.Module):
    """A vision encoder of the transformers library (CLIP, DINOv2, ViT): (B, C, H, W) in [-1, 1] -> (B, L, dim),
    averaged over groups of channels.

    path: a local folder, or a name that transformers can download; loaded at first use
    hidden: return all hidden states; otherwise the pooled (for CLIP projected) embedding, L = 1
    """

    def __init__(self, path: str, hidden: bool = False):
        super().__init__()
        self.path, self.hidden = place_of(path), hidden
        self.model: nn.Module | None = None

    def take(self, processor: Any, model: nn.Module) -> None:
        """Uses this image processor and this model instead of loading them."""
        self.processor, self.model = processor, model.eval().requires_grad_(False)
        sizes = processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size
        self.side = int(sizes.get("height") or sizes.get("shortest_edge"))
        self.register_buffer("mean", torch.tensor(processor.image_mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(processor.image_std).view(1, 3, 1, 1), persistent=False)

    def loaded(self) -> "PretrainedVision":
        """Loads the weights if they are not loaded yet, and returns itself. Raises FileNotFoundError if they cannot be
        obtained."""
        if self.model is None:
            from transformers import AutoConfig, AutoImageProcessor, AutoModel, CLIPVisionModelWithProjection

            path = self.path
            with loading("vision encoder", path, "config.json, preprocessor_config.json and weights"):
                clip = AutoConfig.from_pretrained(path, trust_remote_code=False).model_type.startswith("clip")
                kind = CLIPVisionModelWithProjection if clip else AutoModel
                model = from_pretrained(kind, path)
                self.take(AutoImageProcessor.from_pretrained(path, trust_remote_code=False), model)
        return self

    @property
    def is_taken(self) -> bool:
        """Whether the model was already given or loaded."""
        return self.model is not None

    def savable(self) -> tuple[Any, nn.Module]:
        """Returns the image processor and the model, to be saved in a folder that `path` can name."""
        taken = self.loaded()
        return taken.processor, taken.model

    @property
    def is_local(self) -> bool:
        """Whether it can be loaded without network access."""
        return self.model is not None or Path(self.path).is_dir()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.loaded().to(images.device)
        seen = F.interpolate(in_threes(images), (self.side,) * 2, mode="bicubic", antialias=True, align_corners=False)
        output = self.model(pixel_values=((seen.clamp(-1, 1) + 1) / 2 - self.mean) / self.std)
        if self.hidden:
            return mean_over_groups(output.last_hidden_state, images.shape[1])
        pooled = output.image_embeds if hasattr(output, "image_embeds") else output.pooler_output
        return mean_over_groups(pooled[:, None], images.shape[1])


class Absent(nn.Module):
    """A placeholder for an encoder that is not available: (B, C, H, W) -> zeros (B, 1, dim)."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(images), 1, self.dim)


def read_statistics(path: str, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Reads the mean and standard deviation (dim,) of an encoder's embeddings, from a .safetensors file that holds
    `mean` and `std` (like the image_normalizer of diffusers' unCLIP pipelines), or a .th file with the two (as in
    Stable Diffusion 2 unCLIP). Raises FileNotFoundError or ValueError, naming the file."""
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"{path} is not a file; set statistics to a .safetensors file, or to 'unit' (mean 0, std 1; a trained model's own "
            "come with its weights)"
        )
    try:
        if path.endswith(".th"):
            state = dict(zip(("mean", "std"), torch.load(path, "cpu", weights_only=True)))
        else:
            state = load_file(path)
        statistics = [state[name].float().flatten() for name in ("mean", "std")]
    except Exception:  # the libraries raise many types of exceptions
        statistics = []
    if [len(part) for part in statistics] != [dim, dim] or not (statistics[1] > 0).all():
        raise ValueError(
            f"{path} does not hold `mean` and `std` (above 0) of {dim} values each, as .safetensors or a .th file of both"
        )
    return statistics[0], statistics[1]


class ImageEmbedding(Conditioner):
    """A condition on image embeddings, of the training image itself or, when sampling, of any image, through a trained
    projection.

    encoder: (B, C, H, W) in [-1, 1] -> (B, L, encoder_dim), frozen and not part of the model's weights
    encoder_dim: its width. slot: "vector" (mean over L) or "context"
    dim: width of the condition; the null condition is a learned embedding. None: no projection; the condition is the
        bare embedding, concatenated with that of its noise level if there are noise_levels, as in unCLIP (width 2 *
        encoder_dim), and the null condition is zero
    noise_levels: training adds noise of random timesteps below this number to the normalised embedding, and gives the
        level to the model (0: none)
    statistics: None: each embedding is normalised by itself (LayerNorm) and stays normalised. Otherwise it stays as the
        encoder gives it and is normalised only to add noise, as in unCLIP: "unit" with mean 0 and std 1, else with
        those of a file (`read_statistics`). They are saved with the weights.
    """

    field = "reference"

    def __init__(
        self,
        encoder: nn.Module,
        encoder_dim: int,
        dim: int | None,
        slot: str = "vector",
        noise_levels: int = 0,
        channels: int = 3,
        dropout: float = 0.1,
        statistics: str | None = None,
    ):
        super().__init__(dropout)
        if slot not in ("vector", "context"):
            raise ValueError(f"an image embedding goes to the slot 'vector' or 'context', not {slot!r}")
        self._encoder = (encoder.eval().requires_grad_(False),)  # a tuple hides it from state_dict and optimisers
        self.slot, self.noise_levels, self.channels, self.encoder_dim = slot, noise_levels, channels, encoder_dim
        self.level_dim = 0 if not noise_levels else (64 if dim else encoder_dim)
        self.widths = {slot: dim or encoder_dim + self.level_dim}
        self.projection = nn.Linear(encoder_dim + self.level_dim, dim) if dim else nn.Identity()
        null = torch.randn(dim) * 0.02 if dim else torch.zeros(self.widths[slot])
        self.null_embedding = nn.Parameter(null, requires_grad=bool(dim))
        if noise_levels:
            self.noise = NoiseSchedule("cosine")
        self.per_image = statistics is None
        if not self.per_image:
            unit = torch.zeros(encoder_dim), torch.ones(encoder_dim)
            mean, std = unit if statistics == "unit" else read_statistics(statistics, encoder_dim)
            self.register_buffer("mean", mean)
            self.register_buffer("std", std)

    @classmethod
    def trained_options(cls, options: dict[str, Any]) -> dict[str, Any]:
        return options if options.get("statistics") is None else options | {"statistics": "unit"}

    @property
    def encoder(self) -> nn.Module:
        return self._encoder[0]

    def require(self) -> None:
        if isinstance(self.encoder, PretrainedVision):
            self.encoder.loaded()

    def prepare_for_plan(self) -> Sequence[nn.Module]:
        encoder = self.encoder
        if isinstance(encoder, PretrainedVision) and not encoder.is_local:
            self._encoder = (Absent(self.encoder_dim),)
            raise FileNotFoundError(f"the vision encoder {encoder.path} is not there")
        return [encoder.loaded() if isinstance(encoder, PretrainedVision) else encoder]

    @torch.no_grad()
    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """images (B, C, H, W) in [-1, 1] -> embeddings (B, L, encoder_dim), each with mean 0 and variance 1 unless
        `statistics` are given. Raises ValueError if the encoder has another width."""
        features = self.encoder.to(self.device)(to_device(images, self.device)).float()
        if features.shape[2] != self.encoder_dim:
            raise ValueError(
                f"the image encoder gives {features.shape[2]} features, the config says {self.encoder_dim}"
            )
        return F.layer_norm(features, features.shape[-1:]) if self.per_image else features

    def noised(self, features: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
        """Adds noise of levels (B,) to embeddings (B, L, encoder_dim), for which they are normalised to mean 0 and std
        1."""
        mean, std = (0.0, 1.0) if self.per_image else (self.mean, self.std)
        return self.noise.add_noise((features - mean) / std, torch.randn_like(features), levels) * std + mean

    def forward(self, values: torch.Tensor, drop: torch.Tensor) -> dict[str, torch.Tensor]:
        """images (B, C, H, W), or embeddings (B, L, encoder_dim) from `embed` -> vector (B, dim) or context (B, L, dim)
        with its mask."""
        values = torch.as_tensor(values)
        features = to_device(values, self.device) if values.ndim == 3 else self.embed(values)
        if self.noise_levels:
            levels = torch.zeros(len(features), dtype=torch.long)
            if self.training:
                levels = torch.randint(self.noise_levels, (len(features),))
            levels = to_device(levels, features.device)
            if self.training:
                features = self.noised(features, levels)
            told = timestep_embedding(levels, self.level_dim)  # appended to every token
            features = torch.cat([features, told[:, None].expand(-1, features.shape[1], -1)], dim=2)
        projected = torch.where(
            to_device(drop, self.device)[:, None, None], self.null_embedding, self.projection(features)
        )
        if self.slot == "vector":
            return {"vector": projected.mean(dim=1)}
        mask = torch.ones(projected.shape[:2], dtype=torch.bool, device=projected.device)
        return {"context": projected, "context_mask": mask}

    def null_values(self, count: int, latent_size: Sequence[int]) -> torch.Tensor:
        return torch.zeros(count, self.channels, 64, 64)

    def picture(self, values: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
        return enlarged(values, size)

    def describe(self, values: torch.Tensor) -> list[str]:
        return [""] * len(values)
