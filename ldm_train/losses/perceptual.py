"""Perceptual distances: LPIPS on VGG16 (Zhang et al. 2018, arXiv:1801.03924) and `tiny`, our own shipped network.

Both map (images, targets), each (B, C, H, W) in [-1, 1], to a distance per image (B,). A single channel is repeated;
for other channel counts than three the distance is the mean over `channel_groups`.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from ldm_train.images import in_threes, mean_over_groups
from ldm_train.models.layers import full_precision
from ldm_train.storage import file_sha256

WEIGHTS = Path(__file__).parent / "weights"
VGG16_FILE = "vgg16-397923af.pth"  # torchvision IMAGENET1K_V1; the name ends in the start of its sha256
VGG16_URL = f"https://download.pytorch.org/models/{VGG16_FILE}"


def _normalise(features: torch.Tensor) -> torch.Tensor:
    # 1e-10 inside the root, since the gradient of sqrt at 0 is infinite (CompVis/latent-diffusion issue 176)
    return features / torch.sqrt(features.square().sum(dim=1, keepdim=True) + 1e-10)


class TinyFeatures(nn.Module):
    """Convolution stages, each at half the previous resolution, whose feature maps give a perceptual distance.

    widths: channels per stage. Trained by `experiment=tiny_perceptual`, see weights/README.md.
    """

    def __init__(self, widths: Sequence[int] = (16, 32, 64, 96)):
        super().__init__()
        self.widths = tuple(widths)
        self.stages = nn.ModuleList()
        for previous, width in pairwise((3, *widths)):
            layers = []
            for channels in (previous, width):
                layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            self.stages.append(nn.Sequential(*layers))

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """images (B, 3, H, W) in [-1, 1] -> one map per stage, (B, widths[i], H / 2^i, W / 2^i)."""
        maps, x = [], images
        for i, stage in enumerate(self.stages):
            x = stage(x if i == 0 else F.avg_pool2d(x, 2))
            maps.append(x)
        return maps

    def embedding(self, images: torch.Tensor) -> torch.Tensor:
        """Returns `pooled` features of images (B, C, H, W) of any size, resized to the 64 pixels the networks were
        trained for; averaged over groups of channels."""
        seen = in_threes(images.float())
        if seen.shape[-2:] != (64, 64):
            seen = F.interpolate(seen, (64, 64), mode="bilinear", antialias=True, align_corners=False)
        return mean_over_groups(self.pooled(seen), images.shape[1])

    def pooled(self, images: torch.Tensor) -> torch.Tensor:
        """Returns the last map averaged over space, (B, widths[-1])."""
        return self(images)[-1].mean(dim=(2, 3))


def load_tiny(name: str) -> TinyFeatures:
    """Loads a shipped network, "tiny" (for losses) or "tiny_eval" (for evaluation only), frozen and in eval mode."""
    path = WEIGHTS / f"{name}.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing from the installation; reinstall ldm-train, it ships this file")
    state = load_file(path)
    widths = [state[f"stages.{i}.0.weight"].shape[0] for i in range(sum(k.endswith("0.weight") for k in state))]
    network = TinyFeatures(widths)
    network.load_state_dict(state)
    return network.eval().requires_grad_(False)


class TinyPerceptual(nn.Module):
    """Squared distance of unit-normalised `tiny` features, averaged over space, summed over channels and stages.

    Scaled so that unrelated photos are about 0.7 apart, as with LPIPS-VGG, so that loss weights carry over.
    """

    scale = 0.15

    def __init__(self):
        super().__init__()
        self.features = load_tiny("tiny")

    def train(self, mode: bool = True) -> "TinyPerceptual":
        return super().train(False)  # frozen: BatchNorm must never see training batches

    def forward(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """images, targets (B, C, H, W) in [-1, 1] -> distances (B,). Gradients flow to both arguments."""
        with full_precision(images.device):
            ours, theirs = self.features(in_threes(images.float())), self.features(in_threes(targets.float()))
            gaps = [(_normalise(a) - _normalise(b)).square().sum(1).mean(dim=(1, 2)) for a, b in zip(ours, theirs)]
            return mean_over_groups(self.scale * torch.stack(gaps).sum(dim=0), images.shape[1])


def hub_file(label: str, name: str, url: str, path: str | Path | None, option: str, without: str) -> Path:
    """Returns a weights file: `path` if given, else torch.hub's cached one, downloaded with a checksum if missing.

    label: the network's name, for messages. name: the file's name in torch.hub, ending in the start of its sha256.
    option, without: the option that names a local file, and the way to do without the file, for the message. Raises
    FileNotFoundError, naming file and folder, if the file is missing and cannot be downloaded, and ValueError if the
    cached file is damaged.
    """
    target = Path(path).expanduser() if path else Path(torch.hub.get_dir()) / "checkpoints" / name
    prefix = name.rsplit("-", 1)[1].partition(".")[0]
    if target.is_file():
        digest = file_sha256(target)
        if path is None and not digest.startswith(prefix):
            raise ValueError(f"{target} is damaged (sha256 {digest[:8]}, expected {prefix}); delete it and run again")
        return target
    reason = ""
    if path is None:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(target), hash_prefix=prefix, progress=True)
            return target
        except OSError as error:  # URLError is an OSError
            reason = f" ({error})"
    raise FileNotFoundError(
        f"no {label} weights at {target} and none could be downloaded{reason}. Put {name} (from {url}) into {target.parent}, or name "
        f"a local file with {option}, or {without}"
    )


def vgg16_weights(path: str | Path | None = None) -> Path:
    """Returns the VGG16 weights file, see `hub_file`."""
    return hub_file(
        "VGG16", VGG16_FILE, VGG16_URL, path, "autoencoder.loss.perceptual.weights=<file>",
        "train without a download: autoencoder/loss/perceptual=tiny",
    )  # fmt: skip


class LPIPS(nn.Module):
    """LPIPS v0.1 with a frozen VGG16 trunk and the linear heads that torchmetrics ships.

    weights: path of the torchvision VGG16 state dict; None uses torch.hub's cache and downloads once.
    """

    # The ReLU outputs that are compared: relu1_2, relu2_2, relu3_3, relu4_3, relu5_3.
    taps = (3, 8, 15, 22, 29)

    def __init__(self, weights: str | Path | None = None):
        super().__init__()
        from torchvision.models.vgg import cfgs, make_layers  # here: the shipped network does not need it

        trunk = make_layers(cfgs["D"])
        if torch.get_default_device().type != "meta":  # on the meta device only sizes are needed, no weights
            state = torch.load(vgg16_weights(weights), map_location="cpu", weights_only=True)
            state = {k.removeprefix("features."): v for k, v in state.items() if k.startswith("features.")}
            trunk.load_state_dict(state)
        self.trunk = trunk[: self.taps[-1] + 1]
        self.heads = nn.ParameterList(nn.Parameter(head) for head in load_lpips_heads())
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "LPIPS":
        return super().train(False)

    def _maps(self, images: torch.Tensor) -> list[torch.Tensor]:
        x, maps = (in_threes(images.float()) - self.shift) / self.scale, []
        for i, layer in enumerate(self.trunk):
            x = layer(x)
            if i in self.taps:
                maps.append(_normalise(x))
        return maps

    def forward(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """images, targets (B, C, H, W) in [-1, 1] -> distances (B,). Runs in float32 even under autocast."""
        with full_precision(images.device):
            gaps = [
                (head * (a - b).square()).sum(dim=1).mean(dim=(1, 2))
                for head, a, b in zip(self.heads, self._maps(images), self._maps(targets))
            ]
            return mean_over_groups(torch.stack(gaps).sum(dim=0), images.shape[1])


def load_lpips_heads() -> list[torch.Tensor]:
    """Loads the five linear heads of LPIPS-VGG, each (1, C, 1, 1), non-negative."""
    import torchmetrics.functional.image as tm

    path = Path(tm.__file__).parent / "lpips_models" / "vgg.pth"
    state = torch.load(path, map_location="cpu", weights_only=True)
    return [state[f"lin{i}.model.1.weight"] for i in range(5)]
