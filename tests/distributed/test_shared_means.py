"""The mean over the rows of all gloo processes, and weights that all share, against one process."""

import pytest
import torch

from fdd_kernels import GradientBalance, row_deltas
from fdd_kernels.testing import assert_same_sums
from tests.distributed.means_worker import loss_of, rows
from tests.support.processes import finish_well, start

WORKER = "tests.distributed.means_worker"


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_processes_share_a_mean_and_weights(tmp_path, world):
    """The third process has no valid row."""
    finish_well(start(WORKER, "features", world, tmp_path))
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(world)]
    parts = [rows(rank) for rank in range(world)]
    hidden, mask = (torch.cat(tensors, dim=1) for tensors in zip(*parts))
    deltas = row_deltas(hidden, mask=mask).rows
    (gradient,) = torch.autograd.grad(loss_of(deltas), hidden)
    terms = 16 * hidden.numel()
    assert_same_sums(torch.cat([f["deltas"] for f in found], 1), deltas.detach(), terms)
    assert_same_sums(torch.cat([f["gradient"] for f in found], 1), gradient, terms)

    hidden = hidden.detach().requires_grad_()
    local = {"a": hidden[mask].sum(), "b": hidden[mask].square().sum()}
    expected = GradientBalance(dict.fromkeys(local, 1.0)).update(local, hidden)
    for process in found:
        assert process["weights"] == pytest.approx(expected, rel=2**-45)
        assert process["weights"] == found[0]["weights"]
