"""One process of test_vocab_parallel.py: python -m tests.distributed.vocab_worker KIND RANK WORLD
FOLDER
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from fdd_kernels import Distiller, FDDConfig, fdd_loss_reference, fused_fdd_loss
from fdd_kernels.backends import BACKENDS
from fdd_kernels.backends.cpu import tiling
from fdd_kernels.hf.wrappers import whole
from fdd_kernels.testing import Problem, evaluate, random_problem
from tests.support.processes import leave, show_stack_when_asked

COLUMNS = 37
BOUNDS = {1: (0, 37), 2: (0, 12, 37), 4: (0, 12, 13, 30, 37)}
CONFIG = FDDConfig.paper(num_layers=2, ce_weight=0.5)
# How many rows' values the C++ backend of a rank keeps at a time (None: as many as it chooses), and
# the rank's backend.
WAYS = {
    "at once": lambda rank: (None, "auto"),
    "in blocks": lambda rank: (3 + rank, "auto"),
    "not on rank 0": lambda rank: (3 if rank else 0, "auto"),
    "with another backend on rank 0": lambda rank: (3, "auto" if rank else "torch"),
}
HEADS = ("student_weight", "teacher_weight", "student_bias", "teacher_bias")


def excluded(problem: Problem, first: int) -> Problem:
    """The problem without the tokens from `first` on: all that some processes have."""
    for bias in (problem.student_bias, problem.teacher_bias):
        bias.data[first:] = -torch.inf
    return problem


def cases() -> dict[str, tuple[Problem, float | None, dict]]:
    """Problem, upstream gradient and options by name: the terms of the loss and the edges of its
    input.
    """
    labelled = random_problem(labels=True, mask=True, bias="padded", columns=COLUMNS)
    everything = {
        "ce_weight": 0.5,
        "trajectory": "reverse_kl",
        "derivative": "mse",
        "temperature": 2.0,
    }
    capped = {
        "trajectory": "skew_kl",
        "student_softcap": 3.0,
        "teacher_softcap": 2.0,
        "student_logit_scale": 0.5,
    }
    return {
        "defaults": (random_problem(), None, {}),
        "everything": (
            labelled,
            -2.0,
            everything | {"num_items_in_batch": 7, "output_temperature": 3.0},
        ),
        "jsd": (
            labelled,
            None,
            {"trajectory": "jsd", "derivative": "centered_cosine", "output_in_dynamics": True},
        ),
        "skew_kl, soft caps": (random_problem(bias="plain"), None, capped),
        "divergences with parameters": (
            random_problem(labels=True, bias="padded", token_weights=True),
            None,
            {"trajectory": "jsd:0.2", "output_divergence": "alpha_beta:0.3,0.9", "ce_weight": 0.5},
        ),
        "weighted_cosine": (
            random_problem(layers=4, spread=6.0),
            None,
            {
                "derivative": "weighted_cosine",
                "derivative_temperature": 0.7,
                "layer_weights": (0.5, 2.0, 0.0),
            },
        ),
        "weighted_cosine, the last tokens excluded": (
            excluded(random_problem(layers=4, bias="plain"), 13),
            None,
            {"derivative": "weighted_cosine"},
        ),
        "teacher_mix": (
            random_problem(bias="plain", token_weights=True),
            None,
            {"teacher_mix": 0.4, "output_in_dynamics": True},
        ),
        "logits": (
            random_problem(layers=4),
            None,
            {"trajectory": "cosine", "derivative": "mse"},
        ),
        "cross-entropy alone": (
            labelled,
            None,
            {"alpha": 0.0, "beta": 0.0, "output_kd_weight": 0.0, "ce_weight": 1.0},
        ),
        "per token": (
            random_problem(labels=True),
            1.5,
            {"reduction": "none", "shift": True, "ce_weight": 1.0},
        ),
        "fewer columns": (random_problem(), None, {"vocab_size": 33}),
        "models that nearly agree": (random_problem(near=1e-3), None, {}),
        "one layer": (random_problem(layers=1), None, {}),
        "frozen head": (random_problem().frozen("student_weight"), None, {}),
        "head alone": (random_problem().frozen("student_hidden"), None, {}),
        "no position counts": (
            replace(labelled, labels=torch.full_like(labelled.labels, -100)),
            None,
            everything,
        ),
        "no positions": (random_problem((0, 5), labels=True), None, {"ce_weight": 1.0}),
        "float64": (labelled.to(torch.float64), None, everything),
        "bfloat16": (random_problem(dtype=torch.bfloat16, labels=True), None, {"ce_weight": 1.0}),
    }


def rows_of(problem: Problem, first: int, last: int) -> Problem:
    """The problem with rows first to last of its heads."""
    heads = {name: getattr(problem, name) for name in HEADS}
    return replace(
        problem,
        **{
            n: None if t is None else t[first:last].detach().requires_grad_(t.requires_grad)
            for n, t in heads.items()
        },
    )


@contextlib.contextmanager
def keeping(rows: int | None) -> Iterator[list[int]]:
    """Cap the row block of the C++ backend's cached logits at `rows` (None: its own choice);
    yield the rows of each block.
    """
    backend, block_rows, blocks = BACKENDS["cpu"], tiling.block_rows, []

    def stats_and_grad(inputs, spec, block_rows, upstream_of, needed, refine):
        assert not refine  # a process's own part of the vocabulary gives no more accurate VALUE

        def seen(rows, *statistics):
            blocks.append(len(rows))
            return upstream_of(rows, *statistics)

        return backend.stats_and_grad(inputs, spec, block_rows, seen, needed, refine)

    BACKENDS["cpu"] = replace(backend, stats_and_grad=stats_and_grad)
    if rows is not None:
        tiling.block_rows = lambda layers, count, *_, **__: min(count, rows)
    try:
        yield blocks
    finally:
        BACKENDS["cpu"], tiling.block_rows = backend, block_rows


def run_cases(rank: int, world: int, group, way: str, names: tuple[str, ...] = ()) -> dict:
    rows, backend = WAYS[way](rank)
    bounds, found = BOUNDS[world], {}
    for name, (problem, upstream, options) in cases().items():
        if names and name not in names:
            continue
        part = rows_of(problem, bounds[rank], bounds[rank + 1])
        with keeping(rows) as blocks:
            outcome = evaluate(
                part, fused_fdd_loss, upstream, vocab_group=group, **options, backend=backend
            )
        found[name] = {
            "terms": tuple(outcome.terms),
            "gradients": outcome.gradients,
            "blocks": blocks,
        }
    return found


def backwards_problem() -> Problem:
    return random_problem(labels=True, bias="plain")


def run_backwards(rank: int, world: int, group) -> dict:
    """Every kind of backward pass after one forward: of the loss, again and doubled, and of two
    terms alone.
    """
    problem = rows_of(backwards_problem(), *BOUNDS[world][rank : rank + 2])
    leaves, kept = problem.leaves, []
    with keeping(3) as blocks:
        terms = fused_fdd_loss(
            **problem.arguments, output_in_dynamics=True, return_terms=True, vocab_group=group
        )
        weighted = terms.trajectory + 2 * terms.derivative
        found = []
        for value in (terms.loss, 2 * terms.loss, weighted):
            found.append(torch.autograd.grad(value, list(leaves.values()), retain_graph=True))
            kept.append(len(blocks))
    for once, doubled in zip(*found[:2], strict=True):
        assert torch.equal(2 * once, doubled)
    zero = torch.zeros(())
    of_terms = (weighted.detach(), zero, terms.trajectory.detach(), terms.derivative.detach(), zero)
    return {"terms": of_terms, "gradients": dict(zip(leaves, found[2])), "blocks": kept}


# --- rows of several processes: sequence parallelism, and data parallelism beside vocabulary
# parallelism


def sequence_problem() -> Problem:
    """Labels unshifted, as a causal LM takes them."""
    problem = random_problem((2, 13), labels=True)
    # valid labels at the bounds of the parts
    return replace(problem, labels=problem.labels.where(torch.arange(13) != 6, 3))


def positions_of(problem: Problem, part: slice) -> Problem:
    """The problem with some positions of its last leading dimension."""

    def states(side: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple([h[..., part, :].detach().requires_grad_(h.requires_grad) for h in side])

    return replace(
        problem,
        student_hidden=states(problem.student_hidden),
        teacher_hidden=states(problem.teacher_hidden),
        labels=None if problem.labels is None else problem.labels[..., part],
    )


def run_sequence(rank: int, world: int) -> dict:
    """Each process has a slice of every sequence, of unequal length: shift all labels first, then
    cut.
    """
    problem = sequence_problem()
    shifted = torch.cat(
        [problem.labels[:, 1:], torch.full_like(problem.labels[:, :1], -100)], dim=1
    )
    cuts = [13 * r // world for r in range(world + 1)]
    part = positions_of(replace(problem, labels=shifted), slice(cuts[rank], cuts[rank + 1]))
    items = (part.labels != -100).sum()
    dist.all_reduce(items)
    outcome = evaluate(part, fused_fdd_loss, ce_weight=0.5, num_items_in_batch=items)
    loss, of_head = outcome.terms.loss, outcome.gradients["student_weight"]
    dist.all_reduce(loss)
    dist.all_reduce(of_head)
    hidden = [outcome.gradients[f"student_hidden[{i}]"] for i in range(len(part.student_hidden))]
    return {"loss": loss, "student_weight": of_head, "hidden": hidden}


def grid_problem() -> Problem:
    """Make eleven positions; the first data-parallel rank has four of them, none valid."""
    problem = random_problem((11,), labels=True)
    return replace(problem, labels=problem.labels.where(torch.arange(11) >= 4, -100))


def run_grid(rank: int) -> dict:
    """Run two data-parallel ranks with unequal batches, each of two processes with split heads."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "vocab"))
    data, vocab = mesh["data"].get_group(), mesh["vocab"].get_group()
    part = positions_of(grid_problem(), slice(0, 4) if rank < 2 else slice(4, 11))
    part = rows_of(part, *BOUNDS[2][rank % 2 : rank % 2 + 2])
    items = (part.labels != -100).sum()
    dist.all_reduce(items, group=data)
    outcome = evaluate(
        part, fused_fdd_loss, ce_weight=0.5, num_items_in_batch=items, vocab_group=vocab
    )
    loss, of_head = outcome.terms.loss, outcome.gradients["student_weight"]
    dist.all_reduce(loss, group=data)
    dist.all_reduce(of_head, group=data)
    hidden = [outcome.gradients[f"student_hidden[{i}]"] for i in range(len(part.student_hidden))]
    return {"loss": loss, "student_weight": of_head, "hidden": hidden}


# --- Hugging Face models whose heads are split by tensor parallelism


# Imported where they are used, as transformers is, since every process would wait for them: fsdp
# and tensor.parallel.


def split_head(model: nn.Module, mesh) -> nn.Module:
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    return parallelize_module(model, mesh, {"lm_head": ColwiseParallel(output_layouts=Replicate())})


def tensor_parallel_models(mesh=None) -> dict[str, tuple[nn.Module, nn.Module]]:
    """Students and teachers by how their heads are split, if there is a mesh."""
    from tests.support.hf_models import tiny_model

    pairs = {}
    for kind in ("both heads", "student's head", "head with a bias"):
        student = tiny_model(
            "phi_head_bias" if "bias" in kind else "llama", depth=3, seed=1
        ).train()
        teacher = tiny_model("llama", depth=3, seed=2)
        if mesh is not None:
            split_head(student, mesh)
            if kind == "both heads":
                split_head(teacher, mesh)
        pairs[kind] = student, teacher
    return pairs


def _outcome(student: nn.Module, loss: Tensor) -> dict:
    gradients = {n: whole(p.grad) for n, p in student.named_parameters()}
    return {"loss": loss.detach(), "gradients": gradients}


def run_distillers(world: int) -> dict:
    from tests.support.hf_models import tiny_batch, tiny_model

    mesh, found = init_device_mesh("cpu", (world,)), {}
    pairs = tensor_parallel_models(mesh)
    for kind, (student, teacher) in pairs.items():
        terms = Distiller(student, teacher, CONFIG, vocab_group=mesh.get_group())(tiny_batch())
        terms.loss.backward()
        found[kind] = _outcome(student, terms.loss)
    student, teacher = pairs["both heads"]
    found["refused"] = errors_of(
        {
            "no vocab_group": lambda: Distiller(student, teacher, CONFIG),
            "whole head": lambda: Distiller(
                tiny_model("llama"), teacher, CONFIG, vocab_group=mesh.get_group()
            )(tiny_batch()),
        }
    )
    return found


def run_with_fsdp(rank: int) -> dict:
    """Run FSDP2 over two data-parallel ranks of two processes with split heads."""
    from torch.distributed.fsdp import fully_shard

    from tests.support.hf_models import tiny_batch

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    student, teacher = tensor_parallel_models(mesh["tensor"])["both heads"]
    distiller = Distiller(student, teacher, CONFIG, vocab_group=mesh["tensor"].get_group())
    for block in distiller.student.blocks:
        fully_shard(block, mesh=mesh["data"])
    fully_shard(student, mesh=mesh["data"])
    batch = tiny_batch(rows=2 + rank // 2, seed=20 + rank // 2)
    items = distiller.count_positions(batch)
    dist.all_reduce(items, group=mesh["data"].get_group())
    terms = distiller(batch, num_items_in_batch=items / 2, student=student)
    terms.loss.backward()
    loss = terms.loss.detach() / 2
    dist.all_reduce(loss, group=mesh["data"].get_group())
    return _outcome(student, loss)


# --- calls refused by every process, with nothing left behind


def refusals(rank: int, group) -> dict[str, Callable[[], object]]:
    from torch.distributed.tensor import Shard, distribute_tensor

    own = BOUNDS[2][rank : rank + 2]
    problem = random_problem(labels=True, bias="plain")
    part = rows_of(problem, *own)

    def call(changed: Problem = part, function=fused_fdd_loss, **options):
        return lambda: function(**(changed.arguments | {"vocab_group": group} | options))

    last = rank == 1
    fewer = {n: getattr(part, n)[:-1] for n in ("teacher_weight", "teacher_bias")}
    moved = rows_of(problem, *((0, 13), (13, 37))[rank])
    frozen = tuple([h.detach() for h in part.student_hidden])
    compiled = torch.compile(
        lambda: fused_fdd_loss(**part.arguments, vocab_group=group), backend="eager", fullgraph=True
    )
    split = distribute_tensor(
        problem.student_weight.detach(), init_device_mesh("cpu", (2,)), [Shard(0)]
    )
    return {
        "vocabularies differ": call(replace(part, **fewer) if last else part),
        "other columns": call(
            replace(part, teacher_weight=moved.teacher_weight, teacher_bias=moved.teacher_bias)
        ),
        "one process refuses": call(student_bias=part.student_bias[:-1]) if last else call(),
        "other options": call(alpha=0.5) if last else call(),
        "other positions": call(positions_of(part, slice(0, 4))) if last else call(),
        "other labels": call(labels=torch.full_like(part.labels, -100)) if last else call(),
        "other gradients": call(replace(part, student_hidden=frozen)) if last else call(),
        "label": call(labels=torch.full_like(part.labels, COLUMNS), ce_weight=1.0),
        "vocab_size": call(vocab_size=38),
        "no column": call(vocab_size=12),
        "feature space": call(random_problem(feature_space=True), trajectory="mse"),
        "reference": call(function=fdd_loss_reference),
        "group": call(vocab_group="tp"),
        "DTensor": call(student_weight=split),
        "compiled": compiled,
    }


def errors_of(calls: dict[str, Callable[[], object]]) -> dict[str, str]:
    found = {}
    for name, use in calls.items():
        try:
            use()
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
        else:
            found[name] = "no error"
    return found


def die_in_the_middle(rank: int, world: int, group) -> None:
    """The last process dies between forward and backward; the others must not wait for it.

    With a value per position, since otherwise nothing may be left to exchange in the backward pass.
    """
    problem = rows_of(random_problem(), *BOUNDS[world][rank : rank + 2])
    fused_fdd_loss(**problem.arguments, vocab_group=group).backward()
    loss = fused_fdd_loss(**problem.arguments, reduction="none", vocab_group=group).sum()
    if rank == world - 1:
        os._exit(9)
    loss.backward()


def main(kind: str, rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world
    )
    group = dist.group.WORLD
    if kind == "results":
        names = {"at once": (), "in blocks": ()}
        found = {
            way: run_cases(rank, world, group, way, names.get(way, ("everything",))) for way in WAYS
        }
        found |= {
            "sequence": run_sequence(rank, world),
            "backwards": run_backwards(rank, world, group),
        }
        found["distillers"] = run_distillers(world)
        if world == 4:
            found |= {"grid": run_grid(rank), "fsdp": run_with_fsdp(rank)}
    else:
        found = {"refusals": errors_of(refusals(rank, group))}
        found["at once"] = run_cases(rank, world, group, "at once", ("everything",))
    torch.save(found, folder / f"{rank}.pt")
    die_in_the_middle(rank, world, group)


if __name__ == "__main__":
    show_stack_when_asked()
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
    leave()
