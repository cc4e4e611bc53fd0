"""Write the demo's result: a table in the terminal, metrics.json, and one self-contained HTML
page.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import jinja2
from rich import box
from rich.console import Console
from rich.table import Table

from fdd_kernels.common.atomic import write_text
from fdd_kernels.demo import plots
from fdd_kernels.demo.comparison import INTERVAL, ONE_SEED, Comparison
from fdd_kernels.demo.students import Budget, Run
from fdd_kernels.demo.teacher import CONTEXT


@dataclass(frozen=True)
class Result:
    """The contents of the report."""

    budget: Budget
    runs: list[Run]
    teacher: dict
    teacher_held_out_loss: float
    backend: str
    machine: str
    seconds: float
    samples: dict[str, str]

    @cached_property
    def comparison(self) -> Comparison:
        return Comparison(self.runs)

    def table(self) -> list[tuple[str, ...]]:
        """The table as text: the header, then one row per objective."""
        places, base = list(self.comparison.places()), self.comparison.baseline
        table = [("objective", "loss", "KL", "- KD", *places[1:], "ms")]
        for row in self.comparison.rows():
            differences = [
                "" if row[place] is None or row["objective"] == base else row[place]["difference"]
                for place in places
            ]
            numbers = row["held_out_loss"], row[places[0]]["kl"].mean
            table.append(
                (
                    row["objective"],
                    *(f"{number:.3f}" for number in numbers),
                    *map(str, differences),
                    f"{row['ms_per_step']:.0f}",
                )
            )
        return table

    def notes(self) -> list[str]:
        """Sentences that belong under the table."""
        seeds, base = len(self.comparison.seeds), self.comparison.baseline
        return [
            f"Nats per validation token after {self.budget.steps} steps, mean over {seeds} "
            f"seed{'s' * (seeds > 1)}; the teacher's loss is {self.teacher_held_out_loss:.3f}.",
            f"- KD: KL minus that of {base}, at equal steps; then at equal CPU seconds: when the "
            f"first student ended, and when {base} ended (empty: ended before; curves are "
            "interpolated). Seconds, and ms per step, are the student's own steps and, where its "
            "objective needs a teacher, the teacher's forward passes.",
            INTERVAL if seeds > 1 else ONE_SEED,
            "* marks a difference that exceeds its interval.",
        ]

    def markdown(self) -> list[str]:
        """The table in Markdown, line by line."""
        header, *rows = self.table()
        return ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)]


def print_table(result: Result, console: Console) -> None:
    """Print the table of objectives, and what it means."""
    header, *rows = result.table()
    table = Table(box=box.SIMPLE, padding=0, pad_edge=False)  # fits 80 columns
    for i, column in enumerate(header):
        table.add_column(column, justify="right" if i else "left")
    best = min(row[2] for row in rows)
    for row in rows:
        table.add_row(*row, style="bold green" if row[2] == best else None)
    console.print(table)
    for sentence in (*result.notes(), *result.comparison.neighbours()):
        console.print(sentence, soft_wrap=True)


def write_report(result: Result, output: Path) -> None:
    """Write `metrics.json` and `report.html` to `output`."""
    output.mkdir(parents=True, exist_ok=True)
    comparison = result.comparison
    setting = {
        "budget": asdict(result.budget),
        "teacher": {key: value for key, value in result.teacher.items() if key != "curve"},
        "teacher_held_out_loss": result.teacher_held_out_loss,
        "backend": result.backend,
        "machine": result.machine,
        "seconds": round(result.seconds, 1),
    }
    metrics = setting | {
        "seconds_compared_at": comparison.seconds,
        "rows": comparison.rows(),
        "markdown": result.markdown(),
        "notes": result.notes() + comparison.neighbours(),
        "runs": [asdict(run) for run in result.runs],
    }
    write_text(output / "metrics.json", json.dumps(metrics, indent=1, default=asdict) + "\n")
    environment = jinja2.Environment(autoescape=True)
    template = (Path(__file__).parent / "report.html.jinja").read_text("utf-8")
    page = environment.from_string(template).render(
        result=result,
        context=CONTEXT,
        budget=result.budget,
        comparison=comparison,
        curves=plots.curves(comparison),
        differences=plots.differences(comparison),
        layers=plots.layers(comparison),
        setting=json.dumps(setting, indent=1),
    )
    write_text(output / "report.html", page)
