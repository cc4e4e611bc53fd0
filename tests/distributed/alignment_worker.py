"""One process of test_alignment_processes.py: python -m tests.distributed.alignment_worker KIND
RANK WORLD FOLDER
"""

import sys
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from fdd_kernels import Distiller, FDDConfig
from tests.distributed.parallel_worker import batches
from tests.support.hf_models import tiny_model
from tests.support.processes import leave, show_stack_when_asked

CONFIG = FDDConfig.paper(num_layers=2, num_teacher_layers=3, layer_alignment="sinkhorn")


def make_distiller() -> tuple[torch.nn.Module, Distiller]:
    # Not a Llama, whose norms compute in float32.
    student = tiny_model("gpt2", depth=3, seed=1, dtype=torch.float64).train()
    teacher = tiny_model("gpt2", depth=4, seed=2, dtype=torch.float64)
    return student, Distiller(student, teacher, CONFIG)


def main(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world
    )
    student, distiller = make_distiller()
    wrapped, batch = DistributedDataParallel(student), batches(world)[rank]
    items = distiller.count_positions(batch)
    torch.distributed.all_reduce(items)
    items = items.double() / world
    terms = distiller(batch, num_items_in_batch=items, student=wrapped, step=0)
    terms.loss.backward()
    gradients = {name: p.grad for name, p in student.named_parameters()}
    found = {"alignment": distiller.alignment.state_dict(), "gradients": gradients}
    torch.save(found, folder / f"{rank}.pt")


if __name__ == "__main__":
    show_stack_when_asked()
    main(int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
    leave()
