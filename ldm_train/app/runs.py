"""The runs below a folder as the runs page shows them: their progress, curves, pictures, findings and evaluations."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ldm_train.configuration import run_config
from ldm_train.errors import Refused
from ldm_train.pipeline.sweep import reached, read_rows
from ldm_train.storage import read_record
from ldm_train.training import HEALTH

DEPTH = 3  # a run below runs_dir, one of a sweep, one of a sweep's sweep
MOST = 200  # runs that are listed
POINTS = 400  # of a curve
PICTURES = (".png", ".gif")
LIVE = 120  # seconds since a run last wrote, within which it is said to be training
# The columns that are listed first, in this order.
USUAL = ("val/fid_tiny", "val/loss", "train/loss", "val/psnr", "val/perceptual", "train/l1")


def run_folders(runs_dir: str | Path) -> list[Path]:
    """Returns the runs below a folder, at most MOST, the most recently written first."""
    found = [path.parent for depth in range(DEPTH) for path in Path(runs_dir).glob("*/" * (depth + 1) + "config.yaml")]
    runs = [folder for folder in found if _own(folder, "config.yaml") and stages(folder)]
    return sorted(runs, key=written, reverse=True)[:MOST]


def stages(folder: Path) -> list[str]:
    """Returns the stages of a run that have begun: the standard ones in their order, then others by their last
    change."""
    notes = sorted(folder.glob("*/stage.json"), key=_changed)
    named = [path.parent.name for path in notes]
    known = ("autoencoder", "latents", "diffusion", "evaluation", "export")
    return [n for n in known if n in named] + [n for n in named if n not in known]


def _own(folder: Path, *patterns: str) -> list[Path]:
    """Returns the files of a run, without links that lead out of it: a stranger's run could name any file here."""
    place = folder.resolve()
    found = (path for pattern in patterns for path in folder.glob(pattern))
    return [path for path in found if path.is_file() and path.resolve().is_relative_to(place)]


def written(folder: Path) -> float:
    """Returns when a run last wrote something, in seconds since 1970."""
    paths = [*folder.glob("*/stage.json"), *folder.glob("*/metrics.csv"), folder / "config.yaml"]
    return max(map(_changed, paths), default=0.0)


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # it does not exist, or has just been set aside
        return 0.0


def name_of(folder: Path, runs_dir: str | Path) -> str:
    return folder.relative_to(runs_dir).as_posix()


def table(runs_dir: str | Path) -> pd.DataFrame:
    """Returns a table with one row per run: name, state, how far its open stages (or its last one) are, when it last
    wrote, and its number of findings."""
    rows = []
    for folder in run_folders(runs_dir):
        age = time.time() - written(folder)
        steps = [f"{stage}: {_reached(folder / stage)}" for stage in stages(folder)]
        open_stages = [s for s in steps if not s.endswith("done")]
        state = "training" if open_stages and age < LIVE else "finished" if not open_stages else "stopped"
        row = {"run": name_of(folder, runs_dir), "state": state, "stages": ", ".join(open_stages or steps[-1:])}
        rows.append(row | {"last step": _ago(age), "findings": len(findings(folder))})
    return pd.DataFrame(rows, columns=["run", "state", "stages", "last step", "findings"])


def _reached(stage: Path) -> str:
    try:
        return reached(stage)
    except Refused:
        return "damaged"


def _ago(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return "now" if seconds < 15 else f"{seconds:.0f} s ago"


def _rows(stage: Path) -> pd.DataFrame:
    """Returns what a stage has logged, as numbers; an empty table with a column "step" if it has logged nothing."""
    rows = pd.DataFrame(read_rows(stage) if _own(stage.parent, f"{stage.name}/metrics.csv") else [])
    named = rows[[name for name in rows.columns if isinstance(name, str)]]  # cells beyond the header have no name
    return named.apply(pd.to_numeric, errors="coerce") if "step" in named else pd.DataFrame({"step": []})


def columns(folders: Sequence[Path], stage: str) -> list[str]:
    """Returns the names of what a stage of some runs has logged; first those of USUAL that have enough points for a
    curve."""
    tables = [_rows(folder / stage) for folder in folders]
    names = {name for rows in tables for name in rows.columns} - {"step"}
    drawn = {name for rows in tables for name in rows.columns if rows[name].notna().sum() > 1}  # a curve has two points
    usual = [n for n in USUAL if n in names & drawn]
    return usual + sorted(names - {*usual})


def curves(folders: Sequence[Path], runs_dir: str | Path, stage: str, column: str) -> pd.DataFrame:
    """Returns step, value and run of what a stage has logged in a column."""
    parts = []
    for folder in folders:
        rows = _rows(folder / stage)
        if column in rows:
            rows = rows[["step", column]].dropna().rename(columns={column: "value"})
            rows = rows.iloc[:: max(1, len(rows) // POINTS)]
            parts.append(rows.assign(run=name_of(folder, runs_dir)))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame({"step": [], "value": [], "run": []})


def media(folder: Path) -> list[tuple[str, str]]:
    """Returns (path, label) of a run's grids and films, the most recent first."""
    paths = [p for p in _own(folder, "*/images/*", "evaluation/*") if p.suffix in PICTURES]
    paths.sort(key=_changed, reverse=True)
    return [(str(path), f"{path.relative_to(folder).parts[0]}: {path.stem}") for path in paths]


def findings(folder: Path) -> list[dict[str, Any]]:
    """Returns what the health checks of a run have found."""
    found = []
    for path in sorted(_own(folder, f"*/{HEALTH}")):
        try:
            record = read_record(path)
        except (OSError, ValueError):
            continue  # it is being written
        found += [{"stage": path.parent.name} | entry for entry in record.values() if isinstance(entry, dict)]
    return found


def evaluations(folder: Path) -> pd.DataFrame:
    """Returns the numbers of a run's evaluations with their 95 % intervals."""
    rows = []
    for path in (*_own(folder, "evaluation/metrics.json"), *sorted(_own(folder, "evaluations/*.json"))):
        try:
            tree = read_record(path)
        except (OSError, ValueError):
            continue
        rows += _numbers(tree, "" if path.stem == "metrics" else f"{path.stem}: ")
    return pd.DataFrame(rows, columns=["what", "value", "95 % interval", "n"])


def _numbers(tree: dict[str, Any], prefix: str) -> list[dict[str, Any]]:
    rows = []
    for name, value in tree.items():
        if isinstance(value, dict) and isinstance(value.get("value"), int | float):
            ends = value.get("interval")
            known = isinstance(ends, list) and len(ends) == 2 and all(isinstance(end, int | float) for end in ends)
            between = f"{_short(ends[0])} to {_short(ends[1])}" if known else ""
            row = {"what": prefix + name, "value": _short(value["value"]), "95 % interval": between}
            rows.append(row | {"n": str(value.get("n", ""))})
        elif isinstance(value, dict):
            rows += _numbers(value, f"{prefix}{name} ")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            rows.append({"what": prefix + name, "value": _short(value), "95 % interval": "", "n": ""})
    return rows


def _short(value: float) -> str:
    try:
        return f"{value:.4g}"
    except OverflowError:  # a file may hold an integer of any length
        return "too large"


def recipe_of(folder: Path) -> str:
    """Returns the config of a run, as YAML; if it cannot be read, the error as a comment."""
    from omegaconf import OmegaConf

    try:
        return OmegaConf.to_yaml(run_config(folder))
    except (OSError, ValueError, Refused) as error:
        return f"# {error}"
