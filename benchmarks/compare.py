"""What changed between two records beyond noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

DEFAULT_THRESHOLD = 0.1
_TIMES = {"forward": "forward", "total": "forward + backward"}


@dataclass(frozen=True)
class Change:
    """One figure in both records; `ratio` is new / old, `beyond_noise` whether it is more than
    chance and the threshold.
    """

    workload: str
    provider: str
    figure: str
    old: float
    new: float
    beyond_noise: bool

    @property
    def ratio(self) -> float:
        return self.new / self.old if self.old else float("inf")

    @property
    def regression(self) -> bool:
        return self.beyond_noise and self.new > self.old


@dataclass(frozen=True)
class Comparison:
    """All changes, what only one record has, and what differs in how they were taken."""

    changes: list[Change]
    only_old: list[str]
    only_new: list[str]
    lost: list[str]
    caveats: list[str]

    @property
    def regressions(self) -> list[Change]:
        return [c for c in self.changes if c.regression]


def _apart(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether the ranges of the repeats do not overlap."""
    return old["max"] < new["min"] or new["max"] < old["min"]


def _figures(record: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {
        (r["workload"]["name"], name): r | {"entry": entry}
        for r in record["results"]
        for name, entry in r["providers"].items()
    }


def compare(
    old: dict[str, Any], new: dict[str, Any], threshold: float = DEFAULT_THRESHOLD
) -> Comparison:
    """Compare two records.

    A time changed beyond noise if the ranges of its repeats do not overlap and the medians differ
    by more than `threshold`; memory if it differs by more than the threshold and 4 MiB. A figure
    that was there and now is refused or failed counts as lost, which is a regression too.
    """
    before, after = _figures(old), _figures(new)
    changes, lost = [], []
    common = [key for key in before if key in after]
    skipped = []
    for key in common:
        workload, provider = key
        if before[key]["workload"] != after[key]["workload"]:
            skipped.append(f"{workload}: the workload itself changed; not compared")
            continue
        a, b = before[key]["entry"], after[key]["entry"]
        if a["status"] == "ok" and b["status"] in ("refused", "failed"):
            lost.append(f"{workload} / {provider}: {b['status']}: {b['reason']}")
        if a["time"] and b["time"]:
            for field, text in _TIMES.items():
                x, y = a["time"][field], b["time"][field]
                far = abs(y["median"] / x["median"] - 1) > threshold
                changes.append(
                    Change(workload, provider, text, x["median"], y["median"], far and _apart(x, y))
                )
        if a["memory"] and b["memory"]:
            x, y = a["memory"]["beyond_inputs"], b["memory"]["beyond_inputs"]
            far = abs(y - x) > max(threshold * x, 4 * 2**20)
            changes.append(Change(workload, provider, "memory", x, y, far))
    caveats = [
        f"{name} differs: {old[name]} and {new[name]}"
        for name in ("device", "threads")
        if old[name] != new[name]
    ]
    if old["machine"].get("processor") != new["machine"].get("processor"):
        caveats.append(
            f"processor differs: {old['machine'].get('processor')} and "
            f"{new['machine'].get('processor')}"
        )
    packages = old["versions"].keys() | new["versions"].keys()
    for name in sorted(packages):
        if old["versions"].get(name) != new["versions"].get(name):
            caveats.append(
                f"{name} differs: {old['versions'].get(name)} and {new['versions'].get(name)}"
            )
    return Comparison(
        changes,
        [" / ".join(key) for key in before if key not in after],
        [" / ".join(key) for key in after if key not in before],
        lost,
        caveats + sorted(set(skipped)),
    )
