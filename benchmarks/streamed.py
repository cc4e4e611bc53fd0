"""The objectives whose matrices are streamed, each by this package and in plain PyTorch: rows
against rows, attention, all pairs of layers, and transport between rows.

A dense form holds what this package streams: scores (R, C), attention (H, T, T), the logits of all
layers. Like every dense form it computes in the inputs' dtype, and the softmax in float32.

Shape suffixes: R rows, C columns, T positions, H heads, D a width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fdd_kernels
from benchmarks.call import Call
from benchmarks.dense import kl, log_probabilities

TEMPERATURE, EPSILON, ITERATIONS = 2.0, 0.1, 20  # of SinKD, the defaults of both forms


def _tensors(call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return rows and columns of the student, and those of the teacher."""
    student = call.student_hidden[-1], call.student_weight
    return *student, call.teacher_hidden[-1], call.teacher_weight


def _wide(scores: Tensor) -> torch.dtype:
    return torch.promote_types(scores.dtype, torch.float32)


def _similarities(rows: Tensor, columns: Tensor, scale: float) -> Tensor:
    """Compute the log-softmax of scale * cos of all pairs, (R, C)."""
    scores = scale * F.linear(F.normalize(rows, dim=-1), F.normalize(columns, dim=-1))
    return F.log_softmax(scores, dim=-1, dtype=_wide(scores))


def contrastive_rows(call: Call, options: dict[str, Any]) -> Tensor:
    """Compute InfoNCE, or KL between the similarities of teacher and student, (R,)."""
    rows, columns, *teacher = _tensors(call)
    log_q = _similarities(rows, columns, options["scale"])
    if options["loss"] == "infonce":
        return F.nll_loss(log_q, call.labels, reduction="none")
    with torch.no_grad():
        log_p = _similarities(*teacher, options["teacher_scale"])
    return kl(log_q, log_p)


def fused_contrastive(call: Call, options: dict[str, Any]) -> Tensor:
    """Compute the same by this package, where a row's own column is the default."""
    rows, columns, *teacher = _tensors(call)
    if options["loss"] == "infonce":
        return fdd_kernels.fused_contrastive_kd(rows, columns, **options)
    return fdd_kernels.fused_contrastive_kd(rows, columns, *teacher, **options)


def _heads(rows: Tensor, heads: int) -> Tensor:
    """Cut (T, H * D) into heads, (H, T, D)."""
    return rows.unflatten(-1, (heads, -1)).transpose(0, 1)


def _attention(queries: Tensor, keys: Tensor, heads: int, hidden: Tensor | None) -> Tensor:
    """Compute the log-softmax of the scores of all heads, (H, T, T)."""
    q, k = _heads(queries, heads), _heads(keys, heads)
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if hidden is not None:
        scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
    return F.log_softmax(scores, dim=-1, dtype=_wide(scores))


def attention_rows(call: Call, options: dict[str, Any]) -> Tensor:
    """Compute KL between both models' rows of attention, the mean over heads, (T,)."""
    queries, keys, *teacher = _tensors(call)
    hidden = None
    if options.get("causal"):
        hidden = torch.arange(len(keys), device=keys.device) > call.labels[:, None]
    log_q = _attention(queries, keys, call.heads, hidden)
    with torch.no_grad():
        log_p = _attention(*teacher, call.heads, hidden)
    return kl(log_q, log_p).mean(0)


def fused_relation(call: Call, options: dict[str, Any]) -> Tensor:
    """Compute the same by this package, from tensors (1, T, H * D)."""
    tensors = [t[None] for t in _tensors(call)]
    found = fdd_kernels.fused_relation_kd(*tensors, relation_heads=call.heads, **options)
    return found.flatten()


def fused_attention(call: Call, options: dict[str, Any]) -> Tensor:
    """Compute the same by this package, from tensors (1, H, T, D)."""
    tensors = [_heads(t, call.heads)[None] for t in _tensors(call)]
    return fdd_kernels.fused_attention_kd(*tensors, **options).flatten()


def cost_rows(call: Call, options: dict[str, Any]) -> Tensor:
    """Compute KL of every layer of the student and every one of the teacher, (R, Ls * Lt)."""
    student = [log_probabilities(h, call.student_weight) for h in call.student_hidden]
    with torch.no_grad():
        teacher = [log_probabilities(h, call.teacher_weight) for h in call.teacher_hidden]
    return torch.stack([kl(log_q, log_p) for log_q in student for log_p in teacher], -1)


def fused_costs(call: Call, options: dict[str, Any]) -> Tensor:
    """Compute the same by this package, or the means over rows, (Ls * Lt,)."""
    models = call.student_hidden, call.student_weight, call.teacher_hidden, call.teacher_weight
    per_row = options["reduction"] == "none"
    costs = fdd_kernels.layer_costs(*models, per_row=per_row, backend=options["backend"])
    return costs.flatten(0, 1).T if per_row else costs.flatten()


def transport_rows(call: Call, options: dict[str, Any]) -> Tensor:
    """Compute the Sinkhorn distance of all rows as one group, (1,)."""
    rows, head, *teacher = _tensors(call)
    q = log_probabilities(rows, head, temperature=TEMPERATURE).exp()
    with torch.no_grad():
        p = log_probabilities(*teacher, temperature=TEMPERATURE).exp()
    cost = torch.cdist(q, p, p=1.0)
    log_p = -cost / EPSILON
    for _ in range(ITERATIONS):
        log_p = log_p.log_softmax(1).log_softmax(0)
    return (log_p.exp() * cost).sum()[None]


def fused_transport(call: Call, options: dict[str, Any]) -> Tensor:
    """Compute the same by this package."""
    return fdd_kernels.fused_sinkhorn_kd(*_tensors(call), **options).reshape(1)
