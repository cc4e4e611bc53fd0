"""From row statistics to terms per row, and back: the FDD terms and their closed-form gradients.

The terms are ordinary PyTorch on tensors of shape (R,) that autograd differentiates.
`upstream_gradients` has the same derivatives in closed form, in a tenth of the operators, for the
cached-logits path. Neither waits for a device, or has a loop over layers or pairs, but for weights
of pairs of layers.

Shape suffixes: P pairs of vectors (one per pair moments), R rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fdd_kernels.lens.distances import DISTANCES, Distance
from fdd_kernels.lens.layout import (
    COUNT,
    LSE_S,
    LSE_T,
    MEAN_S,
    MEAN_T,
    VALUE,
)
from fdd_kernels.objectives.fdd.plan import Plan
from fdd_kernels.objectives.vectors import Vectors, about_zero, positions_of, shifts_of

_COMPARED_ELEMENTS = 2**22  # of the hidden states that are compared at a time


class RowTerms(NamedTuple):
    """The four terms per row, (R,) each, before weights; None for one that is not computed.

    Trajectory and derivative are means, or weighted sums, over pairs of layers and of deltas.
    """

    output_kd: Tensor | None
    trajectory: Tensor | None
    derivative: Tensor | None
    ce: Tensor | None


class TermWeights(NamedTuple):
    """The weight of each request or pair of a term in a total: a number, a scalar or (R,)."""

    output_kd: Tensor | float
    trajectory: Tensor | float
    derivative: Tensor | float
    ce: Tensor | float


def _run(positions: Sequence[int]) -> slice:
    """Turn a plan's positions, which follow one another, into a slice: a view, without a copy."""
    run = slice(positions[0], positions[-1] + 1)
    assert list(positions) == list(range(run.start, run.stop))
    return run


def _part(tensor: Tensor, run: slice) -> Tensor:
    """Slice a tensor; return the tensor itself where that is all of it, to save an operator."""
    return tensor if run == slice(0, len(tensor)) else tensor[run]


def _compared_vectors(plan: Plan) -> dict[str, tuple[Distance, slice]]:
    """Map each term that compares vectors to its distance and its pairs, in the pairs' order."""
    found = {}
    if plan.trajectory and plan.options.trajectory in DISTANCES:
        found["trajectory"] = DISTANCES[plan.options.trajectory], _run(plan.trajectory)
    if plan.derivative:
        found["derivative"] = DISTANCES[plan.options.derivative], _run(plan.derivative)
    return found


def _layers_of_deltas(plan: Plan) -> slice:
    """Return the requests with the log-sum-exps of the layers between which deltas are taken."""
    first, second = zip(*plan.derivative_requests)
    assert list(first[1:]) == list(second[:-1])
    return _run([*first, second[-1]])


def static_deltas(
    plan: Plan, student_hidden: Sequence[Tensor], teacher_hidden: Sequence[Tensor]
) -> Tensor | None:
    """Find the deltas of length 0, (P, 2, R) bool: those between two equal hidden states.

    Logits of equal states may differ in their last bits, which would then be the delta's direction.
    No bound on its length tells such a delta from a short one, but the states do. Returns None
    where no distance depends on a direction. The hidden states are of the spec's layers.
    """
    if not plan.derivative or not DISTANCES[plan.options.derivative].directional:
        return None
    models = [[h.detach() for h in states] for states in (student_hidden, teacher_hidden)]
    # For vectors of a single layer, which are no deltas.
    other = student_hidden[0].new_zeros(len(student_hidden[0]), dtype=torch.bool)
    found = []
    for pair in plan.spec.moments:
        if pair.first is None:
            found.append(torch.stack([other, other]))
            continue
        ends = zip(models, pair.first, pair.second)
        found.append(torch.stack([_equal_rows(h[first], h[second]) for h, first, second in ends]))
    return torch.stack(found)


def _equal_rows(a: Tensor, b: Tensor) -> Tensor:
    """Compare the rows of two (R, D) tensors, a part of them at a time: (R,) bool."""
    rows = max(1, _COMPARED_ELEMENTS // a.shape[1])
    if torch.compiler.is_compiling() or len(a) <= rows:
        return (a == b).all(-1)
    return torch.cat([(x == y).all(-1) for x, y in zip(a.split(rows), b.split(rows))])


def _vectors(
    plan: Plan, shifts: Tensor, requests: Tensor, moments: Tensor, static: Tensor | None
) -> Vectors:
    """Restate all moments about 0: shifts and log-sum-exps are put back, so that deltas of log q
    are compared.
    """
    means, offsets = moments[:, MEAN_S : MEAN_T + 1], []
    count = moments[:, COUNT]
    for term, (distance, run) in _compared_vectors(plan).items():
        offset = _part(means, run)
        if distance.weighted:  # the sums have normalised weights
            count = torch.cat([count[: run.start], torch.ones_like(count[run]), count[run.stop :]])
        if distance.centred:
            offset = torch.zeros_like(offset)
        elif term == "trajectory":  # of the features themselves
            own = shifts_of(shifts, [pair.second for pair in plan.spec.moments[run]])
            offset = offset + own / plan.options.temperature
        elif plan.derivative_requests:
            lse = _part(requests, _layers_of_deltas(plan))[:, LSE_S : LSE_T + 1]
            offset = offset - (lse[1:] - lse[:-1])
        offsets.append(offset)
    offset = offsets[0] if len(offsets) == 1 else torch.cat(offsets)
    return about_zero(moments, count, offset, static)


def row_terms_from_statistics(
    plan: Plan, shifts: Tensor, requests: Tensor, moments: Tensor, static: Tensor | None = None
) -> RowTerms:
    """Compute the terms of every row from row statistics; `static` is of `static_deltas`."""
    compared, values = _compared_vectors(plan), {}
    if compared:
        sums = _vectors(plan, shifts, requests, moments, static).sums
        values = {term: distance.value(sums.at(run)) for term, (distance, run) in compared.items()}
    if plan.trajectory and "trajectory" not in values:
        values["trajectory"] = requests[positions_of(plan.trajectory), VALUE]
    if plan.trajectory_weights:
        of_pairs = zip(plan.trajectory_weights, values["trajectory"])
        weighted = torch.stack([weight * of_pair for weight, of_pair in of_pairs])
        values["trajectory"] = weighted.sum(0, keepdim=True)
    values = {term: per_pair.mean(0) for term, per_pair in values.items()}
    return RowTerms(
        output_kd=None if plan.output_kd is None else requests[plan.output_kd, VALUE],
        trajectory=values.get("trajectory"),
        derivative=values.get("derivative"),
        ce=None if plan.ce is None else requests[plan.ce, VALUE],
    )


def term_weights(
    plan: Plan,
    denominator: Tensor | float | None,
    upstream: Sequence[Tensor | float | None],
    dtype: torch.dtype,
) -> TermWeights:
    """Compute the weights, in `dtype`, of the total sum(upstream * term).

    `upstream` has the gradients of the loss and of the four terms; None stands for no gradient.
    """
    if isinstance(denominator, Tensor):
        denominator = denominator.to(dtype)
    options, (of_loss, *of_terms) = plan.options, upstream
    factors = (
        options.output_temperature**2 if options.scale_by_t2 else 1.0,
        1 if plan.trajectory_weights else 1 / max(len(plan.trajectory), 1),
        1 / max(len(plan.derivative), 1),
        1.0,
    )
    weights = []
    for factor, of_term, in_loss in zip(
        factors,
        of_terms,
        (options.output_kd_weight, options.alpha, options.beta, options.ce_weight),
    ):
        weight = 0.0 if of_loss is None else factor * in_loss * of_loss
        weight = weight if of_term is None else weight + factor * of_term
        weights.append(weight if denominator is None else weight / denominator)
    return TermWeights(*weights)


def _weigh_pairs(plan: Plan, gradients: Tensor) -> None:
    """Multiply the trajectory's among the gradients by the weights of its pairs, in place."""
    for weight, index in zip(plan.trajectory_weights, plan.trajectory):
        gradients[index].mul_(weight)


@torch.no_grad()
def upstream_gradients(
    plan: Plan,
    shifts: Tensor,
    requests: Tensor,
    moments: Tensor,
    valid: Tensor | None,
    weights: TermWeights,
    static: Tensor | None = None,
    factors: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of requests and moments for the total that has these `weights`.

    Those of the teacher's statistics are 0. `factors` (R,) are those of the rows.
    """
    of_requests, of_moments = torch.zeros_like(requests), torch.zeros_like(moments)
    of_value, compared = of_requests[:, VALUE], _compared_vectors(plan)
    if plan.trajectory and "trajectory" not in compared:
        of_value[positions_of(plan.trajectory)] = weights.trajectory
        _weigh_pairs(plan, of_value)
    if plan.ce is not None:
        of_value[plan.ce] = weights.ce
    if plan.output_kd is not None:  # perhaps a request of the trajectory
        of_value[plan.output_kd].add_(weights.output_kd)
    if compared:
        vectors = _vectors(plan, shifts, requests, moments, static)
        _, of_mean, _, of_ss, _, of_st, of_dd, _, _ = of_moments.unbind(1)
        for write_grad, alike in itertools.groupby(
            compared.values(), lambda entry: entry[0].write_grad
        ):
            runs = [run for _, run in alike]
            run = slice(runs[0].start, runs[-1].stop)
            write_grad(
                vectors.sums.at(run), *[_part(of_sum, run) for of_sum in (of_ss, of_st, of_dd)]
            )
        of_mean.addcmul_(vectors.of_t, of_st)
        of_mean.addcmul_(vectors.of_s, of_ss, value=2).addcmul_(
            vectors.of_difference, of_dd, value=2
        )
        for term, (_, run) in compared.items():
            _part(of_moments, run).mul_(getattr(weights, term))
            if term == "trajectory":
                _weigh_pairs(plan, of_moments)
        if "derivative" in compared and plan.derivative_requests:
            of_lse = _part(of_requests, _layers_of_deltas(plan))[:, LSE_S]
            of_shift = _part(of_mean, compared["derivative"][1])
            of_lse[1:].sub_(of_shift)
            of_lse[:-1].add_(of_shift)
    if factors is not None:
        of_requests, of_moments = of_requests.mul_(factors), of_moments.mul_(factors)
    if valid is not None:
        of_requests, of_moments = (
            torch.where(valid, of_requests, 0.0),
            torch.where(valid, of_moments, 0.0),
        )
    return of_requests, of_moments
