"""Stage 1: the autoencoder, trained, or taken from another run."""

from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from torch import nn

from ldm_train import rng
from ldm_train.checkpoints.native import copy_model, load_model, meta_autoencoder, read_metadata
from ldm_train.configuration import plain
from ldm_train.models.first_stage import FirstStage
from ldm_train.pipeline import training
from ldm_train.pipeline.adopt import adopted_autoencoder, is_foreign
from ldm_train.pipeline.data import data_key, mixture_key, sides, stage_data
from ldm_train.pipeline.run import Run
from ldm_train.pipeline.stage import Plan, Stage

ADOPTED = ".adopted"  # below runs_dir: foreign autoencoders, converted


def model_folder(run: Run) -> Path:
    """Where this run's autoencoder is, once its stage is finished."""
    return run.folder / "autoencoder" / "model"


def pretrained_folder(value: str, runs_dir: str) -> Path:
    """autoencoder.pretrained -> the model folder: of a run by its name or folder, a model folder itself, or that of a foreign
    model (see `adopt.adopted_autoencoder`). Raises FileNotFoundError naming the paths that were tried."""
    candidates = [Path(value), Path(value) / "autoencoder" / "model", Path(runs_dir) / value / "autoencoder" / "model"]
    for folder in candidates:
        if (folder / "model.safetensors").is_file():
            read_metadata(folder)
            return folder
    if is_foreign(Path(value)):
        return adopted_autoencoder(Path(value), Path(runs_dir) / ADOPTED)
    tried = ", ".join(map(str, candidates))
    raise FileNotFoundError(
        f"autoencoder.pretrained={value} is no run with a finished autoencoder, no model folder, no checkpoint and no folder "
        f"of diffusers; looked in {tried}"
    )


def load_first_stage(run: Run) -> FirstStage:
    """This run's autoencoder, on the CPU, its latents not yet scaled."""
    return FirstStage(load_model(model_folder(run), run.trust))


def on_meta(run: Run) -> nn.Module:
    """The run's autoencoder, its own or a pretrained one, on the meta device."""
    if pretrained := run.config.autoencoder.pretrained:
        network = meta_autoencoder(pretrained_folder(pretrained, run.config.runs_dir), run.trust)
    else:
        with torch.device("meta"):
            network = run.part("autoencoder.network").eval()
    for name, data in (("data", run.config.data), ("autoencoder.data", stage_data(run.config, "autoencoder"))):
        (height, width), f = sides(data.image_size), network.downsample_factor
        if height % f or width % f:
            raise ValueError(
                f"{name}.image_size {height}x{width} is not divisible by the autoencoder's downsample_factor {f}; use "
                f"{max(f, height // f * f)}x{max(f, width // f * f)} or another autoencoder"
            )
    channels = run.config.data.channels
    if (taken := getattr(network, "in_channels", channels)) != channels:
        raise ValueError(f"the autoencoder takes {taken} image channels, data.channels is {channels}")
    return network


class AutoencoderStage(Stage):
    """KL or VQ, with perceptual and patch-GAN losses."""

    name = "autoencoder"

    def steps(self, run: Run) -> int:
        section = run.config.autoencoder
        taken = section.pretrained or section.network._target_.endswith("Identity")
        return 0 if taken else section.max_steps

    def key(self, run: Run) -> dict[str, Any]:
        config = run.config
        data = {"data": data_key(config, "autoencoder") | mixture_key(config, "autoencoder")}
        if pretrained := config.autoencoder.pretrained:
            sha256 = read_metadata(pretrained_folder(pretrained, config.runs_dir))["sha256"]
            return data | {"pretrained": sha256, "seed": config.seed}
        return data | training.training_key(run, "autoencoder")

    def check(self, run: Run) -> None:
        training.check_optimisation(run, "autoencoder")
        on_meta(run)
        if run.config.autoencoder.pretrained:
            return
        run.decode_one(run.data("autoencoder", ("image",)))
        with torch.device("meta"):  # without its perceptual network, which the stage loads first when it runs
            instantiate(plain(run.config.autoencoder.loss) | {"perceptual": None}, _convert_="all")

    def plan(self, run: Run) -> Plan | None:
        if not self.steps(run):
            return None
        network, data = on_meta(run), run.data("autoencoder", ("image",))
        size = sides(stage_data(run.config, "autoencoder").image_size)
        picture = torch.empty(1, data.channels, *size, device="meta")
        flops = training.forward_flops("autoencoder.network", network, picture)
        return Plan(network, flops, run.enough_images(data, "autoencoder"))

    def run(self, run: Run, folder: Path) -> dict[str, Any]:
        config, section = run.config, run.config.autoencoder
        if section.pretrained:
            source = pretrained_folder(section.pretrained, config.runs_dir)
            if run.machine.rank == 0:
                copy_model(source, folder / "model")
            return {"sha256": read_metadata(source)["sha256"], "pretrained": str(section.pretrained)}
        rng.reseed(config.seed, "autoencoder", "weights")
        data = run.data("autoencoder", ("image",))
        network = instantiate(section.network, _convert_="all")
        tree, metadata = plain(section.network), {"downsample_factor": network.downsample_factor}
        if not list(network.parameters()):  # the identity has nothing to train
            return {"sha256": training.save(run, folder / "model", network, tree, metadata)}
        task = instantiate(section.task)(
            network,
            instantiate(section.loss, _convert_="all"),
            **training.optimisation(run, "autoencoder"),
            image_folder=folder / "images",
            disc_lr=section.disc_lr,
            features=instantiate(config.evaluation.extractors.tiny) if config.evaluation.metrics else None,
        )
        if section.compile:  # in place; the last convolution stays eager, its gradient is taken by hand
            network.encoder.compile()
            network.decoder.compile()
        network.to(memory_format=torch.channels_last)
        health = {"max_adaptive_weight": section.loss.get("max_adaptive_weight")}
        training.train(run, "autoencoder", task, data, folder, images=data.count(data.train_split), health=health)
        return {"sha256": training.save(run, folder / "model", network, tree, metadata)}
