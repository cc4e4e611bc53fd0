"""Write the demo's result: a table in the terminal, metrics.json, and one self-contained HTML
page.
"""

from __future__ import annotations

import io
import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

import jinja2
import matplotlib
from rich.console import Console
from rich.table import Table

from fdd_kernels.common.atomic import write_text
from fdd_kernels.demo.students import Budget, Run

matplotlib.use("Agg")
import matplotlib.pyplot as plt


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

    @property
    def seeds(self) -> list[int]:
        return sorted({run.seed for run in self.runs})

    def of(self, objective: str) -> list[Run]:
        return [run for run in self.runs if run.objective == objective]

    def rows(self) -> list[dict]:
        """One row per objective: means over seeds, and the spread (largest - smallest)."""
        rows = []
        for objective in dict.fromkeys(run.objective for run in self.runs):
            runs = self.of(objective)
            loss, kl = [r.held_out_loss[-1] for r in runs], [r.held_out_kl[-1] for r in runs]
            rows.append(
                {
                    "objective": objective,
                    "held_out_loss": statistics.fmean(loss),
                    "loss_spread": max(loss) - min(loss),
                    "held_out_kl": statistics.fmean(kl),
                    "kl_spread": max(kl) - min(kl),
                    "seconds_per_step": statistics.fmean(r.seconds[-1] for r in runs)
                    / self.budget.steps,
                }
            )
        return rows

    def noise(self) -> str:
        """Say in words which differences are larger than the spread between seeds."""
        rows = self.rows()
        if len(self.seeds) < 2:
            return (
                "One seed: the differences below cannot be told from chance. Run with more seeds."
            )
        spread = max(row["kl_spread"] for row in rows)
        ordered = sorted(rows, key=lambda row: row["held_out_kl"])
        gaps = [
            (worse["held_out_kl"] - better["held_out_kl"], better["objective"], worse["objective"])
            for better, worse in zip(ordered, ordered[1:])
        ]
        unclear = [f"{a} and {b}" for gap, a, b in gaps if gap <= spread]
        text = (
            f"{len(self.seeds)} seeds; the same objective differs by up to {spread:.3f} nats of KL "
            "between seeds. "
        )
        if unclear:
            return text + f"Not separated by more than that: {'; '.join(unclear)}."
        return text + "Neighbouring objectives differ by more than that."


def print_table(result: Result, console: Console) -> None:
    """Print the table of objectives."""
    table = Table(title="Validation results, nats per token", caption=result.noise())
    table.add_column("objective")
    for column in ("loss", "+/-", "KL to teacher", "+/-", "s per step"):
        table.add_column(column, justify="right")
    best = min(row["held_out_kl"] for row in result.rows())
    for row in result.rows():
        style = "bold green" if row["held_out_kl"] == best else None
        numbers = (
            row["held_out_loss"],
            row["loss_spread"] / 2,
            row["held_out_kl"],
            row["kl_spread"] / 2,
        )
        table.add_row(
            row["objective"],
            *(f"{x:.3f}" for x in numbers),
            f"{row['seconds_per_step']:.3f}",
            style=style,
        )
    table.add_row(
        "teacher", f"{result.teacher_held_out_loss:.3f}", "", "0.000", "", "", style="dim"
    )
    console.print(table)


def _curves(result: Result) -> str:
    """Plot validation KL and loss against steps for every objective, as an SVG element."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for axis, name, title in (
        (axes[0], "held_out_kl", "KL to the teacher (validation)"),
        (axes[1], "held_out_loss", "loss (validation)"),
    ):
        for colour, row in zip(plt.cm.tab10.colors, result.rows()):
            runs = result.of(row["objective"])
            values = [getattr(run, name) for run in runs]
            mean = [statistics.fmean(at) for at in zip(*values)]
            axis.plot(
                runs[0].steps, mean, color=colour, label=row["objective"], marker="o", markersize=3
            )
            low, high = [min(at) for at in zip(*values)], [max(at) for at in zip(*values)]
            axis.fill_between(runs[0].steps, low, high, color=colour, alpha=0.15)
        axis.set(title=title, xlabel="step", ylabel="nats per token")
        axis.grid(alpha=0.3)
    axes[1].axhline(
        result.teacher_held_out_loss, color="black", linestyle="--", linewidth=1, label="teacher"
    )
    axes[1].legend(fontsize=8)
    text = io.StringIO()
    figure.savefig(text, format="svg")
    plt.close(figure)
    return text.getvalue()[text.getvalue().index("<svg") :]


def write_report(result: Result, output: Path) -> None:
    """Write `metrics.json` and `report.html` to `output`."""
    output.mkdir(parents=True, exist_ok=True)
    setting = {
        "budget": asdict(result.budget),
        "teacher": {key: value for key, value in result.teacher.items() if key != "curve"},
        "teacher_held_out_loss": result.teacher_held_out_loss,
        "backend": result.backend,
        "machine": result.machine,
        "seconds": round(result.seconds, 1),
    }
    metrics = setting | {
        "rows": result.rows(),
        "noise": result.noise(),
        "runs": [asdict(run) for run in result.runs],
    }
    write_text(output / "metrics.json", json.dumps(metrics, indent=1) + "\n")
    environment = jinja2.Environment(autoescape=True)
    template = (Path(__file__).parent / "report.html.jinja").read_text("utf-8")
    page = environment.from_string(template).render(
        result=result,
        budget=result.budget,
        rows=result.rows(),
        curves=_curves(result),
        setting=json.dumps(setting, indent=1),
    )
    write_text(output / "report.html", page)
