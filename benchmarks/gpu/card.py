"""The steps' view of a GPU: times, memory, streams, graphs, profiles, clocks. `HostCuda` stands
in for all of it.

A dry run goes through every line of every step on a CPU, at toy size, with Triton's interpreter.
The stand-ins are here and nowhere else. Their figures mean nothing.
"""

from __future__ import annotations

import functools
import gc
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

QUERY = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit"
QUERY += ",temperature.gpu,memory.used"


def _nothing(*_: Any) -> None:
    return None


class HostStream:
    wait_stream = _nothing


class HostGraph:
    """Cannot capture: its replay is set from outside."""

    replay: Callable[[], object]


class HostCuda:
    """The functions of `torch.cuda` that are used here, without a GPU. Its memory is too small for
    all rows of a dense loss.
    """

    Stream, CUDAGraph = HostStream, HostGraph
    synchronize = empty_cache = reset_peak_memory_stats = staticmethod(lambda: None)
    memory_allocated = max_memory_allocated = staticmethod(lambda: 0)
    mem_get_info = staticmethod(lambda: (2**10, 2**10))
    get_device_name = staticmethod(lambda: "H100 of a dry run: nothing is measured")
    current_stream = staticmethod(HostStream)
    stream = graph = staticmethod(nullcontext)


class Card:
    """The GPU at hand, or with `dry` the CPU. `cuda` is `torch.cuda` or its stand-in."""

    def __init__(self, dry: bool) -> None:
        self.dry = dry
        if not dry and not torch.cuda.is_available():
            raise ValueError(
                "torch sees no GPU: try `python -m benchmarks gpu --dry-run`, which needs none"
            )
        self.cuda: Any = HostCuda if dry else torch.cuda
        self.device = torch.device("cpu" if dry else "cuda")
        self.name: str = self.cuda.get_device_name()
        self._results: dict[Any, Callable[[], Any]] = {}

    def size(self, real: Any, toy: Any) -> Any:
        """Return `real`, or in a dry run `toy`."""
        return toy if self.dry else real

    def once(self, run: Callable[[], Any], *key: Any) -> Callable[[], Any]:
        """Return `run`. In a dry run, where the interpreter is slow, it returns the result of its
        first call, or of the first with `key`.
        """
        if not self.dry:
            return run
        return self._results.setdefault(key, functools.cache(run)) if key else functools.cache(run)

    def smi(self) -> str:
        """Ask the driver for clocks, power and temperature; not in a dry run."""
        command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
        command = self.size(command, ["echo", "dry run"])
        about = {"capture_output": True, "text": True, "timeout": 20, "check": True}
        try:
            return subprocess.run(command, **about).stdout.strip()
        except (OSError, subprocess.SubprocessError) as error:
            return f"{command[0]} does not answer ({error})"

    def compile(self, function: Callable) -> Callable:
        """Compile for the shapes at hand; in a dry run return the function as it is."""
        torch._dynamo.reset()
        return torch.compile(function, dynamic=False, disable=self.dry)

    def free(self) -> None:
        """Free unreachable tensors, cycles included, and give cached memory back."""
        gc.collect()
        self.cuda.empty_cache()

    def seconds(self, run: Callable[[], object], *, most: float = 1.5) -> list[float]:
        """Time each run by `triton.testing.do_bench`, which clears L2 before each: at least one,
        and as many as `most` seconds take after a warm-up.
        """
        if self.dry:
            start = time.perf_counter()
            self.once(run)()
            return [time.perf_counter() - start]
        from triton.testing import do_bench

        times = do_bench(run, warmup=100 * most, rep=1000 * most, return_mode="all")
        return [ms / 1e3 for ms in times]

    def host_seconds(self, run: Callable[[], object]) -> float:
        """Time `run` until it has queued its work, with nothing queued before."""
        self.cuda.synchronize()
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start
        self.cuda.synchronize()
        return seconds

    def peak(self, run: Callable[[], Any]) -> tuple[Any, int]:
        """Return the result, and the most bytes that were in use beyond those before."""
        self.cuda.empty_cache()
        self.cuda.synchronize()
        self.cuda.reset_peak_memory_stats()
        before = self.cuda.memory_allocated()
        result = run()
        self.cuda.synchronize()
        return result, self.cuda.max_memory_allocated() - before

    def memory(self) -> int:
        """Count bytes that are free once the cache is given back."""
        self.cuda.empty_cache()
        return self.cuda.mem_get_info()[0]

    @contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        """Queue work within on `stream`, after everything before and before everything after."""
        outer = self.cuda.current_stream()
        stream.wait_stream(outer)
        with self.cuda.stream(stream):
            yield
        outer.wait_stream(stream)

    def captured(self, run: Callable[[], list[Tensor]]) -> tuple[Callable, list[Tensor]]:
        """Capture `run` as a CUDA graph: its replay, and the tensors that a replay writes anew."""
        again, run = run, self.once(run)
        # everything is compiled, and cuBLAS has its workspace, before the capture
        with self.on(self.cuda.Stream()):
            run()
        graph = self.cuda.CUDAGraph()
        with self.cuda.graph(graph):
            result = run()
        if self.dry:
            graph.replay = lambda: [tensor.copy_(new) for tensor, new in zip(result, again())]
        return graph.replay, result

    def kernels(self, run: Callable[[], object]) -> tuple[list[dict[str, Any]], float]:
        """List every kernel of `run` by name with its seconds and number, longest first; and the
        seconds from the first start to the last end.
        """
        activity = self.size(ProfilerActivity.CUDA, ProfilerActivity.CPU)
        with profile(activities=[activity]) as found:
            run()
            self.cuda.synchronize()
        kind = self.size(torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU)
        # Ranges that code has named are no kernels.
        events = [e for e in found.events() if e.device_type == kind]
        events = [e for e in events if not e.name.startswith("fdd_kernels::")]
        rows: dict[str, dict[str, Any]] = {}
        for event in events:
            row = rows.setdefault(event.name, {"name": event.name, "seconds": 0.0, "count": 0})
            row["seconds"] += event.time_range.elapsed_us() / 1e6
            row["count"] += 1
        first = min((e.time_range.start for e in events), default=0.0)
        last = max((e.time_range.end for e in events), default=0.0)
        return sorted(rows.values(), key=lambda row: -row["seconds"]), (last - first) / 1e6
