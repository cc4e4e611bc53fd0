"""Calls that compare rows of attention, their formulas written out densely, and error budgets.

Formulas use nothing of the package, take float64 scores and are differentiated by autograd.
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

from fdd_kernels import fused_attention_kd, fused_relation_kd
from fdd_kernels.testing import unit_roundoff
from fdd_kernels.testing.dense_call import summation_rounding
from tests.support.logit_objectives import MOVES, ROUNDINGS, _assert_below, _most

F32, F64 = torch.float32, torch.float64
KINDS = ["kl", "jeffreys", "mse"]
NAMES = {
    "relation": ("student_x", "student_y", "teacher_x", "teacher_y"),
    "attention": ("q_s", "k_s", "q_t", "k_t"),
}


@dataclass(frozen=True)
class Call:
    """One call: the tensors of both models, student first, and options."""

    name: str
    tensors: tuple[Tensor, ...]
    options: dict[str, Any] = field(default_factory=dict)

    def arguments(self) -> dict[str, Any]:
        return dict(zip(NAMES[self.name], self.tensors)) | self.options

    @property
    def leaves(self) -> dict[str, Tensor]:
        named = zip(NAMES[self.name], self.tensors)
        return {name: t for name, t in named if t.requires_grad}

    def value(self, backend: str = "auto") -> Tensor:
        function = {"relation": fused_relation_kd, "attention": fused_attention_kd}[self.name]
        return function(**self.arguments(), backend=backend)

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
        moved = [t.detach().to(dtype).requires_grad_(t.requires_grad) for t in self.tensors]
        return replace(self, tensors=tuple(moved))

    def heads(self) -> list[Tensor]:
        """The tensors as (B, H, T, d), as many heads of each."""
        if self.name == "relation":
            many = self.options["relation_heads"]
            return [t.unflatten(2, (many, -1)).transpose(1, 2) for t in self.tensors]
        most = self.tensors[0].shape[1]
        return [t.repeat_interleave(most // t.shape[1], 1) for t in self.tensors]

    def truth(self, upstream: Tensor | None = None, move: Callable | None = None) -> Truth:
        """The formula in float64 on the same numbers; `move` changes scores."""
        call, o = self.to(F64), self.options
        move = move or (lambda side, x: x)
        tensors, scores = call.heads(), []
        for side, q, k in (("student", *tensors[:2]), ("teacher", *tensors[2:])):
            scale = o.get(f"{side}_scale") or 1 / math.sqrt(q.shape[-1])
            scores.append(move(side, scale * (q @ k.mT)))
        s, t = scores
        hidden, valid = self.hidden()
        hidden = hidden[:, None].expand_as(s)
        k = o.get("k")
        if k is not None and k < s.shape[-1]:
            at = t.masked_fill(hidden, -torch.inf).topk(k, -1).indices
            hidden = hidden | torch.ones_like(hidden).scatter(-1, at, False)
        values = self._values(s, t, hidden).mean(1)
        values = torch.where(valid, values, 0.0)
        result, reduction = values, o.get("reduction", "mean")
        if reduction != "none":
            items = o.get("num_items_in_batch")
            if items is None:
                items = max(int(valid.sum()), 1) if reduction == "mean" else 1
            result = values.sum() / items
        up = 1 if upstream is None else upstream.to(F64)
        (of_scores,) = torch.autograd.grad((result * up).sum(), [s], retain_graph=True)
        return Truth(result.detach(), call.gradients(result, upstream), of_scores.abs())

    def _values(self, s: Tensor, t: Tensor, hidden: Tensor) -> Tensor:
        kind = self.options.get("kind", "kl")
        if kind == "mse":
            return ((s - t) ** 2).masked_fill(hidden, 0).sum(-1) / (~hidden).sum(-1).clamp(min=1)
        log_q, log_p = (x.masked_fill(hidden, -1e300).log_softmax(-1) for x in (s, t))
        value = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
        if kind == "jeffreys":
            value = value + F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
        return value

    def hidden(self) -> tuple[Tensor, Tensor]:
        """Which columns rows do not see, (B, T, T), and which rows count, (B, T)."""
        o, shape = self.options, (self.tensors[0].shape[0], self.tensors[0].shape[-2])
        at = torch.arange(shape[1])
        hidden = torch.zeros(shape[0], shape[1], shape[1], dtype=torch.bool)
        if o.get("causal"):
            hidden |= at > at[:, None]
        if o.get("exclude_self"):
            hidden |= at == at[:, None]
        ids = o.get("ids")
        lengths, positions = o.get("lengths"), o.get("positions")
        if positions is not None:
            lengths = torch.diff(
                (positions.flatten() == 0).nonzero()[:, 0], append=torch.tensor([positions.numel()])
            ).tolist()
        if lengths is not None:
            ids = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)]).view(shape)
            hidden |= ids[:, :, None] != ids[:, None, :]
        if o.get("mask") is not None:
            hidden |= (o["mask"] == 0)[:, None, :]
        valid = ~hidden.all(-1)
        row_mask = o.get("mask") if self.name == "relation" else o.get("query_mask")
        return hidden, valid if row_mask is None else valid & (row_mask != 0)


@dataclass(frozen=True)
class Truth:
    """A result in float64: value, gradients, |gradient| of the scores (B, H, T, T)."""

    result: Tensor
    gradients: list[Tensor]
    of_scores: Tensor


def random_call(
    name: str,
    sequences: int = 2,
    length: int = 7,
    heads: int = 2,
    *,
    width: int = 4,
    keys: tuple[int, int] | None = None,
    dtype: torch.dtype = F32,
    spread: float = 1.5,
    seed: int = 0,
    **options,
) -> Call:
    """Draw a call; `keys` are numbers of heads of both models' keys."""
    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for i in range(4):
        d = width + i // 2
        many = heads if keys is None or i % 2 == 0 else keys[i // 2]
        shape = (sequences, length, heads * d)
        if name == "attention":
            shape = (sequences, many, length, d)
        drawn = spread * torch.randn(*shape, generator=generator, dtype=F64)
        tensors.append(drawn.to(dtype).requires_grad_(i < 2))
    if name == "relation":
        options = {"relation_heads": heads} | options
    return Call(name, tuple(tensors), options)


def assert_exact(call: Call, backend: str = "auto", upstream: Tensor | None = None) -> None:
    """Value and gradients per vector are within budgets derived from the arithmetic.

    With u the unit roundoff of sums, a score is off by (sqrt(d) + ROUNDINGS) u sum |q k|, and
    log-sum-exps by a sum over T. What that moves is measured in float64, where the scores are moved
    so far at random. A result is rounded once to its own dtype.
    """
    wide = call.tensors[0].dtype == F64
    unit = 2 * unit_roundoff(F64) if wide else unit_roundoff(F32)
    true = call.truth(upstream)
    value, gradients = call.run(backend, upstream)
    assert value.dtype == (F64 if wide else F32)
    tensors = [t.detach() for t in call.to(F64).heads()]
    width, length = tensors[0].shape[-1], tensors[0].shape[-2]
    rows = length * tensors[0].shape[0] * tensors[0].shape[1]
    common = summation_rounding(length, unit)
    relative = unit * (math.sqrt(length) + ROUNDINGS)

    def moved(seed: int) -> Truth:
        generator = torch.Generator().manual_seed(seed)

        def move(side: str, scores: Tensor) -> Tensor:
            q, k = tensors[:2] if side == "student" else tensors[2:]
            scale = call.options.get(f"{side}_scale") or 1 / math.sqrt(q.shape[-1])
            off = unit * (math.sqrt(q.shape[-1]) + ROUNDINGS) * scale * (q.abs() @ k.abs().mT)
            random = 2 * torch.rand(scores.shape, generator=generator, dtype=F64) - 1
            return scores + (off + common) * random

        return call.truth(upstream, move)

    moves = cache(lambda: [moved(seed) for seed in range(MOVES)])
    own = (relative + unit * math.sqrt(rows)) * true.result.abs()
    of_value = lambda: _most([m.result for m in moves()], true.result)  # noqa: E731
    _assert_below((value - true.result).abs(), own, of_value, "value")
    scale = call.options.get("student_scale") or 1 / math.sqrt(width)
    magnitudes = (
        scale * (true.of_scores @ tensors[1].abs()),
        scale * (true.of_scores.mT @ tensors[0].abs()),
    )
    by_name = dict(zip(NAMES[call.name], magnitudes))
    steps = math.sqrt(2 * length) + ROUNDINGS
    for i, (name, got, exact) in enumerate(zip(call.leaves, gradients, true.gradients)):
        leaf, magnitude = call.leaves[name], by_name[name]
        assert got.dtype == leaf.dtype
        if call.name == "relation":
            magnitude = magnitude.transpose(1, 2).flatten(2)
        else:
            magnitude = magnitude.unflatten(1, (leaf.shape[1], -1)).sum(2)
        own = (unit_roundoff(leaf.dtype) + relative) * _norms(exact)
        floor = own + unit * steps * _norms(magnitude)
        floor = floor + math.sqrt(leaf.shape[-1]) * torch.finfo(leaf.dtype).tiny

        def of_gradient(i: int = i, exact: Tensor = exact) -> Tensor:
            return _most([m.gradients[i] for m in moves()], exact, _norms)

        _assert_below(_norms(got.double() - exact), floor, of_gradient, name)


def _norms(gradient: Tensor) -> Tensor:
    return gradient.norm(dim=-1)
