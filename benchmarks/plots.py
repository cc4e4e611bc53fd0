"""Plots of a record, each as PNG and SVG: bars against peers, growth of time and memory, accuracy,
the planner.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from benchmarks import summary

MIB = 2**20
# One colour a provider in every plot: ours warm, others cool and grey.
COLOURS = {
    "cpu": "#d1495b",
    "triton": "#8d0801",
    "torch": "#edae49",
    "dense": "#6c757d",
    "dense-compile": "#495057",
    "dense-chunked": "#adb5bd",
    "liger": "#00798c",
    "trl": "#30638e",
    "orda": "#003d5b",
}
FIELDS = {"rows": "rows R", "columns": "vocabulary V", "layers": "layers L"}


def write_plots(record: dict[str, Any], folder: Path) -> list[Path]:
    """Write every plot that the record has figures for; the SVG files."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        "time": bars(record, "time"),
        "memory": bars(record, "memory"),
        "scaling": scaling(record),
        "flatness": flatness(record),
        "accuracy": accuracy(record),
        "planner": planner(record),
    }
    written = []
    with plt.rc_context({"svg.hashsalt": "fdd_kernels"}):  # the same bytes for the same record
        for name, figure in figures.items():
            if figure is not None:
                figure.savefig(folder / f"{name}.png", dpi=120)
                figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
                written.append(folder / f"{name}.svg")
                plt.close(figure)
    return written


def _grid(count: int, height: float) -> tuple[Figure, list]:
    columns = min(3, count)
    rows = -(-count // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(4.6 * columns, height * rows), squeeze=False, layout="constrained"
    )
    flat = list(axes.flat)
    for unused in flat[count:]:
        unused.set_visible(False)
    return figure, flat


def bars(record: dict[str, Any], measure: str) -> Figure | None:
    """Time (with the bare products as a line) or memory of each provider, one panel a workload."""
    panels = []
    for result in record["results"]:
        if result["workload"].get("sweep") or result["workload"]["group"] in (
            "flatness",
            "threads",
        ):
            continue
        entries = {name: e for name, e in result["providers"].items() if e[measure]}
        if entries:
            panels.append((result, entries))
    if not panels:
        return None
    figure, axes = _grid(len(panels), 3.0)
    for axis, (result, entries) in zip(axes, panels):
        names = list(entries)
        if measure == "time":
            values = [entries[n]["time"]["total"]["median"] for n in names]
            low = [v - entries[n]["time"]["total"]["min"] for n, v in zip(names, values)]
            high = [entries[n]["time"]["total"]["max"] - v for n, v in zip(names, values)]
            axis.barh(
                names,
                values,
                xerr=[low, high],
                color=[COLOURS[n] for n in names],
                error_kw={"lw": 1, "capsize": 2},
            )
            labels = [summary.seconds(v) for v in values]
            axis.set_xlabel("seconds, forward + backward")
            if result["products"]:
                axis.axvline(result["products"]["total"], color="black", ls="--", lw=1)
                axis.set_title("dashed: the bare products", fontsize=8, loc="right")
        else:
            values = [entries[n]["memory"]["beyond_inputs"] / MIB for n in names]
            high = [0.0] * len(values)
            axis.barh(names, values, color=[COLOURS[n] for n in names])
            labels = [summary.memory(v * MIB) for v in values]
            axis.set_xlabel("MiB beyond inputs, gradients included")
        ends = [value + after for value, after in zip(values, high)]
        for i, (end, label) in enumerate(zip(ends, labels)):
            part = " *" if "no derivative" in entries[names[i]]["computes"] else ""
            axis.text(end, i, f"  {label}{part}", va="center", fontsize=8)
        axis.set_xlim(0, 1.3 * max(ends))
        axis.invert_yaxis()
        axis.set_title(result["workload"]["name"], loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    if any("no derivative" in e["computes"] for _, entries in panels for e in entries.values()):
        figure.supxlabel("* without the derivative term: less work", fontsize=8)
    return figure


def scaling(record: dict[str, Any]) -> Figure | None:
    """Time and memory against R, V and L in logarithmic axes, with the fitted exponents."""
    curves = summary.growth(record)
    panels = [
        (field, what)
        for field in FIELDS
        for what in ("times", "memory")
        if any(c["field"] == field and len(c[what]) > 1 for c in curves)
    ]
    if not panels:
        return None
    figure, axes = _grid(len(panels), 3.2)
    for axis, (field, what) in zip(axes, panels):
        swept: set[int] = set()
        for curve in curves:
            if curve["field"] == field and len(curve[what]) > 1:
                x, y = zip(*curve[what])
                swept |= set(x)
                y = [v / MIB for v in y] if what == "memory" else y
                power = curve["time_exponent" if what == "times" else "memory_exponent"]
                axis.plot(
                    x,
                    y,
                    "o-",
                    color=COLOURS[curve["provider"]],
                    label=f"{curve['provider']} (power {power:.2f})",
                    ms=4,
                )
        axis.set(
            xscale="log",
            yscale="log",
            xlabel=FIELDS[field],
            ylabel="seconds" if what == "times" else "MiB beyond inputs",
        )
        axis.set_xticks(sorted(swept), [str(n) for n in sorted(swept)])
        axis.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def flatness(record: dict[str, Any]) -> Figure | None:
    """Memory beyond inputs and gradients against rows."""
    points: dict[str, list[tuple[int, float]]] = {}
    for name, count, _, rest in summary.flatness(record):
        points.setdefault(name, []).append((count, rest / MIB))
    if not points:
        return None
    figure, axis = plt.subplots(figsize=(5, 3.2), layout="constrained")
    for name, values in points.items():
        axis.plot(*zip(*sorted(values)), "o-", color=COLOURS[name], label=name)
    axis.set(
        xscale="log", ylim=(0, None), xlabel="rows R", ylabel="MiB beyond inputs and gradients"
    )
    axis.legend()
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def accuracy(record: dict[str, Any]) -> Figure | None:
    """Error of the gradient of the hidden states against float64, worst row."""
    panels = []
    for result in record["results"]:
        errors = {
            n: e["accuracy"]["grad_hidden_relative"]
            for n, e in result["providers"].items()
            if e["accuracy"]
        }
        if errors:
            panels.append((result, {n: max(v, 1e-17) for n, v in errors.items()}))
    if not panels:
        return None
    figure, axes = _grid(len(panels), 2.6)
    for axis, (result, errors) in zip(axes, panels):
        axis.barh(list(errors), list(errors.values()), color=[COLOURS[n] for n in errors])
        axis.set_xscale("log")
        axis.set_xlim(min(1e-9, *errors.values()), 1)
        axis.invert_yaxis()
        axis.set_title(
            f"{result['workload']['name']} ({result['workload']['dtype']})", loc="left", fontsize=10
        )
        axis.set_xlabel("relative error of the gradient, worst row")
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def planner(record: dict[str, Any]) -> Figure | None:
    """Predicted against measured memory."""
    points = [
        (entry["memory"]["beyond_inputs"] / MIB, entry["predicted_memory"] / MIB, name)
        for result in record["results"]
        for name, entry in result["providers"].items()
        if entry["memory"] and entry["predicted_memory"] and entry["memory"]["beyond_inputs"] > 0
    ]
    if not points:
        return None
    figure, axis = plt.subplots(figsize=(4.6, 4.2), layout="constrained")
    ends = [0.7 * min(p[0] for p in points), 1.4 * max(p[0] for p in points)]
    axis.plot(ends, ends, color="black", lw=1)
    axis.fill_between(
        ends,
        [0.9 * x for x in ends],
        [1.1 * x for x in ends],
        color="black",
        alpha=0.1,
        label="within 10%",
    )
    for name in dict.fromkeys(p[2] for p in points):
        axis.plot(
            *zip(*[p[:2] for p in points if p[2] == name]),
            "o",
            color=COLOURS[name],
            label=name,
            ms=5,
        )
    axis.set(xscale="log", yscale="log", xlabel="measured MiB", ylabel="planner's MiB")
    axis.legend(fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    return figure
