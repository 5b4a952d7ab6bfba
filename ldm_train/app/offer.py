"""What a model offers on its page: the inputs its conditioners read, the tasks it can do, its usual settings, the adapters there are."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm_train.checkpoints.adapters import CONTROL, RECORD, find_adapter, read_word
from ldm_train.conditioning.control import PICTURES
from ldm_train.data.batch import FIELDS
from ldm_train.generation.requests import known_fields
from ldm_train.generation.sample import Loaded
from ldm_train.storage import read_record

MAIN = "draw"  # the tab of the conditions alone: text to picture, class to picture, ...


@dataclass(frozen=True)
class Input:
    """A condition that a model reads. kind: see `Field.input`. option: of ldm-sample, which gives it. choices: by name."""

    field: str
    kind: str
    option: str
    choices: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        words = {"caption": "Prompt", "class_label": "Class", "boxes": "Boxes", "segmentation": "Label map"}
        words |= {"lowres": "Small picture", "reference": "Picture to vary"}
        return words.get(self.field, self.field.replace("_", " ").capitalize())


@dataclass(frozen=True)
class Adapter:
    """An adapter of a run. control: the picture that steers it, where it is one. word: what prompts may say, where it is one."""

    name: str
    control: Input | None = None
    word: str | None = None


@dataclass(frozen=True)
class Offer:
    """name: of the run. run: as commands name it. folder: that jobs are written to. size: (H, W) that it was
    trained on; multiple: of every side. usual: how its run drew."""

    name: str
    run: str
    folder: Path
    inputs: tuple[Input, ...]
    size: tuple[int, int]
    multiple: int
    channels: int
    usual: dict[str, Any]
    adapters: tuple[Adapter, ...] = ()

    @property
    def guided(self) -> bool:
        """Whether it has a condition that guidance strengthens."""
        return bool(self.inputs)

    @property
    def reads_text(self) -> bool:
        return any(one.field == "caption" for one in self.inputs)

    @property
    def title(self) -> str:
        """Of the first tab: what becomes a picture."""
        titles = {"caption": "Text to picture", "class_label": "Class to picture", "boxes": "Boxes to picture"}
        titles |= {"segmentation": "Label map to picture", "lowres": "Enlarge", "reference": "Vary"}
        fields = {one.field for one in self.inputs}
        return next((title for field, title in titles.items() if field in fields), "Draw")

    @property
    def tabs(self) -> tuple[str, ...]:
        """MAIN, and the tasks that begin with a picture. A model that enlarges or varies takes its one picture in MAIN;
        one of other channels than grey or colour has no pictures that a browser could hand in."""
        if any(one.option == "image" for one in self.inputs) or self.channels not in (1, 3):
            return (MAIN,)
        return (MAIN, "img2img", "inpaint", "outpaint", "interpolate", "reconstruct")


def _choices(conditioner: Any, kind: str) -> tuple[str, ...]:
    if kind in ("choice", "boxes"):
        return tuple(conditioner.names)
    return tuple(str(i) for i in range(conditioner.num_labels)) if kind == "map" else ()


def offer_of(name: str, run: str, folder: Path, loaded: Loaded, adapters: Sequence[Adapter] = ()) -> Offer:
    """What a loaded model offers."""
    model = loaded.model
    fields, factor = known_fields(model), model.first_stage.downsample_factor
    inputs = []
    for conditioner in model.conditioners.values():
        declared = fields[conditioner.field]
        if declared.input != "mask":  # inpainting's own tab draws it
            choices = _choices(conditioner, declared.input)
            inputs.append(Input(declared.name, declared.input, declared.argument, choices))
    inputs.sort(key=lambda one: one.kind != "text")  # what people look for first
    return Offer(
        name,
        run,
        folder,
        tuple(inputs),
        (model.latent_size[0] * factor, model.latent_size[1] * factor),
        factor * model.network.size_multiple,
        model.first_stage.autoencoder.in_channels,
        loaded.trained,
        tuple(adapters),
    )


def adapters_of(run: str, bases: Sequence[str], runs_dir: Path, names: Sequence[str]) -> list[Adapter]:
    """Those of the runs `names` that trained an adapter of a run. bases: sha256 of its weights."""
    found = []
    for name in names:
        try:
            path = find_adapter(name, runs_dir)
            record = read_record(path / RECORD)
            word = read_word(path)
        except (OSError, ValueError):
            continue  # none, or a damaged one, of which training and ldm-sample tell
        if record.get("base_sha256") not in bases and record.get("base") != run:
            continue
        control = None
        if (path / CONTROL).is_file():
            if (kind := PICTURES.get(str(record.get("field")))) is None:
                continue
            declared = kind.declares or FIELDS[kind.field]
            control = Input(declared.name, "picture", declared.argument)
        found.append(Adapter(name, control, None if word is None else word[0]))
    return found
