"""A record and a comparison as tables in the terminal."""

from __future__ import annotations

from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table

from benchmarks.report import SHOWN, conditions, memory, notes, seconds, steps, tables
from benchmarks.report.compare import Comparison
from benchmarks.report.objectives import side_by_side


def print_record(record: dict[str, Any]) -> None:
    """Print a table per workload, or those of training steps, then the notes and the conditions."""
    if steps.is_of_steps(record):
        print_tables(steps.tables(record))
        lines = [*steps.pairs(record), *steps.reasons(record)]
    else:
        shown = [
            (f"{workload.name}: {workload.text}; {workload.describe()}", texts)
            for workload, texts in tables(record)
        ]
        together = side_by_side(record)
        print_tables(shown + ([("objectives", together)] if len(together) else []))
        lines = notes(record)
    for line in [*lines, conditions(record)]:
        _console().print(line, highlight=False)


def _console() -> Console:
    console = Console()
    if not console.is_terminal:  # a file has no width, and the table needs some
        console.width = 160
    return console


def print_tables(shown: list[tuple[str, pd.DataFrame]]) -> None:
    """Print tables of texts, each below its title."""
    console = _console()
    for title, texts in shown:
        table = Table(title=title, title_justify="left")
        names = [name for name in texts if name != "predicted"]
        for name in names:
            justify, width = ("right", 8) if name in SHOWN else ("left", 12)
            table.add_column(name, justify=justify, overflow="fold", min_width=width)
        for row in texts[names].itertuples(index=False):
            table.add_row(*row)
        console.print(table)


def print_comparison(result: Comparison) -> None:
    """Print changes beyond noise, the figures that one record lacks, and other differences."""
    console, changed = Console(), result.changes[result.changes.beyond_noise]
    title = f"{len(changed)} of {len(result.changes)} figures changed beyond noise"
    table = Table(title=title, title_justify="left")
    for column in ("workload", "provider", "figure", "before", "after", "change"):
        table.add_column(column)
    for c in changed.sort_values("ratio", ascending=False).itertuples():
        show = memory if c.figure == "memory" else seconds
        outcome = f"{c.ratio - 1:+.1%} {'REGRESSION' if c.ratio > 1 else 'better'}"
        table.add_row(c.workload, c.provider, c.figure, show(c.before), show(c.after), outcome)
    console.print(table)
    for title, lines in (
        ("lost", result.lost),
        ("only before", result.only_old),
        ("only after", result.only_new),
        ("note", result.caveats),
    ):
        for line in lines:
            console.print(f"{title}: {line}", highlight=False)
