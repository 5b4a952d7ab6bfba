"""The ledger: a table of how much each technique gains, from the runs of a sweep over `technique` and `seed`."""

import math
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from ldm_train.configuration import config_folder
from ldm_train.metrics.distribution import student_quantile
from ldm_train.pipeline.sweep import SweptRun, differing, read_rows
from ldm_train.storage import write_atomically

BEGIN, END = "<!-- rows of ldm-sweep ledger=true -->", "<!-- end of rows -->"


@dataclass(frozen=True)
class Measure:
    """A number in metrics.json by which arms are compared. title: its column. key: its path. better: "lower" or
    "higher". relative: effects are fractions of the base's value, else differences. ratio: the number is the ratio of a
    spread to the data's, where more than 1 is as wrong as less: 2 counts as 1/2."""

    title: str
    key: str
    better: str
    relative: bool = False
    ratio: bool = False

    def of(self, metrics: Mapping[str, float]) -> float | None:
        value = metrics.get(self.key)
        if value is None or math.isnan(value):
            return None
        return min(value, 1 / value) if self.ratio and value > 0 else value


# Every one that the runs have is shown and enters the verdict: none is dropped after the results are known.
MEASURES = (
    Measure("fid_tiny", "samples.fid_tiny.value", "lower", relative=True),
    Measure("adherence", "adherence.trained.all", "higher"),
    Measure("held out", "adherence.held_out.all", "higher"),
    Measure("shape fidelity", "adherence.impression.shape_fidelity.ratio", "higher"),
    Measure("partial prompts", "adherence.impression.partial.right", "higher"),
    Measure("partial backgrounds", "adherence.impression.partial.backgrounds", "higher"),
    Measure("diversity", "adherence.diversity.position_ratio", "higher", ratio=True),
    Measure("rFID_tiny", "reconstructions.fid_tiny.value", "lower", relative=True),
)

# What is measured of an autoencoder before a U-Net is trained on its latents, and then of the U-Net's samples.
PREDICTORS = {
    "spectrum slope": "latents.spectrum_slope.value",
    "equivariance error": "latents.equivariance_error.value",
    "decoder sensitivity": "latents.decoder_sensitivity.value",
    "ifid_tiny": "latents.ifid_tiny.value",
    "rFID_tiny": "reconstructions.fid_tiny.value",
    "PSNR": "reconstruction.psnr.value",
}
OUTCOMES = ("fid_tiny", "adherence", "shape fidelity")
LEAST_AUTOENCODERS = 6  # fewer give no rank correlation


def interval(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half width of its 95 % interval) by Student's t. The half width of a single value is infinite."""
    if len(values) < 2:
        return values[0], math.inf
    return fmean(values), student_quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values))


def arm_of(run: SweptRun) -> tuple[str, ...]:
    """The names of the techniques that a run uses, sorted."""
    return tuple(
        sorted(k.removeprefix("techniques.") for k, v in run.config.items() if k.startswith("techniques.") and v)
    )


def arms(runs: Sequence[SweptRun]) -> dict[tuple[str, ...], dict[int, SweptRun]]:
    """The finished runs by techniques and seed. Raises ValueError if no run is without techniques (the base that the
    others are compared with), or if two runs have the same techniques and seed."""
    found: dict[tuple[str, ...], dict[int, SweptRun]] = {}
    for run in runs:
        if run.failed or not run.metrics():
            continue
        arm, seed = arm_of(run), int(run.config["seed"])
        if (other := found.setdefault(arm, {}).get(seed)) is not None:
            raise ValueError(
                f"{run.folder} and {other.folder} have the same techniques and seed; the ledger compares techniques, one "
                "run per seed (without ledger=true, the table shows means over the seeds of any sweep)"
            )
        found[arm][seed] = run
    if () not in found:
        raise ValueError(
            "no finished run without techniques: the ledger compares with technique=[], add it to the sweep"
        )
    return found


def effect(
    measure: Measure, arm: Mapping[int, SweptRun], base: Mapping[int, SweptRun]
) -> tuple[float, float, int] | None:
    """(mean effect, half width of its 95 % interval, number of seeds) from the differences between runs of the same
    seed; None if there are none."""
    differences = []
    for seed in sorted(arm.keys() & base.keys()):
        ours, theirs = measure.of(arm[seed].metrics()), measure.of(base[seed].metrics())
        if ours is None or theirs is None or (measure.relative and not theirs):
            continue
        differences.append(ours / theirs - 1 if measure.relative else ours - theirs)
    return (*interval(differences), len(differences)) if differences else None


def verdict(effects: Mapping[str, tuple[float, float, int] | None]) -> str:
    """Text naming the measures that got better, and those that got worse, at 95 % confidence."""
    words: dict[str, list[str]] = {"better": [], "worse": []}
    for measure in MEASURES:
        found = effects.get(measure.title)
        if found is None or abs(found[0]) <= found[1]:
            continue
        words["better" if (found[0] < 0) == (measure.better == "lower") else "worse"].append(measure.title)
    said = "; ".join(f"{word}: {', '.join(names)}" for word, names in words.items() if names)
    return said or "no difference seen"


def _percent(effect: tuple[float, float, int] | None) -> str:
    if effect is None:
        return ""
    mean, half, _ = effect
    return f"{100 * mean:+.1f} ± {100 * half:.1f} %" if math.isfinite(half) else f"{100 * mean:+.1f} %"


def _spent(run: SweptRun) -> float:
    """The training FLOPs of both stages, in units of 1e12."""
    total = 0.0
    for stage in ("autoencoder", "diffusion"):
        rows = reversed(read_rows(run.folder / stage))
        total += next((float(row["train/tflop"]) for row in rows if row.get("train/tflop")), 0.0)
    return total


def rows(runs: Sequence[SweptRun], commit: str = "") -> list[dict[str, Any]]:
    """One row per arm: effects with intervals, training FLOPs relative to the base's, and the verdict. The base's row
    has the mean values instead."""
    found = arms(runs)
    base, table = found[()], []
    for arm, ours in sorted(found.items()):
        effects = {m.title: effect(m, ours, base) for m in MEASURES}
        seeds = sorted(ours.keys() & base.keys())
        work = [_spent(ours[s]) / _spent(base[s]) for s in seeds if _spent(base[s])]
        row: dict[str, Any] = {"technique": " + ".join(arm) or "(base)", "seeds": len(seeds)}
        if arm:
            row |= {title: _percent(e) for title, e in effects.items()}
            row |= {"work": f"{fmean(work):.2f}" if work else "", "verdict": verdict(effects)}
        else:
            values = {m.title: [v for r in base.values() if (v := m.of(r.metrics())) is not None] for m in MEASURES}
            row |= {m.title: f"{fmean(v):.3f}" if (v := values[m.title]) else "" for m in MEASURES}
            row |= {"work": "1", "verdict": ""}
        table.append(row | {"commit": commit})
    return table


def other_options(runs: Sequence[SweptRun]) -> list[str]:
    """One line per arm: the options in which it differs from the base, with its own values. All of them are part of what
    its row measures, whether they are the technique's or were typed beside it."""
    found, lines = arms(runs), []
    for arm, ours in sorted(found.items()):
        own: dict[str, set[str]] = {}
        for seed in sorted(ours.keys() & found[()].keys()):
            run = ours[seed]
            for key in differing([run, found[()][seed]]):
                if not key.startswith("techniques"):
                    own.setdefault(key, set()).add(str(run.config.get(key, "left out")))
        if own:
            said = ", ".join(f"{key}={' or '.join(sorted(values))}" for key, values in own.items())
            lines.append(f"- {' + '.join(arm)}: {said}")
    return lines


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """(Spearman's rho, low, high), with its 95 % interval by Fisher's z and the variance of Bonett and Wright (2000),
    (1 + rho^2 / 2) / (n - 3). Ties have their mean rank. All are NaN if x or y is constant."""
    ranks = []
    for values in (np.asarray(x, float), np.asarray(y, float)):
        below, equal = (values[:, None] > values).sum(1), (values[:, None] == values).sum(1)
        ranks.append(below + (equal - 1) / 2)
    a, b = (r - r.mean() for r in ranks)
    if not (norm := math.sqrt((a @ a) * (b @ b))):
        return math.nan, math.nan, math.nan
    rho = float(a @ b) / norm
    half = 1.959964 * math.sqrt((1 + rho**2 / 2) / (len(a) - 3))
    z = math.atanh(max(-1 + 1e-12, min(1 - 1e-12, rho)))
    return rho, math.tanh(z - half), math.tanh(z + half)


def predictions(runs: Sequence[SweptRun]) -> list[dict[str, Any]]:
    """One row per predictor: rank correlations, over autoencoders, between the predictor and the outcomes of U-Nets
    trained on their latents with the same options (the most common ones). Several U-Nets on one autoencoder count once,
    by their mean. Empty if there are fewer than LEAST_AUTOENCODERS."""
    outcomes = [m for m in MEASURES if m.title in OUTCOMES]
    finished = [run for run in runs if not run.failed and run.metrics()]
    alike = Counter(map(_second_stage, finished))
    of_autoencoder: dict[tuple[str, ...], list[Mapping[str, float]]] = {}
    for run in finished:
        if _second_stage(run) == alike.most_common(1)[0][0]:
            metrics = run.metrics()
            # Rounded, since another number of threads changes the last digits of the measures of the same autoencoder.
            known = tuple(f"{metrics.get(key, math.nan):.4g}" for key in PREDICTORS.values())
            of_autoencoder.setdefault(known, []).append(metrics)
    table = []
    for predictor, key in PREDICTORS.items():
        row: dict[str, Any] = {"predictor": predictor}
        for outcome in outcomes:
            pairs = [
                (fmean(m[key] for m in trained), fmean(made))
                for trained in of_autoencoder.values()
                if all(not math.isnan(m.get(key, math.nan)) for m in trained)
                and (made := [v for m in trained if (v := outcome.of(m)) is not None])
            ]
            if len(pairs) >= LEAST_AUTOENCODERS:
                rho, low, high = rank_correlation(*zip(*pairs))
                row[outcome.title] = f"{rho:+.2f} [{low:+.2f}, {high:+.2f}]"
                row["autoencoders"] = len(pairs)
        if len(row) > 1:
            table.append(row)
    return table


def _second_stage(run: SweptRun) -> str:
    """A run's options for training its U-Net and sampling from it, as text, without the number of latent channels."""
    own = {k: v for k, v in run.config.items() if k.split(".")[0] in ("diffusion", "sampling", "sampler")}
    own.pop("diffusion.network.in_channels", None)
    return repr(sorted(own.items()))


def markdown(table: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a Markdown table, without columns that are empty in all rows."""
    columns = [c for c in dict.fromkeys(k for row in table for k in row) if any(row.get(c) for row in table)]
    lines = ["| " + " | ".join(columns) + " |", "| " + " | ".join("---" for _ in columns) + " |"]
    lines += ["| " + " | ".join(str(row.get(c, "")).replace("|", "\\|") for c in columns) + " |" for row in table]
    return "\n".join(lines)


def commit_of(folder: Path) -> str:
    """`git describe` of a folder's commit (its short hash if there are no tags), with "+" if files were changed since;
    "" outside of git."""
    try:
        said = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty=+"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return said.stdout.strip()


def write_table(text: str, path: Path) -> None:
    """Writes the text between the marks of an existing file, or a new file with marks. Raises ValueError if an existing
    file has none."""
    if path.is_file():
        old = path.read_text()
        before, begin, rest = old.partition(BEGIN)
        _, end, after = rest.partition(END)
        if not begin or not end:
            raise ValueError(f"{path} is there and has no place for the table; put the lines {BEGIN} and {END} into it")
        text = f"{before}{BEGIN}\n{text}\n{END}{after}"
    else:
        text = f"{BEGIN}\n{text}\n{END}\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def ledger(runs: Sequence[SweptRun], folder: Path) -> Path:
    """Prints the ledger of a sweep's runs, and how well autoencoders' measures predict samples, and writes both to
    ledger.md in `folder`. Returns its path."""
    text = markdown(rows(runs, commit=commit_of(config_folder())))
    if others := other_options(runs):
        text += "\n\nOptions that differ from the base's:\n\n" + "\n".join(others)
    if predicted := predictions(runs):
        text += (
            f"\n\nRank correlations (Spearman) with what is known of an autoencoder before:\n\n{markdown(predicted)}"
        )
    write_table(text, folder / "ledger.md")
    print(text)
    return folder / "ledger.md"
