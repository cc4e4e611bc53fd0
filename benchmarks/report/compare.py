"""Changes between two records beyond noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd

from benchmarks.report import figures
from benchmarks.workloads import Workload
from fdd_kernels.common.sizes import MIB

TIMES = {"forward": "forward", "total": "forward + backward"}
KEY = ["workload", "provider"]
# Fields of a workload that only choose its measures.
CHOICES = ("text", "group", "providers", "measures", "repeats", "sweep", "beside")


@dataclass(frozen=True)
class Comparison:
    """`changes` has a row per figure of both records: workload, provider, figure, before, after,
    ratio, beyond_noise. The rest are lines of text.
    """

    changes: pd.DataFrame
    only_old: list[str]
    only_new: list[str]
    lost: list[str]
    caveats: list[str]

    @property
    def regressions(self) -> pd.DataFrame:
        return self.changes[self.changes.beyond_noise & (self.changes.ratio > 1)]


def _names(frame: pd.DataFrame) -> list[str]:
    return [f"{row.workload} / {row.provider}" for row in frame.itertuples()]


def _problem(result: dict[str, Any]) -> dict[str, Any]:
    # an older record lacks the fields of today
    workload = Workload.from_json(result["workload"]).to_json()
    return {key: value for key, value in workload.items() if key not in CHOICES}


def _caveats(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    pairs = {name: (old[name], new[name]) for name in ("device", "threads")}
    pairs["processor"] = tuple(record["machine"].get("processor") for record in (old, new))
    for package in sorted(old["versions"].keys() | new["versions"].keys()):
        pairs[package] = old["versions"].get(package), new["versions"].get(package)
    return [f"{name} differs: {a} and {b}" for name, (a, b) in pairs.items() if a != b]


def compare(old: dict[str, Any], new: dict[str, Any], threshold: float = 0.1) -> Comparison:
    """Compare two records.

    A time changed beyond noise if the ranges of its repeats do not overlap and the medians differ
    by more than `threshold`; memory, if it differs by more than the threshold and 4 MiB. A figure
    that is now refused or failed is lost, which is a regression too.
    """
    both = figures(old).merge(figures(new), "outer", KEY, suffixes=("", "_new"), indicator=True)
    only_old, only_new = (
        _names(both[both["_merge"] == f"{side}_only"]) for side in ("left", "right")
    )
    both = both[both["_merge"] == "both"]
    same = [_problem(a) == _problem(b) for a, b in zip(both.result, both.result_new)]
    skipped = sorted({row.workload for row, s in zip(both.itertuples(), same) if not s})
    both = both[pd.Series(same, both.index, dtype=bool)]
    gone = both[(both.status == "ok") & both.status_new.isin(["refused", "failed"])]
    reasons = gone.status_new + ": " + gone.reason_new.astype(str)
    parts = []
    for column, text in {**TIMES, "memory": "memory"}.items():
        part = both[KEY].assign(figure=text, before=both[column], after=both[f"{column}_new"])
        change = (part.after - part.before).abs()
        part["beyond_noise"] = change > threshold * part.before
        if column == "memory":
            part["beyond_noise"] &= change > 4 * MIB
        else:
            apart = both[f"{column}_max"] < both[f"{column}_min_new"]
            part["beyond_noise"] &= apart | (both[f"{column}_max_new"] < both[f"{column}_min"])
        parts.append(part.dropna())
    changes = pd.concat(parts, ignore_index=True)
    changes["ratio"] = changes.after / changes.before
    caveats = [f"{name}: the workload itself changed; not compared" for name in skipped]
    lost = [f"{name}: {reason}" for name, reason in zip(_names(gone), reasons)]
    return Comparison(changes, only_old, only_new, lost, _caveats(old, new) + caveats)
