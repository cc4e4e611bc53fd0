"""Bound how far float32 arithmetic may move the gradients of a call; see `budgets.py`."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fdd_kernels.lens.divergences import DIVERGENCES
from fdd_kernels.objectives.fdd.api import fdd_loss_reference
from fdd_kernels.objectives.fdd.terms import RowTerms
from fdd_kernels.testing.problems import Outcome, Problem, evaluate
from fdd_kernels.testing.value_floors import (
    dense_call,
    gemm_rounding,
    summation_rounding,
    unit_roundoff,
    working_unit,
)

PERTURBATIONS = 3  # random movements of the logits from which the floor of a gradient is taken


def _moved(problem: Problem, seed: int, summation: float, unit: float, options: dict) -> Problem:
    """Return the problem in float64, every logit moved at random by at most its rounding error.

    Hidden states get one more unit vector per layer and row. Heads get as many more columns, which
    hold the movements.
    """
    generator = torch.Generator().manual_seed(seed)
    problem = problem.to(torch.float64)
    rows, layers = math.prod(problem.leading_shape), len(problem.student_hidden)
    eye = torch.eye(layers * rows, dtype=torch.float64, device=problem.student_weight.device)
    temperature = max(options.get("temperature", 1.0), options.get("output_temperature", 1.0))
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
        at = [
            eye[i * rows : (i + 1) * rows].reshape(*problem.leading_shape, -1)
            for i in range(layers)
        ]
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


def gradient_floors(
    problem: Problem, truth: Outcome, upstream=None, unit: float | None = None, **options
) -> dict[str, Tensor]:
    """Compute the floor of the error of every gradient, per row; see `budgets.py`.

    `truth` is the result of `exact`.
    """
    unit = working_unit(problem) if unit is None else unit
    columns = problem.student_weight.shape[0]
    summation = summation_rounding(columns, unit)
    floors = {}
    for name, leaf in problem.leaves.items():
        # Its own rounding to the leaf's dtype, and the relative error of the sums it is made of.
        relative = unit_roundoff(leaf.dtype) + summation + unit * math.sqrt(leaf.shape[-1])
        floors[name] = relative * row_norms(truth.gradients[name])
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
        extra = _denominator_floors(problem, upstream, unit, options)
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


def _denominator_floors(
    problem: Problem, upstream, unit: float, options: dict[str, Any]
) -> dict[str, Tensor]:
    """Bound what the gradients of the softmax terms lose by their normalization, per row.

    With respect to the logits they are grad - q sum(grad). The sum, and q itself, are known up to
    the error of a sum over the columns, relative to sum(|grad|). The error is then q times a number
    per row, like a gradient of the row's log-sum-exp.
    """
    problem = problem.to(torch.float64)
    call = dense_call(problem, unit, options)
    o, final = call.options, len(call.student) - 1

    def row(layer: int, temperature: float, name: str) -> Tensor:
        z_s, z_t = (model[layer][0] / temperature for model in (call.student, call.teacher))
        size = 1.0
        if name in DIVERGENCES:
            log_q, log_p = (z.detach().log_softmax(-1) for z in (z_s, z_t))
            entry = DIVERGENCES[name]
            size = entry.grad(log_q, log_p, *entry.defaults).abs().sum(-1)
        return summation_rounding(call.plan.spec.columns, unit) * size * z_s.logsumexp(-1)

    trajectory = output_kd = ce = None
    if o.trajectory in DIVERGENCES and call.plan.trajectory:
        trajectory = torch.stack(
            [row(layer, o.temperature, o.trajectory) for layer in call.dynamics]
        ).mean(0)
    if call.plan.output_kd is not None:
        output_kd = row(final, o.output_temperature, "kl")
    if call.plan.ce is not None:
        ce = row(final, 1.0, "nll")
    leaves = problem.leaves
    floors = dict.fromkeys(leaves, 0.0)
    for term in (trajectory, output_kd, ce):
        if term is None:
            continue
        loss = call.reduce(
            RowTerms(*[t if t is term else None for t in (output_kd, trajectory, None, ce)])
        ).loss
        above = (
            torch.ones_like(loss)
            if upstream is None
            else torch.as_tensor(upstream).to(loss).expand_as(loss)
        )
        found = torch.autograd.grad(
            loss, list(leaves.values()), above, retain_graph=True, materialize_grads=True
        )
        floors = {name: floors[name] + row_norms(g) for name, g in zip(leaves, found)}
    return floors
