"""Draw a pairing of layers; matplotlib is needed for this alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

Matrix = Sequence[Sequence[float]] | Tensor
# More numbers than this in a row would overlap.
MOST_NUMBERS = 16


def plot_layer_alignment(
    weights: Matrix,
    student_layers: Sequence[int],
    teacher_layers: Sequence[int],
    path: str | Path,
    costs: Matrix | None = None,
) -> None:
    """Draw the weights of pairs of layers, and their costs beside them, into a file.

    Args:
        weights: (Ls, Lt) as of `align_layers`, or `distiller.alignment.weights`.
        student_layers, teacher_layers: names of rows and columns, Ls and Lt numbers.
        path: whose suffix decides the format: svg, png or pdf.
        costs: (Ls, Lt) as of `layer_costs`.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: a matrix of another shape than (Ls, Lt), or a format that is unknown.
        OSError: the file cannot be written.
    """
    shape = len(student_layers), len(teacher_layers)
    named = {"weights": weights} | ({} if costs is None else {"costs": costs})
    panels = {name: torch.as_tensor(given).detach().cpu() for name, given in named.items()}
    for name, matrix in panels.items():
        if matrix.shape != shape:
            raise ValueError(
                f"{name} has shape {tuple(matrix.shape)}, but student_layers and teacher_layers "
                f"name {shape[0]} rows and {shape[1]} columns: pass one name for each"
            )
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "plot_layer_alignment needs matplotlib: pip install matplotlib", name="matplotlib"
        ) from error
    size = (1.5 + 0.55 * shape[1]) * len(panels), 1.3 + 0.45 * shape[0]
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (name, matrix) in zip(axes, panels.items()):
        _draw(axis, name, matrix, student_layers, teacher_layers)
    figure.savefig(path, metadata={"Date": None} if Path(path).suffix == ".svg" else None)


def _draw(axis, name: str, matrix: Tensor, rows: Sequence[int], columns: Sequence[int]) -> None:
    """Draw one matrix as a heat map with its numbers."""
    largest = float(matrix.max())
    axis.imshow(matrix.tolist(), cmap="Blues", vmin=0.0, vmax=largest or 1.0, aspect="auto")
    axis.set_title(name)
    axis.set_xlabel("teacher layer")
    axis.set_ylabel("student layer")
    axis.set_xticks(range(len(columns)), columns)
    axis.set_yticks(range(len(rows)), rows)
    if len(columns) > MOST_NUMBERS:
        return
    for i, row in enumerate(matrix.tolist()):
        for j, number in enumerate(row):
            color = "white" if number > 0.6 * largest else "black"
            axis.text(j, i, f"{number:.2g}", ha="center", va="center", size=7, color=color)
