"""The figures of a record as rows, shared by the terminal, the README and the HTML report; nothing
is computed elsewhere.
"""

from __future__ import annotations

import math
from typing import Any

MIB = 2**20
COLUMNS = (
    "workload",
    "provider",
    "forward",
    "forward + backward",
    "spread",
    "tokens/s",
    "x products",
    "vs dense",
    "memory",
    "predicted",
    "value error",
    "gradient error",
    "computes",
)
NOTHING = "-"


def seconds(value: float) -> str:
    """A time with three digits and its unit."""
    if value < 1e-3:
        return f"{value * 1e6:.3g} us"
    return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.3g} s"


def memory(value: float) -> str:
    """Bytes with three digits and a binary unit."""
    return f"{value / 2**30:.3g} GiB" if value >= 2**30 else f"{value / MIB:.3g} MiB"


def ratio_to_products(result: dict[str, Any], entry: dict[str, Any]) -> float | None:
    """Time of forward and backward over that of the bare products; None unless the whole objective
    was computed.
    """
    if not entry["time"] or not result["products"] or not result["products"]["total"]:
        return None
    return entry["time"]["total"]["median"] / result["products"]["total"]


def speed_against_dense(result: dict[str, Any], name: str) -> float | None:
    """How many times as fast as dense eager PyTorch."""
    dense, entry = result["providers"].get("dense"), result["providers"][name]
    if not dense or not dense["time"] or not entry["time"]:
        return None
    return dense["time"]["total"]["median"] / entry["time"]["total"]["median"]


def rows(record: dict[str, Any]) -> list[dict[str, str]]:
    """One row per workload and provider, every cell a text; a provider without figures has its
    reason instead.
    """
    table = []
    for result in record["results"]:
        workload = result["workload"]
        for name, entry in result["providers"].items():
            row = dict.fromkeys(COLUMNS, NOTHING) | {"workload": workload["name"], "provider": name}
            row["computes"] = (
                entry["computes"]
                if entry["status"] == "ok"
                else f"{entry['status']}: {entry['reason']}"
            )
            time, held, accuracy = entry["time"], entry["memory"], entry["accuracy"]
            if time:
                total = time["total"]
                row["forward"], row["forward + backward"] = (
                    seconds(time["forward"]["median"]),
                    seconds(total["median"]),
                )
                row["spread"] = f"{seconds(total['min'])} to {seconds(total['max'])}"
                row["tokens/s"] = f"{time['tokens_per_second']:.4g}"
                if (ratio := ratio_to_products(result, entry)) is not None:
                    row["x products"] = f"{ratio:.2f}"
                if (speed := speed_against_dense(result, name)) is not None:
                    row["vs dense"] = f"{speed:.2f}x"
            if held:
                row["memory"] = memory(held["beyond_inputs"])
                if entry["predicted_memory"]:
                    row["predicted"] = f"{memory(entry['predicted_memory'])} ({_off(entry):+.0%})"
            if accuracy:
                row["value error"] = f"{accuracy['value_error']:.1e}"
                row["gradient error"] = f"{accuracy['grad_hidden_relative']:.1e}"
            table.append(row)
        if result["products"]:
            products = result["products"]
            row = dict.fromkeys(COLUMNS, NOTHING) | {
                "workload": workload["name"],
                "provider": "bare products",
            }
            row |= {
                "forward": seconds(products["forward"]),
                "forward + backward": seconds(products["total"]),
            }
            row["computes"] = (
                f"the matrix products alone, {products['operations']['total'] / 1e9:.4g} GFLOP"
            )
            if workload["dtype"] != "float32":
                row["computes"] += (
                    f"; in {workload['dtype']} alone {seconds(products['input_dtype_total'])}"
                )
            table.append(row)
    return table


def _off(entry: dict[str, Any]) -> float:
    return entry["predicted_memory"] / entry["memory"]["beyond_inputs"] - 1


def prediction_errors(record: dict[str, Any]) -> dict[tuple[str, str], float]:
    """Predicted over measured memory, minus 1, where both exist."""
    return {
        (r["workload"]["name"], name): _off(entry)
        for r in record["results"]
        for name, entry in r["providers"].items()
        if entry["memory"] and entry["predicted_memory"]
    }


def growth(record: dict[str, Any]) -> list[dict[str, Any]]:
    """For each scaling sweep and provider: the points and the exponents of time and memory, by
    least squares in logarithms.
    """
    sweeps: dict[tuple[str, str], list[tuple[int, dict]]] = {}
    for result in record["results"]:
        field = result["workload"].get("sweep")
        if field:
            for name, entry in result["providers"].items():
                if entry["time"] or entry["memory"]:
                    sweeps.setdefault((field, name), []).append((result["workload"][field], entry))
    found = []
    for (field, name), points in sweeps.items():
        points.sort(key=lambda point: point[0])
        times = [(x, e["time"]["total"]["median"]) for x, e in points if e["time"]]
        held = [(x, e["memory"]["beyond_inputs"]) for x, e in points if e["memory"]]
        found.append(
            {
                "field": field,
                "provider": name,
                "times": times,
                "memory": held,
                "time_exponent": exponent(times),
                "memory_exponent": exponent(held),
            }
        )
    return found


def exponent(points: list[tuple[float, float]]) -> float | None:
    """The slope of log y against log x; None for fewer than two points."""
    points = [(math.log(x), math.log(y)) for x, y in points if x > 0 and y > 0]
    if len({x for x, _ in points}) < 2:
        return None
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points))
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / sum(
        (x - mean_x) ** 2 for x, _ in points
    )


def thread_speedup(record: dict[str, Any]) -> list[tuple[str, int, int, float]]:
    """(provider, threads before, threads after, times as fast) between workloads that differ in
    threads alone.
    """
    points: dict[str, dict[int, float]] = {}
    for result in record["results"]:
        threads = result["workload"].get("threads")
        if threads:
            for name, entry in result["providers"].items():
                if entry["time"]:
                    points.setdefault(name, {})[threads] = entry["time"]["total"]["median"]
    return [
        (name, min(p), max(p), p[min(p)] / p[max(p)]) for name, p in points.items() if len(p) > 1
    ]


def flatness(record: dict[str, Any]) -> list[tuple[str, int, int, int]]:
    """(provider, rows, bytes beyond inputs, bytes beyond inputs and gradients) of the flatness
    group.
    """
    return [
        (
            name,
            r["workload"]["rows"],
            e["memory"]["beyond_inputs"],
            e["memory"]["beyond_inputs"] - e["memory"]["gradients"],
        )
        for r in record["results"]
        if r["workload"]["group"] == "flatness"
        for name, e in r["providers"].items()
        if e["memory"]
    ]


def conditions(record: dict[str, Any]) -> str:
    """On what the record was taken, in one sentence."""
    machine, versions, git = record["machine"], record["versions"], record["git"]
    where = (
        machine.get("gpu")
        or f"{machine['processor']}, {record['threads']} of {machine['cores']} cores"
    )
    sets = ", ".join(machine.get("instructions", [])) or "no vector extensions known"
    revision = git["revision"][:10] + (" with uncommitted changes" if git["changed"] else "")
    interrupted = (
        f", interrupted {record['interruptions']} time(s)" if record.get("interruptions") else ""
    )
    return (
        f"Suite {record['suite']}, {record['date'][:10]}, {where} ({sets}), torch "
        f"{versions['torch']}, "
        f"fdd_kernels {versions['fdd_kernels']} at {revision}{interrupted}."
    )
