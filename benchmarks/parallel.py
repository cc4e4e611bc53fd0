"""Scaling over gloo processes of this machine, one thread each: a data-parallel step, and the loss
with its head split.

    python -m benchmarks.parallel [--worlds 1 2 4] [--repeats 5] [--rows 64] [--json FILE]

- "DDP step": weak scaling. Every process trains the same Llama-style student (8.6 M parameters)
  from its teacher on a batch of its own; efficiency is the time of one process over that of all.
- "vocabulary": strong scaling. One call of the loss on the shapes of GPT-2 from GPT-2 XL, forward
  and backward, its columns divided among the processes; efficiency is the time of one process over
  the number of processes times theirs.

"plain" is one process outside of any group; a group of one shows what the group's own work costs.
Processes that share a core, or the machine's memory bandwidth, cannot be twice as fast: with more
processes than cores elapsed seconds say little. Processor seconds do not count waiting for the
others, nor other users of the machine: their efficiency says how much work the split adds. Not part
of any suite.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.inputs import build_problem
from benchmarks.workloads import GPT2
from fdd_kernels import Distiller, FDDConfig, fused_fdd_loss
from fdd_kernels.testing import Problem

VOCABULARY, SEQUENCE, BATCH = 8192, 64, 4


def seconds_of(step: Callable[[], None], repeats: int) -> list[float]:
    """Seconds and processor seconds, each of the slowest process, the processes started together;
    the best after a warm-up.
    """
    found = []
    for _ in range(repeats + 1):
        dist.barrier()
        start = time.perf_counter(), time.process_time()
        step()
        slowest = torch.tensor([time.perf_counter() - start[0], time.process_time() - start[1]])
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        found.append(slowest)
    return torch.stack(found[1:]).amin(0).tolist()


def _model(width: int, depth: int) -> torch.nn.Module:
    config = AutoConfig.for_model(
        "llama",
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=depth,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=VOCABULARY,
        max_position_embeddings=SEQUENCE,
        tie_word_embeddings=False,
    )
    torch.manual_seed(depth)
    return AutoModelForCausalLM.from_config(config)


def data_parallel_step(rank: int) -> Callable[[], None]:
    student, teacher = _model(256, 5), _model(384, 10)
    distiller = Distiller(student, teacher, FDDConfig())
    wrapped = DistributedDataParallel(student)
    optimizer = torch.optim.AdamW(student.parameters())
    tokens = torch.randint(
        0, VOCABULARY, (BATCH, SEQUENCE), generator=torch.Generator().manual_seed(rank)
    )
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}

    def step() -> None:
        distiller(batch, student=wrapped).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _part(problem: Problem, rank: int, world: int) -> Problem:
    """This process's rows of both heads."""
    columns = len(problem.student_weight)
    own = slice(columns * rank // world, columns * (rank + 1) // world)
    return Problem(
        **problem.arguments
        | {
            "student_weight": problem.student_weight.detach()[own].clone().requires_grad_(),
            "teacher_weight": problem.teacher_weight[own].clone(),
        }
    )


def vocabulary_step(rank: int, world: int, rows: int, *, group) -> Callable[[], None]:
    problem = _part(build_problem(GPT2, rows=rows), rank, world)
    leaves = list(problem.leaves.values())

    def step() -> None:
        torch.autograd.grad(fused_fdd_loss(**problem.arguments, vocab_group=group), leaves)

    return step


def work(rank: int, world: int, rows: int, repeats: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world
    )
    found = {"DDP step": seconds_of(data_parallel_step(rank), repeats)}
    if world == 1:
        found["vocabulary, plain"] = seconds_of(vocabulary_step(0, 1, rows, group=None), repeats)
    found["vocabulary"] = seconds_of(
        vocabulary_step(rank, world, rows, group=dist.group.WORLD), repeats
    )
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def measure(world: int, rows: int, repeats: int) -> dict[str, list[float]]:
    """Seconds and processor seconds by name with `world` processes."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with tempfile.TemporaryDirectory() as folder:
        numbers = [
            "--world",
            str(world),
            "--rows",
            str(rows),
            "--repeats",
            str(repeats),
            "--folder",
            folder,
        ]
        command = [sys.executable, "-m", "benchmarks.parallel", *numbers]
        processes = [
            subprocess.Popen([*command, "--rank", str(rank)], env=environment)
            for rank in range(world)
        ]
        try:
            codes = [process.wait() for process in processes]
        finally:
            for process in processes:
                process.kill()
        if any(codes):
            raise SystemExit(f"processes ended with {codes}: see their messages above")
        return json.loads((Path(folder) / "found.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--rows", type=int, default=64, help="tokens of the loss whose head is split"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--world", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        work(arguments.rank, arguments.world, arguments.rows, arguments.repeats, arguments.folder)
        return
    found = {
        world: measure(world, arguments.rows, arguments.repeats)
        for world in sorted({1, *arguments.worlds})
    }
    print(
        f"{len(os.sched_getaffinity(0))} cores, one thread a process, best of {arguments.repeats}; "
        "vocabulary: "
        f"{arguments.rows} tokens, float32, GPT-2's head and GPT-2 XL's, trainable\n"
    )
    print(
        "| processes | what | seconds | efficiency | processor seconds | efficiency "
        "|\n|---|---|---|---|---|---|"
    )
    for world, of_world in found.items():
        for name, seconds in of_world.items():
            # into which the work of one process is divided
            parts = 1 if name == "DDP step" else world
            efficiencies = [f"{a / b / parts:.0%}" for a, b in zip(found[1][name], seconds)]
            columns = [
                f"{value:.2f} | {efficiency}" for value, efficiency in zip(seconds, efficiencies)
            ]
            print(f"| {world} | {name} | {' | '.join(columns)} |")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
