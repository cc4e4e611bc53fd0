"""The figures of a record as a pandas frame, and as texts; tables, plots and pages show these.

overview.py   one table of a suite, and one of its sweeps
objectives.py one table of the objectives
steps.py      tables of whole training steps
compare.py    changes between two records beyond noise
terminal.py   tables in the terminal
plots.py      plots;  page.py, page.html  the HTML report
docs.py       docs/benchmarks.md and, with picture.svg, the picture of the README
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from benchmarks.call import LOSS
from benchmarks.gemms import MM, library_of
from benchmarks.workloads import Workload
from fdd_kernels.common.sizes import GIB, MIB

LIMIT = "limit"
NOTHING = "-"
GEMM_NAMES = {"student": "student's logits", "teacher": "teacher's logits"}
GEMM_NAMES |= {"grad_hidden": "dH", "grad_head": "dW"}


def seconds(value: float) -> str:
    """Write a time with three digits and its unit."""
    if value < 1e-3:
        return f"{value * 1e6:.3g} us"
    return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.3g} s"


def spread(middle: float, low: float | None, high: float | None) -> str:
    """Write a median with the smallest and largest time, in its unit; alone where they lack."""
    text = seconds(middle)
    if pd.isna(low) or pd.isna(high):
        return text
    unit = text.split()[1]
    scaled = [value * {"us": 1e6, "ms": 1e3, "s": 1.0}[unit] for value in (low, high)]
    ends = [f"{value:.0f}" if value >= 1000 else f"{value:.3g}" for value in scaled]
    return f"{text} ({' to '.join(ends)})"


def memory(value: float) -> str:
    """Write bytes with three digits and a binary unit."""
    return f"{value / GIB:.3g} GiB" if value >= GIB else f"{value / MIB:.3g} MiB"


def markdown(table: pd.DataFrame) -> list[str]:
    """Write a frame of texts as the lines of a Markdown table."""
    lines = ["| " + " | ".join(table.columns) + " |", "|" + " --- |" * len(table.columns)]
    for row in table.itertuples(index=False):
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
    return lines


def _row(result: dict[str, Any], name: str, entry: dict[str, Any]) -> dict[str, Any]:
    workload, gemms = result["workload"], result["products"]
    time, held, accuracy = (entry[measure] or {} for measure in ("time", "memory", "accuracy"))
    row = {key: workload.get(key) for key in ("group", "sweep", "threads")}
    row |= {key: entry.get(key) for key in ("status", "reason", "computes")}
    row |= {"workload": workload["name"], "provider": name, "result": result}
    row |= {"tokens": workload["rows"], "point": workload[workload.get("sweep") or "rows"]}
    described = Workload.from_json(workload)
    row["objective"] = described.objective
    row["extent_name"], row["against"], row["extent"] = described.extent
    for which in ("forward", "total"):
        spread = time.get(which, {})
        row[which], row[f"{which}_min"] = spread.get("median"), spread.get("min")
        row[f"{which}_max"] = spread.get("max")
    row["beside"] = time.get("beside", {}).get("median")
    row["tokens_per_second"] = time.get("tokens_per_second")
    # of a whole step they are only those that FDD adds
    gemms = gemms if described.pair is None else None
    for end in ("", "_min", "_max"):
        row[f"limit{end}"] = gemms.get(f"total{end}") if gemms else None
    row["memory"], row["gradients"] = held.get("beyond_inputs"), held.get("gradients")
    row["predicted"] = entry["predicted_memory"]
    row["value_error"] = accuracy.get("value_error")
    row["gradient_error"] = accuracy.get("grad_hidden_relative")
    return row


_TEXTS = ("group", "sweep", "status", "reason", "computes", "workload", "provider", "result")
_TEXTS += ("objective", "extent_name", "against")


def figures(record: dict[str, Any]) -> pd.DataFrame:
    """Make one row per workload and provider: seconds, bytes, errors, NaN where not measured.

    `limit`: seconds of the GEMMs alone; `of_limit`: time over these; `vs_dense`: how many times as
    fast as dense eager PyTorch; `off`: predicted over measured memory, minus 1; `point`: the value
    of the swept field; `beside`: seconds of the call beside it; `result`: the record's entry of the
    workload; `extent_name`, `against`, `extent`: those of `Workload.extent`.
    """
    rows = [_row(r, name, e) for r in record["results"] for name, e in r["providers"].items()]
    frame = pd.DataFrame(rows)
    numbers = [column for column in frame if column not in _TEXTS]
    frame[numbers] = frame[numbers].astype(float)
    dense = frame[frame.provider == "dense"].set_index("workload").total
    frame["vs_dense"] = frame.workload.map(dense) / frame.total
    frame["of_limit"] = frame.total / frame.limit.where(frame.limit > 0)
    frame["off"] = frame.predicted / frame.memory.where(frame.memory > 0) - 1
    return frame


TIME = "forward + backward"
# Heading: column of `figures`, and how a number is written. The last one, "computes", is a text.
SHOWN = {
    "forward": ("forward", seconds),
    TIME: ("total", seconds),
    "tokens/s": ("tokens_per_second", "{:.4g}".format),
    "vs dense": ("vs_dense", "{:.2f}x".format),
    "x limit": ("of_limit", "{:.2f}".format),
    "memory": ("memory", memory),
    "predicted": ("predicted", memory),
    "value error": ("value_error", "{:.1e}".format),
    "gradient error": ("gradient_error", "{:.1e}".format),
}


def libraries(gemms: dict[str, Any]) -> str:
    """Say which library was the fastest for each GEMM of a workload's limit."""
    found: dict[str, list[str]] = {}
    for name, way in gemms.get("best", {}).items():
        found.setdefault(library_of(way), []).append(GEMM_NAMES.get(name, name))
    if len(found) < 2:
        return next(iter(found), MM)
    return "; ".join(f"{library}: {', '.join(names)}" for library, names in found.items())


def texts(frame: pd.DataFrame) -> pd.DataFrame:
    """Write the figures of one workload under the headings "provider", SHOWN and "computes".

    A provider without figures has its reason instead; the limit comes last.
    """
    table = pd.DataFrame({"provider": frame.provider})
    for heading, (column, write) in SHOWN.items():
        table[heading] = [NOTHING if pd.isna(x) else write(x) for x in frame[column]]
    first = frame[["total", "total_min", "total_max"]].itertuples(index=False)
    table[TIME] = [NOTHING if pd.isna(row.total) else spread(*row) for row in first]
    reasons = frame.status + ": " + frame.reason.fillna("").astype(str)
    table["computes"] = frame.computes.where(frame.status == "ok", reasons)
    rows = [dict.fromkeys(table, NOTHING) | row for row in limits(frame.result.iloc[0])]
    return pd.concat([table, pd.DataFrame(rows)], ignore_index=True) if rows else table


def limits(result: dict[str, Any]) -> list[dict[str, str]]:
    """Write the limit of a workload, and that of each library and of the inputs' dtype alone where
    they differ.
    """
    gemms, dtype = result["products"], result["workload"]["dtype"]
    if not gemms or result["workload"].get("pair"):
        return []
    about = f"the GEMMs alone by {libraries(gemms)}; {gemms['operations']['total'] / 1e9:.4g} GFLOP"
    time = spread(gemms["total"], gemms.get("total_min"), gemms.get("total_max"))
    rows = [
        {"provider": LIMIT, "forward": seconds(gemms["forward"]), TIME: time, "computes": about}
    ]
    others = gemms.get("by_library", {})
    others = dict(others) if len(others) > 1 else {}
    if dtype != "float32":
        others[dtype] = gemms["input_dtype_total"]
    return rows + [{"provider": f"{name} alone", TIME: seconds(s)} for name, s in others.items()]


def tables(record: dict[str, Any]) -> list[tuple[Workload, pd.DataFrame]]:
    """Pair each workload with its table of texts."""
    found = figures(record).groupby("workload", sort=False)
    return [
        (Workload.from_json(frame.result.iloc[0]["workload"]), texts(frame)) for _, frame in found
    ]


def exponent(x: pd.Series, y: pd.Series) -> float:
    """Fit the power of x in y by least squares in logarithms; NaN below two points."""
    there = (x > 0) & (y > 0)
    if x[there].nunique() < 2:
        return float("nan")
    return float(np.polyfit(np.log(x[there]), np.log(y[there]), 1)[0])


def growth(frame: pd.DataFrame) -> pd.DataFrame:
    """Fit the exponents of time and memory for each scaling sweep and provider."""
    found = []
    for (field, name), points in frame.groupby(["sweep", "provider"], sort=False):
        powers = {what: exponent(points.point, points[what]) for what in ("total", "memory")}
        found.append({"sweep": field, "provider": name} | powers)
    return pd.DataFrame(found, columns=["sweep", "provider", "total", "memory"])


def notes(record: dict[str, Any]) -> list[str]:
    """Write growth, threads, flatness of memory, ratios to the calls beside, and errors of
    predictions, one line each.
    """
    frame, lines = figures(record), []
    for sweep in growth(frame).itertuples():
        powers = (("time", sweep.total), ("memory", sweep.memory))
        parts = [f"{what} grows as {sweep.sweep}^{p:.2f}" for what, p in powers if not np.isnan(p)]
        lines += [f"scaling, {sweep.provider}: {', '.join(parts)}"] if parts else []
    timed = frame[(frame.group == "threads") & frame.total.notna()].sort_values("threads")
    for name, runs in timed.groupby("provider", sort=False):
        if len(runs) > 1:
            few, many = runs.iloc[0], runs.iloc[-1]
            speed = f"{few.total / many.total:.2f} times as fast on {many.threads:.0f}"
            lines.append(f"threads, {name}: {speed} as on {few.threads:.0f}")
    for run in frame[(frame.group == "flatness") & frame.memory.notna()].itertuples():
        rest = f"{memory(run.memory - run.gradients)} of it not gradients"
        of = "" if run.objective == LOSS else f" of {run.objective}"
        what = f"memory{of}, {run.provider}, {run.against}"
        lines.append(f"{what}: {memory(run.memory)} beyond inputs, {rest}")
    for run in frame[frame.beside.notna()].itertuples():
        other = ", ".join(f"{k}={v}" for k, v in run.result["workload"]["beside"].items())
        ratio = f"{run.total / run.beside:.3f} times the time of {other}"
        lines.append(f"{run.workload}, {run.provider}: {ratio}, called in turn")
    predicted = frame[frame.off.notna()]
    if len(predicted):
        worst, within = predicted.loc[predicted.off.abs().idxmax()], predicted.off.abs() <= 0.1
        off = f"the worst is off by {worst.off:+.0%} ({worst.workload}, {worst.provider})"
        lines.append(
            f"planner: {within.sum()} of {len(predicted)} predictions of memory within 10%; {off}"
        )
    return lines


def conditions(record: dict[str, Any]) -> str:
    """Write suite, date, processor, versions and commit in one sentence."""
    machine, versions, git = record["machine"], record["versions"], record["git"]
    cores = f"{record['threads']} of {machine['cores']} cores"
    processor = ", ".join(filter(None, (machine["processor"], machine.get("generation"))))
    where = machine.get("gpu") or f"{processor}, {cores}"
    sets = ", ".join(machine.get("instructions", [])) or "no vector extensions known"
    revision = git["revision"][:10] + (" with uncommitted changes" if git["changed"] else "")
    times = record.get("interruptions")
    parts = [f"Suite {record['suite']}, {record['date'][:10]}, {where} ({sets})"]
    parts += [f"torch {versions['torch']}", f"fdd_kernels {versions['fdd_kernels']} at {revision}"]
    return ", ".join(parts + ([f"interrupted {times} time(s)"] if times else [])) + "."
