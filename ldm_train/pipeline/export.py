"""The export stage: a model folder with everything that sampling needs and nothing that only training needs."""

import re
from pathlib import Path
from typing import Any

from ldm_train.checkpoints.native import copy_model, load_model, read_metadata, read_tree
from ldm_train.configuration import plain
from ldm_train.pipeline.card import write_card
from ldm_train.pipeline.diffusion import sampling_of
from ldm_train.pipeline.resume import read_note
from ldm_train.pipeline.run import Run
from ldm_train.pipeline.stage import Stage

# How the model is loaded, as the card shows it.
OPENED = [
    "import ldm_train",
    'model = ldm_train.load("<this folder, or its name on the Hub>")',
    "images = model.sample({}, seeds=[0, 1, 2, 3])      # (4, C, H, W) in [-1, 1]; {field: entries} to say what is drawn",
]


class ExportStage(Stage):
    """Copies the model folder, adds its card, and uploads it to W&B if the config asks for it."""

    name, needs = "export", ("diffusion",)

    def key(self, run: Run) -> dict[str, Any]:
        key = {"weights": run.result("diffusion"), "sampling": sampling_of(run)}
        note = read_note(run.folder / self.name)
        if note is not None and note["finished"] and "sampling" not in note["key"]:
            # The key of an older export lacks the sampling options, but its metadata have them.
            recorded = read_metadata(run.folder / self.name).get("sampling", {})
            key["sampling"] = {k: v for k, v in key["sampling"].items() if recorded.get(k) != v}
        return key

    def check(self, run: Run) -> None:
        loggers = (plain(run.config.logger) or {}).values()
        if run.config.wandb_artifact and not any(tree["_target_"].endswith(".WandbRun") for tree in loggers):
            raise ValueError(
                "wandb_artifact=true uploads the model to W&B, and logger= is without it; leave one of them out"
            )

    def run(self, run: Run, folder: Path) -> dict[str, Any]:
        if run.machine.rank == 0:
            source = run.folder / "diffusion" / "model"
            load_model(source, run.trust)  # a folder that does not load must not be exported
            copy_model(source, folder, {"sampling": sampling_of(run), "run": run.config.name})
            write_card(folder, run.folder, run.config.name, read_tree(folder), OPENED)
            if run.wandb and run.config.wandb_artifact:
                name = re.sub(r"[^\w.-]", "-", run.config.name)
                run.wandb.log_model(folder, name, {"sha256": read_metadata(folder)["sha256"]})
        run.barrier()
        return {"sha256": read_metadata(folder)["sha256"]}
