"""The stage that trains a small perceptual network (experiment=tiny_perceptual) like those shipped with the package."""

from pathlib import Path
from typing import Any

from safetensors.torch import save

from ldm_train import rng
from ldm_train.configuration import plain
from ldm_train.losses.perceptual import TinyFeatures
from ldm_train.pipeline.data import data_key
from ldm_train.pipeline.run import Run
from ldm_train.pipeline.stage import Stage
from ldm_train.storage import file_sha256, write_atomically
from ldm_train.training.perceptual_task import photos_in_memory, train_perceptual


class PerceptualStage(Stage):
    """Trains the network on photos of many classes; no other stage needs its result."""

    name = "perceptual"

    def key(self, run: Run) -> dict[str, Any]:
        return {
            "data": data_key(run.config, "autoencoder"),
            "perceptual": plain(run.config.perceptual),
            "seed": run.config.seed,
        }

    def check(self, run: Run) -> None:
        if "perceptual" not in run.config:
            raise ValueError("the stage perceptual needs its section: choose experiment=tiny_perceptual")
        run.data("autoencoder", ("image", "class_label")).check_conditions()

    def run(self, run: Run, folder: Path) -> dict[str, Any]:
        options = plain(run.config.perceptual)
        data = run.data("autoencoder", ("image", "class_label"))
        photos, val_photos = (photos_in_memory(data, s) for s in (data.train_split, data.val_split))
        rng.reseed(run.config.seed, "perceptual", "features")
        features = TinyFeatures(options.pop("widths"))
        name = options.pop("name")
        accuracies = train_perceptual(features, photos, val_photos, seed=run.config.seed, **options)
        state = {k: v.contiguous() for k, v in features.state_dict().items()}
        path = folder / f"{name}.safetensors"
        write_atomically(path, lambda file: file.write(save(state)))
        print("\n".join(f"{head:<12}{value:.1%}" for head, value in accuracies.items()))
        return accuracies | {"sha256": file_sha256(path)}
