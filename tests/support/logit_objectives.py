"""Calls of the objectives of the logits, their formulas written out per row, and error budgets.

Formulas use nothing of the package. They take float64 logits over the temperature, (R, V) each, of
the valid rows, and are differentiated by autograd.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fdd_kernels import fused_decoupled_kd, fused_topk_kd, selected_logprobs
from fdd_kernels.testing import Problem, random_problem, unit_roundoff
from fdd_kernels.testing.dense_call import gemm_rounding, summation_rounding
from tests.support.oracles import jsd, kl

F32, F64 = torch.float32, torch.float64
NAMES = ["decoupled_kd", "topk_kd", "selected"]
LOSSES = NAMES[:2]
TEMPERATURES = [0.5, 1.0, 2.0, 8.0]
MOVES = 8  # random movements of the logits from which a floor is taken
ROUNDINGS = 12  # of the operations around a sum


def dkd_formula(z_s: Tensor, z_t: Tensor, call: Call, row: dict[str, Tensor]) -> Tensor:
    """DKD from the two softmaxes without the label, and from those of the label against them."""
    columns = torch.arange(z_s.shape[-1])
    is_label = columns == row["labels"][:, None]
    binary, rest = [], []
    for z in (z_s, z_t):
        others = z[~is_label].view(len(z), -1)
        own, lse = z[is_label], others.logsumexp(-1)
        binary.append(torch.stack([F.logsigmoid(own - lse), F.logsigmoid(lse - own)], -1))
        rest.append(others.log_softmax(-1))
    of_target, of_others = (kl(log_p, log_q) for log_q, log_p in (binary, rest))
    target = call.options.get("target_weight", 1.0)
    return target * of_target + call.options.get("nontarget_weight", 8.0) * of_others


def top_k_formula(z: Tensor, _: Tensor, call: Call, row: dict[str, Tensor]) -> Tensor:
    """The divergence over K tokens, renormalised or with the rest as one token more."""
    tail = call.options.get("tail", "bucket")
    values = []
    for ids, log_p, of_row in zip(row["ids"], row["logprobs"].to(F64), z):
        ids, log_p = ids[ids >= 0], log_p[ids >= 0]
        log_q = of_row.log_softmax(-1)[ids]
        if tail == "renormalize":
            log_q, log_p = log_q.log_softmax(-1), log_p.log_softmax(-1)
        if tail == "bucket":
            chosen = torch.zeros(len(of_row), dtype=torch.bool).index_fill(0, ids, True)
            of_rest = of_row[~chosen].logsumexp(-1) - of_row.logsumexp(-1)
            log_q = torch.cat([log_q, of_rest[None]])
            log_p = torch.cat([log_p, torch.log1p(-log_p.exp().sum())[None]])
        name, _, beta = call.options.get("divergence", "kl").partition(":")
        if name == "jsd":
            values.append(jsd(log_p, log_q, float(beta or 0.5)))
        else:
            values.append(kl(*((log_p, log_q) if name == "kl" else (log_q, log_p))))
    return torch.stack(values) if values else z.sum(-1)


def selected_formula(z: Tensor, _: Tensor, call: Call, row: dict[str, Tensor]) -> Tensor:
    log_q, ids = z.log_softmax(-1), row["ids"]
    return torch.where(ids >= 0, log_q.gather(-1, ids.clamp(min=0)), 0.0)


@dataclass(frozen=True)
class Call:
    """One call: a problem of one layer, options, and what an objective takes besides."""

    function: Callable[..., Tensor]
    formula: Callable[..., Tensor]
    problem: Problem
    options: dict[str, Any] = field(default_factory=dict)
    more: dict[str, Tensor] = field(default_factory=dict)

    @property
    def is_loss(self) -> bool:
        return self.function is not selected_logprobs

    @property
    def has_teacher(self) -> bool:
        return "teacher_hidden" in self._parameters

    @property
    def _parameters(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self.function).parameters

    def to(self, dtype: torch.dtype) -> Call:
        return replace(self, problem=self.problem.to(dtype))

    @property
    def leaves(self) -> dict[str, Tensor]:
        return self.problem.leaves

    def run(self, backend: str, upstream: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """The result and the gradients of its leaves."""
        result = self.value(backend)
        return result.detach(), self._gradients(result, upstream)

    def value(self, backend: str = "torch") -> Tensor:
        """The result with its graph."""
        return self.function(**self.arguments, backend=backend)

    @property
    def arguments(self) -> dict[str, Any]:
        """The call's keyword arguments but `backend`."""
        p = self.problem
        names = {"hidden": p.student_hidden[0], "weight": p.student_weight, "bias": p.student_bias}
        arguments = self.options | self.more
        if self.is_loss:
            arguments |= {f"student_{name}": tensor for name, tensor in names.items()}
            arguments |= {"labels": p.labels, "mask": p.mask, "token_weights": p.token_weights}
        else:
            arguments |= names
        if self.has_teacher:
            arguments |= {"teacher_hidden": p.teacher_hidden[0], "teacher_bias": p.teacher_bias}
            arguments["teacher_weight"] = p.teacher_weight
        return arguments

    def truth(
        self, upstream: Tensor | None = None, move: Callable[[str, Tensor], Tensor] | None = None
    ) -> Truth:
        """The formula in float64 on the same numbers; `move` changes logits and logprobs."""
        call, o = self.to(F64), self.options
        p, leading = call.problem, self.problem.leading_shape
        valid, row = self._rows()
        logits, of_logits = {}, None
        for side in ("student", "teacher") if self.has_teacher else ("student",):
            prefix = f"{side}_" if self.is_loss else ""
            hidden, weight, bias = (getattr(p, f"{side}_{n}") for n in ("hidden", "weight", "bias"))
            columns = o.get("vocab_size") or len(weight)
            x = hidden[0].reshape(-1, hidden[0].shape[-1])[valid] @ weight[:columns].T
            x = x if bias is None else x + bias[:columns]
            of_logits = x if side == "student" else of_logits
            u = o.get(f"{prefix}logit_scale", 1.0) * x
            u = u if move is None else move(side, u)
            cap = o.get(f"{prefix}softcap")
            u = u if cap is None else cap * torch.tanh(u / cap)
            u = u[:, self._live(columns)] if cap is None else u
            logits[side] = u / self.temperature_of(u)
        row = self._renumbered(row, len(p.student_weight))
        if move is not None and "logprobs" in row:
            row["logprobs"] = move("logprobs", row["logprobs"].to(F64))
        found = self.formula(logits["student"], logits.get("teacher"), self, row)
        values = found.new_zeros((math.prod(leading), *found.shape[1:]))
        values = values.index_put((valid.nonzero()[:, 0],), found)
        result = call._reduced(values, row, valid)
        total = (result * (1 if upstream is None else upstream.to(F64))).sum()
        (of_logits,) = torch.autograd.grad(total, [of_logits], retain_graph=True)
        return Truth(result.detach(), call._gradients(result, upstream), valid, of_logits)

    @property
    def temperature(self) -> float:
        return self.options.get("temperature", self._parameters["temperature"].default)

    def temperature_of(self, u: Tensor) -> float | Tensor:
        """The temperature of logits (R, V), of tokens that can occur."""
        return u.std(-1, keepdim=True) if self.temperature == "std" else self.temperature

    def _reduced(self, values: Tensor, row: dict[str, Tensor], valid: Tensor) -> Tensor:
        if not self.is_loss:
            return values.reshape(self.more["ids"].shape)
        p, reduction = self.problem, self.options.get("reduction", "mean")
        if self.options.get("scale_by_t2"):
            values = values * self.temperature**2
        if p.token_weights is not None:
            values = values * p.token_weights.reshape(-1).to(F64)
        if reduction == "none":
            return values.reshape(p.leading_shape)
        items = self.options.get("num_items_in_batch")
        if items is None:
            items = max(int(valid.sum()), 1) if reduction == "mean" else 1
        return values.sum() / items

    def _rows(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The valid rows, and what the objective has for each of them."""
        p = self.problem
        valid = torch.ones(p.leading_shape, dtype=torch.bool)
        ignored, rows = self.options.get("ignore_index", -100), dict(self.more)
        labels = p.labels
        if self.is_loss and labels is not None:
            if self.options.get("shift"):
                labels = F.pad(labels[..., 1:], (0, 1), value=ignored)
            valid &= labels != ignored
            rows["labels"] = labels
        if self.is_loss and p.mask is not None:
            valid &= p.mask != 0
        if not self.is_loss:
            ids = rows["ids"].reshape(*p.leading_shape, -1)
            rows["ids"] = ids.where(ids != ignored, -1)
        valid = valid.reshape(-1)
        count = math.prod(p.leading_shape)
        return valid, {
            n: t.reshape(count, *t.shape[len(p.leading_shape) :])[valid] for n, t in rows.items()
        }

    def _live(self, columns: int) -> Tensor:
        """The tokens that the student's bias does not exclude, (V,)."""
        bias = self.problem.student_bias
        return (
            torch.ones(columns, dtype=torch.bool) if bias is None else bias[:columns] > -torch.inf
        )

    def _renumbered(self, row: dict[str, Tensor], columns: int) -> dict[str, Tensor]:
        """Count tokens among the live ones; formulas never meet an excluded token."""
        if self.options.get("student_softcap" if self.is_loss else "softcap") is not None:
            return row
        number = self._live(columns).cumsum(0) - 1
        tokens = {
            n: t.where(t < 0, number[t.clamp(min=0)])
            for n, t in row.items()
            if not t.is_floating_point()
        }
        return {**row, **tokens}

    def _gradients(self, result: Tensor, upstream: Tensor | None) -> list[Tensor]:
        upstream = torch.ones_like(result) if upstream is None else upstream.to(result.dtype)
        return list(torch.autograd.grad(result, list(self.leaves.values()), upstream))


@dataclass(frozen=True)
class Truth:
    """A result in float64: value, gradients, valid rows, gradient of h W^T + b of these rows."""

    result: Tensor
    gradients: list[Tensor]
    valid: Tensor
    of_logits: Tensor


def random_call(name: str, leading=(2, 5), columns: int = 37, tokens: int = 4, **changes) -> Call:
    """Draw a call of an objective: "decoupled_kd", "topk_kd" or "selected".

    `changes` are those of `random_problem`, and `weights` for token weights, `options` of the call.
    """
    options, weights = changes.pop("options", {}), changes.pop("weights", False)
    changes.setdefault("labels", name == "decoupled_kd")
    problem = random_problem(leading, columns, layers=1, **changes)
    generator = torch.Generator().manual_seed(changes.get("seed", 0) + 1)
    if weights:
        drawn = torch.randint(0, 4, leading, generator=generator) / 2
        problem = replace(problem, token_weights=drawn.to(F32))
    if name == "decoupled_kd":
        return Call(fused_decoupled_kd, dkd_formula, problem, options)
    used = options.get("vocab_size") or columns
    teacher = problem.to(F64)
    z = teacher.teacher_hidden[0] @ teacher.teacher_weight[:used].T
    z = z if teacher.teacher_bias is None else z + teacher.teacher_bias[:used]
    log_p = (z / options.get("temperature", 1.0)).log_softmax(-1)
    logprobs, ids = log_p.topk(min(tokens, used), -1)
    ragged = torch.rand(ids.shape, generator=generator) < 0.2
    if name == "selected":
        ids = ids.masked_fill(ragged, options.get("ignore_index", -100))
        return Call(selected_logprobs, selected_formula, problem, options, {"ids": ids})
    ids, logprobs = ids.masked_fill(ragged, -1), logprobs.masked_fill(ragged, -torch.inf)
    more = {"ids": ids, "logprobs": logprobs.to(F32)}
    return Call(fused_topk_kd, top_k_formula, problem, options, more)


def norms(gradient: Tensor) -> Tensor:
    """Per row of a gradient its 2-norm; of a bias, absolute values."""
    return gradient.abs() if gradient.ndim == 1 else gradient.norm(dim=-1)


def assert_exact(call: Call, backend: str, upstream: Tensor | None = None) -> None:
    """Value and gradients per row are within budgets derived from the arithmetic.

    With u the unit roundoff of sums, logits are off by (sqrt(D) + 2) u sum |h w| and by three
    roundings of themselves, log-sum-exps by a sum over V. What that moves is measured in float64,
    where the logits are moved so far at random. A result is rounded once to its own dtype.
    """
    wide = call.problem.student_weight.dtype == F64
    # In float64 the formula is off by as much.
    unit = 2 * unit_roundoff(F64) if wide else unit_roundoff(F32)
    true = call.truth(upstream)
    value, gradients = call.run(backend, upstream)
    assert value.dtype == (F64 if wide else F32)
    columns = len(call.problem.student_weight)
    common, relative = summation_rounding(columns, unit), unit * (math.sqrt(columns) + ROUNDINGS)
    moves = cache(lambda: [_moved(call, upstream, unit, common, seed) for seed in range(MOVES)])
    rows = math.prod(call.problem.leading_shape)
    # A loss is a sum over rows, of which it may have rounded each.
    own = (relative + unit * math.sqrt(max(rows, 1))) * true.result.abs()
    of_value = lambda: _most([m.result for m in moves()], true.result)  # noqa: E731
    _assert_below((value - true.result).abs(), own, of_value, "value")
    if value.ndim:
        assert not value.reshape(rows, -1)[~true.valid].any()
    magnitude = _gemm_magnitudes(call, true)
    names = list(call.leaves)
    for i, (name, got, exact) in enumerate(zip(names, gradients, true.gradients)):
        leaf = call.leaves[name]
        assert got.dtype == leaf.dtype
        own = (unit_roundoff(leaf.dtype) + relative + unit * math.sqrt(rows)) * norms(exact)
        floor = own + unit * (math.sqrt(columns + rows) + ROUNDINGS) * magnitude[name]
        # 16 bits may store a small gradient as 0.
        floor = floor + math.sqrt(leaf.shape[-1]) * torch.finfo(leaf.dtype).tiny

        def of_gradient(i: int = i, exact: Tensor = exact) -> Tensor:
            return _most([m.gradients[i] for m in moves()], exact, norms)

        _assert_below(norms(got.double() - exact), floor, of_gradient, name)


def _moved(call: Call, upstream, unit: float, common: float, seed: int) -> Truth:
    generator, p = torch.Generator().manual_seed(seed), call.problem.to(F64)
    valid = call.truth(upstream).valid

    def move(side: str, u: Tensor) -> Tensor:
        random = 2 * torch.rand(u.shape, generator=generator, dtype=F64) - 1
        if side == "logprobs":
            return u + (unit * u.abs().where(u.isfinite(), 0.0) + common) * random
        hidden, weight, bias = (getattr(p, f"{side}_{n}") for n in ("hidden", "weight", "bias"))
        h = hidden[0].detach().reshape(-1, hidden[0].shape[-1])[valid]
        columns = u.shape[-1]
        prefix = f"{side}_" if call.is_loss else ""
        scale = call.options.get(f"{prefix}logit_scale", 1.0)
        bias = None if bias is None else bias.detach()[:columns]
        off = scale * gemm_rounding(h, weight.detach()[:columns], bias, unit)
        off = off + 3 * unit * u.detach().abs().where(u.detach().isfinite(), 0.0)
        if call.temperature == "std":  # a sum over the vocabulary itself
            off = off + common * u.detach().abs().where(u.detach().isfinite(), 0.0)
            live = u.detach()[:, u.isfinite().all(0)]
            return u + (off + common * live.std(-1, keepdim=True)) * random
        return u + (off + common * call.temperature) * random

    return call.truth(upstream, move)


def _most(moved: list[Tensor], true: Tensor, size: Callable = torch.abs) -> Tensor:
    found = torch.stack([size(m - true) for m in moved]).amax(0)
    # Single numbers: one that happens not to move says little.
    return found.clamp(min=float(found.mean()) / 8) if found.numel() else found


def _gemm_magnitudes(call: Call, true: Truth) -> dict[str, Tensor]:
    """Per row, the sum of magnitudes in the GEMMs of G = dL/dx with the head and the states."""
    p = call.problem.to(F64)
    rows, hidden = math.prod(p.leading_shape), p.student_hidden[0].detach()
    columns = true.of_logits.shape[-1]
    grad, h = true.of_logits.abs(), hidden.reshape(rows, -1)[true.valid].abs()
    of_hidden = hidden.new_zeros(rows)
    of_hidden[true.valid] = (grad @ p.student_weight.detach()[:columns].abs()).norm(dim=-1)
    of_weight = hidden.new_zeros(len(p.student_weight))
    of_weight[:columns] = (grad.T @ h).norm(dim=-1)
    of_bias = torch.zeros_like(of_weight)
    of_bias[:columns] = grad.sum(0)
    return {
        "student_hidden[0]": of_hidden.reshape(p.leading_shape),
        "student_weight": of_weight,
        "student_bias": of_bias,
    }


def _assert_below(error: Tensor, floor: Tensor, moves: Callable[[], Tensor], name: str) -> None:
    """An error is at most `floor` and twice `moves`, which are measured where the floor alone does
    not decide.
    """
    if (error <= floor).all():
        return
    floor = floor + 2 * moves()
    ok = error <= floor
    assert ok.all(), (
        f"{name}: error {float(error[~ok].max()):.3e} is above {float(floor[~ok].min()):.3e}"
    )


def upstream_of(call: Call) -> Tensor | None:
    """Differing upstream gradients for results per position."""
    if call.is_loss and call.options.get("reduction") != "none":
        return None
    shape = call.problem.leading_shape if call.is_loss else call.more["ids"].shape
    return torch.linspace(-1, 2, math.prod(shape)).reshape(shape)


def statistics_arguments(problem: Problem, **more) -> dict[str, Any]:
    """The arguments of `row_statistics`."""
    return {
        "student_hidden": problem.student_hidden[0],
        "student_weight": problem.student_weight,
        "teacher_hidden": problem.teacher_hidden[0],
        "teacher_weight": problem.teacher_weight,
        "labels": problem.labels,
        "student_bias": problem.student_bias,
        "teacher_bias": problem.teacher_bias,
        "mask": problem.mask,
        **more,
    }
