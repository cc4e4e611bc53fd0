"""Where the time goes: every kernel of a step by the profiler, and the elementwise kernels alone at several launch shapes."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu import ours
from benchmarks.gpu.bench import Bench, NotHere
from benchmarks.gpu.end_to_end import WAYS

PRODUCT_NAMES = ("gemm", "nvjet", "cutlass", "xmma", "mm", "splitk")
PACKAGE = "fdd_kernels.backends.triton"


@dataclass
class Started:
    """A launch as it was: what it takes to start the kernel once more."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    @property
    def programs(self) -> int:
        return math.prod(self.grid)

    def again(self, **changes: Any) -> None:
        """Start it once more, with other options."""
        self.kernel.run(grid=self.grid, warmup=False, **(self.arguments | changes))


def _kernels() -> list[Any]:
    """Every Triton kernel of the package that is imported."""
    modules = [module for name, module in sys.modules.items() if name.startswith(PACKAGE)]
    found = {id(value): value for module in modules for value in vars(module).values() if hasattr(value, "arg_names")}
    return list(found.values())


@contextmanager
def watched() -> Iterator[dict[str, Started]]:
    """The largest launch of each kernel within, by the kernel's name; launched all the same."""
    largest: dict[str, Started] = {}

    def watching(kernel: Any, run: Callable) -> Callable:
        def observed(*args: Any, grid: tuple, warmup: bool, **arguments: Any) -> Any:
            started = Started(kernel, tuple(grid), arguments)
            if not args and (started.name not in largest or started.programs > largest[started.name].programs):
                largest[started.name] = started
            return run(*args, grid=grid, warmup=warmup, **arguments)

        return observed

    kernels = _kernels()
    for kernel in kernels:
        kernel.run = watching(kernel, kernel.run)
    try:
        yield largest
    finally:
        for kernel in kernels:
            del kernel.run


def profiled(pair: str, strategy: str = "auto") -> Callable[[Bench], dict]:
    """The step that sums the kernels of one loss with its gradients, beside the model's parts."""

    def step(bench: Bench) -> dict:
        workload = bench.workload(pair)
        problem, options = bench.problem(workload), workload.loss_options
        run = lambda: WAYS[strategy].run(bench, problem, options)  # noqa: E731
        run()
        rows, span = bench.card.kernels(run)
        sums = {"products": 0.0, "this package's kernels": 0.0, "other kernels": 0.0}
        own = {kernel.fn.__name__ for kernel in _kernels()}
        for row in rows:
            if row["name"].removesuffix("_0d1d").split("(")[0] in own:
                kind = "this package's kernels"
            else:
                kind = "products" if any(part in row["name"].lower() for part in PRODUCT_NAMES) else "other kernels"
            sums[kind] += row["seconds"]
        predicted = WAYS[strategy].predicted(bench.model, bench.call(workload))
        busy = sum(sums.values())
        return {
            "kernels": rows[:40], "ms": {kind: s * 1e3 for kind, s in sums.items()}, "launches": sum(r["count"] for r in rows),
            "busy_ms": busy * 1e3, "span_ms": span * 1e3, "idle_ms": (span - busy) * 1e3, "blocks": predicted.blocks,
            "predicted_parts_ms": {part: s * 1e3 for part, s in predicted.parts.items()},
        }  # fmt: skip

    return step


def elementwise(pair: str) -> Callable[[Bench], dict]:
    """The step that starts a pair's elementwise kernels again, alone, as launched and with other numbers of warps."""

    def step(bench: Bench) -> dict:
        if ours.missing("cached"):
            raise NotHere(f"the kernels over cached logits are {ours.missing('cached')}")
        card, workload = bench.card, bench.workload(pair)
        problem, options = bench.problem(workload), workload.loss_options
        run = lambda: WAYS["cached"].run(bench, problem, options)  # noqa: E731
        run()
        with watched() as largest:
            run()
        for name, started in largest.items():
            moved = moved_bytes(started)
            if moved is None:
                continue
            found = {}
            shapes = [(w, s) for w in card.size((1, 2, 4, 8), (1,)) for s in card.size((1, 2), (1,))]
            for warps, stages in [(None, None), *shapes]:
                changes = {} if warps is None else {"num_warps": warps, "num_stages": stages}
                seconds = statistics.median(card.seconds(lambda s=started, c=changes: s.again(**c), warm_up=2, most=0.2))
                key = "as launched" if warps is None else f"{warps} warps, {stages} stages"
                found[key] = {"ms": seconds * 1e3, "gb_per_second": moved / seconds / 1e9}
            about = {
                k: v for k, v in started.arguments.items() if isinstance(v, (int, bool)) and not isinstance(v, torch.Tensor)
            }
            bench.report(name, {"grid": started.grid, "arguments": about, "moved_bytes": moved, "launches": found})
        return {"predicted_gb_per_second": bench.model.memory * bench.model.stream / 1e9}

    return step


def moved_bytes(started: Started) -> int | None:
    """What a kernel over cached logits must move; None for any other kernel."""
    arguments = started.arguments
    if "BLOCK_C" not in arguments or "layers" not in arguments:
        return None
    elements = started.programs * arguments["BLOCK_C"] * arguments["layers"]
    written = arguments["grad"].element_size() if "grad" in arguments else 0
    return elements * (8 + written)
