"""The form of a model's page: its inputs, a tab for each task and settings, and the request that their values make
up."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder

from ldm_train import images as pictures
from ldm_train.app.asked import LISTS, kept, layout, sampler_tree, samplers
from ldm_train.app.offer import MAIN, Input, Offer
from ldm_train.app.sketch import boxed, canvas_value, painted, sketch, with_background
from ldm_train.app.studio import Studio, words
from ldm_train.data.files import encoded_png
from ldm_train.generation.adapters import STRONGEST, with_strength

OWN = "the run's own"
ANY = "any"  # a choice of class: draw without this condition
TITLES = {
    "img2img": ("Picture to picture", "Change it"),
    "inpaint": ("Inpaint", "Fill the hole"),
    "outpaint": ("Outpaint", "Extend it"),
    "interpolate": ("Walk", "Walk"),
    "reconstruct": ("Reconstruct", "Reconstruct"),
}
SIDES = ("top", "right", "bottom", "left")
ADAPTER = "adapter: "  # prefix of the name of an adapter's slider
BESIDE = "beside: "  # prefix of the names of settings of the second of two jobs
NEEDED = {
    "boxes": "draw at least one box first",
    "map": "paint a label map first",
    "picture": "hand in a picture first",
}


@dataclass
class Parts:
    """The input components of a page, by name. kept: the names of those whose values survive a reload."""

    all: dict[str, gr.components.Component] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)

    def add(self, name: str, component: Any, kept: bool = True) -> Any:
        self.all[name] = component
        if kept:
            self.kept.append(name)
        return component


def picture(label: str) -> gr.Image:
    """Returns an upload component that passes on the file as it is: if it is not a picture, or too large, the studio
    says so in words."""
    made = gr.Image(label=label, type="filepath", sources=["upload", "clipboard"], image_mode=None, height=240)

    def handed_in(payload: Any) -> str | None:
        if payload is None:
            return None
        path = Path(payload.path).resolve()  # from a request, which may name any file on this machine
        if not any(path.is_relative_to(Path(folder).resolve()) for folder in (get_upload_folder(), made.GRADIO_CACHE)):
            raise gr.Error("hand the picture in first", print_exception=False)
        return str(path)

    made.preprocess = handed_in  # a derived class would write files beside this one
    return made


class Form:
    """Builds the form in the surrounding Blocks. buttons: those that start a job, by task. offers: of all pages."""

    def __init__(self, studio: Studio, offer: Offer, offers: Sequence[Offer]):
        self.studio, self.offer, self.offers, self.parts = studio, offer, offers, Parts()
        for one in offer.inputs:
            self._input(one)
        self._tabs()
        self._settings()

    def _input(self, one: Input) -> None:
        if one.kind == "choice":
            made: Any = gr.Dropdown([(ANY, ""), *one.choices], value="", label=one.label)
        elif one.kind in ("boxes", "map"):
            gr.Markdown(f"**{one.label}**")
            made = sketch(one.kind, one.label, self.offer.size, one.choices, elem_id=f"{one.kind}-{self.offer.name}")
        elif one.kind == "picture":
            made = picture(one.label)
        else:
            made = gr.Textbox(
                label=one.label, lines=1, max_lines=4, max_length=self.studio.limits.characters, autofocus=True
            )
        self.parts.add(one.option, made, kept=one.kind != "picture")

    def _tabs(self) -> None:
        self.buttons: dict[str, gr.Button] = {}
        with gr.Tabs():
            for task in self.offer.tabs:
                title, verb = (self.offer.title, "Draw") if task == MAIN else TITLES[task]
                with gr.Tab(title):
                    if task in ("img2img", "inpaint", "outpaint", "reconstruct"):
                        self.parts.add(f"{task}: image", picture("Picture"), kept=False)
                    getattr(self, f"_of_{task}", lambda: None)()
                    self.buttons[task] = gr.Button(verb, variant="primary")
        self.cancel = gr.Button("Cancel", variant="stop", size="sm")

    def _of_img2img(self) -> None:
        self.parts.add(
            "strength",
            gr.Slider(
                0, 1, 0.7, label="Strength", info="1 starts from pure noise, 0 returns the autoencoder's reconstruction"
            ),
        )
        info = "keeps what else is in the picture; Strength then has no effect"
        self.parts.add("invert", gr.Checkbox(label="Begin with the picture's own noise", info=info))
        if self.offer.reads_text:
            self.parts.add(
                "image_prompt", gr.Textbox(label="What the picture shows now", info="of its own noise alone")
            )

    def _of_inpaint(self) -> None:
        canvas = self.parts.add(
            "inpaint: mask", sketch("mask", "Mask", self.offer.size, elem_id=f"mask-{self.offer.name}")
        )
        self.parts.all["inpaint: image"].change(
            self._shown_under,
            self.parts.all["inpaint: image"],
            canvas,
            show_progress="hidden",
            api_visibility="private",
        )

    def _of_outpaint(self) -> None:
        with gr.Row():
            for side in SIDES:
                info = f"pixels, in multiples of {self.offer.multiple}" if side == "top" else None
                self.parts.add(
                    f"extend {side}", gr.Number(0, label=side.capitalize(), info=info, precision=0, minimum=0)
                )

    def _of_interpolate(self) -> None:
        info = "from each to the next; without any: from one seed's noise to the next seed's"
        if self.offer.reads_text:
            self.parts.add("walk: prompts", gr.Textbox(label="Prompts, one a line", lines=3, info=info))
        for one in self.offer.inputs:
            if one.kind == "choice":
                made = gr.Dropdown(list(one.choices), multiselect=True, label="Classes", info=info)
                self.parts.add("walk: classes", made)
        self.parts.add("walk: n", gr.Slider(2, 24, 8, step=1, label="Pictures from one end to the next"))

    def _settings(self) -> None:
        offer, limits, usual = self.offer, self.studio.limits, self.offer.usual
        self.parts.add("n", gr.Slider(1, limits.pictures, min(4, limits.pictures), step=1, label="Number of pictures"))
        with gr.Row(equal_height=True):
            self.parts.add("seed", gr.Number(0, label="Seed", precision=0, minimum=0, min_width=120))
            self.dice = gr.Button("Random seed", min_width=120)
        with gr.Accordion("Settings", open=False):
            if offer.reads_text:
                self.parts.add("negative", gr.Textbox(label="Negative prompt", info="guidance leads away from it"))
            self._how("", usual["num_inference_steps"], usual["guidance_scale"])
            with gr.Row():
                for side, value in zip(("height", "width"), offer.size):
                    info = f"trained on {value}; multiples of {offer.multiple}"
                    self.parts.add(side, gr.Number(value, label=side.capitalize(), precision=0, minimum=1, info=info))
        if offer.adapters:
            with gr.Accordion("Adapters", open=False):
                for adapter in offer.adapters:
                    info = f"prompts may say {adapter.word}" if adapter.word else "0: without it; 1: as trained"
                    slider = gr.Slider(0, STRONGEST, 0, step=0.05, label=adapter.name, info=info)
                    self.parts.add(ADAPTER + adapter.name, slider)
                    if (one := adapter.control) is not None and one.option not in self.parts.all:
                        self.parts.add(one.option, picture(f"{one.label}: the picture that steers"), kept=False)
        with gr.Accordion("Side by side", open=False):
            self.parts.add(BESIDE + "on", gr.Checkbox(label="Draw twice, from the same seeds", info="the second with:"))
            names = [o.name for o in self.offers if {i.option for i in o.inputs} == {i.option for i in offer.inputs}]
            self.parts.add(BESIDE + "model", gr.Dropdown(names, value=offer.name, label="Model"))
            self._how(BESIDE, usual["num_inference_steps"], usual["guidance_scale"])

    def _how(self, prefix: str, steps: int, guidance_scale: float) -> None:
        """Adds sampler, steps and guidance of one of two jobs."""
        of = " of the second" if prefix else ""
        with gr.Row():
            self.parts.add(prefix + "sampler", gr.Dropdown([OWN, *samplers()], value=OWN, label=f"Sampler{of}"))
            most = self.studio.limits.steps
            made = gr.Slider(1, most, min(steps, most), step=1, label=f"Steps{of}")
            self.parts.add(prefix + "num_inference_steps", made)
            if self.offer.guided:
                made = gr.Slider(0, 20, guidance_scale, step=0.1, label=f"Guidance{of}", info="1: off")
                self.parts.add(prefix + "guidance_scale", made)

    # -- from values to a request --------------------------------------------------------------------------------------

    def asked(self, task: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the request that the values of the page's parts make up. Raises ValueError if an input that a task
        needs is missing."""
        offer = self.offer
        asked = {"seed": _number(given, "seed"), "n": _number(given, "n")} | self.how_asked("", given)
        if (size := [_number(given, side) for side in ("height", "width")]) != list(offer.size):
            asked["size"] = size
        if task == "reconstruct":
            return {"task": task, "seed": 0, "size": asked.get("size")} | self._image(task, given)
        for one in offer.inputs:
            value = self._condition(one, given[one.option])
            if value is None and task == MAIN and one.kind in NEEDED:
                raise ValueError(NEEDED[one.kind])
            asked[one.option] = value
        if given.get("negative"):
            asked["negative"] = given["negative"]
        chosen = [a for a in offer.adapters if given[ADAPTER + a.name]]
        if chosen:
            asked["adapters"] = [f"{a.name}:{given[ADAPTER + a.name]}" for a in chosen]
            asked |= {a.control.option: given[a.control.option] for a in chosen if a.control is not None}
        if task == MAIN:
            return asked
        asked["task"] = task
        if task == "interpolate":
            lines = [line for line in str(given.get("walk: prompts") or "").splitlines() if line.strip()]
            asked |= {"n": _number(given, "walk: n")}
            asked |= {"prompts": lines} if lines else {}
            asked |= {"classes": given["walk: classes"]} if given.get("walk: classes") else {}
            return asked
        asked |= self._image(task, given)
        if task == "img2img":
            if given["invert"]:
                asked |= {"invert": True, "image_prompt": given.get("image_prompt") or None, "sampler": None}
            else:
                asked["strength"] = given["strength"]
        elif task == "inpaint":
            asked["mask"] = painted(given["inpaint: mask"], "mask", offer.size)
            if asked["mask"] is None:
                raise ValueError("paint the mask first: the painted area is redrawn")
            height, width = asked.get("size", offer.size)
            if height * offer.size[1] != width * offer.size[0]:
                raise ValueError("inpainting draws in the proportions of its canvas; set height and width to them")
            # The canvas shows the cropped picture, and the mask belongs to that.
            asked["image"] = encoded_png(self.studio.cut(offer, asked["image"], (height, width)))
        elif task == "outpaint":
            asked["extend"] = [_number(given, f"extend {side}") for side in SIDES]
        return asked

    def how_asked(self, prefix: str, given: Mapping[str, Any]) -> dict[str, Any]:
        sampler, scale = given[prefix + "sampler"], given.get(prefix + "guidance_scale")
        steps = _number(given, prefix + "num_inference_steps")
        sampler = None if sampler == OWN else sampler
        return {"sampler": sampler, "num_inference_steps": steps, "guidance_scale": scale}

    def _image(self, task: str, given: Mapping[str, Any]) -> dict[str, Any]:
        if not (image := given[f"{task}: image"]):
            raise ValueError(NEEDED["picture"])
        return {"image": image}

    def _condition(self, one: Input, value: Any) -> Any:
        if one.kind == "choice":
            return value or None
        if one.kind == "boxes":
            return boxed(value)
        if one.kind == "map":
            return painted(value, "label map", self.offer.size)
        return value

    def _shown_under(self, path: str | None) -> str:
        """Returns the value of the mask's canvas with a picture under it, cropped as the model sees it."""
        if not path:
            return ""
        try:
            return with_background(self.studio.cut(self.offer, path, self.offer.size))
        except Exception as error:
            raise gr.Error(words(error, self.offers), title="No picture", print_exception=False) from error

    def taken(self, path: str, *values: Any) -> list[Any]:
        """Returns the values of the kept parts, replaced by those of a picture's recipe if it has them. Raises gr.Error if
        the recipe sets an option that has no part here, since the picture would differ."""
        given = dict(zip(self.parts.kept, values))
        if not path:
            return list(values)
        recipe = pictures.read_recipe(path)
        config, number = recipe["config"], recipe.get("number", 0)
        if beyond := self._not_offered(config):
            raise gr.Error(
                f"it was drawn with {', '.join(beyond)}, which this page does not offer; Draw it again draws it",
                print_exception=False,
            )
        found = {k: v for k, v in config.items() if k in given and isinstance(v, str | int | float)}
        entries = {name: _entry_of(config, name, number) for name in LISTS}
        found |= {name: entry["prompt"] for name, entry in entries.items()}
        for one in self.offer.inputs:
            if one.kind in ("boxes", "map"):
                found[one.option] = self._canvas_of(one, config.get(one.option))
        found |= {"seed": recipe["seed"], "negative": entries["prompts"].get("negative", config.get("negative")) or ""}
        found |= zip(("height", "width"), _sides(config.get("size"), self.offer.size))
        strengths = dict(with_strength(str(entry)) for entry in config.get("adapters") or [])
        found |= {ADAPTER + a.name: strengths.get(a.name, 0) for a in self.offer.adapters}
        found["sampler"] = self._sampler_named(config.get("sampler"))
        return list((given | {k: v for k, v in found.items() if k in given}).values())

    def _canvas_of(self, one: Input, drawn: Any) -> str:
        """Returns the value of a canvas with a recipe's boxes or label map. Raises gr.Error if it was not drawn here."""
        try:
            if not drawn:
                return ""
            if one.kind == "boxes":
                return canvas_value(
                    json.loads(layout(drawn if isinstance(drawn, str) else json.dumps(drawn), self.studio.limits))
                )
            return canvas_value(png=Path(kept(self.offer, drawn)).read_bytes())
        except ValueError as error:
            raise gr.Error(words(error, self.offers), print_exception=False) from error

    def _not_offered(self, config: Mapping[str, Any]) -> list[str]:
        """Returns the options of a recipe that change its picture and that the form has no part for."""
        usual, sections = self.offer.usual, {k: config.get(k) or {} for k in ("guidance", "guide", "resample")}
        guidance, guide = sections["guidance"], sections["guide"]
        beyond = {
            "these options of its sampler": self._sampler_named(config.get("sampler")) is None,
            "spacing": config.get("spacing") not in (None, usual.get("spacing")),
            "guidance.interval": guidance.get("interval") not in (None, usual.get("guidance_interval")),
            "guidance.rescale": bool(guidance.get("rescale")),
            "guidance.threshold": guidance.get("threshold") is not None,
            "resample.repeats": sections["resample"].get("repeats", 1) != 1,
            **{f"guide.{name}": guide.get(name) is not None for name in ("classifier", "clip")},
            **{name: config.get(name) is not None for name in ("panorama", "weaker_model", "compile")},
            "tiles.cells": (config.get("tiles") or {}).get("cells") is not None,
            "precision": str(config.get("precision", 32)) != "32",
            "task=interpolate": config.get("task") == "interpolate",
        }
        return [name for name, differs in beyond.items() if differs]

    def _sampler_named(self, tree: Any) -> str | None:
        """Returns the choice for a sampler with these options, None if there is none."""
        if tree == self.offer.usual["sampler"]:
            return OWN
        return next((name for name in samplers() if sampler_tree(name) == tree), None)


def _entry_of(config: Mapping[str, Any], name: str, number: int) -> dict[str, Any]:
    """Returns the entry of a recipe's prompts or classes that picture `number` was drawn from, as {"prompt": ...}."""
    entries = {n: [e if isinstance(e, dict) else {"prompt": e} for e in config.get(n) or [""]] for n in LISTS}
    place = 0  # the lists are paired; a single entry goes with every one of the other's
    for place in range(max(map(len, entries.values()))):
        prompt = entries["prompts"][min(place, len(entries["prompts"]) - 1)]
        number -= prompt.get("n", config.get("n", 1))
        if number < 0:
            break
    return entries[name][min(place, len(entries[name]) - 1)]


def _number(given: Mapping[str, Any], name: str) -> int:
    """Returns a field's value as an integer. Raises ValueError if the field is empty."""
    if given[name] is None:
        raise ValueError(f"{name.rpartition(': ')[2]} is empty; type a number")
    return int(given[name])


def _sides(size: Any, usual: Sequence[int]) -> Sequence[int]:
    """Returns a recipe's size, one side or [height, width], as both sides; the usual ones if it has none, or a ratio."""
    return [size, size] if isinstance(size, int) else size if isinstance(size, list) else usual
