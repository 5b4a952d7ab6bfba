"""A run: its config, folder, machine and stages."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch.distributed as dist
from hydra.utils import get_object, instantiate
from lightning.pytorch.loggers.logger import Logger
from omegaconf import DictConfig, OmegaConf

from ldm_train.checkpoints.parts import build, targets
from ldm_train.configuration import default_options, plain, run_config
from ldm_train.data.datamodule import ShardDataModule
from ldm_train.data.shards import DataError
from ldm_train.errors import Refused
from ldm_train.evaluation.evaluator import Evaluator, check_reference
from ldm_train.latent_diffusion import LatentDiffusion
from ldm_train.metrics.metric import HELD_OUT, TRAINING
from ldm_train.pipeline import resume, slurm
from ldm_train.pipeline.data import bucketing, conditioner_classes, data_module, evaluation_batching, stage_data
from ldm_train.pipeline.plan import print_plan
from ldm_train.pipeline.resume import Order, Step
from ldm_train.pipeline.stage import Stage
from ldm_train.storage import write_atomically
from ldm_train.training.callbacks.checkpoint import LAST, steps_done
from ldm_train.training.fit import Machine
from ldm_train.training.loggers import Recorder, StockLogger, WandbRun

# Sections whose `_target_`s a run's folders may refer to.
DENOISING = ("diffusion.network", "diffusion.schedule", "diffusion.objective", "diffusion.conditioning")
NAMEABLE = ("autoencoder.network", *DENOISING, "sampler", "data.derived", "classifier.network")


def own_parts(config: DictConfig) -> list[str]:
    """Names of parts, in addition to this package's, that a run's folders may refer to: those of `trust=` and of the
    user's own config."""
    trees = [plain(section) for s in NAMEABLE if (section := OmegaConf.select(config, s)) is not None]
    return [*config.trust, *dict.fromkeys(targets(trees))]


def option_defaults(config: DictConfig) -> dict[str, Any]:
    """Defaults for options that an older run lacks: the values in the base config files and, for parts with a
    `_target_`, the defaults of their constructor."""
    tree = default_options()
    for section in {"autoencoder", "diffusion", "classifier", "sampler"} & config.keys():
        tree[section] = _with_signatures(plain(config[section]), tree.get(section, {}))
    return tree


def _with_signatures(node: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    defaults = dict(known)
    if "_target_" in node:
        target = get_object(node["_target_"])
        chain = [c.__init__ for c in reversed(target.__mro__)] if isinstance(target, type) else [target]
        for function in chain:  # subclasses that pass on **options accept their base's
            parameters = inspect.signature(function).parameters.values()
            defaults |= {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    for name, value in node.items():
        if isinstance(value, dict):
            inner = known.get(name)  # section of the base files, more informative than a signature's None
            defaults[name] = _with_signatures(value, inner if isinstance(inner, dict) else {})
    return defaults


@dataclass(frozen=True)
class Index:
    """The place of a data module whose images are missing: only the index of its shards and their folder."""

    index: dict[str, Any]
    root: str


class Run:
    """The context in which stages work.

    config, folder, machine: of this process. trust: parts outside this package's models that the run's folders may
    refer to (see `own_parts`). share: take over stages that a run in a sibling folder has finished with an equal key
    (runs of one sweep).
    """

    def __init__(
        self, config: DictConfig, folder: Path, machine: Machine, trust: Sequence[str] = (), share: bool = False
    ):
        self.config, self.folder, self.machine, self.trust, self.share = config, folder, machine, trust, share
        self.fields = tuple(conditioner.field for conditioner in conditioner_classes(config, trust).values())
        self.wandb: WandbRun | None = None
        self.plans_only = config.get("plan") == "only"  # older runs lack this option
        self.missing: dict[str, None] = {}  # with plan=only: messages about missing files, in order
        self.effort: dict[str, tuple[float, float]] = {}  # per stage: training FLOPs per image, devices' peak FLOP/s

    # -- for the stages' work -----------------------------------------------------------------------------------------

    def data(self, stage: str, fields: tuple[str, ...]) -> ShardDataModule:
        """The data module of a stage that has a section in the config."""
        return data_module(self.config, stage, self.machine, fields, self.trust)

    def part(self, option: str) -> Any:
        """Builds the object that a config section describes, see `parts.build`."""
        return build(plain(attrgetter(option)(self.config)), option, self.trust)

    def result(self, stage: str, name: str | None = None) -> Any:
        """Returns an entry of a finished stage's result. Raises Refused if the stage is not finished."""
        return self.order.result_of(self.folder, stage, name)

    def barrier(self) -> None:
        """Waits for the other ranks, if there are any."""
        if self.machine.world_size > 1:
            dist.barrier()

    def loggers(self, stage: str) -> list[Logger]:
        """A stage's loggers in addition to metrics.csv, on the first rank only. In string options of all loggers except
        wandb, "{folder}" is replaced by the run's folder and "{stage}" by the stage."""
        if self.machine.rank > 0:
            return []
        loggers: list[Logger] = [self.wandb.stage(stage, self.config[stage].batch_size)] if self.wandb else []
        for name, tree in plain(self.config.logger).items():
            if name == "wandb":
                continue
            for option, value in tree.items():
                if isinstance(value, str):
                    tree[option] = value.replace("{folder}", str(self.folder)).replace("{stage}", stage)
            logger = instantiate(tree, _convert_="all")
            logger = logger if isinstance(logger, Logger) else logger(self.folder, stage)
            loggers.append(logger if isinstance(logger, Recorder) else StockLogger(logger))
        return loggers

    @cached_property
    def evaluator(self) -> Evaluator:
        """The metrics, extractors and reference of this run."""
        return Evaluator.on_all_ranks(self.config.evaluation, self.machine.device)

    def evaluation_data(self) -> ShardDataModule:
        """The images for an evaluation, split over the ranks, in batches of evaluation.batch_size."""
        data = self.data("diffusion", ("image", *self.fields))
        data.batching = evaluation_batching(self.config, self.machine)
        return data

    def conditions(self, data: ShardDataModule, count: int) -> Any:
        """Validation samples that provide the conditions of `count` generated samples, repeated if there are fewer."""
        return data.fixed_loader(self.config.data.val_split, count, repeat=True)

    def keep_states(self, model: LatentDiffusion) -> None:
        """Caches the hidden states that the model's frozen encoders compute for captions in the folder `text_cache`, if
        set."""
        if (folder := self.config.get("text_cache")) is not None:
            for conditioner in model.conditioners.values():
                conditioner.cache_states_in(Path(folder))

    # -- for the stages' checks -------------------------------------------------------------------------------------

    def check_metrics(self, samples: int) -> None:
        """Raises ValueError if the metrics cannot be measured with this number of samples."""
        data = self.config.data
        self.evaluator.check(self.fields, [samples], data.image_size, data.channels)
        if data.train_split == data.val_split:
            for metric in self.evaluator.metrics:
                if {TRAINING, HELD_OUT} <= {*metric.compared_with}:
                    raise ValueError(
                        f"{metric.name} compares with pictures that training does not see, and data.val_split="
                        f"{data.val_split} is what it sees; leave it out of evaluation.metrics"
                    )

    def check_reference(self, images: ShardDataModule) -> None:
        source = str(self.config.evaluation.reference)
        check_reference(source, images.index["splits"], images.root)
        if not source.endswith(".npz"):
            self.evaluator.check_reference_count(source, images.count(source))

    def decode_one(self, images: ShardDataModule) -> None:
        """Decodes one sample with all its fields, as a check. Skipped for the streaming reader, whose shards may be
        remote."""
        if images.reader == "indexed":
            images.samples(images.val_split, images.fields, random=False)[(0, 0)]

    def index(self, stage: str) -> "Index | ShardDataModule":
        """The data module of a stage, with its index. If only a plan is asked for and the images are not available, a
        stand-in with two classes, since the number of classes hardly affects memory."""
        images = self._images(stage, ("image",))
        return (
            images if images is not None else Index({"classes": ["0", "1"]}, str(stage_data(self.config, stage).root))
        )

    def _images(self, stage: str, fields: tuple[str, ...]) -> ShardDataModule | None:
        """The data module of a stage; None if only a plan is asked for and the images are not available."""
        try:
            return self.data(stage, fields)
        except (FileNotFoundError, DataError) as error:
            if not self.plans_only:
                raise
            self.missing[str(error)] = None
            return None

    def enough_images(self, stage: str, fields: tuple[str, ...]) -> int | None:
        """Returns the number of training images; None if only a plan is asked for and they are not available. Raises
        ValueError if they do not fill a batch."""
        if (images := self._images(stage, fields)) is None:
            return None
        count, size = images.count(images.train_split), self.config[stage].batch_size
        if (least := (bucketing(stage_data(self.config, stage)) or {}).get("min_images", size)) < size:
            raise ValueError(
                f"data.buckets.min_images={least} is less than {stage}.batch_size={size}: a bucket of so few would never be seen; "
                f"say {size}, or somewhat more where some pictures cannot be read"
            )
        if size > count:
            raise ValueError(
                f"{stage}.batch_size={size} exceeds the {count} training images of {images.root}; lower it or prepare more data"
            )
        validated = images.count(images.val_split)
        asked = min(validated, self.config[stage].get("val_images") or validated)
        if asked < self.machine.world_size:
            raise ValueError(
                f"{self.machine.world_size} devices need at least as many validation images, and {stage} has {asked}: "
                f"{stage}.val_images is {self.config[stage].get('val_images')}, {images.root} has {validated} in "
                f"data.val_split={images.val_split}; lower devices, or give more"
            )
        return count

    # -- its stages --------------------------------------------------------------------------------------------------

    @cached_property
    def stages(self) -> dict[str, Stage]:
        """All stages, each after those it needs. Raises ValueError for a stage that comes before one it needs."""
        stages: dict[str, Stage] = {}
        for name, tree in self.config.stage.items():
            stage = instantiate(tree)
            if not isinstance(stage, Stage) or stage.name != name:
                raise ValueError(
                    f"stage.{name}: {tree.get('_target_')} is not a stage of that name (see pipeline/stage.py)"
                )
            if missing := [n for n in stage.needs if n not in stages]:
                raise ValueError(
                    f"stage.{name} needs {missing[0]}, which is not among the stages before it: {', '.join(stages)}"
                )
            stages[name] = stage
        return stages

    @cached_property
    def order(self) -> Order:
        return Order({name: (stage.needs, stage.identity) for name, stage in self.stages.items()})

    def chosen(self) -> list[Step]:
        """The stages named in the option `stages`. Raises ValueError for an unknown name."""
        return [self._step(name) for name in self.order.chosen(list(self.config.stages))]

    def _step(self, name: str) -> Step:
        stage = self.stages[name]
        return Step(name, partial(stage.key, self), partial(stage.run, self), stage.steps(self))

    def binding(self, chosen: Sequence[Step]) -> list[Step]:
        """The stages that are not chosen, but whose options the chosen ones use (see `Stage`)."""
        needed = {need for step in chosen for need in self.stages[step.name].needs} - {step.name for step in chosen}
        return [self._step(name) for name in self.stages if name in needed and self.stages[name].binding]

    def prepare(self) -> list[Step]:
        """Returns the chosen stages after all checks that are possible beforehand. Prints the plan and changes nothing.
        Raises errors that a user can act on: Refused, ValueError, FileNotFoundError, DataError."""
        steps, restart = self.chosen(), self.config.restart
        if restart:
            self.order.chosen([restart])
        for step in steps:
            self.stages[step.name].check(self)
        self.effort = print_plan(self, steps)
        bound = self.binding(steps)
        resume.check_chain(self.order, steps, self.folder, option_defaults(self.config), restart, bound)
        self._check_steps(steps)
        return steps

    def _check_steps(self, steps: Sequence[Step]) -> None:
        """Raises Refused if a stage that was interrupted has more steps than it is asked for."""
        anew = resume.made_anew(self.order, steps, self.folder, self.config.restart)
        for step in steps:
            note, timed = resume.read_note(self.folder / step.name), f"{step.name}.max_time"
            if step.name in anew or not step.steps or note is None or note["finished"]:
                continue
            if OmegaConf.select(self.config, timed) is not None:  # ended by the clock, after any number of steps
                continue
            done = steps_done(self.folder / step.name / "checkpoints" / LAST)
            if done > step.steps:
                raise Refused(
                    f"{self.folder / step.name} has {done} steps and {step.name}.max_steps={step.steps} asks for fewer; "
                    f"{step.name}.max_steps={done} ends it there, restart={step.name} begins it again. Nothing has been changed"
                )

    def plan(self) -> None:
        """Prints the plan in full. Reads no images, loads no weights and changes nothing. Raises ValueError for invalid
        options, and for a step that needs more memory than there is."""
        steps = self.chosen()
        if self.config.restart:
            self.order.chosen([self.config.restart])
        try:
            print_plan(self, steps)
        finally:
            for what in self.missing:
                print(f"missing: {what}")
        print("plan=only: nothing was written; data, weights and downloads are checked when it runs")

    def execute(self) -> None:
        """Runs the chosen stages one after the other, and continues interrupted ones."""
        config, writer = self.config, self.machine.rank == 0
        steps, defaults = self.prepare(), option_defaults(config)
        anew = resume.made_anew(self.order, steps, self.folder, config.restart)  # not taken over from siblings
        said = {"skip": "finished before, skipped", "share": "taken from another run of this sweep"}
        self.barrier()
        if config.restart and writer:
            self.set_aside()
        self.barrier()
        if writer:
            self._record()
        try:
            for step in steps:
                action = resume.advance(step, self.folder, defaults, writer, self.share and step.name not in anew)
                self.barrier()
                if writer:
                    print(f"{step.name}: {said.get(action, 'done')}")
        finally:
            if self.wandb:
                self.wandb.finish()
        if writer:
            self._closing_words()

    def set_aside(self) -> None:
        """Moves the stage named in `restart`, and those made from it, to .replaced. If it trains, its steps start again
        from 0, so they are logged to a new W&B run."""
        restart = self.config.restart
        resume.set_aside(self.folder, resume.made_anew(self.order, self.chosen(), self.folder, restart))
        slurm.note_restart(self.folder, restart)
        if self.stages[restart].steps(self):
            (self.folder / "wandb" / "run_id").unlink(missing_ok=True)

    def _record(self) -> None:
        """Writes the config to the run folder, and starts the W&B run."""
        config, path = self.config, self.folder / "config.yaml"
        trained = [name for name, stage in self.stages.items() if name in config and stage.steps(self)]
        made = [name for name in trained if name in config.stages]
        if made or not path.is_file():
            record = plain(config)
            # Sections of stages that this command does not train keep their recorded options.
            others = [name for name in trained if name not in made]
            before = OmegaConf.to_container(run_config(self.folder)) if others and path.is_file() else {}
            record |= {name: before[name] for name in others if name in before}
            for name in made:  # a finished stage stays as it is if fewer steps are asked for
                note = resume.read_note(self.folder / name)
                if note and note["finished"] and not record[name].get("max_time"):
                    record[name]["max_steps"] = max(record[name]["max_steps"], note["steps"])
            text = OmegaConf.to_yaml(record).encode()
            write_atomically(path, lambda file: file.write(text))
        if "wandb" in config.logger:
            self.wandb = instantiate(config.logger.wandb)(self.folder, config.project, config.name, plain(config))

    def _closing_words(self) -> None:
        samples = self.folder / "evaluation" / "samples.png"
        if samples.is_file():
            print(f"samples: {samples}\nmetrics: {self.folder / 'evaluation' / 'metrics.json'}")
        if (self.folder / "export" / "metadata.json").is_file():
            print(f"model:   {self.folder / 'export'}   (ldm-sample run={self.folder})")
