"""What the steps ask of a GPU: events, memory, streams, graphs, profiles, clocks. `HostCuda` stands
in for all of it.

A dry run goes through every line of every step on a CPU, at toy size, with Triton's interpreter.
Whatever a CPU does not have is replaced here and nowhere else: its figures mean nothing.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

QUERY = (
    "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,"
    "temperature.gpu,memory.used"
)


class HostEvent:
    def __init__(self, enable_timing: bool = True) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: HostEvent) -> float:
        return (end.at - self.at) * 1e3


class HostStream:
    def wait_stream(self, other: HostStream) -> None:
        pass


class HostGraph:
    """Cannot capture: what a replay runs is set from outside."""

    replay: Callable[[], object]


class HostCuda:
    """The functions of `torch.cuda` that are used here, without a GPU. Its memory is too small for
    all rows of a dense loss.
    """

    Event, Stream, CUDAGraph = HostEvent, HostStream, HostGraph

    @staticmethod
    def synchronize() -> None:
        pass

    empty_cache = reset_peak_memory_stats = synchronize

    @staticmethod
    def memory_allocated() -> int:
        return 0

    max_memory_allocated = memory_allocated

    @staticmethod
    def mem_get_info() -> tuple[int, int]:
        return 2**10, 2**10

    @staticmethod
    def get_device_name() -> str:
        return "H100 of a dry run: nothing is measured"

    @staticmethod
    def current_stream() -> HostStream:
        return HostStream()

    @staticmethod
    def stream(stream: HostStream) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    graph = stream


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
        """`real`, or in a dry run `toy`."""
        return toy if self.dry else real

    def once(self, run: Callable[[], Any], *key: Any) -> Callable[[], Any]:
        """`run`; in a dry run, for the interpreter is slow, what gives the result of its first
        call, or of that with `key`.
        """
        if not self.dry:
            return run
        return self._results.setdefault(key, functools.cache(run)) if key else functools.cache(run)

    def smi(self) -> str:
        """What the driver says of clocks, power and temperature; in a dry run, of nothing."""
        command = (
            ["echo", "dry run"]
            if self.dry
            else ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
        )
        try:
            return subprocess.run(
                command, capture_output=True, text=True, timeout=20, check=True
            ).stdout.strip()
        except (OSError, subprocess.SubprocessError) as error:
            return f"{command[0]} does not answer ({error})"

    def compile(self, function: Callable) -> Callable:
        """torch.compile for the shapes at hand; in a dry run the function as it is."""
        torch._dynamo.reset()
        return torch.compile(function, dynamic=False, disable=self.dry)

    def free(self) -> None:
        """Give back what nothing holds any more, cycles included."""
        gc.collect()
        self.cuda.empty_cache()

    def seconds(
        self, run: Callable[[], object], *, repeats: int = 10, warm_up: int = 3, most: float = 3.0
    ) -> list[float]:
        """Seconds of each of `repeats` runs by events, after warm-up; fewer, but three, where they
        would take over `most`.
        """
        run = self.once(run)
        for _ in range(warm_up):
            run()
        self.cuda.synchronize()
        start = time.perf_counter()
        run()
        self.cuda.synchronize()
        repeats = min(repeats, max(3, int(most / max(time.perf_counter() - start, 1e-6))))
        events = [
            (self.cuda.Event(enable_timing=True), self.cuda.Event(enable_timing=True))
            for _ in range(repeats)
        ]
        for first, last in events:
            first.record()
            run()
            last.record()
        self.cuda.synchronize()
        return [first.elapsed_time(last) / 1e3 for first, last in events]

    def host_seconds(self, run: Callable[[], object]) -> float:
        """Seconds until `run` has queued its work, with nothing queued before."""
        self.cuda.synchronize()
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start
        self.cuda.synchronize()
        return seconds

    def peak(self, run: Callable[[], Any]) -> tuple[Any, int]:
        """The result, and the most bytes that were in use beyond those before."""
        self.cuda.empty_cache()
        self.cuda.synchronize()
        self.cuda.reset_peak_memory_stats()
        before = self.cuda.memory_allocated()
        result = run()
        self.cuda.synchronize()
        return result, self.cuda.max_memory_allocated() - before

    def memory(self) -> int:
        """Bytes that are free once the cache is given back."""
        self.cuda.empty_cache()
        return self.cuda.mem_get_info()[0]

    @contextlib.contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        """Work queued within goes to `stream`, behind what is queued so far, and what follows waits
        for it.
        """
        outer = self.cuda.current_stream()
        stream.wait_stream(outer)
        with self.cuda.stream(stream):
            yield
        outer.wait_stream(stream)

    def captured(
        self, run: Callable[[], list[Tensor]]
    ) -> tuple[Callable[[], object], list[Tensor]]:
        """`run` as a CUDA graph: its replay, and the tensors that a replay writes anew."""
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
        """Every kernel of `run` by name with its seconds and number, longest first, and the seconds
        from first to last.
        """
        with profile(
            activities=[ProfilerActivity.CPU if self.dry else ProfilerActivity.CUDA]
        ) as found:
            run()
            self.cuda.synchronize()
        kind = torch.autograd.DeviceType.CPU if self.dry else torch.autograd.DeviceType.CUDA
        # Ranges that code has named are no kernels.
        events = [
            e
            for e in found.events()
            if e.device_type == kind and not e.name.startswith("fdd_kernels::")
        ]
        sums: dict[str, list[float]] = {}
        for event in events:
            entry = sums.setdefault(event.name, [0.0, 0])
            entry[0] += event.time_range.elapsed_us() / 1e6
            entry[1] += 1
        span = (
            max(e.time_range.end for e in events) - min(e.time_range.start for e in events)
            if events
            else 0.0
        )
        rows = [
            {"name": name, "seconds": seconds, "count": count}
            for name, (seconds, count) in sums.items()
        ]
        return sorted(rows, key=lambda row: -row["seconds"]), span / 1e6
