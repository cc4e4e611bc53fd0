"""Bound how far float32 arithmetic may move the gradients of a call; see `budgets.py`."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fdd_kernels.lens.distances import DISTANCES
from fdd_kernels.lens.divergences import DIVERGENCES
from fdd_kernels.objectives.fdd.api import fdd_loss_reference
from fdd_kernels.objectives.fdd.reference import distance_of
from fdd_kernels.objectives.fdd.terms import RowTerms
from fdd_kernels.testing.dense_call import (
    UNDERFLOW,
    DenseCall,
    centred,
    dense_call,
    gemm_rounding,
    summation_rounding,
    unit_roundoff,
    working_dtype,
    working_unit,
)
from fdd_kernels.testing.problems import Outcome, Problem, evaluate
from fdd_kernels.testing.value_floors import PERTURBATIONS, sums_and_grads


def _moved(problem: Problem, seed: int, summation: float, unit: float, options: dict) -> Problem:
    """Return the problem in float64, every logit moved at random by at most its rounding error.

    Hidden states get one more unit vector per layer and row. Heads get as many more columns, which
    hold the movements.
    """
    generator = torch.Generator().manual_seed(seed)
    problem = problem.to(torch.float64)
    rows, device = math.prod(problem.leading_shape), problem.student_weight.device
    names = ("temperature", "output_temperature", "derivative_temperature")
    temperature = max(options.get(name) or 1.0 for name in names)
    changed = {}
    for side in ("student", "teacher"):
        hidden, weight, bias = (
            getattr(problem, f"{side}_{what}") for what in ("hidden", "weight", "bias")
        )
        if weight is None:
            continue
        flat = torch.cat([h.detach().reshape(rows, -1) for h in hidden])
        off = gemm_rounding(flat, weight.detach(), None if bias is None else bias.detach(), unit)
        off += summation * temperature / options.get(f"{side}_logit_scale", 1.0)
        moved = off * (
            2 * torch.rand(off.shape, generator=generator, dtype=torch.float64).to(off.device) - 1
        )
        eye = torch.eye(len(flat), dtype=torch.float64, device=device)
        at = eye.reshape(len(hidden), *problem.leading_shape, len(flat))
        grown = [
            torch.cat([h.detach(), e], -1).requires_grad_(h.requires_grad)
            for h, e in zip(hidden, at)
        ]
        changed[f"{side}_hidden"] = tuple(grown)
        # The student's in any case: the gradient of its movements is that of the logits.
        changed[f"{side}_weight"] = torch.cat([weight.detach(), moved.T], -1).requires_grad_(
            side == "student"
        )
    return replace(problem, **changed)


def row_norms(gradient: Tensor) -> Tensor:
    """Compute 2-norms over the last dimension of a gradient; of a bias, absolute values."""
    return gradient.abs() if gradient.ndim == 1 else gradient.norm(dim=-1)


def relative_floors(
    problem: Problem, truth: Outcome, unit: float | None = None
) -> dict[str, Tensor]:
    """Bound what every gradient loses, per row: its own rounding to the leaf's dtype, and the
    relative error of the sums it is made of. A part of `gradient_floors`.
    """
    unit = working_unit(problem) if unit is None else unit
    summation, floors = summation_rounding(problem.student_weight.shape[0], unit), {}
    for name, leaf in problem.leaves.items():
        relative = unit_roundoff(leaf.dtype) + summation + unit * math.sqrt(leaf.shape[-1])
        floors[name] = relative * row_norms(truth.gradients[name])
    return floors


def gradient_floors(
    problem: Problem, truth: Outcome, upstream=None, unit: float | None = None, **options
) -> dict[str, Tensor]:
    """Compute the floor of the error of every gradient, per row; see `budgets.py`.

    `truth` is the result of `exact`.
    """
    unit = working_unit(problem) if unit is None else unit
    summation = summation_rounding(problem.student_weight.shape[0], unit)
    floors = relative_floors(problem, truth, unit)
    moves = [0.0] * len(floors)
    for seed in range(PERTURBATIONS if floors else 0):
        moved_problem = _moved(problem, seed, summation, unit, options)
        moved = evaluate(moved_problem, fdd_loss_reference, upstream, **options)
        for i, (name, true) in enumerate(truth.gradients.items()):
            width = true.shape[-1]
            move = row_norms(moved.gradients[name][..., :width] - true)
            # single numbers: one that happens not to move says little
            if true.ndim == 1 and move.numel():
                move = move.clamp(min=float(move.mean()))
            moves[i] = torch.maximum(torch.as_tensor(moves[i]), move)
    if not floors:
        return {}
    of_gemms = _gemm_floors(problem, moved.gradients["student_weight"], unit, options)
    floors = {
        name: floor + 2 * move + of_gemms[name]
        for (name, floor), move in zip(floors.items(), moves)
    }
    if problem.teacher_weight is not None:
        extra = _softmax_floors(problem, upstream, unit, options)
        floors = {name: floor + extra[name] for name, floor in floors.items()}
    return floors


def _gemm_floors(
    problem: Problem, grad_moved_weight: Tensor, unit: float, options: dict[str, Any]
) -> dict[str, Tensor]:
    """Bound the error of the logits' gradient G and of its GEMMs with head and hidden states, per
    row.

    A GEMM of inner dimension n loses sqrt(n) u times the sum of the magnitudes, which matters where
    the sum itself cancels. Each of the dozen operations that form an element of G loses u. Under a
    soft cap that element is multiplied by 1 - tanh^2, which is off by u however small it is: there
    the magnitude is that of the gradient before this factor.
    """
    wide = problem.to(torch.float64)
    weight, width, rows = (
        wide.student_weight.detach(),
        wide.student_weight.shape[1],
        math.prod(problem.leading_shape),
    )
    hidden = torch.cat([h.detach().reshape(rows, width) for h in wide.student_hidden])
    grads = grad_moved_weight[:, width:].T.abs()  # |G|: layers and rows x columns
    cap = options.get("student_softcap")
    if cap is not None:
        x = hidden @ weight.T
        x = x if wide.student_bias is None else x + wide.student_bias.detach()
        factor = 1 - (options.get("student_logit_scale", 1.0) * x / cap).tanh().square()
        grads = torch.where(factor > 0, grads / factor, grads)
    of_hidden = unit * (math.sqrt(len(weight)) + 12) * (grads @ weight.abs()).norm(dim=-1)
    of_head = unit * (math.sqrt(len(hidden)) + 12)
    floors = {
        "student_weight": of_head * (grads.T @ hidden.abs()).norm(dim=-1),
        "student_bias": of_head * grads.sum(0),
    }
    for i in range(len(wide.student_hidden)):
        floors[f"student_hidden[{i}]"] = of_hidden[i * rows : (i + 1) * rows].reshape(
            problem.leading_shape
        )
    return floors


def _gradient_parts(call: DenseCall, s: Tensor, t: Tensor, z: Tensor) -> list[Tensor]:
    """Compute the multiples of s, t and s - t, (R, C) each, whose sum is the gradient of a weighted
    distance. Where few tokens have all the weight, the vectors are nearly parallel and it cancels.

    The factor of s may be a difference of t.t and s.s, over 2 |s|^3 |t|: it has the size of these.
    |s|^3 may underflow where the gradient is finite, so that s is divided by |s| first.
    """
    kind, root = call.options.derivative, z.softmax(-1).sqrt()
    s, t = centred(kind, s, t, z)
    sums, (_, of_st, of_dd) = sums_and_grads(kind, s, t)
    ss, tt = sums.squares[0]
    ratio = torch.where((ss > 0) & (tt > 0), (tt / ss).sqrt(), torch.inf)
    along_s = torch.where(ratio.isfinite(), (1 / ratio + ratio) / (2 * ss.sqrt()), 0.0)
    direction = s / ss.sqrt().where(ss > 0, 1.0)[:, None]
    along_s, of_st, of_dd = (factor[:, None] for factor in (along_s, of_st, of_dd))
    return [root * x for x in (along_s * direction, of_st * t, 2 * of_dd * (s - t))]


def _softmax_floors(
    problem: Problem, upstream, unit: float, options: dict[str, Any]
) -> dict[str, Tensor]:
    """Bound what the gradients lose where moved logits say little, per row.

    With respect to the logits a softmax term's is grad - q sum(grad). The sum, and q itself, are
    known up to the error of a sum over the columns, relative to sum(|grad|). The error is then q
    times a number per row, like a gradient of the row's log-sum-exp. Each of the dozen operations
    that form an element of `grad` loses u, which may be more than what the difference leaves.

    At a tie total variation's `grad` jumps by q. A token that is nearer to one than its error may
    be on the other side.

    Where weights underflow, all of a weighted distance's gradient may be lost
    (`DenseCall.underflow`). Elsewhere the three vectors that it is a sum of are off like sums.
    """
    tiny = torch.finfo(working_dtype(problem)).tiny
    problem = problem.to(torch.float64)
    call = replace(dense_call(problem, unit, options), tiny=tiny)
    summation, found = call.summation, []
    for term, factor, layers, temperature, divergence in call.divergences():
        log_q, log_p, off = call.log_probabilities(layers, temperature)
        z_s, log_q = call.student[layers.student][0] / temperature, log_q.detach()
        grad = DIVERGENCES[divergence.name].grad(log_q, log_p, *divergence.parameters)
        found.append((term, factor * summation * grad.abs().sum(-1) * z_s.logsumexp(-1)))
        own = 12 * unit * (grad.abs() * z_s.where(z_s.isfinite(), 0.0)).sum(-1)
        found.append((term, factor * own))
        # A probability that is no normal number may be 0, and its part of the gradient with it.
        lost = torch.where(log_q.exp() < UNDERFLOW * tiny, grad.abs(), 0.0)
        found.append((term, factor * (lost * z_s.where(z_s.isfinite(), 0.0)).sum(-1)))
        if divergence.name == "tv":
            near = (log_q - log_p).abs() <= (3 * sum(off) + 2 * summation)[:, None]
            jumps = torch.where(near, log_q.exp(), 0.0)
            found.append((term, factor * (jumps * z_s.where(near, 0.0)).sum(-1)))
            found.append((term, factor * jumps.sum(-1) * z_s.logsumexp(-1)))
    if call.plan.ce is not None:
        found.append(("ce", summation * call.student[-1][0].logsumexp(-1)))
    pairs = call.pairs() if DISTANCES[call.options.derivative or "mse"].weighted else []
    for pair in pairs:
        s, t, z = call.pair_vectors(*pair)
        live = torch.ones_like(z[0], dtype=torch.bool)
        distance = distance_of(call.options.derivative, s, t, live, z.detach())
        underflow = call.underflow(*pair)
        found.append(("derivative", 4 / len(pairs) * torch.where(underflow, distance, 0.0)))
        # A weight that is no normal number may be 0.
        off = torch.where(z.softmax(-1) < UNDERFLOW * tiny, 1.0, summation)
        for vector in _gradient_parts(call, s.detach(), t, z):
            vector = vector.masked_fill(underflow[:, None], 0.0)  # it may be infinite there
            found.append(("derivative", (off * vector * s).sum(-1) / len(pairs)))
    leaves = problem.leaves
    floors = dict.fromkeys(leaves, 0.0)
    for term, of_rows in found:
        loss = call.reduce(RowTerms(**dict.fromkeys(RowTerms._fields) | {term: of_rows})).loss
        above = (
            torch.ones_like(loss)
            if upstream is None
            else torch.as_tensor(upstream).to(loss).expand_as(loss)
        )
        grads = torch.autograd.grad(
            loss, list(leaves.values()), above, retain_graph=True, materialize_grads=True
        )
        floors = {name: floors[name] + row_norms(g) for name, g in zip(leaves, grads)}
    return floors
