"""One self-contained HTML page of a record: conditions, tables, plots inside, and the record
itself.
"""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

from benchmarks import summary
from benchmarks.plots import write_plots
from benchmarks.terminal import describe, notes

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem;
  padding: 0 1rem; color: #1c1c1c; }
table { border-collapse: collapse; font-size: 13px; margin: .5rem 0 1.5rem;
  display: block; overflow-x: auto; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: right;
  white-space: nowrap; }
th:first-child, td:first-child, th:last-child, td:last-child { text-align: left; }
td:last-child { white-space: normal; min-width: 16rem; color: #555; }
tr.ours td { background: #fff4f4; } tr.products td { color: #555; font-style: italic; }
tr.none td { color: #999; }
svg { max-width: 100%; height: auto; } h2 { margin-top: 2.5rem; }
.quiet { color: #555; } figure { margin: 0; }
"""
_COLUMNS = [c for c in summary.COLUMNS if c != "workload"]
_EXPLAIN = (
    "Times are medians of interleaved rounds after a warm-up; spread is the smallest and largest. "
    "x products is the time "
    "over that of the matrix products that cannot be avoided, timed in the same run. Memory is the "
    "peak beyond the inputs in "
    "a fresh process, the gradients included, without what an allocator keeps of freed memory; "
    "predicted is what the planner "
    "says, with how far it is off. Errors are against float64, of the worst row: absolute for the "
    "value, relative for the "
    "gradient of the hidden states. A provider whose answer is wrong has no figures."
)
_TITLES = {
    "time": "Time",
    "memory": "Memory",
    "scaling": "Growth",
    "flatness": "Memory against rows",
    "accuracy": "Accuracy",
    "planner": "The planner",
}


def write_report(record: dict[str, Any], folder: Path) -> Path:
    """Write the plots and report.html into a folder; the page's path."""
    plots = write_plots(record, folder)
    page = folder / "report.html"
    page.write_text(render(record, plots), encoding="utf-8")
    return page


def render(record: dict[str, Any], plots: list[Path]) -> str:
    """The page."""
    escape = html.escape
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        "<title>fdd_kernels benchmarks, "
        f"{escape(record['date'][:10])}</title><style>{_STYLE}</style></head><body>",
        "<h1>fdd_kernels benchmarks</h1>",
        f"<p>{escape(summary.conditions(record))}</p><p class='quiet'>{escape(_EXPLAIN)}</p>",
    ]
    lines = notes(record)
    if lines:
        parts.append("<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>")
    for path in plots:
        svg = path.read_text(encoding="utf-8")
        svg = svg[svg.index("<svg") :]
        # Several drawings share one page: their identifiers must not meet.
        for mark in ('id="', "#"):
            svg = (
                svg.replace(mark, f"{mark}{path.stem}-")
                if mark != "#"
                else _prefix_references(svg, path.stem)
            )
        parts.append(f"<h2>{_TITLES[path.stem]}</h2><figure>{svg}</figure>")
    parts.append("<h2>Figures</h2>")
    rows = summary.rows(record)
    for result in record["results"]:
        workload = result["workload"]
        parts.append(
            f"<h3>{escape(workload['name'])}</h3><p>{escape(workload['text'])}; "
            f"{escape(describe(workload))}</p>"
        )
        parts.append(
            "<table><thead><tr>"
            + "".join(f"<th>{escape(c)}</th>" for c in _COLUMNS)
            + "</tr></thead><tbody>"
        )
        for row in rows:
            if row["workload"] == workload["name"]:
                parts.append(
                    f"<tr class='{_kind(row, result)}'>"
                    + "".join(f"<td>{escape(row[c])}</td>" for c in _COLUMNS)
                    + "</tr>"
                )
        parts.append("</tbody></table>")
    data = json.dumps(record).replace("</", "<\\/")
    parts.append(f"<script type='application/json' id='record'>{data}</script></body></html>")
    return "\n".join(parts)


def _prefix_references(svg: str, stem: str) -> str:
    return svg.replace('href="#', f'href="#{stem}-').replace("url(#", f"url(#{stem}-")


def _kind(row: dict[str, str], result: dict[str, Any]) -> str:
    name = row["provider"]
    if name == "bare products":
        return "products"
    if result["providers"][name]["status"] != "ok":
        return "none"
    return "ours" if name in ("cpu", "torch", "triton") else ""
