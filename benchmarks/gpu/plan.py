"""The steps, in the order of what they decide. Each has a cap in seconds, compilation counted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.gpu import correctness, gemms, graphs, kernels, training
from benchmarks.gpu.bench import OBJECTIVES, Bench
from benchmarks.gpu.end_to_end import step as end_to_end

PAIRS = ("Llama", "Qwen", "GPT-2")  # of the verdict, the most decisive first


@dataclass(frozen=True)
class Step:
    """`run(bench)` returns its results beside those that it reported on its way."""

    name: str
    run: Callable[[Bench], dict]
    cap: float


def measured(
    way: str, *pairs: str, cap: float, rows: int = 4096, trained: bool = True
) -> list[Step]:
    """Make the steps of one way at the shapes of some pairs."""
    kind = ("" if trained else ", frozen") + ("" if rows == 4096 else f", {rows} rows")
    runs = {pair: end_to_end(pair, way, rows, trained=trained) for pair in pairs}
    return [Step(f"{pair}: {way}{kind}", run, cap) for pair, run in runs.items()]


def _each(ways: tuple[str, ...], *pairs: str, cap: float) -> list[Step]:
    return [step for way in ways for step in measured(way, *pairs, cap=cap)]


def _objective(name: str) -> list[Step]:
    """Make the steps of one objective: ours, its dense form, and torch.compile of that."""
    ways = {"auto": 30, "dense": 15, "torch.compile": 60}
    return [step for way, cap in ways.items() for step in measured(way, name, cap=cap)]


def steps() -> list[Step]:
    """List the steps: for the verdict, for its reasons, then the rest."""
    return [
        Step("machine", gemms.machine, 20),
        Step("GEMMs: probe", gemms.probe, 20),
        Step("correct: essentials", correctness.essential, 60),
        *measured("auto", *PAIRS, cap=20),
        *measured("dense", *PAIRS, cap=15),
        *measured("torch.compile", *PAIRS, cap=60),
        # Why.
        Step("GEMMs: alone", gemms.alone, 30),
        Step("kernels: Llama", kernels.elementwise("Llama"), 40),
        Step("kernels: Qwen", kernels.elementwise("Qwen"), 25),
        Step("profile: Llama", kernels.profiled("Llama"), 12),
        Step("profile: Qwen", kernels.profiled("Qwen"), 12),
        Step("memory bound", correctness.memory_bound, 20),
        Step("correct: cached", correctness.every_problem("cached"), 60),
        Step("correct: slabbed", correctness.every_problem("slabbed"), 60),
        Step("near-equal models", correctness.near_equal, 30),
        # The rest of the comparison.
        *measured("auto", "Gemma", cap=15),
        *measured("auto", "Llama", "Qwen", cap=15, trained=False),
        *measured("torch.compile", "Gemma", cap=60),
        *measured("dense", "Gemma", cap=15),
        *_each(("cached 0.5 GiB", "cached 1 GiB", "slabbed"), "Llama", "Qwen", cap=15),
        *measured("one_pass", "Llama", cap=20),
        *_each(("chunked", "liger", "trl"), "Llama", cap=40),
        Step("graph of a whole step", graphs.whole_step, 15),
        Step("masked rows", graphs.masks, 15),
        Step("training step", training.training_step, 40),
        *[step for name in OBJECTIVES for step in _objective(name)],
        *measured("auto", "Llama", "Qwen", cap=15, rows=16384),
        Step("second stream: Llama", graphs.second_stream("Llama"), 10),
        Step("second stream: Qwen", graphs.second_stream("Qwen"), 10),
        *measured("dense", "Llama", "Qwen", cap=15, trained=False),
        *measured("torch.compile", "Llama", "Qwen", cap=60, trained=False),
        *measured("torch.compile", "Llama", cap=60, rows=16384),
        *measured("dense .float()", "Llama", "Qwen", cap=15),
        *_each(("one_pass", "cached 4 GiB"), "Qwen", "GPT-2", cap=15),
        *measured("chunked", "Qwen", "GPT-2", cap=40),
        *measured("slabbed", "GPT-2", "Gemma", cap=15),
        Step("correct: one_pass", correctness.every_problem("one_pass"), 120),
    ]
