"""The page of a model: its inputs, a tab for each task, settings, and what was drawn."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from ldm_train import images as pictures
from ldm_train.app.asked import samplers
from ldm_train.app.offer import MAIN, Input, Offer
from ldm_train.app.sketch import boxed, painted, sketch, with_background
from ldm_train.app.studio import Progress, Studio, words
from ldm_train.data.transforms import read_image
from ldm_train.generation.adapters import STRONGEST

OWN = "the run's own"
TITLES = {
    "img2img": ("Picture to picture", "Change it"),
    "inpaint": ("Inpaint", "Fill the hole"),
    "outpaint": ("Outpaint", "Extend it"),
    "interpolate": ("Walk", "Walk"),
    "reconstruct": ("Reconstruct", "Reconstruct"),
}
SIDES = ("top", "right", "bottom", "left")
ADAPTER = "adapter: "  # before the name of an adapter, in the names of its slider
BESIDE = "beside: "  # before settings of the second of two jobs
NEEDED = {
    "boxes": "draw at least one box first",
    "map": "paint a label map first",
    "picture": "hand in a picture first",
}
# Keeps what was typed and drawn in the browser: BrowserState encrypts with it, so that it is read again after a restart.
SECRET = "ldm_train"
SAVE = "(...values) => [JSON.stringify(values)]"
RESTORE = "(kept, ...values) => { try { const found = JSON.parse(kept); return found.length === values.length ? found : values; } "
RESTORE += "catch { return values; } }"
RANDOM = "() => Math.floor(Math.random() * 2 ** 31)"


@dataclass
class Parts:
    """The components of a page whose values are asked for, by name; `kept` of them survive a reload."""

    all: dict[str, gr.components.Component] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)

    def add(self, name: str, component: Any, kept: bool = True) -> Any:
        self.all[name] = component
        if kept:
            self.kept.append(name)
        return component


@dataclass
class Shown:
    """The components that show what was drawn. paths: of the pictures in the gallery; chosen: the one whose recipe is shown."""

    status: gr.Markdown
    live: gr.Image
    gallery: gr.Gallery
    beside: gr.Gallery
    paths: gr.State
    chosen: gr.State
    recipe: gr.JSON
    download: gr.DownloadButton

    @property
    def all(self) -> list[Any]:
        return list(vars(self).values())

    @property
    def of_chosen(self) -> list[Any]:
        return [self.chosen, self.recipe, self.download]


class ModelPage:
    """Builds a model's page in the Blocks around it."""

    def __init__(self, studio: Studio, offer: Offer, offers: Sequence[Offer]):
        self.studio, self.offer, self.offers, self.parts = studio, offer, offers, Parts()
        with gr.Row(equal_height=False):
            with gr.Column(scale=1, min_width=320):
                for one in offer.inputs:
                    self._input(one)
                self._tabs()
                self._settings()
            with gr.Column(scale=1, min_width=320):
                self.shown = self._shown()
        self._wire()

    # -- what is asked for --------------------------------------------------------------------------------------------

    def _input(self, one: Input) -> None:
        if one.kind == "choice":
            made: Any = gr.Dropdown(list(one.choices), label=one.label, info="none of them: without a condition")
        elif one.kind in ("boxes", "map"):
            gr.Markdown(f"**{one.label}**")
            made = sketch(one.kind, one.label, self.offer.size, one.choices, elem_id=f"{one.kind}-{self.offer.name}")
        elif one.kind == "picture":
            made = _picture(one.label)
        else:
            made = gr.Textbox(label=one.label, lines=2, max_length=self.studio.limits.characters, autofocus=True)
        self.parts.add(one.option, made, kept=one.kind != "picture")

    def _tabs(self) -> None:
        self.buttons: dict[str, gr.Button] = {}
        with gr.Tabs():
            for task in self.offer.tabs:
                title, verb = (self.offer.title, "Draw") if task == MAIN else TITLES[task]
                with gr.Tab(title):
                    if task in ("img2img", "inpaint", "outpaint", "reconstruct"):
                        self.parts.add(f"{task}: image", _picture("Picture"), kept=False)
                    getattr(self, f"_of_{task}", lambda: None)()
                    self.buttons[task] = gr.Button(verb, variant="primary")
        self.cancel = gr.Button("Cancel", variant="stop", size="sm")

    def _of_img2img(self) -> None:
        self.parts.add(
            "strength", gr.Slider(0, 1, 0.7, label="Strength", info="1 begins with noise, 0 changes nothing")
        )
        info = "what else is in the picture stays; Strength means nothing then"
        self.parts.add("invert", gr.Checkbox(label="Begin with the picture's own noise", info=info))
        if self.offer.reads_text:
            self.parts.add(
                "image_prompt", gr.Textbox(label="What the picture shows now", info="of its own noise alone")
            )

    def _of_inpaint(self) -> None:
        canvas = sketch("mask", "Mask", self.offer.size, elem_id=f"mask-{self.offer.name}")
        self.parts.add("inpaint: mask", canvas)
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
        self.parts.add("n", gr.Slider(1, limits.pictures, 4, step=1, label="Number of pictures"))
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
                        self.parts.add(one.option, _picture(f"{one.label}: the picture that steers"), kept=False)
        with gr.Accordion("Side by side", open=False):
            self.parts.add(BESIDE + "on", gr.Checkbox(label="Draw twice, from the same seeds", info="the second with:"))
            names = [o.name for o in self.offers if {i.option for i in o.inputs} == {i.option for i in offer.inputs}]
            self.parts.add(BESIDE + "model", gr.Dropdown(names, value=offer.name, label="Model"))
            self._how(BESIDE, usual["num_inference_steps"], usual["guidance_scale"])

    def _how(self, prefix: str, steps: int, guidance_scale: float) -> None:
        """Sampler, steps and guidance of one of two jobs."""
        of = " of the second" if prefix else ""
        with gr.Row():
            self.parts.add(prefix + "sampler", gr.Dropdown([OWN, *samplers()], value=OWN, label=f"Sampler{of}"))
            made = gr.Slider(1, self.studio.limits.steps, steps, step=1, label=f"Steps{of}")
            self.parts.add(prefix + "num_inference_steps", made)
            if self.offer.guided:
                made = gr.Slider(0, 20, guidance_scale, step=0.1, label=f"Guidance{of}", info="1: off")
                self.parts.add(prefix + "guidance_scale", made)

    # -- what was drawn -----------------------------------------------------------------------------------------------

    def _shown(self) -> Shown:
        hard = ["hard-edges"] if min(self.offer.size) < 128 else []
        status = gr.Markdown("Nothing drawn yet.", elem_id=f"status-{self.offer.name}", elem_classes=["status"])
        live = gr.Image(label="Being drawn", visible=False, format="png", buttons=[], elem_classes=["live"])
        buttons = ["download", "download_all", "fullscreen"]
        options: dict[str, Any] = {
            "format": "png",
            "columns": 4,
            "object_fit": "contain",
            "buttons": buttons,
            "height": "auto",
        }
        gallery = gr.Gallery(label="Pictures", elem_classes=["pictures", *hard], **options)
        beside = gr.Gallery(label="The same seeds, the second way", visible=False, elem_classes=hard, **options)
        with gr.Accordion("Recipe of the chosen picture", open=False) as self.recipe_section:
            with gr.Row():
                self.again = gr.Button("Draw it again")
                self.take = gr.Button("Take its settings")
                download = gr.DownloadButton("Download it", interactive=False)
            recipe = gr.JSON(label="Recipe", max_height=300)
        self.upload = gr.UploadButton("Draw the picture of a file again", file_types=[".png"], variant="secondary")
        return Shown(status, live, gallery, beside, gr.State([]), gr.State(""), recipe, download)

    def _wire(self) -> None:
        parts, shown = list(self.parts.all.values()), self.shown
        options: dict[str, Any] = {
            "concurrency_id": "draw", "concurrency_limit": 1, "show_progress": "hidden", "api_visibility": "private"
        }  # fmt: skip
        events = [
            button.click(self._drawing(partial(self._jobs, task)), parts, shown.all, **options)
            for task, button in self.buttons.items()
        ]
        for one in self.offer.inputs:
            if one.kind == "text":
                main = partial(self._jobs, MAIN)
                events.append(self.parts.all[one.option].submit(self._drawing(main), parts, shown.all, **options))
        events.append(self.again.click(self._drawing(self._again), [shown.chosen], shown.all, **options))
        events.append(self.upload.upload(self._drawing(self._again), [self.upload], shown.all, **options))
        quick: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        self.cancel.click(
            lambda: ("Cancelled.", gr.Image(visible=False)), None, [shown.status, shown.live], cancels=events, **quick
        )
        self.dice.click(None, None, self.parts.all["seed"], js=RANDOM, api_visibility="private")
        shown.gallery.select(self._choose, [shown.paths], [*shown.of_chosen, self.recipe_section], **quick)
        kept = [self.parts.all[name] for name in self.parts.kept]
        self.take.click(self._taken, [shown.recipe, *kept], kept, **quick)
        memory = gr.BrowserState("", storage_key=f"ldm_train-{self.offer.name}", secret=SECRET)
        changed = [part.input if isinstance(part, gr.HTML) else part.change for part in kept]
        gr.on(changed, None, kept, [memory], js=SAVE, api_visibility="private")
        self.memory = memory, kept

    # -- jobs ---------------------------------------------------------------------------------------------------------

    def _drawing(self, jobs: Callable[..., list[tuple[str, Iterator[Any]]]]) -> Callable[..., Iterator[list[Any]]]:
        """A handler of an event: draws the jobs, each for one of the galleries, and shows every step."""

        def handler(*values: Any) -> Iterator[list[Any]]:
            shown: dict[str, list[Path]] = {"gallery": [], "beside": []}
            try:
                for place, job in jobs(*values):
                    for update in job:
                        if isinstance(update, Progress):
                            yield self._update(update)
                        else:
                            shown[place] = update
                yield self._finished(shown, *values)
            except GeneratorExit:
                raise
            except Exception as error:
                message = words(error, self.offers)
                yield [f"⚠ {message}", gr.Image(visible=False), *[gr.skip()] * 6]
                raise gr.Error(message, title="It was not drawn", print_exception=False) from error

        return handler

    def _update(self, update: Progress) -> list[Any]:
        which = (
            f"picture {update.first}" if update.first == update.last else f"pictures {update.first} to {update.last}"
        )
        live = gr.skip() if update.picture is None else gr.Image(update.picture, visible=True)
        return [f"Step {update.step} of {update.steps}, {which}", live, *[gr.skip()] * 6]

    def _finished(self, shown: Mapping[str, list[Path]], *values: Any) -> list[Any]:
        paths = shown["gallery"]
        said = f"{len(paths)} picture{'' if len(paths) == 1 else 's'}; choose one for its recipe"
        if len(values) == 1 and paths:  # drawn again
            said = _agreement(Path(values[0]), paths[0])
        both = bool(shown["beside"])
        return [
            said,
            gr.Image(visible=False),
            gr.Gallery(_shown_in_gallery(paths), selected_index=None),
            gr.Gallery(_shown_in_gallery(shown["beside"]), visible=both),
            [str(p) for p in paths],
            *self._of(paths[0]),
        ]

    def _jobs(self, task: str, *values: Any) -> list[tuple[str, Iterator[Any]]]:
        given = dict(zip(self.parts.all, values))
        asked = self.asked(task, given)
        jobs = [("gallery", self.studio.draw(self.offer, asked, threading.Event()))]
        if given[BESIDE + "on"]:
            other = next((o for o in self.offers if o.name == given[BESIDE + "model"]), self.offer)
            second = asked | self._how_asked(BESIDE, given)
            if other is not self.offer:
                second.pop("adapters", None)
            jobs.append(("beside", self.studio.draw(other, second, threading.Event())))
        return jobs

    def _again(self, picture: Any) -> list[tuple[str, Iterator[Any]]]:
        if not picture:
            raise ValueError("choose a picture in the gallery first")
        return [("gallery", self.studio.replay(self.offer, Path(picture), threading.Event()))]

    def asked(self, task: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """What the values of the page's parts ask for. Raises ValueError for what a task needs and lacks."""
        offer, asked = self.offer, {"seed": given["seed"], "n": int(given["n"])} | self._how_asked("", given)
        if (size := [given["height"], given["width"]]) != list(offer.size):
            asked["size"] = size
        if task == "reconstruct":
            return (
                {"task": task, "seed": 0} | {k: v for k, v in asked.items() if k == "size"} | self._image(task, given)
            )
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
            asked |= {"n": int(given["walk: n"])}
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
                raise ValueError("paint the mask first: what is painted is drawn anew")
        elif task == "outpaint":
            asked["extend"] = [given[f"extend {side}"] for side in SIDES]
        return asked

    def _how_asked(self, prefix: str, given: Mapping[str, Any]) -> dict[str, Any]:
        sampler, scale = given[prefix + "sampler"], given.get(prefix + "guidance_scale")
        steps = given[prefix + "num_inference_steps"]
        return {
            "sampler": None if sampler == OWN else sampler,
            "num_inference_steps": int(steps),
            "guidance_scale": scale,
        }

    def _image(self, task: str, given: Mapping[str, Any]) -> dict[str, Any]:
        if not (image := given[f"{task}: image"]):
            raise ValueError(NEEDED["picture"])
        return {"image": image}

    def _condition(self, one: Input, value: Any) -> Any:
        if one.kind == "boxes":
            return boxed(value)
        if one.kind == "map":
            return painted(value, "label map", self.offer.size)
        return value

    def _shown_under(self, path: str | None) -> str:
        """The canvas of the mask with a picture under it, cut as the model sees it."""
        if not path:
            return ""
        try:
            kept = self.studio.handed_in(self.offer, path)
            return with_background(pictures.to_pil(read_image(kept, self.offer.size, 3)))
        except Exception as error:
            raise gr.Error(words(error, self.offers), title="No picture", print_exception=False) from error

    # -- recipes ------------------------------------------------------------------------------------------------------

    def _of(self, path: str | Path) -> list[Any]:
        """What is shown of a chosen picture."""
        return [str(path), pictures.read_recipe(path), gr.DownloadButton(value=str(path), interactive=True)]

    def _choose(self, paths: list[str], event: gr.SelectData) -> list[Any]:
        return [*self._of(paths[event.index]), gr.Accordion(open=True)]

    def _taken(self, recipe: Any, *values: Any) -> list[Any]:
        """The parts' values with those of a recipe in their place."""
        config = (recipe or {}).get("config") or {}
        given = dict(zip(self.parts.kept, values))
        found = {k: v for k, v in config.items() if k in given and not isinstance(v, dict | list)}
        found |= {k: config[k][0] for k in ("prompts", "classes") if k in given and config.get(k)}
        found |= {"seed": recipe["seed"]} if recipe else {}
        sampler = str((config.get("sampler") or {}).get("_target_", "")).rpartition(".")[2]
        found |= {"sampler": sampler} if sampler in samplers() else {}
        return list((given | found).values())


def _picture(label: str) -> gr.Image:
    return gr.Image(label=label, type="filepath", sources=["upload", "clipboard"], image_mode=None, height=240)


def _shown_in_gallery(paths: Sequence[Path]) -> list[tuple[str, str]]:
    return [(str(path), f"seed {pictures.read_recipe(path)['seed']}") for path in paths]


def _agreement(before: Path, now: Path) -> str:
    """Whether two pictures are the same, in words."""
    with Image.open(before) as first, Image.open(now) as second:
        a, b = np.asarray(first.convert("RGB"), int), np.asarray(second.convert("RGB"), int)
    if a.shape != b.shape:
        return "Drawn again: another size than the picture's."
    most = int(np.abs(a - b).max())
    return (
        "Drawn again: identical to the pixel." if most == 0 else f"Drawn again: at most {most} of 255 from the picture."
    )
