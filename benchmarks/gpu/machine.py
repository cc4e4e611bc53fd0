"""Step 0: what the figures are figures of; and the two ceilings, of memory and of products."""

from __future__ import annotations

import os
import platform

import torch

from benchmarks import record
from benchmarks.gpu import ours
from benchmarks.gpu.bench import Bench


def machine(bench: Bench) -> dict:
    """Versions, clocks, strategies of this version; bytes a second of a copy, operations a second
    of a large product.
    """
    card = bench.card
    bench.report(
        "card",
        {
            "name": card.name,
            "smi": card.smi(),
            "free_bytes": card.memory(),
            "model": bench.model.name,
        },
    )
    bench.report(
        "versions", record.versions() | {"cuda": torch.version.cuda, "hip": torch.version.hip}
    )
    bench.report("host", {"system": platform.platform(), "cores": os.cpu_count()})
    bench.report("strategies", {name: ours.missing(name) or "here" for name in ours.STRATEGIES})
    numbers = card.size(2**31, 2**10)
    copy = copy_seconds(bench, numbers)
    side = card.size(8192, 16)
    a, b = (torch.randn(side, side, dtype=torch.bfloat16, device=card.device) for _ in range(2))
    product = min(card.seconds(lambda: a @ b))
    return {
        "copy_bytes_per_second": 2 * 2 * numbers / copy,
        "product_flops": 2 * side**3 / product,
        "smi_after": card.smi(),
        "predicted": {
            "memory": bench.model.memory * bench.model.eager,
            "products": bench.model.products * bench.model.gemm,
        },
    }


def copy_seconds(bench: Bench, numbers: int) -> float:
    """Seconds of a copy of so many 16-bit numbers on the card."""
    source = torch.randn(numbers, dtype=torch.bfloat16, device=bench.card.device)
    target = torch.empty_like(source)
    return min(bench.card.seconds(lambda: target.copy_(source)))
