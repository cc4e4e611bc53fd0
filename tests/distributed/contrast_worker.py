"""One process of test_contrast_processes.py: python -m tests.distributed.contrast_worker KIND RANK
WORLD FOLDER
"""

import sys
from pathlib import Path

import torch

from tests.support.contrastive import F64, Call, random_call
from tests.support.processes import leave, show_stack_when_asked

ROWS = 3
CASES = {
    "infonce": {"symmetric": True},
    "kl": {"symmetric": True, "exclude": "self"},
    "supcon": {"exclude": "self", "mask": None},
    "margin_mse": {"teacher_scale": 2.0},
    "positives": {"loss": "supcon", "positives": "teacher", "symmetric": True},
}


def whole_call(name: str, world: int) -> Call:
    """The call of all processes together."""
    options = dict(CASES[name])
    masked = "mask" in options
    options.pop("mask", None)
    loss = options.pop("loss", name)
    scale = torch.tensor(3.0, dtype=F64, requires_grad=True)
    call = random_call(loss, ROWS * world, dtype=F64, scale=scale, **options)
    if masked:
        mask = torch.arange(ROWS * world) % 3 != 1
        call = call.but(mask=mask, column_mask=mask.roll(1))
    return call


def part(call: Call, rank: int) -> Call:
    """A process's part of it."""
    rows = slice(rank * ROWS, (rank + 1) * ROWS)

    def cut(x):
        is_per_row = isinstance(x, torch.Tensor) and x.ndim
        return x[rows].detach().requires_grad_(x.requires_grad) if is_per_row else x

    pairs = tuple([tuple([cut(t) for t in pair]) for pair in call.teachers])
    options = {n: cut(v) for n, v in call.options.items()}
    return Call(cut(call.a), cut(call.b), pairs, options)


def main(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world
    )
    group = torch.distributed.group.WORLD
    found = {}
    for name in CASES:
        for way in ("torch", "reference"):
            call = part(whole_call(name, world), rank).but(process_group=group, reduction="sum")
            found[name, way] = call.run(way)
    call = random_call("infonce", 2 + rank).but(process_group=group)
    try:
        call.value()
    except ValueError as error:
        found["uneven"] = str(error)
    torch.save(found, folder / f"{rank}.pt")


if __name__ == "__main__":
    show_stack_when_asked()
    main(int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
    leave()
