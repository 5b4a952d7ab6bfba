"""The two stages that stand apart from the chain: a classifier of noisy latents, a small perceptual network."""

from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from safetensors.torch import save

from ldm_train import rng
from ldm_train.checkpoints.native import read_metadata
from ldm_train.generation.guides import schedule_facts
from ldm_train.losses.perceptual import TinyFeatures
from ldm_train.pipeline import build
from ldm_train.storage import write_atomically
from ldm_train.training.classifier_task import ClassifierTask
from ldm_train.training.perceptual_task import photos_in_memory, train_perceptual


def classifier(chain: Any, folder: Path) -> dict[str, Any]:
    """A classifier of noisy latents (experiment=classifier_*), apart from the model that it will guide."""
    config = chain.config
    data, images, size = chain.latent_data("classifier", ("class_label",))
    first_stage = build.load_first_stage(chain.folder / "autoencoder" / "model", chain.trust)
    chain.measured(first_stage)
    tree = build.plain(config.classifier.network)
    filled = {"classes": images.index.get("classes"), "latent_size": build.latent_size(config, first_stage)}
    if filled["classes"] is None and tree["classes"] == build.FROM_DATA:
        raise ValueError(
            f"{images.root}/index.json names no classes; set classifier.network.classes=<number> if there are labels"
        )
    tree |= {k: v for k, v in filled.items() if tree[k] == build.FROM_DATA}
    rng.reseed(config.seed, "classifier", "weights")
    network = instantiate(tree, _convert_="all").to(memory_format=torch.channels_last)
    schedule = instantiate(config.diffusion.schedule)
    task = ClassifierTask(network, first_stage, schedule, **chain.optimisation("classifier"))
    chain.fit(task, data, folder, "classifier", size)
    # What a model must share with it to be guided by it.
    metadata = {
        "autoencoder": read_metadata(chain.folder / "autoencoder" / "model")["sha256"],
        "scale": first_stage.scale.flatten().tolist(),
        "shift": first_stage.shift.flatten().tolist(),
    } | schedule_facts(schedule)
    return {"sha256": chain.save(folder / "model", network, tree, metadata)}


def perceptual(chain: Any, folder: Path) -> dict[str, Any]:
    """Trains a small perceptual network (experiment=tiny_perceptual); it stands apart from the other stages."""
    options = build.plain(chain.config.perceptual)
    data = chain.data("autoencoder", ("image", "class_label"))
    photos, val_photos = (photos_in_memory(data, s) for s in (data.train_split, data.val_split))
    rng.reseed(chain.config.seed, "perceptual", "features")
    features = TinyFeatures(options.pop("widths"))
    name = options.pop("name")
    accuracies = train_perceptual(features, photos, val_photos, seed=chain.config.seed, **options)
    state = {k: v.contiguous() for k, v in features.state_dict().items()}
    write_atomically(folder / f"{name}.safetensors", lambda file: file.write(save(state)))
    print("\n".join(f"{head:<12}{value:.1%}" for head, value in accuracies.items()))
    return accuracies
