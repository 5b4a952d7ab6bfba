"""The evaluation stage: metrics of samples, reconstructions, latents and adherence to conditions, and sample images."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ldm_train.checkpoints.native import load_model
from ldm_train.configuration import plain
from ldm_train.data.order import Batching
from ldm_train.data.prepare.build import origin_of
from ldm_train.data.remote import is_address
from ldm_train.errors import Refused
from ldm_train.evaluation.adherence import judged_fields
from ldm_train.evaluation.evaluator import parse_metrics, sampling_options
from ldm_train.evaluation.report import evaluate
from ldm_train.evaluation.restoration import FIELDS as RESTORED
from ldm_train.generation.film import denoising_film
from ldm_train.pipeline.data import data_key
from ldm_train.pipeline.diffusion import check_model, drawer
from ldm_train.pipeline.resume import read_note
from ldm_train.pipeline.run import Run
from ldm_train.pipeline.stage import Stage

SHOWN = 36  # samples that an evaluation without metrics draws, for samples.png


def _may_be_shapes(root: Any) -> bool:
    """Returns False for data that say they were prepared from something else than drawn shapes."""
    name = origin_of(Path(root)).get("source") if isinstance(root, str) and not is_address(root) else None
    return not isinstance(name, str) or name.startswith("shapes")


class EvaluationStage(Stage):
    """Measures the trained model as the config's evaluation section says."""

    name, needs, identity = "evaluation", ("diffusion",), "samples"

    def key(self, run: Run) -> dict[str, Any]:
        return {
            "weights": run.result("diffusion"),
            "data": data_key(run.config, "diffusion"),
            "evaluation": self._section(run),
            "sampling": plain(run.config.sampling),
            "sampler": plain(run.config.sampler),
        }

    def _section(self, run: Run) -> dict[str, Any]:
        """The evaluation section without extractors that its metrics do not use, since their paths change nothing, and
        without some unused or default options."""
        section = plain(run.config.evaluation)
        metrics = parse_metrics(section["metrics"], list(section["extractors"]), section["kinds"])
        used = {m.extractor for m in metrics}
        section["extractors"] = {name: tree for name, tree in section["extractors"].items() if name in used}
        if not section["kinds"]:
            section.pop("kinds")  # the default
        if section["reference"] == run.config.data.val_split:
            section.pop("reference")  # the default
        if "lpips" not in section["paired"]:
            section.pop("lpips")
        if section["restoration"] is None:  # null would count as the default, as a missing section does
            section["restoration"] = {"images": 0}
        return section

    def check(self, run: Run) -> None:
        images = run.data("diffusion", ("image", *run.fields))
        # The reconstructions are of the split's images, so there may be fewer of them than samples.
        run.check_metrics(min(run.config.evaluation.images, images.count(run.config.data.val_split)))
        if "diffusion" not in run.config.stages:
            check_model(run, images)
        run.check_reference(images)

    def run(self, run: Run, folder: Path) -> dict[str, Any]:
        config, evaluator, data = run.config, run.evaluator, run.evaluation_data()
        model = load_model(run.folder / "diffusion" / "model", run.trust)
        run.keep_states(model)  # while it is on the CPU: if all captions' states are cached, the encoder stays there
        model.to(run.machine.device, memory_format=torch.channels_last)
        split, count, section = config.data.val_split, config.evaluation.images, config.evaluation
        judged, writer = judged_fields(model.fields), run.machine.rank == 0
        if section.adherence and not judged and writer:
            print("adherence: not measured, this model has no condition that says what to draw")
        if section.adherence and judged and not _may_be_shapes(config.data.root):
            judged = ()
            if writer:
                print(f"adherence: not measured, {config.data.root} holds no drawn shapes, which alone can be judged")
        restoration = None
        if section.restoration and any(f in model.fields for f in RESTORED):
            whole = run.data("diffusion", ("image", *run.fields))
            whole.batching = Batching(section.batch_size)
            restoration = plain(section.restoration) | {"loader": whole.fixed_loader(split)}
        show, draw = config.progress and writer, drawer(run)
        result = evaluate(
            model,
            evaluator,
            data.fixed_loader(split, count),
            run.conditions(data, count if evaluator.metrics else SHOWN),
            draw,
            evaluator.reference(data, config.runs_dir, show),
            folder,
            sampling_options(config),
            batch_size=section.batch_size,
            predictors=section.predictors,
            adherence=plain(section.adherence) | {"fields": judged} if judged and section.adherence else None,
            restoration=restoration,
            precision=run.machine.precision,
            progress=show,
        )
        with suppress(Refused):  # a damaged note is reported by its own stage
            if writer and (exported := read_note(run.folder / "export")) and exported["finished"]:
                print(
                    "the exported model's card is of an earlier evaluation, or of none: restart=export writes it again"
                )
        if writer:
            batch = next(iter(data.fixed_loader(split, 4)))
            film = denoising_film(model, draw, batch, folder / "denoising.gif")
        if run.wandb:
            run.wandb.log_evaluation(result)
            for path in sorted(folder.glob("*.png")):
                run.wandb.log_picture(f"evaluation/{path.stem}", path)
            run.wandb.log_film("evaluation/denoising", film, "from noise to pictures")
        run.barrier()
        return result
