"""From per-row statistics to the loss, and back from the loss to the statistics: weights and
reductions, once for all.

The values are ordinary PyTorch on tensors of shape (R,) that autograd differentiates.
`upstream_gradients` has the same derivatives in closed form, in a tenth of the operators, for those
who form gradients one block of rows after another. Neither has a loop over layers or pairs of them,
or waits for a device.

Shape suffixes: P pairs of vectors (one a moment target), R rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fdd_kernels.lens.distances import DISTANCES, Distance, Sums
from fdd_kernels.lens.divergences import FEATURE_DISTANCES
from fdd_kernels.lens.layout import LSE_S, LSE_T, M_SS, M_TT, MEAN_S, MEAN_T, VALUE
from fdd_kernels.objectives.fdd.options import FDDLossTerms, LossOptions
from fdd_kernels.objectives.fdd.plan import Plan

_COMPARED_ELEMENTS = 2**22  # of the hidden states that are compared at a time


class RowTerms(NamedTuple):
    """The four terms per row, (R,) each, before weights; None: not computed. Means over layers and
    pairs are taken.
    """

    output_kd: Tensor | None
    trajectory: Tensor | None
    derivative: Tensor | None
    ce: Tensor | None


class TermWeights(NamedTuple):
    """What each request or pair of vectors of a term counts for in a total: numbers, scalars or
    (R,).
    """

    output_kd: Tensor | float
    trajectory: Tensor | float
    derivative: Tensor | float
    ce: Tensor | float


class _Vectors(NamedTuple):
    """Sums of the vectors that are compared, and the offsets (P, R) from their centred moments to
    them: mean - shift.
    """

    sums: Sums
    of_s: Tensor
    of_t: Tensor
    of_difference: Tensor


def _run(positions: Sequence[int]) -> slice:
    """Positions as a slice, whose reading needs neither an index on the device nor a copy: a plan's
    follow one another.
    """
    run = slice(positions[0], positions[-1] + 1)
    assert list(positions) == list(range(run.start, run.stop))
    return run


def _part(tensor: Tensor, run: slice) -> Tensor:
    """`tensor[run]`; the tensor itself where that is all of it, which spares an operator."""
    return tensor if run == slice(0, len(tensor)) else tensor[run]


def _compared_vectors(plan: Plan) -> dict[str, tuple[Distance, slice]]:
    """Term: distance and moment targets, of the terms that compare vectors, in the order of the
    targets.
    """
    found = {}
    if plan.trajectory and plan.options.trajectory in FEATURE_DISTANCES:
        found["trajectory"] = DISTANCES[plan.options.trajectory], _run(plan.trajectory)
    if plan.derivative:
        found["derivative"] = DISTANCES[plan.options.derivative], _run(plan.derivative)
    return found


def _layers_of_deltas(plan: Plan) -> slice:
    """The reads of the layers between which deltas are taken, for their log-sum-exps."""
    first, second = zip(*plan.derivative_requests)
    assert list(first[1:]) == list(second[:-1])
    return _run([*first, second[-1]])


def static_deltas(
    plan: Plan, student_hidden: Sequence[Tensor], teacher_hidden: Sequence[Tensor]
) -> Tensor | None:
    """Where a model's delta has length 0 because its two hidden states are equal: (moment targets,
    2, R) bool; None: no angle.

    The hidden states are of the spec's layers. Products of equal states may differ in their last
    bits, which would be the direction of a delta that has none; no bound on its length tells it
    from a short one, but the states themselves do.
    """
    if not plan.derivative or plan.options.derivative == "mse":
        return None
    models = [[h.detach() for h in states] for states in (student_hidden, teacher_hidden)]
    # of a layer's own values
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
    """(R,) bool: which rows of two (R, D) tensors are equal; a part of them at a time."""
    rows = max(1, _COMPARED_ELEMENTS // a.shape[1])
    if torch.compiler.is_compiling() or len(a) <= rows:
        return (a == b).all(-1)
    return torch.cat([(x == y).all(-1) for x, y in zip(a.split(rows), b.split(rows))])


def _vectors(
    plan: Plan, shifts: Tensor, requests: Tensor, moments: Tensor, static: Tensor | None
) -> _Vectors:
    """The vectors of all moment targets: what the statistics are relative to is put back, so that
    deltas are log q's.
    """
    means, offsets = moments[:, MEAN_S : MEAN_T + 1], []
    count, _, _, _, _, product, difference = moments.unbind(1)
    for term, (distance, run) in _compared_vectors(plan).items():
        offset = _part(means, run)
        if distance.centred:
            offset = torch.zeros_like(offset)
        elif term == "trajectory":  # the features themselves: their shifts are put back
            layers = _run([pair.second.student for pair in plan.spec.moments[run]])
            offset = offset + shifts[:, layers].transpose(0, 1) / plan.spec.moment_temperature
        elif plan.derivative_requests:
            lse = _part(requests, _layers_of_deltas(plan))[:, LSE_S : LSE_T + 1]
            offset = offset - (lse[1:] - lse[:-1])
        offsets.append(offset)
    offset = offsets[0] if len(offsets) == 1 else torch.cat(offsets)
    summed = count[:, None] * offset
    (offset_s, offset_t), (sum_s, sum_t) = offset.unbind(1), summed.unbind(1)
    apart = offset_s - offset_t
    sum_apart = count * apart
    squares = torch.addcmul(moments[:, M_SS : M_TT + 1], summed, offset)
    if static is not None:
        squares = squares.masked_fill(static, 0.0)
    sums = Sums(
        count=count,
        squares=squares,
        product=torch.addcmul(product, sum_s, offset_t),
        difference=torch.addcmul(difference, sum_apart, apart),
    )
    return _Vectors(sums, sum_s, sum_t, sum_apart)


def row_terms_from_statistics(
    plan: Plan, shifts: Tensor, requests: Tensor, moments: Tensor, static: Tensor | None = None
) -> RowTerms:
    """The terms of every row from the statistics of `spec.py`; `static` is of `static_deltas`."""
    compared, values = _compared_vectors(plan), {}
    if compared:
        sums = _vectors(plan, shifts, requests, moments, static).sums
        values = {
            term: distance.value(sums.at(run)).mean(0) for term, (distance, run) in compared.items()
        }
    if plan.trajectory and "trajectory" not in values:
        values["trajectory"] = requests[_run(plan.trajectory), VALUE].mean(0)
    return RowTerms(
        output_kd=None if plan.output_kd is None else requests[plan.output_kd, VALUE],
        trajectory=values.get("trajectory"),
        derivative=values.get("derivative"),
        ce=None if plan.ce is None else requests[plan.ce, VALUE],
    )


def divisor_of(items: Tensor | float) -> Tensor | float:
    """A number of items as a divisor; a tensor of 0, which nobody has looked at, becomes inf, so
    that what it divides is 0.
    """
    return torch.where(items == 0, torch.inf, items) if isinstance(items, Tensor) else items


def normaliser_of(
    options: LossOptions,
    rows: int,
    valid: Tensor | None,
    num_items_in_batch: Tensor | float | None,
    device: torch.device,
) -> Tensor | float | None:
    """What divides the sum over rows; None: nothing does."""
    if num_items_in_batch is None:
        if options.reduction != "mean":
            return None
        return max(rows, 1) if valid is None else valid.sum().clamp(min=1)
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.reshape(()).to(device)
    return divisor_of(num_items_in_batch)


def combine(
    terms: RowTerms,
    options: LossOptions,
    valid: Tensor | None,
    leading_shape: tuple[int, ...],
    normaliser: Tensor | float | None,
) -> FDDLossTerms:
    """Weights, temperature factor and reduction; rows with `valid` False count as 0. `normaliser`:
    of `normaliser_of`.
    """
    like = next(term for term in terms if term is not None)

    def reduce(term: Tensor | None) -> Tensor:
        if term is None:
            return like.new_zeros(leading_shape if options.reduction == "none" else ())
        if valid is not None:
            term = torch.where(valid, term, 0.0)
        if options.reduction == "none":
            return term.view(leading_shape)
        return term.sum() if normaliser is None else (term.sum() / normaliser).to(term.dtype)

    output_kd = reduce(terms.output_kd)
    if options.scale_by_t2:
        output_kd = output_kd * options.output_temperature**2
    trajectory, derivative, ce = (
        reduce(terms.trajectory),
        reduce(terms.derivative),
        reduce(terms.ce),
    )
    loss = (
        options.output_kd_weight * output_kd
        + options.alpha * trajectory
        + options.beta * derivative
        + options.ce_weight * ce
    )
    return FDDLossTerms(loss, output_kd, trajectory, derivative, ce)


def term_weights(
    plan: Plan,
    normaliser: Tensor | float | None,
    upstream: Sequence[Tensor | float | None],
    dtype: torch.dtype,
) -> TermWeights:
    """The weights of the total sum of `upstream` * terms, with the terms of `combine` (None: no
    gradient), in `dtype`.
    """
    if isinstance(normaliser, Tensor):
        normaliser = normaliser.to(dtype)
    options, (of_loss, *of_terms) = plan.options, upstream
    factors = (
        options.output_temperature**2 if options.scale_by_t2 else 1.0,
        1 / max(len(plan.trajectory), 1),
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
        weights.append(weight if normaliser is None else weight / normaliser)
    return TermWeights(*weights)


@torch.no_grad()
def upstream_gradients(
    plan: Plan,
    shifts: Tensor,
    requests: Tensor,
    moments: Tensor,
    valid: Tensor | None,
    weights: TermWeights,
    static: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradients of requests and moments of the total that has these `weights`; those of the
    teacher's statistics are 0.
    """
    of_requests, of_moments = torch.zeros_like(requests), torch.zeros_like(moments)
    of_value, compared = of_requests[:, VALUE], _compared_vectors(plan)
    if plan.trajectory and "trajectory" not in compared:
        of_value[_run(plan.trajectory)] = weights.trajectory
    if plan.ce is not None:
        of_value[plan.ce] = weights.ce
    if plan.output_kd is not None:  # perhaps a request of the trajectory
        of_value[plan.output_kd].add_(weights.output_kd)
    if compared:
        vectors = _vectors(plan, shifts, requests, moments, static)
        _, of_mean, _, of_ss, _, of_st, of_dd = of_moments.unbind(1)
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
        if "derivative" in compared and plan.derivative_requests:
            of_lse = _part(of_requests, _layers_of_deltas(plan))[:, LSE_S]
            of_shift = _part(of_mean, compared["derivative"][1])
            of_lse[1:].sub_(of_shift)
            of_lse[:-1].add_(of_shift)
    if valid is not None:
        of_requests, of_moments = (
            torch.where(valid, of_requests, 0.0),
            torch.where(valid, of_moments, 0.0),
        )
    return of_requests, of_moments
