"""A classifier of noisy latents (experiment=classifier_*), which guides diffusion models of the same latents."""

from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from ldm_train import rng
from ldm_train.checkpoints.native import read_metadata
from ldm_train.configuration import plain
from ldm_train.data.datamodule import ShardDataModule
from ldm_train.devices import shapes_only
from ldm_train.generation.guides import schedule_identity
from ldm_train.pipeline import autoencoder, latents, training
from ldm_train.pipeline.data import FROM_DATA, mixture_key
from ldm_train.pipeline.diffusion import latent_size
from ldm_train.pipeline.run import Run
from ldm_train.pipeline.stage import Stage


def classifier_tree(config: DictConfig, images: ShardDataModule, first_stage: Any) -> dict[str, Any]:
    """The network's config, completed from the data. Raises ValueError if it needs classes and the data name none."""
    tree = plain(config.classifier.network)
    filled = {"classes": images.index.get("classes"), "latent_size": latent_size(config, first_stage)}
    if filled["classes"] is None and tree["classes"] == FROM_DATA:
        raise ValueError(
            f"{images.root}/index.json names no classes; set classifier.network.classes=<number> if there are labels"
        )
    return tree | {k: v for k, v in filled.items() if tree[k] == FROM_DATA}


class ClassifierStage(Stage):
    """Trains a classifier on the latents of a run, independently of the model that it will guide."""

    name, needs = "classifier", ("latents",)

    def steps(self, run: Run) -> int:
        return run.config.classifier.max_steps if "classifier" in run.config else 0

    def key(self, run: Run) -> dict[str, Any]:
        return training.training_key(run, "classifier") | {
            "schedule": plain(run.config.diffusion.schedule),
            "latents": run.result("latents"),
            "data": mixture_key(run.config, "diffusion"),
        }

    def check(self, run: Run) -> None:
        if "classifier" not in run.config:
            raise ValueError("the stage classifier needs its section: choose an experiment=classifier_...")
        training.check_optimisation(run, "classifier")
        latents.check_crop(run)
        images = run.data("classifier", ("image", "class_label"))
        tree = classifier_tree(run.config, images, autoencoder.on_meta(run))
        with shapes_only():
            instantiate(tree, _convert_="all")
        run.enough_images("classifier", ("image", "class_label"))
        images.check_conditions()

    def run(self, run: Run, folder: Path) -> dict[str, Any]:
        config = run.config
        data, images, count = latents.latent_data(run, "classifier", ("class_label",))
        first_stage = autoencoder.load_first_stage(run)
        latents.give_statistics(run.folder / "latents", first_stage, config.latents.per_channel)
        tree = classifier_tree(config, images, first_stage)
        rng.reseed(config.seed, "classifier", "weights")
        network = instantiate(tree, _convert_="all").to(memory_format=torch.channels_last)
        schedule, options = run.part("diffusion.schedule"), training.optimisation(run, "classifier")
        task = instantiate(config.classifier.task)(network, first_stage, schedule, **options)
        training.train(run, "classifier", task, data, folder, images=count)
        # A model that it guides must have the same values, see `guides.latents_of`.
        metadata = {
            "autoencoder": read_metadata(autoencoder.model_folder(run))["sha256"],
            "scale": first_stage.scale.flatten().tolist(),
            "shift": first_stage.shift.flatten().tolist(),
        } | schedule_identity(schedule)
        return {"sha256": training.save(run, folder / "model", network, tree, metadata)}
