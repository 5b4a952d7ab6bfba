"""What a model offers on its page: the inputs its conditioners read, the tasks it can do, its usual settings and its
adapters."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm_train.checkpoints.adapters import CONTROL, RECORD, find_adapter, read_word
from ldm_train.conditioning.control import PICTURES
from ldm_train.data.batch import FIELDS
from ldm_train.generation.requests import known_fields, picture_multiple
from ldm_train.generation.sample import Loaded
from ldm_train.storage import read_record

MAIN = "draw"  # the tab of the conditions alone: text to picture, class to picture, ...


@dataclass(frozen=True)
class Input:
    """A condition that a model reads. kind: see `Field.input`. option: of ldm-sample, which sets it. choices: names of
    the values to choose from."""

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
    """An adapter of a run. control: the input of the picture that steers it, if it is a control. word: what prompts may
    say, if it is a learned word."""

    name: str
    control: Input | None = None
    word: str | None = None


@dataclass(frozen=True)
class Offer:
    """What a model offers. name: of its page. run: as commands name it. folder: the one that jobs are written to. size:
    (H, W) that it was trained on; every side must be divisible by `multiple`. usual: the sampling options that its run
    recorded."""

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
        """Returns True if it has a condition that guidance strengthens."""
        return bool(self.inputs)

    @property
    def reads_text(self) -> bool:
        return any(one.field == "caption" for one in self.inputs)

    @property
    def title(self) -> str:
        """Returns the title of the first tab, which says what becomes a picture, e.g. "Text to picture"."""
        titles = {"caption": "Text to picture", "class_label": "Class to picture", "boxes": "Boxes to picture"}
        titles |= {"segmentation": "Label map to picture", "lowres": "Enlarge", "reference": "Vary"}
        fields = {one.field for one in self.inputs}
        return next((title for field, title in titles.items() if field in fields), "Draw")

    @property
    def tabs(self) -> tuple[str, ...]:
        """Returns MAIN and the tasks that start from a picture. Returns only MAIN for a model that enlarges or varies,
        which takes its one picture there, and for one that is neither grey nor RGB, whose pictures a browser cannot
        upload."""
        if any(one.option == "image" for one in self.inputs) or self.channels not in (1, 3):
            return (MAIN,)
        return (MAIN, "img2img", "inpaint", "outpaint", "interpolate", "reconstruct")


def _choices(conditioner: Any, kind: str) -> tuple[str, ...]:
    if kind in ("choice", "boxes"):
        return tuple(conditioner.names)
    return tuple(str(i) for i in range(conditioner.num_labels)) if kind == "map" else ()


def offer_of(name: str, run: str, folder: Path, loaded: Loaded, adapters: Sequence[Adapter] = ()) -> Offer:
    """Returns the offer of a loaded model."""
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
        picture_multiple(model),
        model.first_stage.autoencoder.in_channels,
        loaded.trained,
        tuple(adapters),
    )


def adapters_of(run: str, bases: Sequence[str], runs_dir: Path, names: Sequence[str]) -> list[Adapter]:
    """Returns the adapters of a run that the runs `names` have trained. bases: sha256 of the weights of the run's
    models."""
    found = []
    for name in names:
        try:
            path = find_adapter(name, runs_dir)
            record = read_record(path / RECORD)
            word = read_word(path)
        except (OSError, ValueError):
            continue  # no adapter, or a damaged one, which training and ldm-sample report
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
