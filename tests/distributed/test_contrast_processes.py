"""Columns of all gloo processes, and gradients sent back to them, against one process."""

import pytest
import torch

from fdd_kernels.testing import assert_same_sums
from tests.distributed.contrast_worker import CASES, whole_call
from tests.support.processes import finish_well, start

WORKER = "tests.distributed.contrast_worker"


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_processes_compare_with_all_columns(tmp_path, world):
    finish_well(start(WORKER, "columns", world, tmp_path))
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(world)]
    for name in CASES:
        for way in ("torch", "reference"):
            value, (of_a, of_b, of_scale) = whole_call(name, world).but(reduction="sum").run()
            parts = [process[name, way] for process in found]
            terms = 1000
            assert_same_sums(sum(v for v, _ in parts), value, terms)
            assert_same_sums(torch.cat([g[0] for _, g in parts]), of_a, terms)
            assert_same_sums(torch.cat([g[1] for _, g in parts]), of_b, terms)
            assert_same_sums(sum(g[2] for _, g in parts), of_scale, terms)
    for process in found:
        assert "give every process as many" in process["uneven"]
