"""Where the time goes: every kernel of a step by the profiler, and the elementwise kernels alone at
several launch shapes.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu import ours
from benchmarks.gpu.bench import Bench, NotHere
from benchmarks.gpu.end_to_end import WAYS
from benchmarks.workloads import Workload

PRODUCT_NAMES = ("gemm", "nvjet", "cutlass", "xmma", "splitk")
SHAPES = (
    (1024, 1),
    (1024, 2),
    (2048, 2),
    (2048, 4),
    (4096, 4),
    (4096, 8),
)  # tokens of a tile, warps
TOY_SHAPES = ((16, 1), (32, 1))
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

    @property
    def numbers(self) -> dict[str, float]:
        """Its arguments but for tensors, and the compiler's options."""
        return {
            name: value for name, value in self.arguments.items() if isinstance(value, (int, float))
        }

    def again(self) -> None:
        """Start it once more."""
        self.kernel.run(grid=self.grid, warmup=False, **self.arguments)

    def reshaped(self, block: int, warps: int) -> Started:
        """A kernel over cached logits with other tiles: all full ones of its slab, and state of
        their number.
        """
        tiles = max(1, self.arguments["columns"] // block)
        full = block <= self.arguments["columns"]
        changes = {
            "BLOCK_C": block,
            "num_warps": warps,
            "first_tile": 0,
            "state_tile": 0,
            "tiles": tiles,
            "FULL": full,
        }
        for name in ("state", "values", "sums"):  # (..., rows, tiles)
            tensor = self.arguments.get(name)
            if tensor is not None and tensor.shape[-1] == self.arguments["tiles"]:
                changes[name] = tensor.new_empty((*tensor.shape[:-1], tiles))
        return Started(self.kernel, (self.grid[0], tiles, *self.grid[2:]), self.arguments | changes)


def _kernels() -> list[Any]:
    """Every Triton kernel of the package that is imported."""
    modules = [module for name, module in sys.modules.items() if name.startswith(PACKAGE)]
    found = {
        id(value): value
        for module in modules
        for value in vars(module).values()
        if hasattr(value, "arg_names")
    }
    return list(found.values())


@contextmanager
def watched() -> Iterator[dict[str, Started]]:
    """The largest launch of each kernel within, by the kernel's name; launched all the same."""
    largest: dict[str, Started] = {}

    def watching(kernel: Any, run: Callable) -> Callable:
        def observed(*args: Any, grid: tuple, warmup: bool, **arguments: Any) -> Any:
            started = Started(kernel, tuple(grid), arguments)
            if not args and (
                started.name not in largest or started.programs > largest[started.name].programs
            ):
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


def called(bench: Bench, workload: Workload, strategy: str) -> Callable[[], object]:
    """A function that computes the loss with its gradients, after one such call."""
    problem, way = bench.problem(workload), WAYS[strategy]
    run = lambda: way.run(bench, problem, workload.loss_options)  # noqa: E731
    bench.card.once(run, workload, way)()
    return run


def watched_call(bench: Bench, workload: Workload, strategy: str) -> dict[str, Started]:
    """The largest launch of each kernel of a call."""
    run = called(bench, workload, strategy)
    with watched() as largest:
        run()
    return largest


def profiled(pair: str, strategy: str = "auto") -> Callable[[Bench], dict]:
    """The step that sums the kernels of one loss with its gradients, beside the model's parts."""

    def step(bench: Bench) -> dict:
        workload = bench.workload(pair)
        run = called(bench, workload, strategy)
        rows, span = bench.card.kernels(run)
        sums = {"products": 0.0, "this package's kernels": 0.0, "other kernels": 0.0}
        own = {kernel.fn.__name__ for kernel in _kernels()}
        for row in rows:
            if row["name"].removesuffix("_0d1d").split("(")[0] in own:
                kind = "this package's kernels"
            else:
                kind = (
                    "products"
                    if any(part in row["name"].lower() for part in PRODUCT_NAMES)
                    else "other kernels"
                )
            sums[kind] += row["seconds"]
        predicted = WAYS[strategy].predicted(bench.model, bench.call(workload))
        busy = sum(sums.values())
        return {
            "kernels": rows[:40],
            "ms": {kind: s * 1e3 for kind, s in sums.items()},
            "launches": sum(r["count"] for r in rows),
            "busy_ms": busy * 1e3,
            "span_ms": span * 1e3,
            "idle_ms": (span - busy) * 1e3,
            "blocks": predicted.blocks,
            "predicted_parts_ms": {part: s * 1e3 for part, s in predicted.parts.items()},
        }

    return step


def elementwise(pair: str) -> Callable[[Bench], dict]:
    """The step that starts a pair's elementwise kernels again, alone: as launched, then in other
    shapes.
    """

    def step(bench: Bench) -> dict:
        if ours.missing("cached"):
            raise NotHere(f"the kernels over cached logits are {ours.missing('cached')}")
        card, workload = bench.card, bench.workload(pair)
        largest = watched_call(bench, workload, "cached")
        for name, started in largest.items():
            if moved_bytes(started) is None:
                continue
            found = {"as launched": _rate(bench, started)}
            bench.report(
                name, {"grid": started.grid, "arguments": started.numbers, "launches": found}
            )
            for block, warps in card.size(SHAPES, TOY_SHAPES):
                found[f"{block} tokens, {warps} warps"] = _rate(
                    bench, started.reshaped(block, warps)
                )
                bench.report(
                    name, {"grid": started.grid, "arguments": started.numbers, "launches": found}
                )
        return {"predicted_gb_per_second": bench.model.memory * bench.model.stream / 1e9}

    return step


def _rate(bench: Bench, started: Started) -> dict[str, float] | str:
    """Milliseconds and GB/s of a launch; why not, if it does not compile."""
    try:
        seconds = statistics.median(bench.card.seconds(started.again, warm_up=2, most=0.2))
    except (RuntimeError, ValueError) as error:
        bench.card.cuda.synchronize()
        return f"{type(error).__name__}: {error}"[:200]
    return {"ms": seconds * 1e3, "gb_per_second": moved_bytes(started) / seconds / 1e9}


def moved_bytes(started: Started) -> int | None:
    """What a kernel over cached logits must move; None for any other kernel."""
    arguments = started.arguments
    if "logits_s" not in arguments:
        return None
    block, first = arguments["BLOCK_C"], arguments["first_tile"]
    columns = min(arguments["columns"], (first + started.grid[1]) * block) - first * block
    written = arguments["grad"].element_size() if "grad" in arguments else 0
    return started.grid[0] * columns * arguments["layers"] * (8 + written)
