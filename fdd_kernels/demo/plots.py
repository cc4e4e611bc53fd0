"""Plots of the demo's page, as SVG elements."""

from __future__ import annotations

import io

import matplotlib
import numpy as np

from fdd_kernels.demo.comparison import Comparison, mean_by_layer

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def curves(comparison: Comparison) -> str:
    """Plot validation KL by steps and by seconds: means over seeds, and bands from the best seed to
    the worst.
    """
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True)
    steps = np.array(comparison.steps)
    for colour, (objective, runs) in zip(plt.cm.tab10.colors, comparison.runs.items()):
        kl = np.array([run.held_out_kl for run in runs])
        for axis, scale in zip(axes, (1.0, comparison.seconds_per_step[objective])):
            axis.plot(
                scale * steps, kl.mean(0), color=colour, label=objective, marker="o", markersize=3
            )
            axis.fill_between(scale * steps, kl.min(0), kl.max(0), color=colour, alpha=0.15)
    for seconds in comparison.seconds:
        axes[1].axvline(seconds, color="black", linestyle="--", linewidth=1)
    axes[0].set(title="at equal steps", xlabel="step", ylabel="validation KL, nats per token")
    axes[1].set(title="at equal seconds (dashed: compared there)", xlabel="CPU seconds")
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    return _svg(figure)


def differences(comparison: Comparison) -> str:
    """Plot a bar per objective: its KL minus the baseline's, with interval and a dot per seed, at
    equal steps and at equal seconds.
    """
    rows = [row for row in comparison.rows() if row["objective"] != comparison.baseline]
    places = list(comparison.places())
    figure, axis = plt.subplots(figsize=(11, 0.8 * len(rows) + 1.2), layout="constrained")
    height = 0.8 / len(places)
    for i, place in enumerate(places):
        shift = (i - (len(places) - 1) / 2) * height
        found = [(j + shift, row[place]) for j, row in enumerate(rows) if row[place]]
        axis.barh(
            [y for y, _ in found],
            [at["difference"].mean for _, at in found],
            xerr=[at["difference"].half for _, at in found],
            height=height,
            capsize=3,
            label=f"at {place}",
        )
        for y, at in found:
            by_seed = at["difference_by_seed"]
            axis.plot(by_seed, [y] * len(by_seed), "ko", markersize=3, alpha=0.6)
    axis.axvline(0, color="black", linewidth=1)
    axis.set_yticks(range(len(rows)), [row["objective"] for row in rows])
    axis.invert_yaxis()
    axis.set(xlabel=f"KL minus that of {comparison.baseline}, nats per token (less is better)")
    axis.grid(axis="x", alpha=0.3)
    axis.legend(fontsize=8)
    return _svg(figure)


def layers(comparison: Comparison) -> str:
    """Plot KL layer by layer, before training and after it under each objective, as a heat map."""
    first = next(iter(comparison.runs.values()))
    rows = {"before training": mean_by_layer(first, "layer_kl_before")}
    for objective, runs in comparison.runs.items():
        rows[objective] = mean_by_layer(runs, "layer_kl_after")
    values = np.array(list(rows.values()))
    figure, axis = plt.subplots(figsize=(8, 0.42 * len(rows) + 1), layout="constrained")
    axis.pcolormesh(values, cmap="viridis_r")
    middle = (values.min() + values.max()) / 2
    for (i, j), value in np.ndenumerate(values):
        colour = "white" if value > middle else "black"
        axis.text(
            j + 0.5, i + 0.5, f"{value:.2f}", ha="center", va="center", fontsize=8, color=colour
        )
    names = [f"layer {k}" for k in range(1, values.shape[1])] + ["output"]
    axis.set_xticks(np.arange(values.shape[1]) + 0.5, names)
    axis.set_yticks(np.arange(len(rows)) + 0.5, list(rows))
    axis.invert_yaxis()
    return _svg(figure)


def _svg(figure: plt.Figure) -> str:
    """Close the figure and return it as an SVG element."""
    text = io.StringIO()
    figure.savefig(text, format="svg")
    plt.close(figure)
    return text.getvalue()[text.getvalue().index("<svg") :]
