"""Right before fast: the public loss on the card against float64, held to the error budgets of
`fdd_kernels.testing`.
"""

from __future__ import annotations

import torch

from benchmarks.gpu.bench import STRATEGIES, Bench, WrongNumbersError, chosen, gradients, ours
from fdd_kernels.common.sizes import MIB
from fdd_kernels.testing import Problem, evaluate, exact, excesses, random_problem

PLAIN = {"leading": (2, 40), "columns": 5003, "layers": 5}
PLAIN |= {"student_width": 96, "teacher_width": 160}
TOY = {"leading": (1, 2), "columns": 37, "layers": 3, "student_width": 8, "teacher_width": 12}
CAPS = {"student_softcap": 30.0, "teacher_softcap": 20.0, "student_logit_scale": 0.5}
LABELS = {"ce_weight": 0.5, "temperature": 2.0, "output_in_dynamics": True}
SCALED = LABELS | {"output_temperature": 3.0, "scale_by_t2": True}
FEATURES = {"trajectory": "mse", "derivative": "mse"}
WEIGHTED = {"derivative": "weighted_cosine", "derivative_temperature": 2.0}

# Name: (changes of the problem, options).
PROBLEMS: dict[str, tuple[dict, dict]] = {
    "plain": ({}, {}),
    "vocabulary of 32001": ({"columns": 32001, "leading": (32,)}, {}),
    "frozen head": ({"frozen": True}, {}),
    "near-equal models": ({"near": 0.01}, {}),
    "mask": ({"mask": True}, {}),
    "labels, temperatures": ({"labels": True}, SCALED),
    "soft caps, scale": ({}, CAPS),
    "bias": ({"bias": "plain"}, {}),
    "bias of -inf, labels": ({"bias": "padded", "labels": True}, LABELS),
    "output alone": ({"layers": 1}, {}),
    "two layers": ({"layers": 2}, {}),
    "the same model": ({"near": 0.0}, {}),
    "float16": ({"dtype": torch.float16}, {}),
    "float32": ({"dtype": torch.float32}, {}),
    "odd widths": ({"student_width": 95, "teacher_width": 163}, {}),
    "few columns": ({"columns": 127}, {}),
    "one row, 1025 columns": ({"leading": (1,), "columns": 1025}, {}),
    "strided views": ({"contiguous": False}, {}),
    "feature space": ({"feature_space": True, "columns": 160}, FEATURES),
    "reverse_kl": ({}, {"trajectory": "reverse_kl"}),
    "jsd": ({}, {"trajectory": "jsd"}),
    "skew_kl": ({}, {"trajectory": "skew_kl"}),
    "skew_reverse_kl": ({}, {"trajectory": "skew_reverse_kl"}),
    "tv": ({}, {"trajectory": "tv"}),
    "alpha_beta": ({}, {"trajectory": "alpha_beta"}),
    "jsd twice": ({}, {"trajectory": "jsd", "output_divergence": "jsd:0.1"}),
    "weighted_cosine": ({}, WEIGHTED),
    "weighted_cosine, bias of -inf": ({"bias": "padded"}, WEIGHTED),
    "mse of deltas": ({}, {"derivative": "mse", "trajectory": "cosine"}),
    "no reduction": ({}, {"reduction": "none"}),
}
ESSENTIAL = ("plain", "vocabulary of 32001", "frozen head", "near-equal models", "mask")


def build(bench: Bench, name: str) -> tuple[Problem, dict]:
    """Build the problem of this name on the card, and its options."""
    changes, options = PROBLEMS[name]
    changes = dict(changes)
    frozen = changes.pop("frozen", False)
    shape = PLAIN | changes
    if bench.card.dry:
        shape = TOY | changes | {k: min(shape[k], TOY[k]) for k in ("leading", "layers", "columns")}
        if changes.get("feature_space"):
            shape["columns"] = TOY["teacher_width"]
    if shape.get("near") is not None:
        shape["teacher_width"] = shape["student_width"]
    problem = random_problem(**{"dtype": torch.bfloat16, "device": bench.card.device} | shape)
    return problem.frozen("student_weight", "student_bias") if frozen else problem, options


def check(bench: Bench, strategy: str, name: str) -> float:
    """Return the largest error as a fraction of its budget.

    Raises:
        WrongNumbersError: it is above 1; the message names what is wrong.
    """
    problem, options = build(bench, name)
    with chosen(strategy):
        outcome = evaluate(problem, backend="triton", **options)
    found = excesses(problem, outcome, None, **options)
    worst = max(found, key=lambda leaf: found[leaf].fraction)
    if not found[worst].fraction <= 1:
        raise WrongNumbersError(f"{strategy}, {name}: {worst} is beyond its budget: {found[worst]}")
    return found[worst].fraction


def essential(bench: Bench) -> dict:
    """Check the basis of every later step: the default strategy and its second backward pass."""
    for name in ESSENTIAL:
        bench.report(name, {"auto": check(bench, "auto", name)})
    bench.report("second backward", second_backward(bench))
    return {}


def every_problem(strategy: str):
    """Make the step of one strategy: all problems."""

    def step(bench: Bench) -> dict:
        for name in bench.card.size(PROBLEMS, ESSENTIAL[:2]):
            bench.report(name, {strategy: check(bench, strategy, name)})
        return {}

    return step


def second_backward(bench: Bench) -> dict:
    """Run backward through one graph twice, the second time with four times the upstream
    gradient.
    """
    problem, options = build(bench, "plain")
    leaves, loss = list(problem.leaves.values()), ours(problem, options)
    upstream = [torch.tensor(x, device=loss.device) for x in (0.5, 2.0)]
    first = torch.autograd.grad(loss, leaves, upstream[0], retain_graph=True)
    second = torch.autograd.grad(loss, leaves, upstream[1])
    worst = max(
        float((b.double() - 4 * a.double()).norm() / b.double().norm())
        for a, b in zip(first, second)
    )
    if not worst < 1e-2:  # both are rounded to bfloat16
        raise WrongNumbersError(f"a second backward pass differs from the first by {worst:.2e}")
    return {"relative_difference": worst}


def memory_bound(bench: Bench) -> dict:
    """Compare peak memory beside inputs and gradients, with 256 MiB of scratch, with the bound of
    each strategy.
    """
    workload = bench.workload("Llama", 8192)
    problem, call = bench.problem(workload), bench.call(workload)
    budget = bench.card.size(256 * MIB, 2**14)
    # Besides the scratch: dL/dlogits of a slab, dH of a block and the head's gradient in float32,
    # states of a block.
    states = 8 * call.layers * workload.rows * (call.student + call.teacher)
    bound = budget + 96 * MIB + states + 4 * call.columns * call.student + 64 * MIB
    for strategy in STRATEGIES:
        with chosen(strategy, budget):
            run = bench.card.once(lambda: gradients(ours, problem, workload.loss_options))
            run()
            (_, found), peak = bench.card.peak(run)
        outputs = sum(gradient.nbytes for gradient in found)
        found = {"peak_bytes": peak, "gradient_bytes": outputs, "bound_bytes": bound}
        bench.report(strategy, found)
        if strategy in ("cached", "slabbed") and peak - outputs > bound:
            raise WrongNumbersError(f"{strategy} takes more memory than it may: {found}")
    return {}


def near_equal(bench: Bench) -> dict:
    """Measure the error of a row's gradient for every way where rounding shows: 64 rows of models
    1% apart.
    """
    from benchmarks.gpu.end_to_end import WAYS

    shape = bench.card.size(PLAIN | {"leading": (64,), "columns": 32001}, TOY)
    shape = shape | {"near": 0.01, "teacher_width": shape["student_width"]}
    problem = random_problem(**shape, dtype=torch.bfloat16, device=bench.card.device)
    truth = exact(problem).gradients
    for name, way in WAYS.items():
        # not another loss, nor another budget of the same strategy
        if not way.whole or "GiB" in name or way.missing():
            continue
        _, found = way.run(bench, problem, {})
        errors = {}
        for (leaf, true), got in zip(truth.items(), found):
            norms = true.norm(dim=-1).clamp(min=1e-30)
            errors[leaf] = float(((got.double() - true).norm(dim=-1) / norms).max())
        worst = max(error for leaf, error in errors.items() if "hidden" in leaf)
        bench.report(name, {"worst_row": worst, "leaves": errors})
    return {}
