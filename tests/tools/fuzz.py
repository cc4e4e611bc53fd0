"""Random configurations of the loss on every backend, each term and gradient within its error
budget against float64.

    python -m tests.tools.fuzz --count 10000 [--first SEED] [--backends cpu,torch]

tests/numerics/test_fuzz.py runs the first hundred. A configuration follows from its seed alone;
what fails is printed with it.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from dataclasses import replace

import torch

from fdd_kernels import fused_fdd_loss
from fdd_kernels.backends import BACKENDS, why_unavailable
from fdd_kernels.lens.divergences import DIVERGENCES, FEATURE_DISTANCES
from fdd_kernels.testing import Problem, beyond_budget, evaluate, random_problem

# The floor of a gradient is the largest of three random changes, which some of thousands of rows
# exceed. It is linear in them, which rows of tiny probabilities are not: compare these with the
# largest row.
SLACK, NOTHING = 2.0, 2.0**-48


# Drawn from in this order since the first release, so that seeds keep their configurations.
FIRST_TRAJECTORIES = ["kl", "reverse_kl", "jsd", "skew_kl", "cosine", "mse"]
FIRST_DERIVATIVES = ["cosine", "centered_cosine", "mse", None]


def configuration(seed: int, later: bool = True) -> tuple[Problem, dict, str]:
    """Make a problem, the options of the loss, and a line that describes it.

    `later` adds the options of later releases, which draw numbers of their own.
    """
    draw = random.Random(seed)

    def some(*choices):
        return draw.choice(choices)

    def between(low: float, high: float) -> float:
        return math.exp(draw.uniform(math.log(low), math.log(high)))

    feature_space, near = draw.random() < 0.15, some(None, None, 1.0, 1e-1, 1e-2, 1e-3)
    dtype = some(torch.float32, torch.float32, torch.bfloat16, torch.float16)
    # Gradients of more confident models leave the range of float16.
    spread = some(0.0, between(0.1, 10), between(0.1, 10 if dtype == torch.float16 else 1000))
    labels, bias = (
        draw.random() < 0.5,
        None if feature_space else some(None, None, "plain", "padded"),
    )
    # The angle of vectors of a few columns, some of them excluded, may have no digits.
    width = draw.randint(8, 40)
    sizes = {
        "leading": (draw.randint(1, 12),),
        "columns": width if feature_space else some(draw.randint(8, 40), draw.randint(100, 400)),
        "student_width": width,
        "teacher_width": width if near is not None else draw.randint(2, 40),
        "layers": draw.randint(2 if feature_space else 1, 4),
    }
    problem = random_problem(
        **sizes,
        dtype=dtype,
        seed=seed,
        spread=spread,
        bias=bias,
        labels=labels,
        mask=draw.random() < 0.3,
        near=None if feature_space else near,
        feature_space=feature_space,
        contiguous=draw.random() < 0.8,
    )
    options = {
        "trajectory": some(*FEATURE_DISTANCES) if feature_space else some(*FIRST_TRAJECTORIES),
        "derivative": some(*FIRST_DERIVATIVES),
        "alpha": some(1.0, 0.3),
        "beta": some(1.0, 0.3, 0.0),
        "output_in_dynamics": feature_space or draw.random() < 0.4,
        "reduction": some("mean", "sum", "none"),
    }
    if not feature_space:
        options |= {
            "temperature": some(1.0, between(0.1, 10)),
            "output_temperature": some(1.0, between(0.1, 10)),
            "scale_by_t2": draw.random() < 0.3,
            "ce_weight": 0.5 if labels and draw.random() < 0.5 else 0.0,
        }
        for side in ("student", "teacher"):
            options[f"{side}_logit_scale"] = some(1.0, 1.0, between(0.1, 2))
            if bias != "padded":  # a soft cap in front of -inf
                options[f"{side}_softcap"] = some(None, None, between(1, 50))
    if later:
        weights, more = later_options(seed, sizes, options, feature_space)
        problem, options = replace(problem, token_weights=weights), options | more
        problem, more = paired_layers(seed, problem, options["output_in_dynamics"])
        options |= more
    what = (
        f"{sizes} {dtype} spread={spread:.3g} near={near} bias={bias} feature_space={feature_space}"
    )
    return problem, options, what


def later_options(
    seed: int, sizes: dict, options: dict, feature_space: bool
) -> tuple[torch.Tensor | None, dict]:
    """Draw token weights, or None, and the options that came after the first release."""
    draw, more = random.Random(f"later {seed}"), {}

    def text() -> str:
        name = draw.choice(list(DIVERGENCES))
        share = draw.choice([draw.random(), 10 ** draw.uniform(-4, -1), 0.0])
        power = draw.choice([draw.uniform(0.2, 2), 1.0])  # with another power of 0 still above 0
        of = {"alpha_beta": [(share, power), (power, share)]}
        # Towards 1 its gradient, of the order (1 - alpha)^2, is a difference of larger numbers.
        of["skew_reverse_kl"] = [(min(share, 0.9),)]
        numbers = draw.choice(of.get(name, [(share,), (1 - share,)]))
        if name in ("kl", "reverse_kl", "tv") or numbers == (1.0,) or draw.random() < 0.3:
            return name
        return f"{name}:{','.join(map(repr, numbers))}"

    layers = sizes["layers"] - (not options["output_in_dynamics"])
    if draw.random() < 0.3:
        chosen = tuple([draw.choice([0.0, 1.0, 2.5]) for _ in range(layers)])
        more["layer_weights"] = chosen if any(chosen) else None  # there may be nothing else
    if not feature_space:
        if draw.random() < 0.5:
            more["trajectory"] = text()
        if draw.random() < 0.5:
            more["output_divergence"] = text()
        if draw.random() < 0.4:
            more["derivative"] = "weighted_cosine"
        if draw.random() < 0.3:
            more["derivative_temperature"] = 10 ** draw.uniform(-0.5, 0.9)
        if draw.random() < 0.2:
            more |= {"trajectory": "kl", "output_divergence": "kl"}
            more["teacher_mix"] = draw.choice([0.0, draw.random(), 1 - 1e-4])
    weights = None
    if draw.random() < 0.3:
        chosen = [draw.choice([0.0, 1.0, 3 * draw.random()]) for _ in range(sizes["leading"][0])]
        weights = torch.tensor(chosen)
    return weights, more


def paired_layers(seed: int, problem: Problem, with_output: bool) -> tuple[Problem, dict]:
    """Draw a teacher of another depth and weights of pairs of layers, or change nothing."""
    draw = random.Random(f"pairs {seed}")
    students, teachers = len(problem.student_hidden) - (not with_output), draw.randint(1, 4)
    numbers = [0.0, 0.0, 1.0, 2.5]
    weights = [[draw.choice(numbers) for _ in range(teachers)] for _ in range(students)]
    if draw.random() < 0.7 or not any(map(any, weights)):  # there may be nothing else
        return problem, {}
    *sampled, final = problem.teacher_hidden
    states = [draw.choice([*sampled, final]) * draw.uniform(0.5, 1.5) for _ in range(teachers)]
    options = {"layer_weights": weights}
    if draw.random() < 0.5:
        options["derivative_layers"] = sorted(draw.choices(range(teachers), k=students))
    own = states[: teachers - with_output]
    return replace(problem, teacher_hidden=(*own, final)), options


def failures(seed: int, backends: list[str], later: bool = True) -> list[str]:
    """Return one line for each backend's term or gradient of this seed outside its budget."""
    problem, options, what = configuration(seed, later)
    found = []
    for backend in backends:
        outcome = evaluate(problem, fused_fdd_loss, backend=backend, **options)
        beyond = beyond_budget(problem, outcome, most=SLACK, **options)
        largest = {name: float(tensor.abs().max()) for name, tensor in outcome.gradients.items()}
        found += [
            f"seed {seed} {backend} {name}: {e.error:.2e} is {e.fraction:.2f} x {e.budget:.2e} at "
            f"{e.at}; {what}; {options}"
            for name, e in beyond.items()
            if not e.error <= NOTHING * largest.get(name, 0.0)
        ]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument(
        "--backends", default=None, help="comma-separated; default: all that run here"
    )
    arguments = parser.parse_args()
    here = [name for name in BACKENDS if why_unavailable(name, torch.device("cpu")) is None]
    backends = arguments.backends.split(",") if arguments.backends else here
    failed, started = 0, time.monotonic()
    for done, seed in enumerate(range(arguments.first, arguments.first + arguments.count), 1):
        lines = failures(seed, backends)
        failed += bool(lines)
        print(*lines, sep="\n", end="\n" if lines else "", flush=True)
        if done % 100 == 0:
            print(
                f"{done} configurations, {failed} failed, {time.monotonic() - started:.0f} s",
                file=sys.stderr,
                flush=True,
            )
    print(f"{arguments.count} configurations on {', '.join(backends)}: {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
