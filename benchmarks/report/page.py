"""One self-contained HTML page of a record: conditions, tables, plots, and the record itself."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from benchmarks.providers import PROVIDERS
from benchmarks.report import conditions, notes, tables
from benchmarks.report.plots import TITLES, write_plots

TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    keep_trailing_newline=True,
    trim_blocks=True,
    lstrip_blocks=True,
)


def write_report(record: dict[str, Any], folder: Path) -> Path:
    """Write the plots and report.html into a folder; the page's path."""
    page, plots = folder / "report.html", write_plots(record, folder)
    page.write_text(render(record, plots), encoding="utf-8")
    return page


def render(record: dict[str, Any], plots: list[Path]) -> str:
    """Render the page."""
    workloads = []
    for (workload, table), result in zip(tables(record), record["results"]):
        kinds = [_kind(name, result) for name in table.provider]
        rows = zip(kinds, table.itertuples(index=False))
        workloads.append((workload, list(table), list(rows)))
    return TEMPLATES.get_template("page.html").render(
        record=record,
        conditions=conditions(record),
        notes=notes(record),
        plots=[(TITLES[path.stem], _embedded(path)) for path in plots],
        workloads=workloads,
        json=json.dumps(record).replace("</", "<\\/"),
    )


def _embedded(path: Path) -> str:
    """Cut out the <svg> element of a file, its ids prefixed: several drawings share one page."""
    svg = path.read_text(encoding="utf-8")
    svg = svg[svg.index("<svg") :]
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{path.stem}-", svg)


def _kind(name: str, result: dict[str, Any]) -> str:
    if name not in result["providers"]:
        return "limit"
    if result["providers"][name]["status"] != "ok":
        return "none"
    return PROVIDERS[name].kind if name in PROVIDERS else ""
