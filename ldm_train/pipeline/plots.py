"""The plots of a sweep, drawn with Matplotlib, without a display."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm_train.storage import write_atomically

# Colours that the colour-blind can distinguish (Okabe and Ito), each used with its own marker.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C8C00")
MARKERS = "osD^vPX*"

Rows = Sequence[Mapping[str, Any]]


def _figure(columns: int) -> tuple[Any, Any]:
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise ValueError("plots of a sweep need `pip install 'ldm-train[sweep]'`") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, columns, figsize=(4.6 * columns, 3.8), squeeze=False, layout="constrained")
    for axis in axes[0]:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes[0]


def _save(figure: Any, path: Path) -> Path:
    import matplotlib.pyplot as plt

    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=130))
    plt.close(figure)
    return path


def _line(axis: Any, number: int, name: str, xs: list[float], rows: Rows, metric: str) -> None:
    """Draws a run's metric over `xs`, with 95 % confidence intervals where known. number: index of the run, sets its
    colour and marker."""
    colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
    axis.plot(xs, [r[metric] for r in rows], f"{marker}-", color=colour, label=name, markersize=4)
    low, high = f"{metric}_low", f"{metric}_high"
    if known := [(x, r[low], r[high]) for x, r in zip(xs, rows) if r.get(low) is not None]:
        axis.fill_between(*zip(*known), color=colour, alpha=0.15, linewidth=0)


def _scale(axis: Any, values: Sequence[float]) -> None:
    """Uses a logarithmic axis if the values span more than one order of magnitude."""
    if min(values) > 0 and max(values) / min(values) > 10:
        axis.set_yscale("log")


def curves(rows: Rows, metric: str, names: Mapping[str, str], path: Path) -> Path:
    """Plots a metric against optimiser steps, training time and compute, one line per run."""
    wanted = {"step": "optimiser steps", "seconds": "training time in seconds", "tflop": "training compute in TFLOP"}
    shown = [key for key in wanted if all(r.get(key) is not None for r in rows)]
    figure, axes = _figure(len(shown))
    for axis, key in zip(axes, shown):
        for number, (run, name) in enumerate(names.items()):
            mine = [r for r in rows if r["run"] == run]
            _line(axis, number, name, [float(r[key]) for r in mine], mine, metric)
        axis.set_xlabel(wanted[key])
        axis.set_ylabel(metric.removeprefix("val/"))
        _scale(axis, [r[metric] for r in rows])
    axes[-1].legend(fontsize=8)
    return _save(figure, path)


def against_factor(rows: Rows, number: str, path: Path) -> Path:
    """Plots a number of the evaluation, with its interval, against the downsampling factor f."""
    figure, (axis,) = _figure(1)
    rows = sorted(rows, key=lambda r: r["f"])
    base = number.removesuffix("value")
    values = [float(r[number]) for r in rows]
    below = [max(0.0, v - float(r.get(f"{base}low") or v)) for r, v in zip(rows, values)]
    above = [max(0.0, float(r.get(f"{base}high") or v) - v) for r, v in zip(rows, values)]
    axis.errorbar([r["f"] for r in rows], values, [below, above], fmt="o-", color=COLOURS[0], capsize=3)
    axis.set_xscale("log", base=2)
    axis.set_xticks([r["f"] for r in rows], [str(r["f"]) for r in rows])
    axis.set_xlabel("downsampling factor f")
    axis.set_ylabel(number.removesuffix(".value"))
    _scale(axis, values)
    return _save(figure, path)


def speed(rows: Rows, metric: str, path: Path) -> Path:
    """Plots a metric against sampling speed, one line per run and one point per number of sampling steps."""
    figure, (axis,) = _figure(1)
    rows = [row for row in rows if metric in row]  # a run may have measured other metrics
    runs = list(dict.fromkeys(r["run"] for r in rows))
    distinct = len({r["f"] for r in rows}) == len(runs)
    for number, run in enumerate(runs):
        mine = [r for r in rows if r["run"] == run]
        name = f"f = {mine[0]['f']}" if distinct else run[:40]
        _line(axis, number, name, [r["images_per_second"] for r in mine], mine, metric)
        for row in mine:
            place = (row["images_per_second"], row[metric])
            axis.annotate(row["num_inference_steps"], place, fontsize=6, xytext=(3, 3), textcoords="offset points")
    axis.set_xscale("log")
    axis.set_xlabel("samples per second (beside each point: sampling steps)")
    axis.set_ylabel(metric)
    _scale(axis, [r[metric] for r in rows])
    axis.legend(fontsize=8)
    return _save(figure, path)
