"""The pairing of layers that a run found from its data: printed, and drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fdd_kernels.hf.alignment_plot import plot_layer_alignment


def print_alignment(found: dict[str, Any], console: Console) -> None:
    """Print the weights of the last matching, and the layers of the derivative: a row for each
    layer of the student.

    Args:
        found: as of `LayerAlignment.state_dict`.
    """
    console.print(
        f"weights of the teacher's layers for each student layer, of step {found['step']}"
    )
    teachers = found["teacher_layers"]
    table = Table("student", *map(str, teachers), "derivative")
    rows = zip(found["student_layers"], found["weights"], found["derivative_layers"])
    for layer, weights, index in rows:
        table.add_row(str(layer), *(f"{w:.2f}" for w in weights), str(teachers[index]))
    console.print(table)


def draw_alignment(found: dict[str, Any], file: Path, console: Console) -> None:
    """Draw weights and costs of the last matching; say so in one line if that needs a package.

    Raises:
        OSError: the file cannot be written.
    """
    names = ("weights", "student_layers", "teacher_layers", "costs")
    try:
        plot_layer_alignment(**{name: found[name] for name in names}, path=file)
    except ModuleNotFoundError as error:
        console.print(f"{file.name} was not drawn: {error}", soft_wrap=True)
