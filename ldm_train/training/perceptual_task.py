"""Trains the small perceptual networks on attributes of shapes, classes of photos, and which distortion was applied.

The distortion task makes the features sensitive to blur, noise and blocks; the other two to colour, shape and position.
A batch is {"images": (B, 3, s, s) in [-1, 1], "targets": {head: (B,) int64, IGNORE where the head has no answer}}.
"""

import math
from collections.abc import Callable, Sequence

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from ldm_train.data import shapes_world
from ldm_train.data.datamodule import ShardDataModule
from ldm_train.images import to_uint8
from ldm_train.losses.perceptual import TinyFeatures
from ldm_train.rng import derive_seed, generator, reseed

IGNORE = -100  # cross_entropy's default ignore_index
WARMUP_STEPS, ACTIVITY = 50, 0.05
SHAPE_HEADS = {
    "colour": tuple(shapes_world.COLOURS),
    "shape": shapes_world.SHAPES,
    "position": tuple(shapes_world.POSITIONS),
    "background": tuple(shapes_world.BACKGROUNDS),
    "size": tuple(shapes_world.SIZES),
}
Photos = tuple[Tensor, Tensor]  # (N, 3, S, S) uint8 and class indices (N,)
Shapes = dict[int, tuple[Tensor, dict[str, Tensor]]]  # per size s: (N, 3, s, s) uint8 and labels (N,) per head


def _uniform(n: int, low: float, high: float, g: torch.Generator) -> Tensor:
    """Draws one strength per image from [low, high): (n, 1, 1, 1)."""
    return torch.empty(n, 1, 1, 1).uniform_(low, high, generator=g)


def unchanged(x: Tensor, g: torch.Generator) -> Tensor:
    return x


def blur(x: Tensor, g: torch.Generator) -> Tensor:
    """Gaussian blur, sigma drawn from 0.6 to 2.5 pixels per image."""
    low, high = 0.6, 2.5
    n, c, h, w = x.shape
    radius = math.ceil(3 * high)
    taps = torch.arange(-radius, radius + 1.0)
    kernel = torch.exp(-0.5 * (taps / _uniform(n, low, high, g)) ** 2)  # (n, 1, 1, 2 radius + 1)
    kernel = (kernel / kernel.sum(-1, keepdim=True)).repeat_interleave(c, 0)
    x = F.pad(x, [radius] * 4, mode="reflect").reshape(1, n * c, h + 2 * radius, w + 2 * radius)
    x = F.conv2d(F.conv2d(x, kernel, groups=n * c), kernel.transpose(2, 3), groups=n * c)
    return x.reshape(n, c, h, w)


def noise(x: Tensor, g: torch.Generator) -> Tensor:
    """Gaussian noise of standard deviation 0.02 to 0.2."""
    return x + _uniform(len(x), 0.02, 0.2, g) * torch.randn(x.shape, generator=g)


def pixelate(x: Tensor, g: torch.Generator) -> Tensor:
    """Replaces 4 x 4 blocks by their mean and blends with the original; the blocks' share of the result is 0.4 to 1."""
    blocks = F.interpolate(F.avg_pool2d(x, 4), scale_factor=4.0, mode="nearest")
    return torch.lerp(x, blocks, _uniform(len(x), 0.4, 1.0, g))


def recolour(x: Tensor, g: torch.Generator) -> Tensor:
    """Contrast and brightness change per channel: gains within a factor of 1.6, shifts within 0.15."""
    strength = _uniform(len(x), 0.4, 1.0, g)
    gain, shift = torch.empty(2, len(x), 3, 1, 1).uniform_(-1, 1, generator=g)
    mean = x.mean(dim=(2, 3), keepdim=True)
    return mean + (x - mean) * 1.6 ** (strength * gain) + 0.15 * strength * shift


def quantise(x: Tensor, g: torch.Generator) -> Tensor:
    """JPEG-like: rounds the DCT of each 8 x 8 block, more coarsely at high frequencies. x's sides: multiples of 8."""
    n, c, h, w = x.shape
    k, i = torch.arange(8.0)[:, None], torch.arange(8.0)
    dct = torch.cos(math.pi * (i + 0.5) * k / 8) * torch.where(k == 0, math.sqrt(1 / 8), 0.5)  # orthonormal rows
    blocks = x.reshape(n, c, h // 8, 8, w // 8, 8).transpose(3, 4)  # (n, c, h/8, w/8, 8, 8)
    step = _uniform(n, 0.08, 0.4, g)[..., None, None] * (1 + 0.3 * (k + i))
    blocks = dct.T @ (step * torch.round(dct @ blocks @ dct.T / step)) @ dct
    return blocks.transpose(3, 4).reshape(n, c, h, w)


def warp(x: Tensor, g: torch.Generator) -> Tensor:
    """A smooth random displacement with a standard deviation of 0.7 to 2 pixels at its nodes, 8 pixels apart."""
    n, _, h, w = x.shape
    nodes = torch.randn(n, 2, h // 8, w // 8, generator=g) * _uniform(n, 0.7, 2.0, g)
    flow = F.interpolate(nodes, size=(h, w), mode="bicubic").movedim(1, -1) * 2 / torch.tensor([w, h])
    grid = F.affine_grid(torch.eye(2, 3).expand(n, 2, 3), [n, 3, h, w], align_corners=False)
    return F.grid_sample(x, grid + flow, mode="bicubic", padding_mode="reflection", align_corners=False)


DISTORTIONS: tuple[Callable[[Tensor, torch.Generator], Tensor], ...] = (
    unchanged, blur, noise, pixelate, recolour, quantise, warp
)  # fmt: skip


def distort(images: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """images (B, 3, s, s) in [0, 1] -> the images, each under one uniformly drawn distortion, and its index (B,)."""
    kinds = torch.randint(len(DISTORTIONS), (len(images),), generator=g)
    out = images.clone()
    for i, distortion in enumerate(DISTORTIONS):
        if (kinds == i).any():
            out[kinds == i] = distortion(images[kinds == i], g)
    return out.clamp(0, 1), kinds


def render_shapes(count: int, size: int, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Renders random one-object scenes of all combinations: images (N, 3, size, size) uint8, labels (N,) per head."""
    rng = np.random.default_rng(seed)
    images, labels = [], {head: [] for head in SHAPE_HEADS}
    for _ in range(count):
        scene = shapes_world.random_scene(rng, shapes_world.COMBINATIONS)
        images.append(torch.from_numpy(shapes_world.render(scene, size, rng)[0]).permute(2, 0, 1))
        for head, values in SHAPE_HEADS.items():
            value = scene.background if head == "background" else getattr(scene.objects[0], head)
            labels[head].append(values.index(value))
    return torch.stack(images), {head: torch.tensor(v) for head, v in labels.items()}


def random_crops(photos: Tensor, size: int, g: torch.Generator) -> Tensor:
    """photos (B, 3, S, S) uint8 -> (B, 3, size, size) in [0, 1]: crops of 0.4 to 1 of the area, half of them mirrored.

    Crops are never enlarged, since an enlarged crop would look blurred but be labelled sharp.
    """
    full, crops = photos.shape[-1], []
    for photo in photos:
        area, left, top, mirror = torch.rand(4, generator=g).tolist()
        side = max(size, round(full * math.sqrt(0.4 + 0.6 * area)))
        left, top = round(left * (full - side)), round(top * (full - side))
        crop = photo[None, :, top : top + side, left : left + side].float() / 255
        crop = F.interpolate(crop, size=(size, size), mode="bilinear", antialias=True)
        crops.append(crop.flip(-1) if mirror < 0.5 else crop)
    return torch.cat(crops)


def make_batch(images: Tensor, targets: dict[str, Tensor], heads: Sequence[str]) -> dict:
    """Returns a batch. images (B, 3, s, s) in [0, 1]; heads missing from `targets` get IGNORE."""
    nothing = torch.full((len(images),), IGNORE)
    return {"images": images * 2 - 1, "targets": {head: targets.get(head, nothing) for head in heads}}


class PerceptualBatches(Dataset):
    """Training batches, half shapes, half photos, at one image size each, in turn. Batch i is a function of (seed, i).

    Every batch holds both kinds, so that BatchNorm's running statistics describe the batches it was trained on.
    """

    def __init__(self, shapes: Shapes, photos: Photos, heads: Sequence[str], seed: int, steps: int, batch_size: int):
        self.shapes, self.photos, self.heads = shapes, photos, heads
        self.seed, self.steps, self.half = seed, steps, batch_size // 2

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, i: int) -> dict:
        g = generator(self.seed, "perceptual", i)
        size = list(self.shapes)[i % len(self.shapes)]
        scenes, labels = self.shapes[size]
        s = torch.randint(len(scenes), (self.half,), generator=g)
        p = torch.randint(len(self.photos[0]), (self.half,), generator=g)
        images, kinds = distort(torch.cat([scenes[s] / 255, random_crops(self.photos[0][p], size, g)]), g)
        nothing = torch.full((self.half,), IGNORE)
        targets = {head: torch.cat([values[s], nothing]) for head, values in labels.items()}
        targets |= {"photo": torch.cat([nothing, self.photos[1][p]]), "distortion": kinds}
        return make_batch(images, targets, self.heads)


def validation_batches(shapes: Shapes, photos: Photos, heads: Sequence[str], seed: int) -> list[dict]:
    """Returns batches of clean images, with attributes or classes as targets, and of distorted ones, with the
    distortion as target. Photos are resized to the largest size."""
    g, size = generator(seed, "perceptual", "validation"), max(shapes)
    whole = F.interpolate(photos[0] / 255, size=(size, size), mode="bilinear", antialias=True)
    clean = [(images / 255, labels) for images, labels in shapes.values()] + [(whole, {"photo": photos[1]})]
    batches = []
    for images, labels in clean:
        distorted, kinds = distort(images, g)
        batches += [make_batch(images, labels, heads), make_batch(distorted, {"distortion": kinds}, heads)]
    return batches


class PerceptualTask(L.LightningModule):
    """Trains linear heads on the pooled last feature map; the distortion head sees the pooled maps of all stages.

    Logs the accuracy as val/<head>. A hinge term in the loss keeps every channel's mean above ACTIVITY.
    """

    def __init__(self, features: TinyFeatures, heads: dict[str, int], lr: float, weight_decay: float, max_steps: int):
        super().__init__()
        self.features, self.lr, self.weight_decay, self.max_steps = features, lr, weight_decay, max_steps
        width = {head: sum(features.widths) if head == "distortion" else features.widths[-1] for head in heads}
        self.heads = nn.ModuleDict({head: nn.Linear(width[head], classes) for head, classes in heads.items()})

    def forward(self, images: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """images (B, 3, s, s) -> logits (B, classes) per head, and the pooled maps of all stages (B, sum of widths)."""
        pooled = [m.mean(dim=(2, 3)) for m in self.features(images.contiguous(memory_format=torch.channels_last))]
        everything = torch.cat(pooled, dim=1)
        seen = {head: everything if head == "distortion" else pooled[-1] for head in self.heads}
        return {head: layer(seen[head]) for head, layer in self.heads.items()}, everything

    def training_step(self, batch: dict, index: int) -> Tensor:
        logits, pooled = self(batch["images"])
        loss = F.relu(ACTIVITY - pooled.mean(dim=0)).sum()
        for head, target in batch["targets"].items():
            loss = loss + F.cross_entropy(logits[head], target)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict, index: int) -> None:
        logits, _ = self(batch["images"])
        for head, target in batch["targets"].items():
            known = target != IGNORE
            if known.any():
                right = (logits[head].argmax(dim=1) == target)[known].float().mean()
                self.log(f"val/{head}", right, on_epoch=True, batch_size=int(known.sum()))

    def configure_optimizers(self) -> dict:
        optimiser = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)

        def schedule(step: int) -> float:
            """Linear warm-up, then half a cosine down to 0."""
            done = min(1.0, step / self.max_steps)
            return min(1.0, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * done))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimiser, schedule)
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def photos_in_memory(data: ShardDataModule, split: str) -> Photos:
    """All images of a split, centre-cropped, as uint8 (N, 3, S, S), with their class indices (N,)."""
    batches = list(data.fixed_loader(split))
    return torch.cat([to_uint8(b["image"]) for b in batches]), torch.cat([b["class_label"] for b in batches])


def train_perceptual(
    features: TinyFeatures, photos: Photos, val_photos: Photos, *, seed: int, max_steps: int, batch_size: int = 64,
    lr: float = 3e-3, weight_decay: float = 0.02, photo_classes: int = 10, sizes: Sequence[int] = (32, 48, 64),
    scenes: int = 3000, val_scenes: int = 500, accelerator: str = "auto",
) -> dict[str, float]:  # fmt: skip
    """Trains `features` in place and returns the validation accuracy per head.

    photos, val_photos: uint8 (N, 3, S, S) and class indices (N,). scenes: number of scenes rendered per size. Raises
    ValueError if S < max(sizes).
    """
    if photos[0].shape[-1] < max(sizes):
        raise ValueError(f"photos of {photos[0].shape[-1]} px cannot fill {max(sizes)} px; prepare them larger")
    heads = {head: len(values) for head, values in SHAPE_HEADS.items()}
    heads |= {"photo": photo_classes, "distortion": len(DISTORTIONS)}
    shapes = {s: render_shapes(scenes, s, derive_seed(seed, "shapes", "train", s)) for s in sizes}
    val_shapes = {s: render_shapes(val_scenes, s, derive_seed(seed, "shapes", "validation", s)) for s in sizes}
    train = PerceptualBatches(shapes, photos, list(heads), seed, max_steps, batch_size)
    validation = validation_batches(val_shapes, val_photos, list(heads), seed)

    reseed(seed, "perceptual", "heads")
    task = PerceptualTask(features, heads, lr, weight_decay, max_steps)
    task.to(memory_format=torch.channels_last)  # about 1.7 times faster on a CPU
    trainer = L.Trainer(
        max_steps=max_steps, accelerator=accelerator, devices=1, logger=False, enable_checkpointing=False,
        enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(task, DataLoader(train, batch_size=None), DataLoader(validation, batch_size=None))
    task.to(memory_format=torch.contiguous_format)
    return {head: float(trainer.callback_metrics[f"val/{head}"]) for head in heads}
