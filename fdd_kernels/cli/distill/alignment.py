"""The pairing of layers that a run found from its data: printed, and drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fdd_kernels.hf.alignment_plot import plot_layer_alignment


def print_alignment(found: dict[str, Any], console: Console) -> None:
    """Print the weights of the last matching: a row for each layer of the student.

    Args:
        found: as of `LayerAlignment.record`.
    """
    console.print(
        f"weights of the teacher's layers for each student layer, of step {found['step']}"
    )
    table = Table("student", *map(str, found["teacher_layers"]))
    for layer, weights in zip(found["student_layers"], found["weights"]):
        table.add_row(str(layer), *(f"{weight:.2f}" for weight in weights))
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
