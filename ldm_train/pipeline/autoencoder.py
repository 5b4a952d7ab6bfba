"""Stage 1: the autoencoder, trained, or taken from another run."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ldm_train import rng
from ldm_train.checkpoints.compvis import read_discriminator
from ldm_train.checkpoints.hub import downloaded, is_repo
from ldm_train.checkpoints.native import (
    CONFIG,
    copy_model,
    load_autoencoder,
    load_model,
    meta_autoencoder,
    read_metadata,
    read_tree,
)
from ldm_train.compiling import compile_training
from ldm_train.configuration import plain
from ldm_train.devices import shapes_only
from ldm_train.errors import in_one_line
from ldm_train.losses.autoencoder import AutoencoderLoss
from ldm_train.models.first_stage import FirstStage
from ldm_train.pipeline import training
from ldm_train.pipeline.adopt import ADOPTED, adopted_autoencoder, adopted_embeddings, is_foreign, is_whole
from ldm_train.pipeline.begin import model_folder as whole_model
from ldm_train.pipeline.data import check_bucket_step, data_key, mixture_key, sides, stage_data
from ldm_train.pipeline.memory import Rehearsal
from ldm_train.pipeline.run import Run
from ldm_train.pipeline.stage import Plan, Stage
from ldm_train.storage import read_config
from ldm_train.training.callbacks.checkpoint import LAST, read_checkpoint
from ldm_train.training.task import Task
from ldm_train.unclip import ImageEmbeddings

EMBEDDINGS = "embeddings:"


def model_folder(run: Run) -> Path:
    """The model folder of this run's autoencoder, which exists once its stage is finished."""
    return run.folder / "autoencoder" / "model"


def pretrained_folder(
    value: str, runs_dir: str, option: str = "autoencoder.pretrained", trust: Sequence[str] = ()
) -> Path:
    """The model folder of the autoencoder that an option's value names.

    value: a run's name or folder, a model folder, a model on the Hub, or a foreign or whole model (see
    `adopt.adopted_autoencoder`). "embeddings:<whole model>" means the image embeddings that this model decodes to
    pictures (see `adopt.adopted_embeddings`). Raises FileNotFoundError naming the paths that were tried."""
    if value.startswith(EMBEDDINGS):
        whole = whole_model(value.removeprefix(EMBEDDINGS), runs_dir, option)
        return adopted_embeddings(whole, Path(runs_dir) / ADOPTED, trust)
    candidates = [Path(value), Path(value) / "autoencoder" / "model", Path(runs_dir) / value / "autoencoder" / "model"]
    if is_repo(value) and not (Path(runs_dir) / value).exists():
        return pretrained_folder(str(downloaded(value)), runs_dir, option, trust)
    for folder in candidates:
        if (folder / "model.safetensors").is_file():
            read_metadata(folder)
            return adopted_autoencoder(folder, Path(runs_dir) / ADOPTED, trust) if is_whole(folder) else folder
    if is_foreign(Path(value)):
        return adopted_autoencoder(Path(value), Path(runs_dir) / ADOPTED)
    tried = ", ".join(map(str, candidates))
    raise FileNotFoundError(
        f"{option}={value} is not a run with a finished autoencoder, a model folder, a checkpoint or a folder "
        f"of diffusers; looked in {tried}"
    )


def taken_folder(run: Run) -> Path | None:
    """The model folder of the autoencoder that this run uses (autoencoder.pretrained) or starts from
    (autoencoder.init); None without these."""
    section = run.config.autoencoder
    for option in ("pretrained", "init"):
        if value := section[option]:
            return pretrained_folder(value, run.config.runs_dir, f"autoencoder.{option}", run.trust)
    return None


def latents_of(folder: Path) -> str:
    """The sha256 that identifies an autoencoder's latents: that of its own weights, or, if only its decoder was trained
    (autoencoder.train=decoder), that of the autoencoder whose encoder it kept."""
    metadata = read_metadata(folder)
    return str(metadata.get("latents_of", metadata["sha256"]))


def check_start(section: DictConfig) -> None:
    """Raises ValueError if pretrained, init, init_discriminator and train=decoder contradict each other."""
    if section.pretrained and section.init:
        raise ValueError(
            "autoencoder.pretrained takes an autoencoder as it is, autoencoder.init trains it on; give one of them"
        )
    if section.train == "decoder" and not section.init:
        raise ValueError("autoencoder.train=decoder needs autoencoder.init=<the run whose decoder is to be trained on>")
    if section.init_discriminator and not section.init:
        raise ValueError("autoencoder.init_discriminator=true needs autoencoder.init=<the run that it is taken from>")


def give_discriminator(run: Run, loss: AutoencoderLoss) -> None:
    """Loads the discriminator, and a learned log-variance, of autoencoder.init into the loss if they were saved. Raises
    ValueError if autoencoder.init_discriminator=true and there is no discriminator that fits."""
    section, wanted = run.config.autoencoder, run.config.autoencoder.init_discriminator
    if loss.discriminator is None or wanted is False:
        return
    path, weights, logvar = Path(section.init), {}, None
    if path.is_file():
        weights, logvar = read_discriminator(path)
    elif (last := taken_folder(run).parent / "checkpoints" / LAST).is_file():
        state = read_checkpoint(last)["state_dict"]
        weights = {k.removeprefix("discriminator."): v for k, v in state.items() if k.startswith("discriminator.")}
        logvar = state.get("likelihood.0")
    reason = "autoencoder.init has none"
    try:
        if weights:
            loss.discriminator.load_state_dict(weights)
            if logvar is not None and loss.logvar.requires_grad:
                loss.logvar.data.copy_(logvar.view(()))
            return
    except RuntimeError as error:
        reason = f"that of autoencoder.init does not fit ({in_one_line(error)})"
    if wanted:
        raise ValueError(f"autoencoder.init_discriminator=true, but {reason}; leave it out for a new one")
    if run.machine.rank == 0:
        print(f"  discriminator: a new one, {reason}", flush=True)


def load_first_stage(run: Run) -> FirstStage:
    """This run's autoencoder, on the CPU; the scale and shift of its latents are not set yet."""
    return FirstStage(load_model(model_folder(run), run.trust))


def on_meta(run: Run) -> nn.Module:
    """The run's autoencoder, its own or a pretrained one, on the meta device. Raises ValueError if image or bucket
    sizes are not divisible by its downsample_factor, or if the image channels differ."""
    if (taken := taken_folder(run)) is not None:
        network = meta_autoencoder(taken, run.trust)
    else:
        with shapes_only():
            network = run.part("autoencoder.network").eval()
    for name, data in (("data", run.config.data), ("autoencoder.data", stage_data(run.config, "autoencoder"))):
        (height, width), f = sides(data.image_size), network.downsample_factor
        if height % f or width % f:
            raise ValueError(
                f"{name}.image_size {height}x{width} is not divisible by the autoencoder's downsample_factor {f}; use "
                f"{max(f, height // f * f)}x{max(f, width // f * f)} or another autoencoder"
            )
        check_bucket_step(data, f, name)
    channels = run.config.data.channels
    if (taken := getattr(network, "in_channels", channels)) != channels:
        raise ValueError(f"the autoencoder takes {taken} image channels, data.channels is {channels}")
    return network


def _check_sizes(run: Run, factor: int, loss: nn.Module) -> None:
    """Raises ValueError if the smallest pictures of the training are too small for the discriminator, which would show
    only when it begins."""
    if (discriminator := getattr(loss, "discriminator", None)) is None:
        return
    augmentation = instantiate(run.config.autoencoder.task.get("augmentation"))
    size = sides(stage_data(run.config, "autoencoder").image_size)
    least = size if augmentation is None else augmentation.smallest(size, factor)
    try:
        discriminator.eval()(torch.empty(1, run.config.data.channels, *least, device="meta"))
    except RuntimeError as error:
        drawn = (
            "" if least == size else f", which autoencoder.task.augmentation.equivariance draws of {size[0]}x{size[1]},"
        )
        raise ValueError(
            f"the discriminator cannot look at pictures of {least[0]}x{least[1]}{drawn} ({in_one_line(error)}): set fewer "
            "layers (autoencoder.loss.discriminator.num_layers=2), take larger pictures, or leave it out "
            "(autoencoder.loss.discriminator=null)"
        ) from None


class AutoencoderStage(Stage):
    """Trains a KL or VQ autoencoder with perceptual and patch-GAN losses, or takes a pretrained one."""

    name = "autoencoder"

    def steps(self, run: Run) -> int:
        section = run.config.autoencoder
        taken = section.pretrained or section.network._target_.endswith("Identity")
        return 0 if taken else section.max_steps

    def key(self, run: Run) -> dict[str, Any]:
        config = run.config
        data = {"data": data_key(config, "autoencoder") | mixture_key(config, "autoencoder")}
        sha256 = None if (taken := taken_folder(run)) is None else read_metadata(taken)["sha256"]
        if config.autoencoder.pretrained:
            return data | {"pretrained": sha256, "seed": config.seed}
        key = data | training.training_key(run, "autoencoder")
        if sha256 is not None:  # identify `init` by its content; it also determines the network
            key["autoencoder"] = {k: v for k, v in key["autoencoder"].items() if k != "network"} | {"init": sha256}
        return key

    def check(self, run: Run) -> None:
        training.check_optimisation(run, "autoencoder")
        check_start(run.config.autoencoder)
        equivariance = OmegaConf.select(run.config, "autoencoder.task.augmentation.equivariance")
        if run.config.autoencoder.compile and equivariance:
            raise ValueError(
                f"autoencoder.compile=true compiles again for each size of picture, and task.augmentation.equivariance={equivariance} "
                "draws many; leave one of them out"
            )
        network = on_meta(run)
        if run.config.autoencoder.pretrained:
            if isinstance(network, ImageEmbeddings):
                network.require()
            return
        if run.config.autoencoder.init_discriminator:
            give_discriminator(
                run, instantiate(plain(run.config.autoencoder.loss) | {"perceptual": None}, _convert_="all")
            )
        run.decode_one(run.data("autoencoder", ("image",)))
        with shapes_only():  # without the perceptual network, which is loaded only when the stage runs
            loss = instantiate(plain(run.config.autoencoder.loss) | {"perceptual": None}, _convert_="all")
        _check_sizes(run, network.downsample_factor, loss)

    def plan(self, run: Run) -> Plan | None:
        if not self.steps(run):
            return None
        network = on_meta(run)
        size = sides(stage_data(run.config, "autoencoder").image_size)
        picture = torch.empty(1, run.config.data.channels, *size, device="meta")
        section, taken = run.config.autoencoder, taken_folder(run)
        tree = plain(section.network) if taken is None else read_tree(taken)
        flops = training.forward_flops("autoencoder.network", tree, network, picture)
        kept = ", its encoder kept" if section.train == "decoder" else ""
        begins = f"begins from {section.init}{kept}" if section.init else ""
        loss, warning = section.loss, ""
        if loss.get("discriminator") is not None and loss.disc_start - loss.disc_warmup >= section.max_steps:
            warning = (
                f"the discriminator never trains: autoencoder.loss.disc_start={loss.disc_start} lies beyond "
                f"autoencoder.max_steps={section.max_steps}; change one of them, or leave it out with "
                "autoencoder.loss.discriminator=null"
            )
        return Plan(network, flops, run.enough_images("autoencoder", ("image",)), begins, warning=warning)

    def task(self, run: Run, network: nn.Module, loss: AutoencoderLoss, folder: Path) -> Task:
        """The LightningModule that trains the autoencoder."""
        config, section = run.config, run.config.autoencoder
        return instantiate(section.task)(
            network,
            loss,
            **training.optimisation(run, "autoencoder"),
            image_folder=folder / "images",
            disc_lr=section.disc_lr,
            features=instantiate(config.evaluation.extractors.tiny) if config.evaluation.metrics else None,
        )

    def rehearsal(self, run: Run) -> Rehearsal | None:
        if not self.steps(run):
            return None
        section, network = run.config.autoencoder, on_meta(run).to(memory_format=torch.channels_last).train()
        if section.train == "decoder":
            network.freeze_encoder()
        with torch.device("meta"), warnings.catch_warnings(action="ignore"):  # about weights that are not kept
            loss = instantiate(section.loss, _convert_="all")
        size = sides(stage_data(run.config, "autoencoder").image_size)
        task = self.task(run, network, loss, run.folder / "autoencoder")
        # Of the image sizes that equivariance draws, the full size takes the most memory.
        task.augmentation = replace(task.augmentation, equivariance=0.0)
        return Rehearsal(task, {"image": (run.config.data.channels, *size)})

    def run(self, run: Run, folder: Path) -> dict[str, Any]:
        config, section = run.config, run.config.autoencoder
        if section.pretrained:
            source = taken_folder(run)
            if run.machine.rank == 0:
                copy_model(source, folder / "model")
            return {"sha256": read_metadata(source)["sha256"], "pretrained": str(section.pretrained)}
        rng.reseed(config.seed, "autoencoder", "weights")
        data, taken = run.data("autoencoder", ("image",)), taken_folder(run)
        if taken is None:
            network, tree = instantiate(section.network, _convert_="all"), plain(section.network)
        else:
            network, tree = load_autoencoder(taken, run.trust), read_config(taken / CONFIG)
        metadata = {"downsample_factor": network.downsample_factor}
        network.train()  # a loaded one is in eval mode, in which codebooks do not learn
        if section.train == "decoder":
            network.freeze_encoder()
            metadata["latents_of"] = latents_of(taken)
        if not list(network.parameters()):  # the identity has nothing to train
            return {"sha256": training.save(run, folder / "model", network, tree, metadata)}
        loss = instantiate(section.loss, _convert_="all")
        if taken is not None:
            give_discriminator(run, loss)
        task = self.task(run, network, loss, folder)
        if section.compile:  # not the last convolution: the adaptive weight computes its gradient by hand
            compile_training(network.encoder, network.decoder)
        for part in (network, loss):  # also the losses' networks: otherwise their weights are copied in every pass
            part.to(memory_format=torch.channels_last)
        health = {"max_adaptive_weight": section.loss.get("max_adaptive_weight")}
        training.train(run, "autoencoder", task, data, folder, images=data.count(data.train_split), health=health)
        return {"sha256": training.save(run, folder / "model", network, tree, metadata)}
