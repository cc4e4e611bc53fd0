"""Calls of fused_rows, fused_logit_kd and fused_rank_kd, and their formulas written out per row.

Formulas are as those of `logit_objectives.py`: float64 logits over the temperature of the valid
rows, of tokens that can occur.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from fdd_kernels import fused_logit_kd, fused_rank_kd, fused_rows
from fdd_kernels.testing import random_problem
from tests.support.logit_objectives import Call
from tests.support.oracles import divergence, kl

NAMES = ["rows", "logit_kd", "uld", "listmle"]
DIVERGENCE_TEXTS = ["kl", "akl", "akl:0.8", "kl+reverse_kl", "kl+reverse_kl:0.2", "relative_mse"]


def focal(z_s: Tensor, z_t: Tensor, focus: Tensor) -> Tensor:
    """A user's loss: KL, raised where one says so, less a bonus for a large margin."""
    log_q, log_p = z_s.log_softmax(-1), z_t.log_softmax(-1)
    top = z_s.topk(2, -1).values
    margin = torch.nn.functional.softplus(top[:, 0] - top[:, 1])
    return focus * kl(log_p, log_q) - 0.1 * margin


def rows_with_focus(
    student_hidden, student_weight, teacher_hidden, teacher_weight, focus, temperature=1.0, **others
) -> Tensor:
    """`fused_rows` of `focal` as a function of keywords."""
    models = student_hidden, student_weight, teacher_hidden, teacher_weight
    return fused_rows(focal, *models, focus, temperature=temperature, **others)


def focal_formula(z_s: Tensor, z_t: Tensor, _: Call, row: dict[str, Tensor]) -> Tensor:
    return focal(z_s, z_t, row["focus"].to(z_s.dtype))


def akl_weight(log_p: Tensor, log_q: Tensor, mu: float) -> Tensor:
    """The share of the head, by the sorted order, of constants."""
    p, q = log_p.exp(), log_q.detach().exp()
    order = p.sort(-1, descending=True)
    inside = order.values.cumsum(-1) <= mu
    inside[:, 0] = True
    head = torch.zeros_like(inside).scatter(-1, order.indices, inside)
    gap = (p - q).abs()
    return (gap * head).sum(-1) / gap.sum(-1)


def logit_kd_formula(z_s: Tensor, z_t: Tensor, call: Call, _: dict[str, Tensor]) -> Tensor:
    name, _, number = call.options.get("divergence", "kl").partition(":")
    if name == "relative_mse":
        return (z_s - z_t).square().sum(-1) / z_t.square().sum(-1)
    log_q, log_p = z_s.log_softmax(-1), z_t.log_softmax(-1)
    if name not in ("akl", "kl+reverse_kl"):
        return divergence(call.options.get("divergence", "kl"), log_p, log_q)
    weight = float(number or 0.5)
    weight = akl_weight(log_p, log_q, weight) if name == "akl" else weight
    return weight * kl(log_p, log_q) + (1 - weight) * kl(log_q, log_p)


def uld_formula(z_s: Tensor, z_t: Tensor, _: Call, __: dict[str, Tensor]) -> Tensor:
    q, p = (z.softmax(-1).sort(-1, descending=True).values for z in (z_s, z_t))
    return (q - p).abs().sum(-1)


def listmle_formula(z_s: Tensor, z_t: Tensor, call: Call, _: dict[str, Tensor]) -> Tensor:
    """Rank after rank, the softmax of what is left."""
    ranked = z_s.gather(-1, z_t.argsort(-1, descending=True))
    k = call.options.get("k") or ranked.shape[-1]
    losses = [-ranked[:, i:].log_softmax(-1)[:, 0] for i in range(min(k, ranked.shape[-1]))]
    return torch.stack(losses, -1).sum(-1)


FORMULAS = {
    "rows": (rows_with_focus, focal_formula),
    "logit_kd": (fused_logit_kd, logit_kd_formula),
    "uld": (fused_rank_kd, uld_formula),
    "listmle": (fused_rank_kd, listmle_formula),
}


def random_row_call(name: str, leading=(2, 5), columns: int = 37, **changes) -> Call:
    """Draw a call of one of `NAMES`; `changes` are those of `random_problem`, and `options`."""
    options, more = dict(changes.pop("options", {})), {}
    function, formula = FORMULAS[name]
    problem = random_problem(leading, columns, layers=1, **changes)
    if name in ("uld", "listmle"):
        options["kind"] = name
    if name == "rows":
        generator = torch.Generator().manual_seed(changes.get("seed", 0) + 1)
        more["focus"] = torch.rand(leading, generator=generator, dtype=torch.float64)
    return Call(function, formula, problem, options, more)


def least_distance_to_ties(call: Call) -> float:
    """The least relative distance at which the formula jumps: between sorted probabilities and
    their differences ("uld"), logits of the teacher ("listmle"), and, of "akl", between sums of the
    teacher's sorted probabilities and mu, and between these probabilities.
    """
    found = []

    def watched(z_s: Tensor, z_t: Tensor, call: Call, row: dict[str, Tensor]) -> Tensor:
        q, p = (z.detach().softmax(-1).sort(-1, descending=True).values for z in (z_s, z_t))
        name, _, mu = call.options.get("divergence", "").partition(":")
        if call.options.get("kind") == "uld":
            found.extend([(q - p).abs() / q, (q[:, :-1] - q[:, 1:]) / q[:, 1:]])
        elif call.options.get("kind") == "listmle":
            found.append(z_t.sort(-1).values.diff())
        elif name == "akl":
            found.append((p.cumsum(-1) - float(mu or 0.5)).abs())
            found.append((p[:, :-1] - p[:, 1:]) / p[:, 1:])
        return call.formula(z_s, z_t, call, row)

    replace(call, formula=lambda z_s, z_t, _, row: watched(z_s, z_t, call, row)).truth()
    return min([float(t.min()) for t in found if t.numel()], default=math.inf)
