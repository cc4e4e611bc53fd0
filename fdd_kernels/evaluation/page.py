"""One self-contained HTML page that compares models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from fdd_kernels.evaluation.record import COLUMNS, differs, shown


def page_of(record: Mapping[str, Any]) -> str:
    """Return the page of an evaluation's record: table, bars with intervals, KL by layer, answers.

    Args:
        record: as of `Evaluation.record`, with whatever else is to be shown as its setting.
    """
    models = record["models"]
    columns = [name for name in COLUMNS if any(name in model["metrics"] for model in models)]
    apart = ("models", "samples", "format", "version", "intervals")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = (Path(__file__).parent / "page.html.jinja").read_text("utf-8")
    return environment.from_string(template).render(
        record=record,
        columns={name: COLUMNS[name][0] for name in columns},
        bars={COLUMNS[name][0]: _bars(name, models) for name in columns},
        shown=shown,
        differs=differs,
        largest=max((layer["mean"] for m in models for layer in m["layers"]), default=0.0),
        setting=json.dumps({k: v for k, v in record.items() if k not in apart}, indent=1),
    )


def _bars(column: str, models: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the bars of a metric: lengths as shares of the longest, in percent."""
    found = {model["name"]: model["metrics"].get(column) for model in models}
    found = {name: value for name, value in found.items() if value is not None}
    ends = [end for value in found.values() for end in value.values() if _is_finite(end)]
    longest = 1.01 * max(ends, default=0.0) or 1.0  # the ends of intervals are lines

    def share(end: float | None) -> float:
        return round(min(max(100 * end / longest, 0.0), 100.0), 2) if _is_finite(end) else 0.0

    return [
        {"name": name, "text": shown(column, value)}
        | {end: share(value[end]) for end in ("mean", "low", "high")}
        for name, value in found.items()
    ]


def _is_finite(end: float | None) -> bool:
    return end is not None and abs(end) != float("inf") and end == end
