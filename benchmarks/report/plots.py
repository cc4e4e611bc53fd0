"""Plots of a record, each as PNG and SVG: time and memory beside others, growth, accuracy, the
memory planner.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from benchmarks.providers import PROVIDERS
from benchmarks.report import figures, growth, memory, seconds
from benchmarks.workloads import SWEPT, Workload
from fdd_kernels.common.sizes import MIB

TITLES = {
    "time": "Time",
    "memory": "Memory",
    "scaling": "Growth",
    "flatness": "Memory against sizes",
    "accuracy": "Accuracy",
    "planner": "The memory planner",
}


def write_plots(record: dict[str, Any], folder: Path) -> list[Path]:
    """Write every plot that the record has figures for; the SVG files."""
    folder.mkdir(parents=True, exist_ok=True)
    frame = figures(record)
    drawn = {
        "time": bars(frame, "total"),
        "memory": bars(frame, "memory"),
        "scaling": scaling(frame),
        "flatness": flatness(frame),
        "accuracy": accuracy(frame),
        "planner": planner(frame),
    }
    written = []
    with plt.rc_context({"svg.hashsalt": "fdd_kernels"}):  # the same bytes for the same record
        for name, figure in drawn.items():
            if figure is not None:
                figure.savefig(folder / f"{name}.png", dpi=120)
                figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
                written.append(folder / f"{name}.svg")
                plt.close(figure)
    return written


def color(name: str) -> str:
    """Return a provider's colour, the same in every plot; grey for one of an older version."""
    return PROVIDERS[name].color if name in PROVIDERS else "#ced4da"


def _grid(count: int, height: float) -> tuple[Figure, list]:
    columns = min(3, count)
    rows = -(-count // columns)
    size = (4.6 * columns, height * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    flat = list(axes.flat)
    for unused in flat[count:]:
        unused.set_visible(False)
    for axis in flat:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, flat


def _overview(frame: pd.DataFrame, column: str) -> list[tuple[Workload, pd.DataFrame]]:
    """List workloads that stand for themselves, with the providers that have this figure."""
    found = []
    for _, rows in frame[frame[column].notna()].groupby("workload", sort=False):
        workload = Workload.from_json(rows.result.iloc[0]["workload"])
        found += [(workload, rows)] if workload.in_overview else []
    return found


def bars(frame: pd.DataFrame, column: str) -> Figure | None:
    """Plot time (the limit dashed) or memory of each provider, a panel per workload."""
    panels = _overview(frame, column)
    if not panels:
        return None
    figure, axes = _grid(len(panels), 3.0)
    for axis, (workload, rows) in zip(axes, panels):
        values, write, ends = rows.memory / MIB, memory, rows.memory / MIB
        errors, label = None, "MiB beyond inputs, gradients included"
        if column == "total":
            values, write, ends = rows.total, seconds, rows.total_max
            errors = [rows.total - rows.total_min, rows.total_max - rows.total]
            label = "seconds, forward + backward"
            if rows.limit.notna().any():
                axis.axvline(rows.limit.iloc[0], color="black", ls="--", lw=1)
                axis.set_title("dashed: the limit", fontsize=8, loc="right")
        drawn = {"xerr": errors, "error_kw": {"lw": 1, "capsize": 2}}
        axis.barh(rows.provider, values, color=rows.provider.map(color), **drawn)
        for i, row in enumerate(rows.itertuples()):
            star = " *" if "no derivative" in row.computes else ""
            text = f"  {write(getattr(row, column))}{star}"
            axis.text(ends.iloc[i], i, text, va="center", fontsize=8)
        axis.set(xlabel=label, xlim=(0, 1.3 * ends.max()))
        axis.invert_yaxis()
        axis.set_title(workload.name, loc="left", fontsize=10)
    if any(rows.computes.str.contains("no derivative").any() for _, rows in panels):
        figure.supxlabel("* without the derivative term: less work", fontsize=8)
    return figure


def scaling(frame: pd.DataFrame) -> Figure | None:
    """Plot time and memory against R, V and L in logarithmic axes, with the fitted exponents."""
    curves, panels = growth(frame), []
    for field in SWEPT:
        for column in ("total", "memory"):
            found = curves[(curves.sweep == field) & curves[column].notna()]
            panels += [(field, column, found)] if len(found) else []
    if not panels:
        return None
    figure, axes = _grid(len(panels), 3.2)
    for axis, (field, column, found) in zip(axes, panels):
        swept = frame[(frame.sweep == field) & frame[column].notna()].sort_values("point")
        for curve in found.itertuples():
            points = swept[swept.provider == curve.provider]
            y, name = points[column] / (MIB if column == "memory" else 1), curve.provider
            label = f"{name} (power {getattr(curve, column):.2f})"
            axis.plot(points.point, y, "o-", color=color(name), label=label, ms=4)
        unit = "seconds" if column == "total" else "MiB beyond inputs"
        axis.set(xscale="log", yscale="log", xlabel=SWEPT[field], ylabel=unit)
        ticks = sorted(swept.point.unique())
        axis.set_xticks(ticks, [f"{n:.0f}" for n in ticks])
        axis.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    return figure


def flatness(frame: pd.DataFrame) -> Figure | None:
    """Plot memory beyond inputs and gradients against what it does not grow with, a panel per
    objective.
    """
    points = frame[(frame.group == "flatness") & frame.memory.notna()].sort_values("extent")
    panels = list(points.groupby("objective", sort=False))
    if not panels:
        return None
    figure, axes = _grid(len(panels), 3.2)
    for axis, (objective, of_objective) in zip(axes, panels):
        for name, rows in of_objective.groupby("provider", sort=False):
            rest = (rows.memory - rows.gradients) / MIB
            axis.plot(rows.extent, rest, "o-", color=color(name), label=name)
        axis.set(xscale="log", ylim=(0, None), xlabel=of_objective.extent_name.iloc[0])
        axis.set_ylabel("MiB beyond inputs and gradients")
        axis.set_title(objective, loc="left", fontsize=10)
        axis.legend()
        axis.grid(alpha=0.3)
    return figure


def accuracy(frame: pd.DataFrame) -> Figure | None:
    """Plot the error of the gradient of the hidden states against float64, worst row."""
    panels = _overview(frame, "gradient_error")
    if not panels:
        return None
    figure, axes = _grid(len(panels), 2.6)
    for axis, (workload, rows) in zip(axes, panels):
        errors = rows.gradient_error.clip(lower=1e-17)
        axis.barh(rows.provider, errors, color=rows.provider.map(color))
        axis.set(xscale="log", xlim=(min(1e-9, errors.min()), 1))
        axis.set_xlabel("relative error of the gradient, worst row")
        axis.invert_yaxis()
        axis.set_title(f"{workload.name} ({workload.dtype})", loc="left", fontsize=10)
    return figure


def planner(frame: pd.DataFrame) -> Figure | None:
    """Plot predicted against measured memory."""
    points = frame[frame.off.notna()]
    if points.empty:
        return None
    figure, (axis,) = _grid(1, 4.2)
    measured = points.memory / MIB
    ends = [0.7 * measured.min(), 1.4 * measured.max()]
    axis.plot(ends, ends, color="black", lw=1)
    low, high = ([f * x for x in ends] for f in (0.9, 1.1))
    axis.fill_between(ends, low, high, color="black", alpha=0.1, label="within 10%")
    for name, rows in points.groupby("provider", sort=False):
        x, y = rows.memory / MIB, rows.predicted / MIB
        axis.plot(x, y, "o", color=color(name), label=name, ms=5)
    axis.set(xscale="log", yscale="log", xlabel="measured MiB", ylabel="planner's MiB")
    axis.legend(fontsize=8)
    return figure
