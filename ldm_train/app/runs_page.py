"""The runs page: a table of all runs, and curves, pictures, findings and evaluations of the chosen ones, updated while
they train."""

from pathlib import Path
from typing import Any

import gradio as gr

from ldm_train.app import runs
from ldm_train.app.serving import as_text, served

EVERY = 4.0  # seconds between looks at the folders
STAGES = ("diffusion", "autoencoder", "classifier", "perceptual")


class RunsPage:
    """Builds the page in the surrounding Blocks."""

    def __init__(self, runs_dir: str | Path):
        self.runs_dir = Path(runs_dir)
        names = self._names()
        gr.Markdown("Runs below the folder that this app was started with, the last one first. The page follows them.")
        self.table = gr.Dataframe(
            runs.table(runs_dir), label="Runs", interactive=False, max_height=280, elem_id="runs-table", wrap=True
        )
        self.chosen = gr.Dropdown(
            names,
            value=names[:1],
            multiselect=True,
            label="Show",
            info="several: their curves in one picture",
            elem_id="runs-chosen",
        )
        with gr.Row():
            self.stage = gr.Radio(list(STAGES), value=STAGES[0], label="Stage", elem_id="runs-stage")
            self.column = gr.Dropdown([], label="Curve of", elem_id="runs-column")
        self.curve = gr.Plot(label="Curve", elem_id="runs-curve")
        self.findings = gr.Markdown(elem_id="runs-findings")
        with gr.Row(equal_height=False):
            with gr.Column(min_width=320):
                self.numbers = gr.Dataframe(
                    label="Evaluation of the first",
                    interactive=False,
                    column_widths=["40%", "17%", "28%", "15%"],
                    max_height=480,
                    wrap=True,
                )
            with gr.Column(min_width=320):
                self.media = gr.Gallery(
                    label="Its pictures", format="png", columns=2, object_fit="contain", height="auto"
                )
        with gr.Accordion("Its config", open=False):
            self.config = gr.Code(language="yaml", interactive=False, max_lines=40)
        self.timer = gr.Timer(EVERY)
        self._wire()

    def _names(self) -> list[str]:
        return [runs.name_of(folder, self.runs_dir) for folder in runs.run_folders(self.runs_dir)]

    def _folders(self, chosen: list[str] | None) -> list[Path]:
        """Returns the folders of the chosen runs that exist; names of other runs are ignored."""
        known = {runs.name_of(folder, self.runs_dir): folder for folder in runs.run_folders(self.runs_dir)}
        return [known[name] for name in chosen or () if name in known]

    def _wire(self) -> None:
        quick: dict[str, Any] = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}
        inputs = [self.chosen, self.stage, self.column]
        own = [self.column, self.curve, self.findings, self.numbers, self.media, self.config]
        for trigger in (self.chosen.change, self.stage.change):
            trigger(self.look, inputs, own, **quick)
        self.column.input(self._curve, inputs, [self.curve], **quick)
        seen = gr.State("")
        self.timer.tick(self.follow, [seen, *inputs], [seen, self.table, self.chosen, *own], **quick)
        self._first = self.look, inputs, own

    def begin(self, demo: gr.Blocks) -> None:
        """Fills the page when it is opened."""
        demo.load(*self._first, show_progress="hidden", api_visibility="private")

    def _curve(self, chosen: list[str], stage: str, column: str | None) -> Any:
        stage = stage if stage in STAGES else STAGES[0]
        data = runs.curves(self._folders(chosen), self.runs_dir, stage, str(column))
        if data.empty:
            return None
        import altair as alt  # takes a second to import, which the first page view need not wait for

        legend = alt.Legend(title=None, orient="bottom", columns=1, labelLimit=600)
        lines = alt.Chart(data).encode(alt.X("step:Q"), alt.Y("value:Q", title=column, scale=alt.Scale(zero=False)))
        lines = lines.encode(alt.Color("run:N", legend=legend), tooltip=["run", "step", "value"])
        # With points, so that a curve of one point is visible.
        return lines.mark_line(point=True).properties(width=640, height=300).interactive()

    def look(self, chosen: list[str], stage: str, column: str | None) -> list[Any]:
        """Returns all that the page shows of the chosen runs."""
        folders, stage = self._folders(chosen), stage if stage in STAGES else STAGES[0]
        known = runs.columns(folders, stage)
        column = column if column in known else (known[0] if known else None)
        first = folders[0] if folders else None
        return [
            gr.Dropdown(known, value=column),
            self._curve(chosen, stage, column),
            "" if first is None else self._findings(first),
            None if first is None else runs.evaluations(first),
            [] if first is None else [(served(path, self.media), what) for path, what in runs.media(first)],
            "" if first is None else runs.recipe_of(first),
        ]

    def follow(self, seen: str, chosen: list[str], stage: str, column: str | None) -> list[Any]:
        """Returns what has changed since the last look; changes nothing if no run has written since."""
        folders = runs.run_folders(self.runs_dir)
        now = repr([(str(folder), runs.written(folder)) for folder in folders])
        if now == seen:
            return [gr.skip()] * 9
        names = [runs.name_of(folder, self.runs_dir) for folder in folders]
        chosen = [name for name in chosen or () if name in names] or names[:1]
        table = runs.table(self.runs_dir)
        return [now, table, gr.Dropdown(names, value=chosen), *self.look(chosen, stage, column)]

    def _findings(self, folder: Path) -> str:
        found = runs.findings(folder)
        lines = [
            f"- **{as_text(f.get('stage'))}: {as_text(f.get('name'))}** at step {as_text(f.get('step'))}: {as_text(f.get('what'))} "
            f"*Remedy:* {as_text(f.get('remedy'))}"
            for f in found
        ]
        return "Health: nothing found." if not lines else "\n".join(["Health:", *lines])
