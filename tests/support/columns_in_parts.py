"""What processes with parts of the columns compute together, done one after another in this
process.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
from torch import Tensor

from fdd_kernels.engine import ops
from fdd_kernels.engine.shards import (
    first_pass,
    merge_statistics,
    part_statistics,
    second_pass_requests,
)
from fdd_kernels.engine.vocab_parallel import VocabShard, second_pass_sums
from fdd_kernels.lens.layout import GRAD_SUM, VALUE, Statistics
from fdd_kernels.objectives.fdd.loss import prepare, used_by
from fdd_kernels.objectives.fdd.objective import reduce_terms
from fdd_kernels.objectives.fdd.options import LossOptions
from fdd_kernels.objectives.fdd.terms import (
    row_terms_from_statistics,
    term_weights,
    upstream_gradients,
)
from fdd_kernels.objectives.reduction import loss_denominator
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
    frozen = p.frozen("student_hidden", "student_weight", "student_bias")
    plan, tensors = prepare(replace(frozen, num_items_in_batch=num_items_in_batch), chosen)
    tensors = used_by(plan, tensors)
    assert bounds[0] == 0
    assert bounds[-1] == plan.spec.columns
    valid, labels = tensors.valid, tensors.labels
    parts = []
    for rank, (first, last) in enumerate(itertools.pairwise(bounds)):
        shard = VocabShard(None, rank, bounds, len(p.student_weight))
        heads = {
            name: None if t is None else t[first:last]
            for name, t in tensors._asdict().items()
            if name.endswith(("weight", "bias"))
        }
        own_labels = None if labels is None else shard.own_labels(labels)
        inputs = tensors._replace(**heads, labels=own_labels)
        parts.append((inputs, replace(plan.spec, columns=last - first)))
    found = [
        part_statistics(
            i, spec, Statistics(*ops.lens_stats(*i, *first_pass(spec).encode(), plan.backend))
        )
        for i, spec in parts
    ]
    shifts, requests, moments = merge_statistics(plan.spec, *[torch.stack(s) for s in zip(*found)])
    if later := second_pass_requests(plan.spec):
        sums = sum(second_pass_sums(*part, shifts, requests) for part in parts)
        requests[later, VALUE], requests[later, GRAD_SUM] = sums.unbind(1)
    statistics = [
        s if valid is None else torch.where(valid, s, 0.0) for s in (shifts, requests, moments)
    ]
    denominator = loss_denominator(chosen.reduction, tensors, num_items_in_batch)
    rows = row_terms_from_statistics(plan, *statistics)
    terms = reduce_terms(rows, chosen, valid, (), denominator)
    weights = term_weights(plan, denominator, (upstream, None, None, None, None), requests.dtype)
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
