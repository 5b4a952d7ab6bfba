"""Feature extractors: images (B, C, H, W) in [-1, 1] -> features (B, D).

An extractor's name in the config is part of the metrics' names. One with classes also has `logits` (features -> (B,
classes)), for the Inception score; one that embeds text has `texts` (captions -> (B, D)), for CLIPScore. A user's own
module only needs to be callable.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from ldm_train.conditioning.clip_score import ClipScore
from ldm_train.conditioning.image_embedding import PretrainedVision
from ldm_train.images import in_threes, mean_over_groups
from ldm_train.losses.perceptual import hub_file, load_tiny

WITHOUT = "measure without a download: metrics=[fid_tiny,kid_tiny]"
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"


def weights_hash(module: nn.Module) -> str:
    """Returns the sha256 of the names and values of a module's weights, which identifies an extractor."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


class Extractor(nn.Module):
    """A frozen network that stays in eval mode, even inside a task that trains. For pictures that are neither grey nor
    RGB, the features are the mean over `channel_groups`."""

    name: str

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "Extractor":
        return super().train(False)


class TinyEval(Extractor):
    """The shipped `tiny_eval` network, on images resized to 64 pixels, never used in a loss. Its numbers are called
    fid_tiny and kid_tiny, never fid."""

    name = "tiny"

    def __init__(self):
        super().__init__(load_tiny("tiny_eval"))

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network.embedding(images)


class Inception(Extractor):
    """The Inception network of the published FID: torch-fidelity's port of the TensorFlow graph of 2015, with its
    resize.

    weights: a local copy of its file; None uses torch.hub's cache and downloads once (96 MB, checksum checked).
    Pictures go in as 8-bit values, as they would from files. (B, 2048) features, 1,008 classes.
    """

    name = "inception"

    def __init__(self, weights: str | Path | None = None):
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        option = "extractors.inception.weights=<file> (in training evaluation.extractors...)"
        path = hub_file("Inception", INCEPTION_FILE, INCEPTION_URL, weights, option, WITHOUT)
        super().__init__(FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(path)))

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pixels = ((in_threes(images.float()).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return mean_over_groups(self.network(pixels)[0], images.shape[1])

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """(B, 2048) -> (B, 1008), without the bias, as in the published score."""
        return features @ self.network.fc.weight.T


def _named(option: str, path: str, load: Callable[[str], nn.Module]) -> nn.Module:
    """Returns the result of `load`. Raises FileNotFoundError, naming the option to change, if the model cannot be
    obtained."""
    try:
        return load(str(Path(path).expanduser()) if path.startswith("~") else path)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}: {option}=<folder> (in training evaluation.{option}); or {WITHOUT}"
        ) from error


class DinoV2(Extractor):
    """DINOv2 (Oquab et al. 2023) for FD-DINOv2: the class token after the last norm (Stein et al. 2023 use the large one).

    path: a folder, or a name that transformers can download.
    """

    name = "dinov2"

    def __init__(self, path: str = "facebook/dinov2-large"):
        super().__init__(_named("extractors.dinov2.path", path, lambda path: PretrainedVision(path).loaded()))

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(images.float())[:, 0].float()


class Clip(Extractor):
    """CLIP (Radford et al. 2021) for CMMD and CLIPScore: projected embeddings of length 1.

    path: a folder with a tokenizer beside the model, or a name that transformers can download.
    """

    name = "clip"

    def __init__(self, path: str = "openai/clip-vit-large-patch14-336"):
        super().__init__(_named("extractors.clip.path", path, ClipScore))

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network.embedded(images.clamp(-1, 1))

    def texts(self, captions: Sequence[str]) -> torch.Tensor:
        """B captions -> (B, D) of length 1."""
        return self.network.texts(captions)
