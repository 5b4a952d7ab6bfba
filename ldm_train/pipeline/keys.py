"""What each stage of a run depends on, as a tree of plain values: equal trees mean equal results."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ldm_train.checkpoints.native import read_metadata
from ldm_train.data.shards import data_hash, read_index
from ldm_train.metrics.measures import parse_metrics
from ldm_train.pipeline import build
from ldm_train.pipeline import resume as stages
from ldm_train.training.fit import Machine

# Options that change how a stage runs but not what it computes; they may differ when it resumes.
NOT_IN_KEY = (
    "data",  # enters by content
    "max_steps",
    "micro_batch_size",
    "val_every",
    "val_images",
    "checkpoint_every",
    "log_every",
    "compile",
    "samples",
    "evaluate_every",
    "evaluate_images",
    "best_by",
)


class Keys:
    """The keys of one run's stages; a later stage asks for what earlier ones made, so each is asked in its turn."""

    def __init__(self, config: DictConfig, folder: Path, machine: Machine):
        self.config, self.folder, self.machine = config, folder, machine

    def section(self, stage: str) -> dict[str, Any]:
        return {k: v for k, v in build.plain(self.config[stage]).items() if k not in NOT_IN_KEY}

    def data(self, stage: str) -> dict[str, Any]:
        data = build.stage_data(self.config, stage)
        index = read_index(build.plain(data)["root"], data.remedy)
        used = {k: data[k] for k in ("image_size", "crop", "scale", "flip", "channels", "reader", "shuffle_buffer")}
        if data.reader == "streaming":  # its order depends on the number of its readers
            used["num_workers"] = self.config.num_workers
        return OmegaConf.to_container(OmegaConf.create(used)) | {
            "content": data_hash(index, data.train_split, data.val_split)
        }

    def drawn(self, stage: str) -> dict[str, Any]:
        """How training draws from several sets of data."""
        data = build.plain(build.stage_data(self.config, stage))
        return {k: data[k] for k in ("weights", "balance_classes")}

    def autoencoder(self) -> dict[str, Any]:
        data = self.data("autoencoder") | self.drawn("autoencoder")
        common = {"data": data, "seed": self.config.seed}
        if pretrained := self.config.autoencoder.pretrained:
            folder = build.pretrained_folder(pretrained, self.config.runs_dir)
            return common | {"pretrained": read_metadata(folder)["sha256"]}
        return common | {"autoencoder": self.section("autoencoder"), "precision": self.machine.precision}

    def latents(self) -> dict[str, Any]:
        weights = stages.result_of(self.folder, "autoencoder", "sha256")
        return {
            "autoencoder_weights": weights,
            "data": self.data("diffusion"),
            "latents": build.plain(self.config.latents),
        }

    def diffusion(self) -> dict[str, Any]:
        content = stages.result_of(self.folder, "latents", "content")
        return {
            "diffusion": self.section("diffusion"),
            "latents": content,
            "derived": build.plain(self.config.data.derived),
            "data": self.drawn("diffusion"),
            "seed": self.config.seed,
            "precision": self.machine.precision,
        }

    def evaluation(self) -> dict[str, Any]:
        return {
            "weights": stages.result_of(self.folder, "diffusion", "sha256"),
            "data": self.data("diffusion"),
            "evaluation": self.evaluated(),
            "sampling": build.plain(self.config.sampling),
            "sampler": build.plain(self.config.sampler),
        }

    def evaluated(self) -> dict[str, Any]:
        """The evaluation section with the extractors that its metrics use: another's path changes nothing."""
        section = build.plain(self.config.evaluation)
        used = {m.extractor for m in parse_metrics(section["metrics"], list(section["extractors"]))}
        section["extractors"] = {name: tree for name, tree in section["extractors"].items() if name in used}
        if section["reference"] == self.config.data.val_split:
            section.pop("reference")  # as usual
        if "lpips" not in section["paired"]:
            section.pop("lpips")
        return section

    def export(self) -> dict[str, Any]:
        return {"weights": stages.result_of(self.folder, "diffusion", "sha256")}

    def classifier(self) -> dict[str, Any]:
        content = stages.result_of(self.folder, "latents", "content")
        return {
            "classifier": self.section("classifier"),
            "schedule": build.plain(self.config.diffusion.schedule),
            "latents": content,
            "data": self.drawn("diffusion"),
            "seed": self.config.seed,
            "precision": self.machine.precision,
        }

    def perceptual(self) -> dict[str, Any]:
        return {
            "data": self.data("autoencoder"),
            "perceptual": build.plain(self.config.perceptual),
            "seed": self.config.seed,
        }
