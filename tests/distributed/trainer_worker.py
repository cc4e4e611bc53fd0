"""One process of test_trainer_processes.py: python -m tests.distributed.trainer_worker KINDS RANK
WORLD FOLDER, with the kinds separated by commas.
"""

import importlib.util
import os
import sys
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from fdd_kernels import Distiller, FDDConfig
from tests.support.hf_models import tiny_model
from tests.support.processes import leave, show_stack_when_asked
from tests.support.training import Ruin, examples, trainer

HELD_OUT = [9, 4, 17, 6, 12]
# Its first evaluation is the best: afterwards every step makes the student worse.
BEST_FIRST = {
    "max_steps": 4,
    "save_strategy": "steps",
    "save_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_trajectory",
    "greater_is_better": False,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
}
# No gradient for the head, nor for the last block: with and without gradient checkpointing, where
# Trainer does not look for parameters without one by itself.
PARTIAL = FDDConfig.paper(
    student_layers=(1, 2), teacher_layers=(1, 2), output_kd_weight=0.0, train_head=False
)


# accelerate takes streams whose batches have one length only.
STREAMED = [9] * 5


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(examples(STREAMED, seed=3))


def best_first(folder: Path) -> dict:
    run = trainer(
        folder / "run",
        train=examples([9] * 28),
        held_out=examples(HELD_OUT),
        callbacks=[Ruin()],
        **BEST_FIRST,
    )
    run.train()
    metrics = run.evaluate()
    return {
        "best": run.state.best_model_checkpoint,
        "weights": {name: p.detach().clone() for name, p in run.model.named_parameters()},
        "metrics": {name: value for name, value in metrics.items() if isinstance(value, float)},
        "stream": run.evaluate(Stream()),
    }


def partial(folder: Path) -> dict:
    steps = {}
    for checkpointing in (False, True):
        run = trainer(
            folder / f"run-{checkpointing}",
            train=examples([9] * 16),
            config=PARTIAL,
            max_steps=3,
            per_device_train_batch_size=2,
            gradient_checkpointing=checkpointing,
        )
        run.train()
        steps[checkpointing] = run.state.global_step
    student = tiny_model("llama", depth=3, seed=1)
    distiller = Distiller(student, tiny_model("gpt2", depth=3, seed=2), PARTIAL)
    try:
        distiller(
            {"input_ids": torch.ones(1, 4, dtype=torch.int64)},
            student=DistributedDataParallel(student),
        )
    except ValueError as error:
        return {"steps": steps, "refused": str(error)}
    return {"steps": steps}


# State that depends on the losses and gradients of both processes.
CHANGING = FDDConfig.paper(
    num_layers=2,
    schedules="teacher_mix=taid:60,0.4,1,0.3",
    gradient_balance="output_kd=1,trajectory=0.5;every=2;smoothing=0.5",
)


def changing(folder: Path) -> dict:
    """Four steps without a stop, and again from the checkpoint of the second."""
    found = {}
    for kind in ("whole", "resumed"):
        run = trainer(
            folder / "run",
            train=examples([9, 5, 12, 7] * 8),
            config=CHANGING,
            student=tiny_model("llama", depth=3, seed=1 if kind == "whole" else 77),
            max_steps=4,
            save_strategy="steps",
            save_steps=2,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
        )
        resume = None if kind == "whole" else str(folder / "run" / "checkpoint-2")
        run.train(resume_from_checkpoint=resume)
        found[kind] = {
            "state": run.distiller.state_dict(),
            "weights": {name: p.detach().clone() for name, p in run.model.named_parameters()},
        }
    return found


FEATURES = FDDConfig.paper(num_layers=2, space="feature", trajectory="mse", projection="linear")
FEATURE_ROWS = [9, 5, 12, 7]


def features(folder: Path, size: int = 2) -> dict:
    """One step of gradient descent with two of the four rows in each process."""
    run = trainer(
        folder / "run",
        train=examples(FEATURE_ROWS),
        config=FEATURES,
        per_device_train_batch_size=size,
        max_steps=1,
        optim="sgd",
        learning_rate=1.0,
        lr_scheduler_type="constant",
    )
    with torch.no_grad():  # the other process's is taken
        run.distiller.projection.weight.mul_(1 + run.args.process_index)
    run.train()
    return {
        "weights": {name: p.detach() for name, p in run.distiller.projection.named_parameters()}
    }


def generated(folder: Path) -> dict:
    """An evaluation of three rows and one step of each trainer that generates: its text, metrics,
    log and gradients; nothing without trl.
    """
    if importlib.util.find_spec("trl") is None:
        return {}
    from datasets import Dataset

    from tests.support.on_policy import CHATS, PROMPTS, Gradients, answering, sampling

    found = {}
    for make, rows, options in ((sampling, PROMPTS, {}), (answering, CHATS, {"lmbda": 0.5})):
        seen = Gradients()
        run = make(
            folder / make.__name__,
            callbacks=[seen],
            eval_dataset=Dataset.from_list(rows[:3]),
            per_device_eval_batch_size=1,
            **options,
        )
        metrics = run.evaluate()
        run.train()
        found[make.__name__] = {
            "texts": run.texts,
            "evaluated": run.evaluated,
            "metrics": {name: v for name, v in metrics.items() if isinstance(v, float)},
            "log": next(log for log in run.state.log_history if "loss" in log),
            "gradient": seen.found[0],
        }
    return found


KINDS = {
    "best-first": best_first,
    "partial": partial,
    "changing": changing,
    "generated": generated,
    "features": features,
}


def main(kinds: str, rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), **address}
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world
    )
    for kind in kinds.split(","):
        found = KINDS[kind](folder / kind)
        torch.save(found, folder / f"{kind}-{rank}.pt")


if __name__ == "__main__":
    show_stack_when_asked()
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
    leave()
