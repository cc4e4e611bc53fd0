"""A record and a comparison as tables in the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import summary
from benchmarks.compare import Comparison

_NUMBERS = (
    "forward",
    "forward + backward",
    "tokens/s",
    "x products",
    "vs dense",
    "memory",
    "value error",
    "gradient error",
)


def print_record(record: dict[str, Any], console: Console | None = None) -> None:
    """The main table, then growth, threads, flatness and the planner's errors where the record has
    them.
    """
    console = console or Console()
    if not console.is_terminal:  # a file has no width, and the table needs some
        console.width = 160
    shown = ("provider", *_NUMBERS, "computes")
    rows = summary.rows(record)
    for result in record["results"]:
        workload = result["workload"]
        table = Table(
            title=f"{workload['name']}: {workload['text']}; {describe(workload)}",
            title_justify="left",
        )
        for column in shown:
            number = column in _NUMBERS
            table.add_column(
                column,
                justify="right" if number else "left",
                overflow="fold",
                min_width=8 if number else 12,
            )
        for row in rows:
            if row["workload"] == workload["name"]:
                table.add_row(*[row[column] for column in shown])
        console.print(table)
    for line in notes(record):
        console.print(line, highlight=False)
    console.print(summary.conditions(record), highlight=False)


def describe(workload: dict[str, Any]) -> str:
    """Shapes of a recorded workload in one line."""
    from benchmarks.workloads import Workload

    return Workload.from_json(workload).describe()


def notes(record: dict[str, Any]) -> list[str]:
    """What the main table does not show, one line each."""
    lines = []
    for sweep in summary.growth(record):
        parts = [
            f"{what} grows as {sweep['field']}^{sweep[key]:.2f}"
            for what, key in (("time", "time_exponent"), ("memory", "memory_exponent"))
            if sweep[key] is not None
        ]
        if parts:
            lines.append(f"scaling, {sweep['provider']}: {', '.join(parts)}")
    for name, few, many, speed in summary.thread_speedup(record):
        lines.append(f"threads, {name}: {speed:.2f} times as fast on {many} as on {few}")
    for name, count, held, rest in summary.flatness(record):
        lines.append(
            f"memory, {name}, R={count}: {summary.memory(held)} beyond inputs, "
            f"{summary.memory(rest)} of it not gradients"
        )
    errors = summary.prediction_errors(record)
    if errors:
        (where, name), worst = max(errors.items(), key=lambda item: abs(item[1]))
        within = sum(abs(e) <= 0.1 for e in errors.values())
        lines.append(
            f"planner: {within} of {len(errors)} predictions of memory within 10%; the worst is "
            f"off by {worst:+.0%} "
            f"({where}, {name})"
        )
    return lines


def print_comparison(result: Comparison, console: Console | None = None) -> None:
    """Changes beyond noise, what is missing on either side, and what else differs."""
    console = console or Console()
    changed = [c for c in result.changes if c.beyond_noise]
    table = Table(
        title=f"{len(changed)} of {len(result.changes)} figures changed beyond noise",
        title_justify="left",
    )
    for column in ("workload", "provider", "figure", "before", "after", "change"):
        table.add_column(column)
    for c in sorted(changed, key=lambda c: -c.ratio):
        show = summary.memory if c.figure == "memory" else summary.seconds
        table.add_row(
            c.workload,
            c.provider,
            c.figure,
            show(c.old),
            show(c.new),
            f"{c.ratio - 1:+.1%} {'REGRESSION' if c.regression else 'better'}",
        )
    console.print(table)
    for title, lines in (
        ("lost", result.lost),
        ("only before", result.only_old),
        ("only after", result.only_new),
        ("note", result.caveats),
    ):
        for line in lines:
            console.print(f"{title}: {line}", highlight=False)
