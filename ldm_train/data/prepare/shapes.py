"""Procedural shapes: pictures with captions, classes, boxes and label maps, from a seed. See data/shapes_world.py."""

import json
from dataclasses import replace

import numpy as np

from ldm_train.data import shapes_world
from ldm_train.data.files import encoded_png
from ldm_train.data.prepare.build import Source


class Shapes(Source):
    """Random images of the shapes world.

    size: pixels. objects: 1 or 2 per image. count, val_count: samples. seed: determines everything.

    A tenth of the (colour, shape, position, background) combinations never occurs in either split: they are held out to
    test composition. A third of the captions of single objects is incomplete, like the prompts that people type.
    """

    classes: list[str] | None = list(shapes_world.CLASSES)

    def __init__(self, size: int = 32, objects: int = 1, count: int = 8000, val_count: int = 512, seed: int = 0):
        if objects not in (1, 2):
            raise ValueError(f"source.objects is 1 or 2, not {objects}")
        if size < 24:
            raise ValueError(f"source.size is {size}; below 24 pixels shapes cannot be told apart")
        self.size, self.objects, self.seed = size, objects, seed
        self.items = {"train": range(count), "val": range(val_count)}
        held_out = shapes_world.held_out_combinations(seed)
        self.combinations = [c for c in shapes_world.COMBINATIONS if c not in held_out]
        self.identity = {"source": "shapes", "size": size, "objects": objects, "seed": seed}

    def sample(self, split: str, i: int) -> tuple[str, dict[str, bytes]]:
        rng = np.random.default_rng([self.seed, ("train", "val").index(split), i])
        scene = shapes_world.random_scene(rng, self.combinations, self.objects)
        image, labels = shapes_world.render(scene, self.size, rng)
        texts, boxes = shapes_world.captions(scene), shapes_world.boxes(scene)
        if self.objects == 1:
            texts = texts + shapes_world.partial_captions(scene)
        fields = {
            "png": encoded_png(image, compress_level=1),
            "seg.png": encoded_png(labels, compress_level=1),
            "txt": texts[0].encode(),
            "json": json.dumps({"captions": texts, "boxes": boxes, "scene": scene.as_dict()}).encode(),
        }
        if self.objects == 1:
            fields["cls"] = str(int(boxes[0][4])).encode()
        return f"{split}_{i:07d}", fields


class Subject(Source):
    """Images of shapes_world.SUBJECT, which is in no image of `Shapes`, all with the same caption: like a user's few
    photos of their own dog.

    count: number of images. caption: of all of them; it names the subject by a word without a meaning so far. size:
    pixels.
    """

    def __init__(self, count: int = 5, caption: str = "a zqx circle", size: int = 32, seed: int = 0):
        self.caption, self.size, self.seed = caption, size, seed
        self.items = {"train": range(count), "val": range(count)}
        self.identity = {"source": "shapes_subject", "size": size, "caption": caption, "seed": seed}

    def sample(self, split: str, i: int) -> tuple[str, dict[str, bytes]]:
        rng = np.random.default_rng([self.seed, 0x5B, i])  # validation shows the same pictures
        position = list(shapes_world.POSITIONS)[i % len(shapes_world.POSITIONS)]
        item = shapes_world.random_object(rng, (*shapes_world.SUBJECT, position, ""))
        item = replace(item, r=float(rng.uniform(*shapes_world.SUBJECT_SIZES)))
        background = list(shapes_world.BACKGROUNDS)[i % len(shapes_world.BACKGROUNDS)]
        image, _ = shapes_world.render(shapes_world.Scene(background, (item,)), self.size, rng)
        return f"{split}_{i:07d}", {"png": encoded_png(image), "txt": self.caption.encode()}
