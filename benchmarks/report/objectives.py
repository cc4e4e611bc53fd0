"""One table of the objectives: this package beside the dense form and torch.compile of it."""

from __future__ import annotations

from typing import Any

import pandas as pd

from benchmarks.providers import PROVIDERS
from benchmarks.report import LIMIT, NOTHING, SHOWN, TIME, figures, spread

COLUMNS = {"dense": "dense", "dense-compile": "torch.compile"}


def side_by_side(record: dict[str, Any]) -> pd.DataFrame:
    """Write a row per objective and backend that computes it; no rows for a record without."""
    frame, found = figures(record), []
    for name, rows in frame[frame.group == "objectives"].groupby("workload", sort=False):
        by_name = {row["provider"]: row for row in rows.to_dict("records")}
        for provider, row in by_name.items():
            ours = provider in PROVIDERS and PROVIDERS[provider].kind == "backends"
            if ours and not pd.isna(row["total"]):
                line = {"objective": name, "backend": provider, TIME: _time(row, "total")}
                for dense, title in COLUMNS.items():
                    line[title] = _time(by_name.get(dense), "total")
                line |= {LIMIT: _time(row, "limit"), "memory": _text(row, "memory")}
                for dense, title in COLUMNS.items():
                    line[f"{title}: memory"] = _text(by_name.get(dense), "memory")
                found.append(line | {h: _text(row, h) for h in ("value error", "gradient error")})
    return pd.DataFrame(found)


def _time(row: dict[str, Any] | None, column: str) -> str:
    if row is None or pd.isna(row[column]):
        return NOTHING
    return spread(row[column], row[f"{column}_min"], row[f"{column}_max"])


def _text(row: dict[str, Any] | None, heading: str) -> str:
    column, write = SHOWN[heading]
    return NOTHING if row is None or pd.isna(row[column]) else write(row[column])
