"""Strategies of hypothesis: problems of any shape, dtype and mask, and options for them."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from hypothesis import assume
from hypothesis import strategies as st

from fdd_kernels.lens.divergences import DERIVATIVES, FEATURE_DISTANCES
from fdd_kernels.testing import random_problem
from tests.support.options import DIVERGENCE_TEXTS

LEADING = st.sampled_from([(), (1,), (9,), (3, 4), (2, 1, 3)])
WIDTHS = st.integers(1, 20)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
TEMPERATURES = st.sampled_from([1.0, 0.5, 2.0, 3.7])
SOFTCAPS = st.sampled_from([None, 2.0, 30.0])
SCALES = st.sampled_from([1.0, 0.25, 3.0])
WEIGHTS = st.sampled_from([0.0, 0.3, 1.0, 2.5])
SEEDS = st.integers(0, 2**16)


@st.composite
def problems(draw, feature_space=False):
    return random_problem(
        draw(LEADING),
        draw(st.integers(3 if feature_space else 1, 70)),
        draw(WIDTHS),
        draw(WIDTHS),
        draw(st.integers(1, 5)),
        dtype=draw(DTYPES),
        seed=draw(SEEDS),
        bias=None if feature_space else draw(st.sampled_from([None, "plain", "padded"])),
        labels=draw(st.booleans()),
        mask=draw(st.booleans()),
        token_weights=draw(st.booleans()),
        contiguous=draw(st.booleans()),
        feature_space=feature_space,
    )


def reductions(draw, leading) -> tuple[dict, torch.Tensor | None]:
    """Draw a reduction with its denominator, and an upstream gradient for it."""
    reduction = draw(st.sampled_from(["mean", "sum", "none"]))
    if reduction == "none":
        return {"reduction": reduction}, torch.linspace(-1, 2, math.prod(leading)).reshape(leading)
    number = draw(st.sampled_from([None, 3, 17.5, torch.tensor(11)]))
    return {"reduction": reduction, "num_items_in_batch": number}, torch.tensor(
        draw(st.sampled_from([1.0, -2.0, 16.0]))
    )


@st.composite
def calls(draw):
    problem = draw(problems())
    options, upstream = reductions(draw, problem.leading_shape)
    columns = problem.student_weight.shape[0]
    if problem.labels is not None:
        options["ce_weight"] = draw(WEIGHTS)
        options["shift"] = bool(problem.leading_shape) and draw(st.booleans())
    if draw(st.booleans()):
        # A token beyond the columns compared would be an error.
        used = 1 if problem.labels is None else max(1, int(problem.labels.max()) + 1)
        options["vocab_size"] = draw(st.integers(used, columns))
    options |= {
        "trajectory": draw(st.sampled_from([*DIVERGENCE_TEXTS, *FEATURE_DISTANCES])),
        "derivative": draw(st.sampled_from([*DERIVATIVES, None])),
        "output_divergence": draw(st.sampled_from(DIVERGENCE_TEXTS)),
        "temperature": draw(TEMPERATURES),
        "derivative_temperature": draw(st.none() | TEMPERATURES),
        "output_temperature": draw(TEMPERATURES),
        "scale_by_t2": draw(st.booleans()),
        "student_softcap": draw(SOFTCAPS),
        "teacher_softcap": draw(SOFTCAPS),
        "student_logit_scale": draw(SCALES),
        "teacher_logit_scale": draw(SCALES),
        "output_in_dynamics": draw(st.booleans()),
        "alpha": draw(WEIGHTS),
        "beta": draw(WEIGHTS),
        # not 0: there may be nothing else to compute
        "output_kd_weight": draw(st.sampled_from([0.5, 1.0])),
    }
    mix = draw(st.sampled_from([1.0, 1.0, 0.6, 0.0]))
    if mix < 1:
        options |= {"teacher_mix": mix, "output_divergence": "kl"}
        if options["trajectory"] != "kl":
            options["alpha"] = 0.0
    layers = len(problem.student_hidden) - (not options["output_in_dynamics"])
    if draw(st.booleans()):
        options["layer_weights"] = tuple(draw(st.lists(WEIGHTS, min_size=layers, max_size=layers)))
    if problem.student_bias is not None and problem.student_bias.isinf().any():
        # A cap makes -inf finite, perhaps for one model alone: an infinite loss without a gradient.
        options["student_softcap"] = options["teacher_softcap"] = None
    live = options.get("vocab_size", columns)
    if problem.student_bias is not None:
        live = int(problem.student_bias[:live].isfinite().sum())
    if live <= 2 and options["derivative"] != "mse":
        # Deltas of one or two live columns are parallel or zero up to rounding: their angle is
        # rounding error, or undefined.
        options["derivative"] = None
    if live == 1 and options["trajectory"] == "cosine":
        options["trajectory"] = "mse"  # likewise
    return problem, options, upstream


@st.composite
def paired_calls(draw):
    """Draw calls whose models have any numbers of layers, with weights of pairs of layers."""
    problem, options, upstream = draw(calls())
    output = options["output_in_dynamics"]
    students = len(problem.student_hidden) - (not output)
    assume(students)
    teachers = draw(st.integers(1, 4))
    other = random_problem(
        problem.leading_shape,
        1,
        1,
        problem.teacher_hidden[0].shape[-1],
        teachers + (not output),
        dtype=problem.teacher_hidden[0].dtype,
        seed=draw(SEEDS),
    )
    row = st.lists(WEIGHTS, min_size=teachers, max_size=teachers).map(tuple)
    options["layer_weights"] = tuple(draw(st.lists(row, min_size=students, max_size=students)))
    if draw(st.booleans()):
        layers = st.integers(0, teachers - 1)
        drawn = draw(st.lists(layers, min_size=students, max_size=students))
        options["derivative_layers"] = tuple(sorted(drawn))
    return replace(problem, teacher_hidden=other.teacher_hidden), options, upstream
