"""One table of the objectives: this package beside the dense form and torch.compile of it."""

from __future__ import annotations

from typing import Any

import pandas as pd

from benchmarks.providers import PROVIDERS
from benchmarks.report import NOTHING, SHOWN, figures

DENSE = {"dense": "dense", "dense-compile": "torch.compile"}
MEASURED = ("forward + backward", "memory")


def side_by_side(record: dict[str, Any]) -> pd.DataFrame:
    """Write a row per objective and backend that computes it; no rows for a record without."""
    frame, found = figures(record), []
    for name, rows in frame[frame.group == "objectives"].groupby("workload", sort=False):
        by_name = {row["provider"]: row for row in rows.to_dict("records")}
        for provider, row in by_name.items():
            if provider in PROVIDERS and PROVIDERS[provider].kind == "backends":
                line = {"objective": name, "backend": provider}
                for heading in MEASURED:
                    line[heading] = _text(row, heading)
                    line |= {
                        f"{title}: {heading}": _text(by_name.get(dense), heading)
                        for dense, title in DENSE.items()
                    }
                line |= {h: _text(row, h) for h in ("value error", "gradient error")}
                found.append(line)
    return pd.DataFrame(found)


def _text(row: dict[str, Any] | None, heading: str) -> str:
    column, write = SHOWN[heading]
    return NOTHING if row is None or pd.isna(row[column]) else write(row[column])
