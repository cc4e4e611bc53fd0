"""Measured beside predicted, and whether the default strategy is accepted. Imports no torch."""

from __future__ import annotations

from typing import Any

# The most that the default may take of another way's time, by pair.
LIMITS = {
    ("Qwen", "torch.compile"): 0.95,
    ("GPT-2", "torch.compile"): 0.95,
    ("Llama", "torch.compile"): 1.0,
    ("Llama", "dense"): 0.6,
    ("Qwen", "dense"): 0.6,
    ("GPT-2", "dense"): 0.6,
    ("Gemma", "dense"): 0.6,
}
# Gemma's dense loss fits no card of 80 GB: it counts if measured
NEEDED = [limit for limit in LIMITS if limit[0] != "Gemma"]
CORRECT = ("GEMMs: probe", "correct: essentials")


def line(entry: dict[str, Any]) -> str:
    """Describe a step's outcome in one line."""
    parts = [f"{entry['status']:13} {entry['seconds']:6.1f} s"]
    ms, predicted = (entry["results"].get(key) for key in ("ms", "predicted_ms"))
    if isinstance(ms, dict):
        parts.append(", ".join(f"{name} {value:.2f} ms" for name, value in ms.items()))
    elif ms is not None:
        parts.append(f"{ms:9.2f} ms" + (f" (predicted {predicted:.2f})" if predicted else ""))
        parts.append(f"{entry['results']['beyond_gradients'] / 2**20:8.0f} MiB")
    if entry.get("reason"):
        parts.append(entry["reason"].splitlines()[0][:160])
    return "  ".join(parts)


def _results(record: dict[str, Any], step: str) -> dict[str, Any] | None:
    entry = record["steps"].get(step)
    return entry["results"] if entry and entry["status"] == "ok" else None


def ratio(record: dict[str, Any], pair: str, way: str) -> float | None:
    """Time of the default over that of another way with the same rows; None where either is not
    measured.
    """
    ours, theirs = (_results(record, f"{pair}: {name}") for name in ("auto", way))
    if not ours or not theirs:
        return None
    return theirs.get("ours_at_these_rows", ours)["ms"] / theirs["ms"]


def verdict(record: dict[str, Any]) -> tuple[str, list[str]]:
    """Decide "accepted", "refused" or "open" for the default, with the reasons."""
    lines, outcomes = [], []
    for step in CORRECT:
        status = record["steps"].get(step, {"status": "not taken"})["status"]
        outcomes.append({"ok": True, "wrong": False}.get(status))
        lines.append(f"{step}: {status}")
    for (pair, way), most in LIMITS.items():
        found = ratio(record, pair, way)
        if found is None and (pair, way) not in NEEDED:
            continue
        outcomes.append(None if found is None else found <= most if most == 1.0 else found < most)
        shown = "not measured" if found is None else f"{found:.3f}"
        limit = f"{'at most' if most == 1 else 'below'} {most}"
        lines.append(f"{pair}: the default takes {shown} of {way}'s time; it must be {limit}")
    if False in outcomes:
        return "refused", lines
    return "open" if None in outcomes else "accepted", lines


def text(record: dict[str, Any]) -> str:
    """Format failed steps, measured beside predicted, and the verdict, last."""
    lines = [f"\n{record['device']}, sources {record['sources']}"]
    if record["dry_run"]:
        lines.append("DRY RUN: toy sizes on a CPU; no figure means anything.")
    steps = record["steps"].items()
    lines += [f"{name:40} {line(entry)}" for name, entry in steps if entry["status"] != "ok"]
    lines += _gemms_and_kernels(record) + _comparison(record)
    outcome, reasons = verdict(record)
    nothing = " (of a dry run: it means nothing)" if record["dry_run"] else ""
    return "\n".join([*lines, "", *reasons, f"verdict: {outcome}{nothing}"])


def _comparison(record: dict[str, Any]) -> list[str]:
    """List every way at every shape: measured, predicted, the default's time over its, memory."""
    headings = f"{'measured ms':>12} {'predicted':>10} {'default / it':>13}"
    lines = ["", f"{'':40} {headings} {'MiB beside gradients':>21}"]
    for name, entry in record["steps"].items():
        found = entry["results"]
        if entry["status"] != "ok" or "beyond_gradients" not in found:
            continue
        pair, _, kind = name.partition(": ")
        way, comma, shape = kind.partition(", ")
        same_shape = record["steps"].get(f"{pair}: auto{comma}{shape}", {"results": {}})
        ours = found.get("ours_at_these_rows", same_shape["results"])
        quotient = f"{ours['ms'] / found['ms']:.3f}" if way != "auto" and "ms" in ours else ""
        predicted = f"{found['predicted_ms']:.2f}" if found.get("predicted_ms") else ""
        memory = f"{found['beyond_gradients'] / 2**20:21.0f}  {found['rows']} rows"
        if "beside_ms" in found:
            memory += f", {found['ms'] / found['beside_ms']:.3f} times {found['beside']}"
        lines.append(f"{name:40} {found['ms']:12.2f} {predicted:>10} {quotient:>13} {memory}")
    return lines


def _gemms_and_kernels(record: dict[str, Any]) -> list[str]:
    """List GEMMs in TF/s and kernels in GB/s, with the model's times."""
    lines = []
    for step, entry in record["steps"].items():
        for key, value in entry["results"].items():
            rows = (value.get("launches") or value) if isinstance(value, dict) else {}
            for name, found in rows.items() if isinstance(rows, dict) else ():
                if not isinstance(found, dict):
                    continue
                about = f"{step.partition(': ')[2]}, {key}, {name}"
                if "tflops" in found:
                    rate = f"{found['tflops']:6.0f} TF/s {found['ms']:8.3f} ms"
                    lines.append(f"{about:64} {rate} (predicted {found['predicted_ms']:.3f})")
                elif "gb_per_second" in found:
                    rate = f"{found['gb_per_second']:6.0f} GB/s {found['ms']:8.3f} ms"
                    lines.append(f"{about:64} {rate}")
    return lines
