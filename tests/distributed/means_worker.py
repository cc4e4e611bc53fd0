"""One process of test_shared_means.py: python -m tests.distributed.means_worker KIND RANK WORLD
FOLDER
"""

import sys
from pathlib import Path

import torch

from fdd_kernels import GradientBalance, row_deltas
from tests.support.processes import leave, show_stack_when_asked


def rows(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A process's hidden states (1, T, 3) of its own length, and a mask; the last has none."""
    generator = torch.Generator().manual_seed(rank)
    hidden = torch.randn(1, 4 + rank, 3, generator=generator, dtype=torch.float64) + rank
    mask = torch.arange(4 + rank)[None] % 3 != 0
    return hidden.requires_grad_(), mask if rank < 2 else torch.zeros_like(mask)


def loss_of(deltas: torch.Tensor) -> torch.Tensor:
    """A loss that is not linear in the deltas."""
    return deltas.pow(3).sum()


def main(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world
    )
    group = torch.distributed.group.WORLD
    hidden, mask = rows(rank)
    deltas = row_deltas(hidden, mask=mask, process_group=group)
    terms = {"a": loss_of(deltas.rows), "b": hidden[mask].square().sum()}
    (gradient,) = torch.autograd.grad(terms["a"], hidden, retain_graph=True)
    balance = GradientBalance(dict.fromkeys(terms, 1.0))
    local = {"a": hidden[mask].sum(), "b": terms["b"]}
    weights = balance.update(local, hidden, process_group=group)
    found = {"deltas": deltas.rows.detach(), "gradient": gradient, "weights": weights}
    torch.save(found, folder / f"{rank}.pt")


if __name__ == "__main__":
    show_stack_when_asked()
    main(int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
    leave()
