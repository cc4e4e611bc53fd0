"""One process of test_parallel.py: python -m tests.distributed.parallel_worker KINDS RANK WORLD
FOLDER, with the kinds separated by commas.
"""

import os
import sys
import traceback
from pathlib import Path

import peft
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from fdd_kernels import Distiller, FDDConfig
from tests.support.hf_models import tiny_batch, tiny_model
from tests.support.processes import leave, show_stack_when_asked

CONFIG = FDDConfig.paper(num_layers=2, ce_weight=0.5)


def models(kind: str):
    """Make student and teacher; for kinds ending with "self" one peft model for both."""
    student = tiny_model(
        "llama_tied" if kind.endswith("tied") else "llama", depth=3, seed=1
    ).train()
    if not kind.endswith("self"):
        return student, tiny_model("gpt2", depth=3, seed=2)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    student = peft.get_peft_model(student, lora)
    return student, student


def batches(world: int) -> list[dict]:
    """One batch a process: of unequal length, with weights for the first, and without a single
    label for the last.
    """
    found = [
        tiny_batch(rows=2 + rank, length=7 + 3 * rank, seed=10 + rank) for rank in range(world)
    ]
    weights = torch.rand(found[0]["input_ids"].shape, generator=torch.Generator().manual_seed(5))
    found[0]["token_weights"] = weights
    found[-1]["labels"] = torch.full_like(found[-1]["labels"], -100)
    return found


def zero_step(
    stage: int,
    rank: int,
    world: int,
    student,
    distiller: Distiller,
    batch: dict,
    items: torch.Tensor,
) -> dict:
    """Return loss and gradients of a DeepSpeed step; the gradients are the changes of plain descent
    at a rate of 1.
    """
    os.environ |= {
        "DS_ACCELERATOR": "cpu",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
    }
    import deepspeed

    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    deepspeed.init_distributed("gloo")
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "optimizer": {"type": "SGD", "params": {"lr": 1.0}},
    }
    engine, *_ = deepspeed.initialize(
        model=student, model_parameters=student.parameters(), config=config
    )
    if stage == 3:
        with pytest.raises(RuntimeError, match="ZeRO-3"):
            distiller(batch, student=engine)
    with deepspeed.zero.GatheredParameters([student.lm_head.weight], enabled=stage == 3):
        loss = distiller(batch, num_items_in_batch=items / world, student=engine).loss
        engine.backward(loss)
    engine.step()
    loss = loss.detach() / world
    torch.distributed.all_reduce(loss)
    with deepspeed.zero.GatheredParameters(list(student.parameters()), enabled=stage == 3):
        return {
            "loss": loss,
            "gradients": {
                name: before[name] - p.detach() for name, p in student.named_parameters()
            },
        }


def deepspeed_step(kind: str, rank: int, world: int) -> dict:
    """Return loss and gradients of zero2 or zero3."""
    student, teacher = models(kind)
    distiller = Distiller(student, teacher, CONFIG)
    batch = batches(world)[rank]
    items = distiller.count_positions(batch)
    torch.distributed.all_reduce(items)
    stage = int(kind.removeprefix("zero"))
    return zero_step(stage, rank, world, student, distiller, batch, items)


def two_steps(kind: str, rank: int, world: int) -> dict:
    """Return loss and gradients of the second step, since the first step of FSDP2 is special.

    "sharded-head" spreads the teacher's head over the processes. In "killed" the last process dies
    between the steps.
    """
    student, teacher = models(kind)
    distiller = Distiller(student, teacher, CONFIG)
    if kind.startswith("fsdp"):
        mesh = init_device_mesh("cpu", (world,))
        for block in distiller.student.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(student, mesh=mesh)
        wrapped = student
    else:
        wrapped = DistributedDataParallel(student)
    if kind == "sharded-head":
        fully_shard(teacher.lm_head, mesh=init_device_mesh("cpu", (world,)))
    batch = batches(world)[rank]
    items = distiller.count_positions(batch)
    torch.distributed.all_reduce(items)
    for step in range(2):
        student.zero_grad()
        if kind == "killed" and step and rank == world - 1:
            os._exit(9)
        terms = distiller(batch, num_items_in_batch=items / world, student=wrapped)
        terms.loss.backward()
    loss = terms.loss.detach() / world
    torch.distributed.all_reduce(loss)
    gradients = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
    gradients = {
        n: gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
        for n, gradient in gradients.items()
    }
    assert "forward" not in vars(student)
    return {"loss": loss, "gradients": gradients}


def main(kinds: str, rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world
    )
    for kind in kinds.split(","):
        step = deepspeed_step if kind.startswith("zero") else two_steps
        path = folder / f"{kind}-{rank}.pt"
        try:
            torch.save(step(kind, rank, world), path)
        except Exception as error:  # a test says whether it is the right one
            torch.save({"error": f"{type(error).__name__}: {error}"}, path)
            if kind == "killed":
                raise
            traceback.print_exc()


if __name__ == "__main__":
    show_stack_when_asked()
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
    leave()
