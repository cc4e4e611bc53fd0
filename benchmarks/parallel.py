"""Scaling over gloo processes of this machine, one thread each: a data-parallel step, and the loss
with its head split.

    python -m benchmarks.parallel [--worlds 1 2 4] [--repeats 5] [--rows 64] [--json FILE]

- "DDP step": weak scaling. Every process trains the same Llama-style student (8.6 M parameters)
from its teacher on a batch of its own; efficiency is the time of one process over that of all.
"vocabulary": strong scaling. One call of the loss on the shapes of GPT-2 from GPT-2 XL, forward and
backward, its vocabulary divided among the processes; efficiency is the time of one process over the
number of processes times theirs.

"plain" is one process outside of any group; a group of one shows the cost of the group's own work.
Processes that share a core, or the machine's memory bandwidth, cannot be twice as fast: with more
processes than cores elapsed seconds say little. CPU time does not count waiting, nor other users of
the machine: its efficiency says how much work the split adds. Not part of any suite.
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
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.inputs import build_problem
from benchmarks.report import markdown
from benchmarks.workloads import GPT2
from fdd_kernels import Distiller, FDDConfig, fused_fdd_loss

VOCABULARY, SEQUENCE, BATCH = 8192, 64, 4


def seconds_of(step: Callable[[], None], repeats: int) -> list[float]:
    """Time a step: elapsed seconds and CPU time, each of the slowest process, the processes started
    together; the best after a warm-up.
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
    shape = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": depth}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": VOCABULARY}
    shape |= {"max_position_embeddings": SEQUENCE, "tie_word_embeddings": False}
    torch.manual_seed(depth)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **shape))


def data_parallel_step(rank: int) -> Callable[[], None]:
    student, teacher = _model(256, 5), _model(384, 10)
    distiller = Distiller(student, teacher, FDDConfig.paper())
    wrapped = DistributedDataParallel(student)
    optimizer = torch.optim.AdamW(student.parameters())
    generator = torch.Generator().manual_seed(rank)
    tokens = torch.randint(0, VOCABULARY, (BATCH, SEQUENCE), generator=generator)
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}

    def step() -> None:
        distiller(batch, student=wrapped).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def vocabulary_step(rank: int, world: int, rows: int, *, group) -> Callable[[], None]:
    """Make the step of one loss with its gradients on this process's rows of both heads."""
    problem = build_problem(GPT2, rows=rows)
    columns = len(problem.student_weight)
    own = slice(columns * rank // world, columns * (rank + 1) // world)
    student = problem.student_weight.detach()[own].clone().requires_grad_()
    teacher = problem.teacher_weight[own].clone()
    problem = replace(problem, student_weight=student, teacher_weight=teacher)
    leaves = list(problem.leaves.values())

    def step() -> None:
        torch.autograd.grad(fused_fdd_loss(**problem.arguments, vocab_group=group), leaves)

    return step


def work(rank: int, world: int, rows: int, repeats: int, folder: Path) -> None:
    """Be one process of the group."""
    torch.set_num_threads(1)
    meeting = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
    steps = {"DDP step": data_parallel_step(rank)}
    if world == 1:
        steps["vocabulary, plain"] = vocabulary_step(0, 1, rows, group=None)
    steps["vocabulary"] = vocabulary_step(rank, world, rows, group=dist.group.WORLD)
    found = {name: seconds_of(step, repeats) for name, step in steps.items()}
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def measure(world: int, rows: int, repeats: int) -> dict[str, list[float]]:
    """Measure elapsed seconds and CPU time by name with `world` processes."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with tempfile.TemporaryDirectory() as folder:
        numbers = {"world": world, "rows": rows, "repeats": repeats, "folder": folder}
        command = [sys.executable, "-m", "benchmarks.parallel"]
        command += [f"--{name}={value}" for name, value in numbers.items()]
        processes = [
            subprocess.Popen([*command, f"--rank={rank}"], env=environment) for rank in range(world)
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
    parser.add_argument("--rows", type=int, default=64, help="tokens of the loss with a split head")
    parser.add_argument("--json", type=Path)
    for name, kind in (("--rank", int), ("--world", int), ("--folder", Path)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    rows, repeats = arguments.rows, arguments.repeats
    if arguments.rank is not None:
        work(arguments.rank, arguments.world, rows, repeats, arguments.folder)
        return
    found = {w: measure(w, rows, repeats) for w in sorted({1, *arguments.worlds})}
    table = []
    for world, of_world in found.items():
        for name, seconds in of_world.items():
            # into which the work of one process is divided
            parts = 1 if name == "DDP step" else world
            cells = [
                cell
                for alone, here in zip(found[1][name], seconds)
                for cell in (f"{here:.2f}", f"{alone / here / parts:.0%}")
            ]
            table.append([f"{world}", name, *cells])
    headings = ["processes", "what", "seconds", "efficiency", "CPU time", "efficiency"]
    about = f"{len(os.sched_getaffinity(0))} cores, one thread a process, best of {repeats}"
    heads = "float32, GPT-2's head and GPT-2 XL's, trainable"
    print(f"{about}; vocabulary: {rows} tokens, {heads}\n")
    print(*markdown(pd.DataFrame(table, columns=headings)), sep="\n")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
