"""ldm-sweep: summarises the runs of a sweep, finished or not, in a table and plots."""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from ldm_train.configuration import flatten, numbers, run_config
from ldm_train.errors import Refused
from ldm_train.pipeline import plots
from ldm_train.pipeline.plots import Rows
from ldm_train.pipeline.resume import read_note
from ldm_train.storage import read_csv, read_record, write_csv

FAILED = "failed.json"
# Options that differ between runs but are not swept.
INCIDENTAL = ("name", "trace", "progress", "logger", "runs_dir", "data_dir", "share", "text_cache")
# Columns of a stage's metrics.csv whose last values go into the table, and their names there.
SPENT = {"step": "steps", "train/seconds": "seconds", "train/tflop": "tflop", "train/images": "images"}


class SweptRun:
    """One run of a sweep: its folder, its options (empty if it failed before it had a config), its error message if it
    failed, and the rows of its diffusion stage's metrics.csv."""

    def __init__(self, folder: Path):
        self.folder = folder
        known = (folder / "config.yaml").is_file()
        self.config = flatten(OmegaConf.to_container(run_config(folder))) if known else {}
        self.failed = failure(folder)
        self.rows = read_rows(folder / "diffusion")

    @property
    def factor(self) -> int:
        """The autoencoder's downsampling factor f: of its model folder or, before it is trained, by the run's options."""
        model = self.folder / "autoencoder" / "model" / "metadata.json"
        if model.is_file():
            return int(read_record(model)["downsample_factor"])
        network = {name: self.config.get(f"autoencoder.network.{name}") for name in ("channel_mult", "patch_size")}
        return 2 ** (len(network["channel_mult"] or [1]) - 1) * int(network["patch_size"] or 1)

    def stage(self, name: str) -> str:
        return reached(self.folder / name)

    def metrics(self) -> dict[str, float]:
        """The numbers of metrics.json by dotted path; {} before the evaluation."""
        path = self.folder / "evaluation" / "metrics.json"
        tree = read_record(path) if path.is_file() else {}
        return {name.replace("/", "."): v for name, v in numbers(tree).items()}

    def measured(self) -> list[str]:
        """The names of the metrics of its evaluation."""
        return list(self.config.get("evaluation.metrics") or ["fid_tiny"])


def reached(stage: Path) -> str:
    """How far a stage is: "done", "step <n>" for the last step logged, "begun" before that, or "" if it has not
    started."""
    if (note := read_note(stage)) is None:
        return ""
    if note["finished"]:
        return "done"
    rows = read_rows(stage)
    return f"step {rows[-1]['step']}" if rows else "begun"


def read_rows(stage: Path) -> list[dict[str, str]]:
    """The complete rows of a stage's metrics.csv; [] if there is no file yet."""
    return read_csv(stage / "metrics.csv")


def failure(folder: Path) -> str | None:
    """The error message of a failed job of a sweep; None if it has not failed."""
    return str(read_record(folder / FAILED).get("error")) if (folder / FAILED).is_file() else None


def jobs(folder: Path) -> list[Path]:
    """The folders of a sweep's jobs, by name; those that failed before they had a config come last."""
    known = sorted(p.parent for p in folder.glob("*/config.yaml"))
    failed = sorted(p.parent for p in folder.glob(f"*/{FAILED}") if p.parent not in known)
    return [job for job in (*known, *failed) if not (job / "metadata.json").is_file()]  # no export next to the jobs


def read_runs(folder: Path) -> list[SweptRun]:
    """The runs in a folder. Raises FileNotFoundError if there are none."""
    runs = [SweptRun(job) for job in jobs(folder)]
    if not runs:
        raise FileNotFoundError(
            f"{folder} holds no runs; dir= is the folder of a sweep: <runs_dir>/<experiment or name>"
        )
    return runs


def differing(runs: Sequence[SweptRun]) -> list[str]:
    """The options in which the runs differ, without INCIDENTAL ones."""
    known = [run.config for run in runs if run.config]
    keys = sorted({k for config in known for k in config if k.split(".")[0] not in INCIDENTAL})
    return [k for k in keys if len({json.dumps(config.get(k), default=str) for config in known}) > 1]


def gather(runs: Sequence[SweptRun]) -> list[dict[str, Any]]:
    """One row per run: differing options, progress, steps, seconds, TFLOP and images, all metrics, and the error if it
    failed."""
    options, table = differing(runs), []
    for run in runs:
        try:
            table.append(_row(run, options))
        except (Refused, ValueError, OSError) as error:  # of one damaged run among others
            table.append({"run": run.folder.name, "f": "", "failed": str(error)})
    return table


def _row(run: SweptRun, options: Sequence[str]) -> dict[str, Any]:
    last = {k: v for row in run.rows for k, v in row.items() if v}
    row: dict[str, Any] = {"run": run.folder.name, "f": run.factor if run.config else ""}
    row |= {k: run.config.get(k, "") for k in options}
    row |= {s: run.stage(s) for s in ("autoencoder", "diffusion", "evaluation")}
    row |= {name: last.get(column, "") for column, name in SPENT.items()}
    row |= {k: v for k, v in last.items() if k.startswith("val/")} | run.metrics()
    return row | {"failed": run.failed or ""}


def columns_of(rows: Rows) -> list[str]:
    return list(dict.fromkeys(k for row in rows for k in row))


def curve_metric(runs: Sequence[SweptRun], asked: str | None) -> str | None:
    """The metrics.csv column that curves show: `asked`, else the first FID or KID, else the first val/ column, or None.
    Raises ValueError if no run has the column asked for."""
    rows = [row for run in runs for row in run.rows]
    there = list(dict.fromkeys(k for row in rows for k, v in row.items() if v and k.startswith("val/")))
    if asked is not None:
        if not any(asked in row for row in rows):
            known = ", ".join(there) or "none yet"
            raise ValueError(f"curve={asked} is in no run's diffusion/metrics.csv; there are {known}")
        return asked
    better = [k for k in there if k.startswith(("val/fid", "val/kid")) and not k.endswith(("_low", "_high"))]
    return next(iter(better or there), None)


def curves(runs: Sequence[SweptRun], metric: str) -> list[dict[str, Any]]:
    """One row per run and measurement: step, and the images, seconds and TFLOP spent up to there."""
    table = []
    for run in runs:
        spent: dict[str, str] = {}
        for row in run.rows:
            spent |= {k: row[k] for k in ("train/images", "train/seconds", "train/tflop") if row.get(k)}
            if row.get(metric):
                table.append(
                    {"run": run.folder.name, "f": run.factor, "step": int(row["step"])}
                    | {k.removeprefix("train/"): float(v) for k, v in spent.items()}
                    | {k: float(row[k]) for k in (metric, f"{metric}_low", f"{metric}_high") if row.get(k)}
                )
    return table


def summarise(
    folder: Path, runs: Sequence[SweptRun], table: Rows, metric: str | None = None, final: str | None = None
) -> list[Path]:
    """Writes sweep.csv, curves.csv, curves.png and f.png for the runs so far; returns the paths written."""
    written = [folder / "sweep.csv"]
    write_csv(written[0], columns_of(table), table)
    column = curve_metric(runs, metric)
    factors = [run.factor for run in runs if run.config]
    by_factor = len(set(factors)) == len(factors) > 1
    names = {run.folder.name: f"f = {run.factor}" if by_factor else run.folder.name[:40] for run in runs}
    if column is not None and (rows := curves(runs, column)):
        write_csv(folder / "curves.csv", columns_of(rows), rows)
        written += [folder / "curves.csv", plots.curves(rows, column, names, folder / "curves.png")]
    number = final_number(table, column, final)
    points = [r for r in table if number is not None and r.get(number) not in (None, "")]
    if points and len(set(factors)) > 1:
        written.append(plots.against_factor(points, number, folder / "f.png"))
    return written


def speed(config: DictConfig, runs: Sequence[SweptRun], folder: Path) -> list[dict[str, Any]]:
    """Measures every run with a finished model at each number of sampling steps; one row per run and number. Existing
    measurements with the same batch size on the same kind of machine are reused; interrupted ones continue."""
    from ldm_train.pipeline import measure

    options = {k: config[k] for k in ("n", "batch_size", "accelerator", "precision", "progress")}
    rows = []
    for run in runs:
        if not (run.folder / "diffusion" / "model" / "model.safetensors").is_file():
            continue
        for steps in config.steps:
            own = {"run": str(run.folder), "runs_dir": str(folder.parent), "metrics": run.measured()}
            asked = options | own | {"num_inference_steps": steps}
            metrics = measure.measured_run(OmegaConf.merge(measure.command_options(), asked))
            row: dict[str, Any] = {"run": run.folder.name, "f": run.factor, "num_inference_steps": steps}
            row["images_per_second"] = metrics["speed"].get("images_per_second")
            for name, entry in metrics["samples"].items():
                row[name] = entry["value"]
                row.update(zip((f"{name}_low", f"{name}_high"), entry["interval"] or ()))
            rows.append(row)
            print(f"{run.folder.name}: {steps} steps measured", flush=True)
    return rows


def final_number(table: Rows, column: str | None, asked: str | None) -> str | None:
    """The column of the table that runs are compared by: `asked`, a value of metrics.json, else that of the curves'
    metric, else the first FID of samples, or None. Raises ValueError if no run has the value asked for."""
    measured = (key.removesuffix(".value") for row in table for key in row if key.startswith("samples.fid"))
    number = asked or (f"samples.{column.removeprefix('val/')}" if column else next(measured, None))
    key = f"{number}.value" if number and not any(number in row for row in table) else number
    if asked and not any(row.get(key) not in (None, "") for row in table):
        known = dict.fromkeys(k.removesuffix(".value") for row in table for k in row if k.endswith(".value"))
        raise ValueError(f"final={asked} is in no run's metrics.json; there are {', '.join(known) or 'none yet'}")
    return key


def format_table(table: Rows, number: str | None) -> str:
    lines = []
    for row in table:
        state = row["failed"] and f"FAILED: {row['failed'].splitlines()[0]}"
        where = next((f"{s} {row[s]}" for s in ("evaluation", "diffusion", "autoencoder") if row.get(s)), "not begun")
        value = f"{number} {float(row[number]):.4g}" if number and row.get(number) not in (None, "") else ""
        lines.append(f"{row['run']:<44} {where:<22} {value}  {state}".rstrip())
    return "\n".join(lines)


def over_seeds(table: Rows, options: Sequence[str], number: str | None) -> str:
    """One line for each group of runs that differ in `seed` only: the mean of a value, and its standard deviation."""
    others = [option for option in options if option != "seed"]
    groups: dict[tuple[str, ...], list[float]] = {}
    for row in table:
        if number is not None and row.get(number) not in (None, "") and "seed" in options:
            groups.setdefault(tuple(f"{o}={row.get(o, '')}" for o in others), []).append(float(row[number]))
    return "\n".join(
        f"{' '.join(group) or 'all runs'}: {number} {fmean(values):.4g} ± {stdev(values):.2g} over {len(values)} seeds"
        for group, values in groups.items()
        if len(values) > 1
    )


def sweep(config: DictConfig) -> list[Path]:
    if config.dir is None:
        raise ValueError("set dir=<folder of its runs> to the sweep")
    if config.steps is not None and not OmegaConf.is_list(config.steps):
        raise ValueError(f"steps is a list: steps=[{config.steps}]")
    folder = Path(config.dir) if Path(config.dir).is_dir() else Path(config.runs_dir) / config.dir
    if not folder.is_dir():
        raise FileNotFoundError(f"dir={config.dir}: there is no such folder")
    runs = read_runs(folder)
    table = gather(runs)
    written = summarise(folder, runs, table, config.curve, config.final)
    name = (curve_metric(runs, config.curve) or "").removeprefix("val/")
    number = final_number(table, name, config.final)
    print(format_table(table, number))
    if means := over_seeds(table, differing(runs), number):
        print(means)
    if config.steps:
        rows = speed(config, runs, folder)
        if not rows:
            raise ValueError(
                f"no run of {folder} has finished its diffusion stage: there is nothing to sample from yet"
            )
        write_csv(folder / "speed.csv", columns_of(rows), rows)
        metric = name if name in rows[0] else runs[0].measured()[0]
        written += [folder / "speed.csv", plots.speed(rows, metric, folder / "speed.png")]
    if config.ledger:
        from ldm_train.pipeline.ledger import ledger

        written.append(ledger(runs, folder))
    if config.wandb:
        upload(folder, table, written, config.project)
    print("\n".join(f"wrote {path}" for path in written))
    return written


def upload(folder: Path, table: Rows, written: Sequence[Path], project: str) -> None:
    """Logs the table and the plots as a W&B run."""
    import wandb

    from ldm_train.training.loggers import WandbRun  # imported late: Lightning takes seconds

    run = WandbRun(folder, project, f"{folder.name}-sweep", {"sweep": folder.name})
    columns = list(dict.fromkeys(k for row in table for k in row))
    run.run.log({"sweep": wandb.Table(columns, [[str(row.get(c, "")) for c in columns] for row in table])})
    run.run.log({path.stem: wandb.Image(str(path)) for path in written if path.suffix == ".png"})
    run.finish()


def swept_names(config: DictConfig) -> list[str]:
    """Returns the names of the folders that hold a multirun's jobs: one for each value of name or experiment, if the
    command sweeps over that."""
    overrides = OverridesParser.create().parse_overrides(list(OmegaConf.select(config, "hydra.overrides.task") or []))
    asked = {override.key_or_group: override for override in overrides}
    chosen = OmegaConf.select(config, "hydra.runtime.choices") or {}
    usual = {"name": config.name, "experiment": chosen.get("experiment")}
    for option, value in usual.items():
        if option in asked and asked[option].is_sweep_override():
            return [text.strip("'\"") for text in asked[option].sweep_string_iterator()]
        if value:
            return [str(value)]
    return ["run"]


class Report(Callback):
    """Reports at the end of a multirun of train.py which jobs failed and why, and writes the table and the plots."""

    start = 0.0  # in seconds since 1970

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        self.start = time.time()

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        failed, count = list[Path](), 0
        for folder in filter(Path.is_dir, (Path(config.runs_dir) / name for name in swept_names(config))):
            try:
                runs = read_runs(folder) if config.get("plan") is None else []  # a plan writes nothing
                written = summarise(folder, runs, gather(runs)) if runs else []
            except (FileNotFoundError, ValueError, Refused) as error:
                print(f"no table or plots of the sweep: {error}")
                written = []
            print("\n".join(f"wrote {path}" for path in written))
            # Jobs of earlier sweeps in this folder may have failed, too.
            failed += sorted(p.parent for p in folder.glob(f"*/{FAILED}") if p.stat().st_mtime >= self.start - 1)
            count += len(jobs(folder))
        if failed:
            lines = "\n".join(f"  {job.name}: {failure(job)}" for job in failed)
            print(f"\nerror: {len(failed)} of {count} jobs failed:\n{lines}", file=sys.stderr, flush=True)
            sys.exit(1)
