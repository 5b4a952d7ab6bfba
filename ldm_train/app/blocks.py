"""The app: a page for each model and one for the runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from omegaconf import DictConfig, ListConfig

from ldm_train.app import runs
from ldm_train.app.asked import Limits
from ldm_train.app.offer import Offer
from ldm_train.app.page import ModelPage
from ldm_train.app.runs_page import RunsPage
from ldm_train.app.studio import ERRORS, Studio
from ldm_train.checkpoints.native import find_model

RUNS = "Runs"
KEPT = 3600  # seconds after which copies of shown files are deleted; the pictures themselves stay in the run
MOST = 6  # the most models that get a page if none is named
CSS = """
.status { min-height: 1.6em; }
.hard-edges img, .live img { image-rendering: pixelated; }
.hard-edges button img { width: 100%; height: 100%; }
#runs-curve { overflow-x: auto; }
.caption-label { padding: 0 4px; font-size: 10px; opacity: 0.85; }
button, input, select, textarea { min-height: 32px; }
"""
# System fonts: pages must not load fonts from other hosts.
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
LOOK: dict[str, Any] = {"css": CSS, "theme": THEME}


def build(config: DictConfig) -> gr.Blocks:
    """Builds the app of a config. Raises FileNotFoundError or ValueError if a model that the config names cannot be
    loaded."""
    studio = Studio(config.runs_dir, Limits(**config.limits), config.accelerator, config.trust)
    offers = _offers(studio, config)
    with gr.Blocks(title="ldm_train", analytics_enabled=False, delete_cache=(600, KEPT)) as demo:
        _model(demo, studio, offers, 0) if offers else RunsPage(config.runs_dir).begin(demo)
    for number, offer in enumerate(offers[1:], 1):
        with demo.route(offer.name, f"/model{number}"):
            _model(demo, studio, offers, number)
    if offers:
        with demo.route(RUNS, "/runs"):
            gr.Navbar(main_page_name=offers[0].name)
            RunsPage(config.runs_dir).begin(demo)
    return demo


def _model(demo: gr.Blocks, studio: Studio, offers: Sequence[Offer], number: int) -> None:
    gr.Navbar(main_page_name=offers[0].name)
    page = ModelPage(studio, offers[number], offers)
    memory, kept = page.memory
    demo.load(None, [memory, *kept], kept, js=page.restore, api_visibility="private")


def _offers(studio: Studio, config: DictConfig) -> list[Offer]:
    """Returns the offers of the models that the config names; if it names none, of the last finished ones that load."""
    folders = runs.run_folders(config.runs_dir)
    names = [runs.name_of(folder, config.runs_dir) for folder in folders]
    if config.run is not None:
        chosen = [str(run) for run in config.run] if isinstance(config.run, ListConfig) else [str(config.run)]
        # Runs with the same folder name are told apart by their paths.
        bases = [Path(run).name for run in chosen]
        return [studio.offer(run, names, run if bases.count(base) > 1 else base) for run, base in zip(chosen, bases)]
    offers: list[Offer] = []
    for folder, name in zip(folders, names):
        if len(offers) == MOST:
            print(f"more models than {MOST}: name others with run=[...]", flush=True)
            break
        if find_model(folder) is None:
            continue
        try:
            offers.append(studio.offer(name, names, name))
        except ERRORS as error:
            print(f"{name} gets no page: {error}", flush=True)
    return offers
