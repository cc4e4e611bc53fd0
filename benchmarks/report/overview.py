"""One table of a suite, a row per workload and provider, and one of its sweeps, a row per point."""

from __future__ import annotations

from typing import Any

import pandas as pd

from benchmarks.providers import NO_DERIVATIVE, default_backend
from benchmarks.report import LIMIT, NOTHING, TIME, figures, libraries, spread, texts
from benchmarks.workloads import Workload

COLUMNS = ("provider", TIME, "vs dense", "x limit", "memory", "value error", "gradient error")


def _workloads(record: dict[str, Any]) -> list[tuple[Workload, pd.DataFrame]]:
    """Pair the workloads that stand for themselves with their figures."""
    found = figures(record).groupby("workload", sort=False)
    pairs = [(Workload.from_json(rows.result.iloc[0]["workload"]), rows) for _, rows in found]
    return [(workload, rows) for workload, rows in pairs if workload.in_overview]


def described(record: dict[str, Any]) -> list[str]:
    """Describe each workload in one line."""
    return [f"**{w.name}**: {w.text}; {w.describe()}" for w, _ in _workloads(record)]


def overview(record: dict[str, Any]) -> pd.DataFrame:
    """Write a row per workload and provider that has figures, and rows of the limit; objectives
    have a table of their own.
    """
    found = []
    for workload, rows in _workloads(record):
        done = rows[rows[["total", "memory", "value_error"]].notna().any(axis=1)]
        if len(done) and workload.group != "objectives":
            table = texts(done)
            star = [" *" if NO_DERIVATIVE in text else "" for text in table.computes]
            library = libraries(done.result.iloc[0]["products"] or {})
            names = table.provider.replace(LIMIT, f"{LIMIT} ({library})") + star
            table = table.assign(provider=names)[list(COLUMNS)]
            table.insert(0, "workload", workload.name)
            found.append(table)
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame()


def sweeps(record: dict[str, Any]) -> pd.DataFrame:
    """Write a row per point of the sweeps: the limit, the time of every provider, and that of this
    package's default backend over the limit.
    """
    frame, ours, found = figures(record), default_backend(record["device"]), []
    swept = frame[frame.sweep.notna() & frame.total.notna()]
    for name, rows in swept.groupby("workload", sort=False):
        first = rows.iloc[0]
        row = {"workload": name, LIMIT: NOTHING}
        if not pd.isna(first.limit):
            row[LIMIT] = spread(first.limit, first.limit_min, first.limit_max)
        for entry in rows.itertuples():
            row[entry.provider] = spread(entry.total, entry.total_min, entry.total_max)
        over = rows[rows.provider == ours].of_limit.dropna()
        found.append(row | {f"{ours} x limit": f"{over.iloc[0]:.2f}" if len(over) else NOTHING})
    return pd.DataFrame(found).fillna(NOTHING)


def remarks(record: dict[str, Any]) -> list[str]:
    """Say which providers compute a part of the loss (marked *), and why others have no figures,
    with the names of the workloads.
    """
    parts: dict[str, dict[str, list[str]]] = {}  # text: {provider: names of workloads}
    missing: dict[str, dict[str, list[str]]] = {}
    for workload, rows in _workloads(record):
        for row in rows.itertuples():
            if row.status != "ok":
                of = missing.setdefault(f"{row.status}: {row.reason}", {})
                of.setdefault(row.provider, []).append(workload.name)
            elif NO_DERIVATIVE in row.computes:
                of = parts.setdefault(row.computes, {})
                of.setdefault(f"{row.provider} *", []).append(workload.name)
    lines = []
    for text, providers in (parts | missing).items():
        names = dict.fromkeys(name for of in providers.values() for name in of)
        lines.append(f"{', '.join(providers)}: {text} ({', '.join(names)})")
    return lines
