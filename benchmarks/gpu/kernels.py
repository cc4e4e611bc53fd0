"""Where the time goes: every kernel of a call by the profiler, and the elementwise kernels alone at
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

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.end_to_end import WAYS
from benchmarks.traffic import elements_of
from benchmarks.workloads import Workload

GEMM_NAMES = ("gemm", "nvjet", "cutlass", "xmma", "splitk")
# Tokens of a tile, warps.
SHAPES = ((1024, 1), (1024, 2), (2048, 2), (2048, 4), (4096, 4), (4096, 8))
TOY_SHAPES = ((16, 1), (32, 1))
PACKAGE = "fdd_kernels.backends.triton"


@dataclass
class Started:
    """A launch as it was, so that the kernel can be started once more."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    @property
    def numbers(self) -> dict[str, float]:
        """List its arguments but for tensors, and the compiler's options."""
        return {name: x for name, x in self.arguments.items() if isinstance(x, (int, float))}

    def again(self) -> None:
        """Start it once more."""
        self.kernel.run(grid=self.grid, warmup=False, **self.arguments)

    def reshaped(self, block: int, warps: int) -> Started:
        """Change the tiles of a kernel over cached logits: all full tiles of its slab, with state
        of their number.
        """
        columns = self.arguments["columns"]
        tiles = max(1, columns // block)
        changes = {"BLOCK_C": block, "num_warps": warps, "FULL": block <= columns, "tiles": tiles}
        changes |= {"first_tile": 0, "state_tile": 0}
        for name in ("state", "values", "sums"):  # (..., rows, tiles)
            tensor = self.arguments.get(name)
            if tensor is not None and tensor.shape[-1] == self.arguments["tiles"]:
                changes[name] = tensor.new_empty((*tensor.shape[:-1], tiles))
        return Started(self.kernel, (self.grid[0], tiles, *self.grid[2:]), self.arguments | changes)


def _kernels() -> list[Any]:
    """List every Triton kernel of the package that is imported."""
    modules = [module for name, module in sys.modules.items() if name.startswith(PACKAGE)]
    values = [value for module in modules for value in vars(module).values()]
    return list({id(value): value for value in values if hasattr(value, "arg_names")}.values())


@contextmanager
def watched() -> Iterator[dict[str, Started]]:
    """Note the largest launch of each kernel within, by the kernel's name; all are launched."""
    largest: dict[str, Started] = {}

    def watching(kernel: Any, run: Callable) -> Callable:
        def observed(*args: Any, grid: tuple, warmup: bool, **arguments: Any) -> Any:
            started = Started(kernel, tuple(grid), arguments)
            before = largest.get(started.name)
            if not args and (before is None or math.prod(started.grid) > math.prod(before.grid)):
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
    """Return a function that computes the loss with its gradients, after one such call."""
    problem, way = bench.problem(workload), WAYS[strategy]

    def run() -> object:
        return way.run(bench, problem, workload.loss_options)

    bench.card.once(run, workload, way)()
    return run


def heavy_launches(bench: Bench, workload: Workload) -> dict[str, Started]:
    """Find the largest launch of each kernel over cached logits in a call."""
    run = called(bench, workload, "cached")
    with watched() as largest:
        run()
    return {name: s for name, s in largest.items() if "logits_s" in s.arguments}


def profiled(pair: str, strategy: str = "auto") -> Callable[[Bench], dict]:
    """Make the step that sums the kernels of one loss with its gradients, beside the model's
    parts.
    """

    def step(bench: Bench) -> dict:
        workload = bench.workload(pair)
        rows, span = bench.card.kernels(called(bench, workload, strategy))
        sums = {"GEMMs": 0.0, "this package's kernels": 0.0, "other kernels": 0.0}
        own = {kernel.fn.__name__ for kernel in _kernels()}
        for row in rows:
            kind, name = "other kernels", row["name"]
            if name.removesuffix("_0d1d").split("(")[0] in own:
                kind = "this package's kernels"
            elif any(part in name.lower() for part in GEMM_NAMES):
                kind = "GEMMs"
            sums[kind] += row["seconds"]
        predicted = WAYS[strategy].predicted(bench.model, bench.call(workload))
        busy = sum(sums.values())
        return {
            "kernels": rows[:40],
            "ms": {kind: s * 1e3 for kind, s in sums.items()},
            "launches": sum(row["count"] for row in rows),
            "busy_ms": busy * 1e3,
            "span_ms": span * 1e3,
            "idle_ms": (span - busy) * 1e3,
            "blocks": predicted.blocks,
            "predicted_parts_ms": {part: s * 1e3 for part, s in predicted.parts.items()},
        }

    return step


def elementwise(pair: str) -> Callable[[Bench], dict]:
    """Make the step that starts a pair's elementwise kernels again, alone: as launched, then in
    other shapes.
    """

    def step(bench: Bench) -> dict:
        for name, started in heavy_launches(bench, bench.workload(pair)).items():
            shapes = {"as launched": started}
            for block, warps in bench.card.size(SHAPES, TOY_SHAPES):
                shapes[f"{block} tokens, {warps} warps"] = started.reshaped(block, warps)
            about = {"grid": started.grid, "arguments": started.numbers, "launches": {}}
            for shape, launch in shapes.items():
                about["launches"][shape] = _rate(bench, launch)
                bench.report(name, about)
        return {"predicted_gb_per_second": bench.model.memory * bench.model.stream / 1e9}

    return step


def _rate(bench: Bench, started: Started) -> dict[str, float] | str:
    """Return milliseconds and GB/s of a launch; why not, if it does not compile."""
    try:
        seconds = statistics.median(bench.card.seconds(started.again, most=0.1))
    except (RuntimeError, ValueError) as error:
        bench.card.cuda.synchronize()
        return f"{type(error).__name__}: {error}"[:200]
    return {"ms": seconds * 1e3, "gb_per_second": moved_bytes(started) / seconds / 1e9}


def moved_bytes(started: Started) -> int:
    """Count the bytes that a kernel over cached logits must move."""
    arguments = started.arguments
    written = arguments["grad"].element_size() if "grad" in arguments else 0
    return elements_of(started.grid, arguments) * (8 + written)
