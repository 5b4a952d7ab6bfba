"""The page of a model: its form, and the pictures that were drawn."""

import hashlib
import html
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from ldm_train import images as pictures
from ldm_train.app.form import BESIDE, Form
from ldm_train.app.offer import MAIN, Offer
from ldm_train.app.serving import as_text, served
from ldm_train.app.studio import Cancelled, Progress, Studio, without_folders, words

# With it BrowserState encrypts what was typed and drawn in the browser. It is fixed, so that this outlives a restart.
SECRET = "ldm_train"
TICKETS = 1000  # the most that are remembered
SAVE = "(...values) => [JSON.stringify({form: FORM, values})]"
# If nothing was kept, nothing is set: that would undo what was typed while the page was loading.
RESTORE = """(kept, ...values) => {
  const unchanged = values.map(() => ({__type__: "update"}));
  try { const found = JSON.parse(kept); return found.form === FORM ? found.values : unchanged; } catch { return unchanged; }
}"""
RANDOM = "() => Math.floor(Math.random() * 2 ** 31)"
QUICK: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
# Options of the events that draw: one at a time.
DRAWS: dict[str, Any] = {
    "concurrency_id": "draw", "concurrency_limit": 1, "show_progress": "hidden", "api_visibility": "private",
    "trigger_mode": "multiple",
}  # fmt: skip
Jobs = list[tuple[str, Iterator[Any]]]  # each with the gallery that shows it


@dataclass
class Shown:
    """The components that show what was drawn. paths: of the pictures in the gallery; chosen: the one whose recipe
    is shown."""

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
    """Builds a model's page in the surrounding Blocks."""

    def __init__(self, studio: Studio, offer: Offer, offers: Sequence[Offer]):
        self.studio, self.offer, self.offers = studio, offer, offers
        self._stops: dict[str, threading.Event] = {}  # set to cancel: of waiting and running jobs, by ticket
        with gr.Row(equal_height=False):
            with gr.Column(scale=1, min_width=320):
                self.form = Form(studio, offer, offers)
            with gr.Column(scale=1, min_width=320):
                self.shown = self._shown()
        self._wire()

    def _shown(self) -> Shown:
        hard = ["hard-edges"] if min(self.offer.size) < 128 else []
        status = gr.Markdown("Nothing drawn yet.", elem_id=f"status-{self.offer.name}", elem_classes=["status"])
        live = gr.Image(label="Being drawn", visible=False, format="png", buttons=[], elem_classes=["live"])
        options: dict[str, Any] = {"format": "png", "columns": 4, "object_fit": "contain"}
        options["buttons"] = ["download", "download_all", "fullscreen"]
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
        form, shown = self.form, self.shown
        parts = list(form.parts.all.values())
        # Not a gr.State, which is read when a job's turn comes: a waiting job must keep the ticket that it was given.
        ticket = gr.Textbox(visible="hidden", label="ticket")
        begun: list[tuple[Any, Callable[..., Jobs], list[Any]]] = [
            (button.click, partial(self._jobs, task), parts) for task, button in form.buttons.items()
        ]
        texts = [form.parts.all[one.option] for one in self.offer.inputs if one.kind == "text"]
        begun += [(text.submit, partial(self._jobs, MAIN), parts) for text in texts]
        begun += [(self.again.click, self._again, [shown.chosen]), (self.upload.upload, self._again, [self.upload])]
        for trigger, jobs, inputs in begun:
            asked = trigger(self._begin, [ticket], [ticket, shown.status], **QUICK)
            drawn = asked.success(self._drawing(jobs), [ticket, *inputs], shown.all, **DRAWS)
            drawn.failure(self._failed, [ticket], [shown.status], **QUICK)
        form.cancel.click(self._cancel, [ticket], [shown.status], **QUICK)
        form.dice.click(None, None, form.parts.all["seed"], js=RANDOM, api_visibility="private")
        shown.gallery.select(self._choose, [shown.paths], [*shown.of_chosen, self.recipe_section], **QUICK)
        kept = [form.parts.all[name] for name in form.parts.kept]
        self.take.click(form.taken, [shown.chosen, *kept], kept, **QUICK)
        memory = gr.BrowserState("", storage_key=f"ldm_train-{self.offer.run}", secret=SECRET)
        changed = [part.input if isinstance(part, gr.HTML) else part.change for part in kept]
        offered = [(name, part.get_config().get("choices")) for name, part in form.parts.all.items()]
        # Values kept for a different form are ignored.
        digest = repr(hashlib.sha256(repr((offered, self.studio.limits)).encode()).hexdigest())
        gr.on(changed, None, kept, [memory], js=SAVE.replace("FORM", digest), api_visibility="private")
        self.memory, self.restore = (memory, kept), RESTORE.replace("FORM", digest)

    # -- jobs ---------------------------------------------------------------------------------------------------------

    def _begin(self, before: str) -> tuple[str, str]:
        """Returns the ticket of a job that waits for its turn, by which it can be cancelled, and a status text. before:
        the page's last ticket. Raises gr.Error if the job of that one still waits or runs."""
        if (stop := self._stops.get(before)) is not None and not stop.is_set():
            raise gr.Error("one job at a time: cancel the one that waits or runs first", print_exception=False)
        ticket = uuid.uuid4().hex
        self._stops[ticket] = threading.Event()
        for old in list(self._stops)[:-TICKETS]:  # of pages that were left before their job began
            del self._stops[old]
        return ticket, "Waiting for its turn."

    def _cancel(self, ticket: str) -> Any:
        if (stop := self._stops.get(ticket)) is None:
            return gr.skip()  # it has ended
        stop.set()
        return "Cancelled."

    def _failed(self, ticket: str) -> Any:
        """Returns the status after a job that was refused before it began, because a value is not one that the form
        offers."""
        if self._stops.pop(ticket, None) is None:
            return gr.skip()  # reported by the job itself
        return "⚠ a field holds a value that is not among its options; choose again"

    def _drawing(self, jobs: Callable[..., Jobs]) -> Callable[..., Iterator[list[Any]]]:
        """Returns an event handler that draws the jobs, each for one of the galleries, and shows every step."""

        def handler(ticket: str, *values: Any) -> Iterator[list[Any]]:
            shown: dict[str, list[Path]] = {"gallery": [], "beside": []}
            if (stop := self._stops.get(ticket)) is None or stop.is_set():
                self._stops.pop(ticket, None)  # cancelled before its turn
                yield [gr.skip()] * 8
                return
            try:
                for place, job in jobs(stop, *values):
                    for update in job:
                        if isinstance(update, Progress):
                            yield self._update(update)
                        else:
                            shown[place] = update
                yield self._finished(shown, *values)
            except Cancelled:
                yield ["Cancelled.", gr.Image(visible=False), *[gr.skip()] * 6]
            except Exception as error:
                message = words(error, self.offers)
                yield [f"⚠ {as_text(message)}", gr.Image(visible=False), *[gr.skip()] * 6]
                shown_message = html.escape(message, quote=False)
                raise gr.Error(shown_message, title="It was not drawn", print_exception=False) from error
            finally:
                stop.set()
                self._stops.pop(ticket, None)

        return handler

    def _update(self, update: Progress) -> list[Any]:
        first, last = update.first, update.last
        which = f"picture {first}" if first == last else f"pictures {first} to {last}"
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
            gr.Gallery(self._served(paths), selected_index=None),
            gr.Gallery(self._served(shown["beside"]), visible=both),
            [str(p) for p in paths],
            *self._of(paths[0]),
        ]

    def _jobs(self, task: str, stop: threading.Event, *values: Any) -> Jobs:
        given = dict(zip(self.form.parts.all, values))
        asked = self.form.asked(task, given)
        jobs = [("gallery", self.studio.draw(self.offer, asked, stop))]
        if given[BESIDE + "on"]:
            other = next((o for o in self.offers if o.name == given[BESIDE + "model"]), self.offer)
            second = asked | self.form.how_asked(BESIDE, given)
            if other is not self.offer:
                for adapter in self.offer.adapters:  # which belong to this model
                    second.pop("adapters", None)
                    second.pop(adapter.control.option if adapter.control else "", None)
            jobs.append(("beside", self.studio.draw(other, second, stop)))
        return jobs

    def _again(self, stop: threading.Event, picture: Any) -> Jobs:
        if not picture:
            raise ValueError("choose a picture in the gallery first")
        return [("gallery", self.studio.replay(self.offer, Path(picture), stop))]

    # -- recipes ------------------------------------------------------------------------------------------------------

    def _of(self, path: str | Path) -> list[Any]:
        """Returns what is shown of a chosen picture: its path, recipe and download."""
        file = served(path, self.shown.download)
        return [str(path), without_folders(pictures.read_recipe(path)), gr.DownloadButton(value=file, interactive=True)]

    def _served(self, paths: Sequence[Path]) -> list[tuple[str, str]]:
        return [(served(path, self.shown.gallery), f"seed {pictures.read_recipe(path)['seed']}") for path in paths]

    def _choose(self, paths: list[str], event: gr.SelectData) -> list[Any]:
        return [*self._of(paths[event.index]), gr.Accordion(open=True)]


def _agreement(before: Path, now: Path) -> str:
    """Says in words whether two pictures are the same."""
    with Image.open(before) as first, Image.open(now) as second:
        if first.size != second.size:
            return "Drawn again: another size than the picture's."
        a, b = (np.asarray(image.convert("RGB"), np.int16) for image in (first, second))
    most = int(np.abs(a - b).max())
    return f"Drawn again: {'identical to the pixel' if most == 0 else f'at most {most} of 255 from the picture'}."
