"""What today's planner says of the calls on record, beside the peaks that were measured."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.measure import MEMORY_IN_USE
from benchmarks.runner import loss_shape
from benchmarks.workloads import Workload
from fdd_kernels.memory.loss import loss_memory


def peaks_on_record(data: dict[str, Any]) -> Iterator[tuple[str, int, int]]:
    """(workload and provider, predicted bytes, measured bytes) where a record has the peak of
    memory in use.

    The oldest records count what an allocator had kept besides, and are left out.
    """
    for result in data["results"]:
        workload = Workload.from_json(result["workload"])
        for name, entry in result["providers"].items():
            threads = workload.threads or data["threads"]
            prediction = loss_memory(
                loss_shape(workload), name, threads=threads, device=data["device"]
            )
            if (
                prediction
                and entry["memory"]
                and entry["memory"].get("measure") in MEMORY_IN_USE.values()
            ):
                yield (
                    f"{workload.name} / {name}",
                    prediction.total,
                    entry["memory"]["beyond_inputs"],
                )
