"""Contrastive calls, their formulas written out densely in float64, and error budgets.

Formulas use nothing of the package and are differentiated by autograd.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fdd_kernels import fused_contrastive_kd
from fdd_kernels.testing import unit_roundoff
from fdd_kernels.testing.dense_call import summation_rounding
from tests.support.logit_objectives import MOVES, ROUNDINGS, _assert_below, _most

F32, F64 = torch.float32, torch.float64
LOSSES = ["infonce", "kl", "supcon", "margin_mse"]
INF = math.inf


def softmax_loss(z: Tensor, targets: Tensor, left_out: Tensor) -> Tensor:
    """Per row -sum of targets * log_softmax(z); 0 where there is no column."""
    none = left_out.all(-1, keepdim=True)
    log_q = z.masked_fill(left_out & ~none, -INF).log_softmax(-1)
    return -(targets * torch.where(left_out, 0.0, log_q)).sum(-1)


@dataclass(frozen=True)
class Call:
    """One call: vectors of both sides, teachers, and options."""

    a: Tensor
    b: Tensor
    teachers: tuple[tuple[Tensor | None, Tensor], ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def loss(self) -> str:
        return self.options.get("loss", "infonce")

    @property
    def leaves(self) -> dict[str, Tensor]:
        named = {"a": self.a, "b": self.b, "scale": self.options.get("scale")}
        return {n: t for n, t in named.items() if isinstance(t, Tensor) and t.requires_grad}

    def arguments(self) -> dict[str, Any]:
        pairs = {"teachers": list(self.teachers)}
        if len(self.teachers) <= 1:
            a, b = self.teachers[0] if self.teachers else (None, None)
            pairs = {"teacher_a": a, "teacher_b": b}
        return {"student_a": self.a, "student_b": self.b, **pairs, **self.options}

    def value(self, backend: str = "auto") -> Tensor:
        return fused_contrastive_kd(**self.arguments(), backend=backend)

    def run(self, backend: str = "auto", upstream: Tensor | None = None):
        """The result and the gradients of its leaves."""
        result = self.value(backend)
        return result.detach(), self.gradients(result, upstream)

    def gradients(self, result: Tensor, upstream: Tensor | None = None) -> list[Tensor]:
        upstream = torch.ones_like(result) if upstream is None else upstream.to(result.dtype)
        return list(torch.autograd.grad(result, list(self.leaves.values()), upstream))

    def but(self, **options) -> Call:
        return replace(self, options=self.options | options)

    def to(self, dtype: torch.dtype) -> Call:
        def moved(tensor):
            if tensor is None:
                return None
            return tensor.detach().to(dtype).requires_grad_(tensor.requires_grad)

        options = {
            n: moved(v) if isinstance(v, Tensor) and v.is_floating_point() else v
            for n, v in self.options.items()
        }
        teachers = tuple([tuple([moved(t) for t in pair]) for pair in self.teachers])
        return replace(self, a=moved(self.a), b=moved(self.b), teachers=teachers, options=options)

    def truth(self, upstream: Tensor | None = None, move: Callable | None = None) -> Truth:
        """The formula in float64 on the same numbers; `move` changes scores of length-1 vectors."""
        call, o = self.to(F64), self.options
        move = move or (lambda x: x)
        scale = call.options.get("scale", 1.0)
        raw = not o.get("normalize", self.loss != "margin_mse")
        side = lambda x: x if raw else F.normalize(x, eps=1e-300)  # noqa: E731
        present = [
            torch.ones(len(x), dtype=torch.bool) if m is None else m != 0
            for x, m in ((call.a, o.get("mask")), (call.b, o.get("column_mask")))
        ]
        labels = o.get("labels")
        if labels is not None:
            present[0] = present[0] & (labels != o.get("ignore_index", -100))
        a, b = (
            torch.where(p[:, None], side(torch.where(p[:, None], x, 1.0)), 0.0)
            for x, p in zip((call.a, call.b), present)
        )
        student = move(a @ b.T)
        student = student if student.requires_grad else student.requires_grad_()
        teachers, scales = [], o.get("teacher_scale")
        for m, (ta, tb) in enumerate(call.teachers):
            factor = scales[m] if isinstance(scales, (list, tuple)) else scales
            factor = float(torch.as_tensor(scale).detach()) if factor is None else factor
            if o.get("positives") == "teacher":
                # Scaled as the student's scores, with gradient to the student's vectors.
                pair = [move(a @ side(tb).T), None if ta is None else move(b @ side(ta).T)]
                teachers.append([None if t is None else scale * t for t in pair])
            else:
                t = factor * move(side(ta) @ side(tb).T)
                teachers.append([t, t.T])
        tags = [o.get("row_tags"), o.get("column_tags")]
        tags[1] = tags[0] if tags[1] is None else tags[1]
        results, of_scores = [], []
        for direction in range(1 + bool(o.get("symmetric"))):
            s = student if direction == 0 else student.T
            rows, columns = present[:: 1 - 2 * direction]
            row_tags, column_tags = tags[:: 1 - 2 * direction]
            values = call._values(
                scale * s, [t[direction] for t in teachers], row_tags, column_tags, columns, labels
            )
            values = torch.where(rows, values, 0.0)
            results.append(call._reduced(values, rows))
            of_scores.append(s)
        result = sum(results) / len(results)
        up = 1 if upstream is None else upstream.to(F64)
        found = [
            torch.autograd.grad((r / len(results) * up).sum(), [student], retain_graph=True)[0]
            for r in results
        ]
        return Truth(
            result.detach(), call.gradients(result, upstream), sum(g.abs() for g in found), a, b
        )

    def _values(self, z, teachers, row_tags, column_tags, present, labels) -> Tensor:
        rows, columns = z.shape
        own = torch.arange(rows)[:, None] == torch.arange(columns)
        left_out = ~present.expand(rows, -1)
        same = None if row_tags is None else row_tags[:, None] == column_tags
        exclude = self.options.get("exclude", "none")
        if exclude != "none":
            left_out = left_out | (own if exclude == "self" else same)
        if self.loss == "infonce":
            if labels is not None:
                own = torch.arange(columns) == labels[:, None]
            left_out = (left_out & ~own) | ~present
            return softmax_loss(z, (own & present).to(F64), left_out)
        if self.loss == "kl":
            weights = self.options.get("teacher_weights")
            weights = torch.ones(len(teachers)) if weights is None else torch.as_tensor(weights)
            weights = weights.to(F64).reshape(len(teachers), -1, 1)
            some = left_out & ~left_out.all(-1, keepdim=True)
            p = [t.masked_fill(some, -INF).softmax(-1) for t in teachers]
            p = sum(w * q for w, q in zip(weights, p)) / weights.sum(0)
            p = p.masked_fill(left_out, 0.0)
            own_entropy = -(p * torch.where(p == 0, 1.0, p).log()).sum(-1)
            return softmax_loss(z, p, left_out) - own_entropy
        if self.loss == "margin_mse":
            e = (z - teachers[0]).masked_fill(left_out, torch.nan)
            values = []
            for of_row in e:
                e_i = of_row[~of_row.isnan()]
                values.append(2 * e_i.var(unbiased=False) if len(e_i) else 0 * of_row.nansum())
            return torch.stack(values) if values else z.sum(-1)
        positive = (same & ~left_out).to(F64)
        count = positive.sum(-1).clamp(min=1)
        if self.options.get("positives") == "teacher":
            some = left_out & ~left_out.all(-1, keepdim=True)
            lse = z.masked_fill(some, -INF).logsumexp(-1, keepdim=True)
            return (positive * (lse - teachers[0])).sum(-1) / count
        return softmax_loss(z, positive, left_out) / count

    def _reduced(self, values: Tensor, rows: Tensor) -> Tensor:
        reduction, items = self.options.get("reduction", "mean"), None
        if reduction == "none":
            return values
        items = self.options.get("num_items_in_batch")
        if items is None:
            items = max(int(rows.sum()), 1) if reduction == "mean" else 1
        return values.sum() / items


@dataclass(frozen=True)
class Truth:
    """A result in float64: value, gradients, |gradient| of a_i . b_j summed over directions, and
    the vectors a, b as they enter scores.
    """

    result: Tensor
    gradients: list[Tensor]
    of_scores: Tensor
    a: Tensor
    b: Tensor


def random_call(
    loss: str,
    rows: int = 9,
    columns: int | None = None,
    *,
    width: int = 6,
    teachers: int = 1,
    dtype: torch.dtype = F32,
    seed: int = 0,
    near: float | None = None,
    **options,
) -> Call:
    """Draw a call; with `near` the teacher differs from the student by so much."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=F64).to(dtype)

    columns = rows if columns is None else columns
    a, b = draw(rows, width), draw(columns, width)
    pairs = []
    of_teacher = options.get("positives") == "teacher"
    for m in range(teachers if loss in ("kl", "margin_mse") else int(of_teacher)):
        wide = width if of_teacher else width + 1 + m
        pair = draw(rows, wide), draw(columns, wide)
        if near is not None:
            pair = a + near * draw(rows, width), b + near * draw(columns, width)
        pairs.append(pair)
    if loss == "supcon" or options.get("exclude") == "same_tag":
        draws = [torch.randint(0, 3, (n,), generator=generator) for n in (rows, columns)]
        options = {"row_tags": draws[0], "column_tags": draws[1]} | options
    options = {"loss": loss} | options
    return Call(a.requires_grad_(), b.requires_grad_(), tuple(pairs), options)


def assert_exact(call: Call, backend: str = "auto", upstream: Tensor | None = None) -> None:
    """Value and gradients per row are within budgets derived from the arithmetic.

    With u the unit roundoff of sums, a score of normalised vectors is off by (sqrt(D) + ROUNDINGS)
    u sum |a b|, and log-sum-exps by a sum over C. What that moves is measured in float64, where the
    scores are moved so far at random. A result is rounded once to its own dtype.
    """
    wide = call.a.dtype == F64
    unit = 2 * unit_roundoff(F64) if wide else unit_roundoff(F32)
    true = call.truth(upstream)
    value, gradients = call.run(backend, upstream)
    assert value.dtype == (F64 if wide else F32)
    (rows, width), columns = call.a.shape, len(call.b)
    scale = float(torch.as_tensor(call.options.get("scale", 1.0)).detach())
    common = summation_rounding(columns, unit) / scale
    relative = unit * (math.sqrt(columns) + ROUNDINGS)

    def moved(seed: int) -> Truth:
        generator = torch.Generator().manual_seed(seed)

        def move(x: Tensor) -> Tensor:
            # sum |a_d b_d| is at most |a| |b|; scores that are sums of vectors' products know both.
            most = float((true.a.norm(dim=-1).max() * true.b.norm(dim=-1).max()).detach())
            most = max(most, float(x.detach().abs().max()))
            off = unit * (math.sqrt(width) + ROUNDINGS) * most + common
            return x + off * (2 * torch.rand(x.shape, generator=generator, dtype=F64) - 1)

        return call.truth(upstream, move)

    moves = cache(lambda: [moved(seed) for seed in range(MOVES)])
    own = (relative + unit * math.sqrt(max(rows, 1))) * true.result.abs()
    of_value = lambda: _most([m.result for m in moves()], true.result)  # noqa: E731
    _assert_below((value - true.result).abs(), own, of_value, "value")
    magnitude = _magnitudes(call, true)
    steps = math.sqrt(columns + rows) + math.sqrt(width) + ROUNDINGS
    for i, (name, got, exact) in enumerate(zip(call.leaves, gradients, true.gradients)):
        leaf = call.leaves[name]
        assert got.dtype == leaf.dtype
        own = (unit_roundoff(leaf.dtype) + relative + unit * math.sqrt(rows)) * _norms(exact)
        if name == "scale":
            steps = steps + math.sqrt(rows * width)
        floor = own + unit * steps * magnitude[name]
        floor = floor + math.sqrt(width) * torch.finfo(leaf.dtype).tiny

        def of_gradient(i: int = i, exact: Tensor = exact) -> Tensor:
            return _most([m.gradients[i] for m in moves()], exact, _norms)

        _assert_below(_norms(got.double() - exact), floor, of_gradient, name)


def _norms(gradient: Tensor) -> Tensor:
    return gradient.norm(dim=-1) if gradient.ndim else gradient.abs()


def _magnitudes(call: Call, true: Truth) -> dict[str, Tensor]:
    """Per row, the sum of magnitudes in the GEMMs of the scores' gradients with the other side."""
    a, b, g = true.a.detach().abs(), true.b.detach().abs(), true.of_scores
    raw = not call.options.get("normalize", call.loss != "margin_mse")
    found = {}
    for name, x, rows in (("a", call.a, g @ b), ("b", call.b, g.T @ a)):
        length = 1.0 if raw else x.detach().double().norm(dim=-1).clamp(min=1e-12)
        found[name] = rows.norm(dim=-1) / length
    scale = float(torch.as_tensor(call.options.get("scale", 1.0)).detach())
    found["scale"] = (g * (a @ b.T)).sum() / scale
    if call.options.get("positives") == "teacher":
        # The positives' gradients add at most as much as the softmax's.
        for name in ("a", "b"):
            other = true.a.norm(dim=-1).max() if name == "b" else 1.0
            found[name] = found[name] + float(g.sum(-1).max()) * other
        found["scale"] = found["scale"] + g.sum() / scale
    return found
