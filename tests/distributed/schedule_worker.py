"""One process of test_schedule_processes.py: python -m tests.distributed.schedule_worker KIND RANK
WORLD FOLDER
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from fdd_kernels import Distiller, FDDConfig, GradientBalance, TAIDSchedule
from tests.support.hf_models import tiny_model
from tests.support.processes import leave, show_stack_when_asked
from tests.support.training import examples, pad

CONFIG = FDDConfig.paper(
    num_layers=2,
    schedules={"teacher_mix": TAIDSchedule(60, rate=0.3)},
    gradient_balance=GradientBalance({"output_kd": 1.0, "trajectory": 0.5}, every=2, smoothing=0.5),
)
# The first stage has no term of the final state: the head and the last block get no gradient.
STAGED = replace(
    CONFIG,
    schedules=None,
    gradient_balance=None,
    train_head=False,
    stages="dynamics=2:output_kd_weight=0;both:output_kd_weight=1",
)
STEPS = 4


def batches(step: int, parts: int) -> list[dict]:
    """The micro-batches of a step, of unequal lengths; process r takes each `world`-th."""
    lengths = ([9, 4], [17, 16], [6, 12], [5, 4])
    return [pad(examples(lengths[(step + i) % 4], seed=4 * step + i)) for i in range(parts)]


def models() -> tuple[torch.nn.Module, torch.nn.Module]:
    """Of a family that computes nothing in float32."""
    return tuple([tiny_model("gpt2", depth=3, seed=seed, dtype=torch.float64) for seed in (1, 2)])


def train(distiller: Distiller, student, own, items, world: int = 1) -> list[dict]:
    """Take STEPS steps of plain gradient descent; `own(step)` gives a process's micro-batches and
    `items(step)` the number of valid tokens of all. Return what was logged at each.
    """
    optimizer, logged = torch.optim.SGD(student.parameters(), lr=0.1), []
    for step in range(STEPS):
        for batch in own(step):
            call = {"num_items_in_batch": items(step) / world, "student": student, "step": step}
            terms = distiller(batch, **call)
            terms.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        logged.append(distiller.logged())
    return logged


def found_with(config: FDDConfig, rank: int, world: int) -> dict:
    """Train; also the message if DistributedDataParallel is not told of unused parameters."""
    refused = []
    for static in (False, True):
        student, teacher = models()
        try:
            wrapped = DistributedDataParallel(student, static_graph=static)
            Distiller(student, teacher, config)(batches(0, 1)[0], student=wrapped, step=0)
        except ValueError as error:
            refused.append(str(error))
    student, teacher = models()
    distiller = Distiller(student, teacher, config)
    wrapped = DistributedDataParallel(student, find_unused_parameters=True)

    def items(step: int) -> torch.Tensor:
        return sum(distiller.count_positions(batch) for batch in batches(step, 2 * world))

    own = [batches(step, 2 * world)[rank::world] for step in range(STEPS)]
    logged = train(distiller, wrapped, own.__getitem__, items, world)
    return {
        "refused": refused,
        "logged": logged,
        "state": distiller.state_dict(),
        "weights": {name: p.detach() for name, p in student.named_parameters()},
    }


KINDS = {"state": CONFIG, "stage": STAGED}


def main(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world
    )
    found = {kind: found_with(config, rank, world) for kind, config in KINDS.items()}
    torch.save(found, folder / f"{rank}.pt")


if __name__ == "__main__":
    show_stack_when_asked()
    main(int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
    leave()
