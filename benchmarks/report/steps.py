"""Tables and picture of whole training steps: seconds, memory, and what FDD adds to output KD."""

from __future__ import annotations

import statistics
from typing import Any

import pandas as pd

from benchmarks.gemms import MM
from benchmarks.report import NOTHING, memory, seconds, spread
from benchmarks.steps import GROUP, LOSSES
from benchmarks.workloads import Workload

BASE, OURS = "kd-dense", "fdd-ours"
SECONDS = "Seconds of a step: median (smallest to largest)"
MEMORY = "Peak memory of the process beyond the interpreter (beyond both models)"
ADDED = "What FDD adds to output KD: medians of the differences within rounds (smallest to largest)"
Figures = dict[str, Any]


def is_of_steps(record: Figures) -> bool:
    """Tell whether a record is of training steps."""
    return any(result["workload"].get("group") == GROUP for result in record["results"])


def tables(record: Figures) -> list[tuple[str, pd.DataFrame]]:
    """Make the three tables of a record, each with its title: a row per training step."""
    makers = {SECONDS: _of_seconds, MEMORY: _of_memory, ADDED: _of_added}
    return [
        (title, pd.DataFrame([_step(r) | make(r) for r in record["results"]]))
        for title, make in makers.items()
    ]


def reasons(record: Figures) -> list[str]:
    """Say of every loss without figures why it has none."""
    return [
        f"{result['workload']['name']}, {name}: {entry['status']}: {entry['reason']}"
        for result in record["results"]
        for name, entry in result["providers"].items()
        if entry["status"] != "ok"
    ]


def pairs(record: Figures) -> list[str]:
    """Describe every pair of models of a record."""
    about = {r["workload"]["pair"]: r["workload"]["text"] for r in record["results"]}
    return [f"{name}: {text}" for name, text in about.items()]


def _step(result: Figures) -> dict[str, str]:
    workload = Workload.from_json(result["workload"])
    return {"pair": workload.pair, "tokens": str(workload.rows + 1), "dtype": workload.dtype}


def _measured(result: Figures, name: str, measure: str) -> Figures | None:
    return result["providers"].get(name, {}).get(measure)


def _total(result: Figures, name: str) -> Figures | None:
    time = _measured(result, name, "time")
    return None if time is None else time["total"]


def _spread(times: list[float]) -> str:
    return spread(statistics.median(times), min(times), max(times))


def _of_seconds(result: Figures) -> dict[str, str]:
    times = {name: _total(result, name) for name in LOSSES}
    texts = {
        LOSSES[name].title: NOTHING if time is None else _spread(time["all"])
        for name, time in times.items()
    }
    return texts | _ratios({n: t and t["median"] for n, t in times.items()})


def _of_memory(result: Figures) -> dict[str, str]:
    peaks = {name: _measured(result, name, "memory") for name in LOSSES}
    texts = {
        LOSSES[name].title: NOTHING
        if held is None
        else f"{memory(held['beyond_interpreter'])} ({memory(held['beyond_inputs'])})"
        for name, held in peaks.items()
    }
    return texts | _ratios({n: h and h["beyond_interpreter"] for n, h in peaks.items()})


def _ratios(figures: dict[str, float | None]) -> dict[str, str]:
    """Divide ours by both dense losses."""
    ours = figures[OURS]
    return {
        f"{LOSSES[OURS].title} / {LOSSES[dense].title}": f"{ours / figures[dense]:.2f}"
        if ours and figures[dense]
        else NOTHING
        for dense in (BASE, "fdd-dense")
    }


def added(result: Figures, how: str) -> list[float] | None:
    """Return the seconds that FDD adds to output KD in each round, by "dense" or "ours"."""
    totals = [_total(result, f"{loss}-{how}") for loss in ("kd", "fdd")]
    if None in totals:
        return None
    return [fdd - kd for kd, fdd in zip(*[t["all"] for t in totals])]


def _of_added(result: Figures) -> dict[str, str]:
    """Write what FDD adds beside the limit: the GEMMs of the sampled layers, without all else."""
    found = {how: added(result, how) for how in ("dense", "ours")}
    texts = {how: NOTHING if of is None else _spread(of) for how, of in found.items()}
    texts |= dict.fromkeys(("the limit", f"{MM} alone", "ours / limit"), NOTHING)
    if gemms := result["products"]:
        texts["the limit"] = _spread([gemms[f"total{end}"] for end in ("_min", "", "_max")])
        texts[f"{MM} alone"] = seconds(gemms["by_library"][MM])
        if found["ours"]:
            ratio = statistics.median(found["ours"]) / gemms["total"]
            texts["ours / limit"] = f"{ratio:.2f}"
    return texts


def pictured(record: Figures) -> tuple[list[tuple[str, str]], list[Figures]]:
    """Collect the picture's legend (text, colour) and a group of bars for each step that has both
    figures of this package.
    """
    groups = []
    for result in record["results"]:
        bars = []
        for name in (OURS, "kd-ours", BASE, "fdd-dense"):
            total, held = _total(result, name), _measured(result, name, "memory")
            if total and held:
                peak, middle = held["beyond_interpreter"], total["median"]
                bar = {"color": LOSSES[name].color, "time": middle, "memory": peak}
                bars.append(bar | {"time_text": seconds(middle), "memory_text": memory(peak)})
        step = _step(result)
        name, shape = f"{step['pair']}, {step['dtype']}", f"{step['tokens']} tokens"
        groups += [{"name": name, "shape": shape, "bars": bars}] if bars else []
    legend = [(LOSSES[n].title, LOSSES[n].color) for n in (OURS, "kd-ours", BASE, "fdd-dense")]
    return legend, groups
