"""What a record says: measured beside predicted, and whether the default strategy is accepted.
Imports no torch.
"""

from __future__ import annotations

from typing import Any

# The most that the default may take of what another way takes, by pair: what it must do to be the
# default.
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
CORRECT = ("products: probe", "correct: essentials")


def line(entry: dict[str, Any]) -> str:
    """A step's outcome in one line."""
    parts = [f"{entry['status']:13} {entry['seconds']:6.1f} s"]
    results = entry["results"]
    if "ms" in results and not isinstance(results["ms"], dict):
        predicted = results.get("predicted_ms")
        parts.append(
            f"{results['ms']:9.2f} ms" + (f" (predicted {predicted:.2f})" if predicted else "")
        )
        parts.append(f"{results['beyond_gradients'] / 2**20:8.0f} MiB")
    elif isinstance(results.get("ms"), dict):
        parts.append(", ".join(f"{name} {ms:.2f} ms" for name, ms in results["ms"].items()))
    if entry.get("reason"):
        parts.append(entry["reason"].splitlines()[0][:160])
    return "  ".join(parts)


def ratio(record: dict[str, Any], pair: str, way: str) -> float | None:
    """Time of the default over that of another way at the same rows; None where either is not
    measured.
    """
    ours, theirs = (_results(record, f"{pair}: {name}") for name in ("auto", way))
    if not ours or not theirs:
        return None
    return theirs.get("ours_at_these_rows", ours)["ms"] / theirs["ms"]


def _results(record: dict[str, Any], step: str) -> dict[str, Any] | None:
    entry = record["steps"].get(step)
    return entry["results"] if entry and entry["status"] == "ok" else None


def verdict(record: dict[str, Any]) -> tuple[str, list[str]]:
    """Whether the default is "accepted" or "refused", or that is "open", and what it rests on."""
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
        lines.append(
            f"{pair}: the default takes {shown} of {way}'s time; it must be "
            f"{'at most' if most == 1 else 'below'} {most}"
        )
    if False in outcomes:
        return "refused", lines
    return "open" if None in outcomes else "accepted", lines


def text(record: dict[str, Any]) -> str:
    """What went wrong, measured beside predicted, and the verdict, last."""
    lines = [f"\n{record['device']}, sources {record['sources']}"]
    if record["dry_run"]:
        lines.append("DRY RUN: toy sizes on a CPU; no figure means anything.")
    lines += [
        f"{name:34} {line(entry)}"
        for name, entry in record["steps"].items()
        if entry["status"] != "ok"
    ]
    lines += _products_and_kernels(record) + _comparison(record)
    outcome, reasons = verdict(record)
    lines += [
        "",
        *reasons,
        f"verdict: {outcome}{' (of a dry run: it means nothing)' if record['dry_run'] else ''}",
    ]
    return "\n".join(lines)


def _comparison(record: dict[str, Any]) -> list[str]:
    """Every way at every shape: measured, predicted, the default's time over its, memory."""
    lines = [
        "",
        f"{'':34} {'measured ms':>12} {'predicted':>10} {'default / it':>13} "
        f"{'MiB beside gradients':>21}",
    ]
    for name, entry in record["steps"].items():
        found = entry["results"]
        if entry["status"] != "ok" or "beyond_gradients" not in found:
            continue
        pair, _, kind = name.partition(": ")
        way, _, shape = kind.partition(", ")
        ours = record["steps"].get(f"{pair}: auto{', ' + shape if shape else ''}", {"results": {}})[
            "results"
        ]
        ours = found.get("ours_at_these_rows", ours)
        quotient = (
            f"{ours['ms'] / found['ms']:13.3f}" if way != "auto" and "ms" in ours else f"{'':13}"
        )
        predicted = f"{found['predicted_ms']:10.2f}" if found.get("predicted_ms") else f"{'':10}"
        memory = found["beyond_gradients"] / 2**20
        lines.append(
            f"{name:34} {found['ms']:12.2f} {predicted} {quotient} {memory:21.0f}  {found['rows']} "
            "rows"
        )
    return lines


def _products_and_kernels(record: dict[str, Any]) -> list[str]:
    """Products in TF/s and kernels in GB/s, with what was predicted."""
    lines = []
    for step, entry in record["steps"].items():
        for key, value in entry["results"].items():
            for name, found in (
                (value.get("launches") or value).items() if isinstance(value, dict) else ()
            ):
                about = f"{step.partition(': ')[2]}, {key}, {name}"
                if isinstance(found, dict) and "tflops" in found:
                    rate = (
                        f"{found['tflops']:6.0f} TF/s {found['ms']:8.3f} ms (predicted "
                        f"{found['predicted_ms']:.3f})"
                    )
                    lines.append(f"{about:64} {rate}")
                elif isinstance(found, dict) and "gb_per_second" in found:
                    lines.append(
                        f"{about:64} {found['gb_per_second']:6.0f} GB/s {found['ms']:8.3f} ms"
                    )
    return lines
