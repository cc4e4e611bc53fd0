"""Layers paired from the batches of all gloo processes, against one process with all batches."""

import pytest
import torch

from fdd_kernels.testing import assert_same_sums
from tests.distributed.alignment_worker import make_distiller
from tests.distributed.parallel_worker import batches
from tests.support.processes import finish_well, start


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_processes_share_a_pairing(tmp_path, world):
    """The batches have different lengths, the first has weights, and the last has no label."""
    finish_well(start("tests.distributed.alignment_worker", "pairs", world, tmp_path))
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(world)]
    assert all(process["alignment"] == found[0]["alignment"] for process in found)
    parts = batches(world)
    sums, count = 0.0, sum(int(make_distiller()[1].count_positions(part)) for part in parts)
    for part in parts:  # a pairing of its own each, whose costs are means over its tokens
        student, distiller = make_distiller()
        distiller(part, step=0)
        costs = torch.tensor(distiller.alignment.costs, dtype=torch.float64)
        sums = sums + costs * distiller.count_positions(part)
    alignment = found[0]["alignment"]
    of_all = torch.tensor(alignment["costs"], dtype=torch.float64)
    assert_same_sums(of_all, sums / count, terms=2 * world)

    student, distiller = make_distiller()
    distiller.alignment.load_state_dict(alignment)
    loss = sum(distiller(part, num_items_in_batch=count, step=0).loss for part in parts)
    loss.backward()
    for name, parameter in student.named_parameters():
        wanted = parameter.grad
        budget = 1e4 * torch.finfo(torch.float64).eps * float(wanted.abs().max())
        found_gradient = found[0]["gradients"][name]
        torch.testing.assert_close(found_gradient, wanted, rtol=0, atol=budget, msg=name)
