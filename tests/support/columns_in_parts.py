"""What processes with parts of the columns compute together, done one after another in this
process.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
from torch import Tensor

from fdd_kernels.engine import ops
from fdd_kernels.engine.shards import merge_statistics
from fdd_kernels.engine.vocab_parallel import (
    VocabShard,
    first_pass,
    part_statistics,
    second_pass_requests,
    second_pass_sums,
)
from fdd_kernels.lens.inputs import LensInputs
from fdd_kernels.lens.layout import GRAD_SUM, VALUE
from fdd_kernels.objectives.fdd.api import _rows_that_count
from fdd_kernels.objectives.fdd.options import LossOptions
from fdd_kernels.objectives.fdd.plan import make_plan
from fdd_kernels.objectives.fdd.terms import (
    combine,
    normaliser_of,
    row_terms_from_statistics,
    term_weights,
    upstream_gradients,
)
from fdd_kernels.testing import Outcome, Problem


def in_parts(
    problem: Problem,
    bounds: tuple[int, ...],
    upstream: float = 1.0,
    *,
    num_items_in_batch=None,
    **options,
) -> tuple[Outcome, dict[str, list[Tensor]]]:
    """The outcome of a call whose columns are cut at `bounds`, and every part's share of the hidden
    states' gradients.

    For reductions to a scalar.
    """
    p, chosen = problem, LossOptions(**options)
    plan, students, teachers = make_plan(
        chosen,
        p.student_hidden,
        p.student_weight,
        p.teacher_hidden,
        p.teacher_weight,
        p.labels,
        p.student_bias,
        p.teacher_bias,
        p.mask,
        num_items_in_batch,
    )
    assert bounds[0] == 0
    assert bounds[-1] == plan.spec.columns
    valid, labels = _rows_that_count(chosen, p.labels, p.mask)
    states = [
        [side[i].detach().reshape(-1, side[i].shape[-1]) for i in plan.layers]
        for side in (students, teachers)
    ]
    parts = []
    for rank, (first, last) in enumerate(itertools.pairwise(bounds)):
        heads = [
            None if t is None else t.detach()[first:last]
            for t in (p.student_weight, p.student_bias, p.teacher_weight, p.teacher_bias)
        ]
        own_labels = (
            VocabShard(None, rank, bounds, len(p.student_weight)).own_labels(labels)
            if chosen.ce_weight
            else None
        )
        inputs = LensInputs(states[0], *heads[:2], states[1], *heads[2:], valid, own_labels)
        parts.append((inputs, replace(plan.spec, columns=last - first)))
    found = [
        part_statistics(i, spec, ops.lens_stats(*i, *first_pass(spec).encode(), plan.backend))
        for i, spec in parts
    ]
    shifts, requests, moments = merge_statistics(plan.spec, *[torch.stack(s) for s in zip(*found)])
    if later := second_pass_requests(plan.spec):
        sums = sum(second_pass_sums(*part, shifts, requests) for part in parts)
        requests[later, VALUE], requests[later, GRAD_SUM] = sums.unbind(1)
    statistics = [
        s if valid is None else torch.where(valid, s, 0.0) for s in (shifts, requests, moments)
    ]
    normaliser = normaliser_of(
        chosen, parts[0][0].rows, valid, num_items_in_batch, p.student_weight.device
    )
    terms = combine(row_terms_from_statistics(plan, *statistics), chosen, valid, (), normaliser)
    weights = term_weights(plan, normaliser, (upstream, None, None, None, None), requests.dtype)
    of_statistics = upstream_gradients(plan, *statistics, valid, weights)
    needed = [True] * (len(plan.layers) + 1) + [p.student_bias is not None]
    of_parts = [
        ops.lens_grad(*i, *spec.encode(), plan.backend, *statistics, *of_statistics, needed)
        for i, spec in parts
    ]
    shares = {
        f"student_hidden[{layer}]": [
            of_part[at].view_as(p.student_hidden[layer]) for of_part in of_parts
        ]
        for at, layer in enumerate(plan.layers)
    }
    gradients = {
        f"student_hidden[{i}]": torch.zeros_like(h) for i, h in enumerate(p.student_hidden)
    }
    gradients |= {
        name: sum(
            share.to(torch.promote_types(share.dtype, torch.float32)) for share in of_name
        ).to(of_name[0].dtype)
        for name, of_name in shares.items()
    }
    for name, at in (("student_weight", len(plan.layers)), ("student_bias", len(plan.layers) + 1)):
        whole = getattr(p, name)
        if whole is not None:
            beyond = whole.new_zeros((len(whole) - bounds[-1], *whole.shape[1:]))
            gradients[name] = torch.cat([*[of_part[at] for of_part in of_parts], beyond]).detach()
    return Outcome(terms, {name: gradients[name] for name in p.leaves}), shares
