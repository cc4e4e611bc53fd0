"""The measured objectives: each by this package, and in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fdd_kernels
from benchmarks import streamed
from benchmarks.call import Call, objective_of
from benchmarks.dense import fdd_rows, kl, log_probabilities
from benchmarks.workloads import Workload
from fdd_kernels.testing import Problem

Rows = Callable[[Call, dict[str, Any]], Tensor]
CHUNK_ROWS = 128
STATISTICS = ("lse_s", "lse_t", "entropy_s", "entropy_t", "kl", "agree", "label_logprob", "correct")


@dataclass(frozen=True)
class Objective:
    """One public function.

    Attributes:
        fused: `fused(call, options)` by this package, with "backend" and "reduction" in the
            options; one without `reduction` gives numbers per row.
        dense: `dense(call, options)`, the same per row in plain PyTorch, (R,) or (R, n); (1,) where
            rows depend on one another.
        teacher: whether it multiplies by the teacher's head.
        gradient: whether it has one.
        rows_alone: whether a row's number depends on no other row.
    """

    fused: Rows
    dense: Rows
    teacher: bool = True
    gradient: bool = True
    rows_alone: bool = True


def _student(call: Call) -> tuple[Tensor, Tensor]:
    return call.student_hidden[-1], call.student_weight


def _teacher(call: Call) -> tuple[Tensor, Tensor]:
    return call.teacher_hidden[-1], call.teacher_weight


def _decoupled_rows(call: Call, options: dict[str, Any]) -> Tensor:
    """Compute DKD: KL of the label's probability against all others', and KL among the others."""
    temperature, label = options.get("temperature", 4.0), call.labels[:, None]
    log_q = log_probabilities(*_student(call), temperature=temperature)
    with torch.no_grad():
        log_p = log_probabilities(*_teacher(call), temperature=temperature)

    def split(log: Tensor) -> tuple[Tensor, Tensor]:
        of_label = log.gather(-1, label)
        others = F.log_softmax(log.scatter(-1, label, -1e4), dim=-1)
        return torch.cat([of_label, torch.log1p(-of_label.exp())], -1), others

    (target_q, others_q), (target_p, others_p) = split(log_q), split(log_p)
    weights = options.get("target_weight", 1.0), options.get("nontarget_weight", 8.0)
    return weights[0] * kl(target_q, target_p) + weights[1] * kl(others_q, others_p)


def _topk_rows(call: Call, options: dict[str, Any]) -> Tensor:
    """Compute KL over the teacher's K likeliest tokens and one bucket for the others."""
    log_q = log_probabilities(*_student(call), temperature=options.get("temperature", 1.0))

    def with_tail(log: Tensor) -> Tensor:
        return torch.cat([log, torch.log1p(-log.exp().sum(-1, keepdim=True))], -1)

    return kl(with_tail(log_q.gather(-1, call.ids)), with_tail(call.logprobs))


def _logprob_rows(call: Call, options: dict[str, Any]) -> Tensor:
    return log_probabilities(*_student(call)).gather(-1, call.labels[:, None]).squeeze(-1)


@torch.no_grad()
def _statistics_rows(call: Call, options: dict[str, Any]) -> Tensor:
    """Compute what `STATISTICS` names, (R, 8)."""
    z_s, z_t = (F.linear(*model(call)) for model in (_student, _teacher))
    wide = torch.promote_types(z_s.dtype, torch.float32)
    lse = [z.to(wide).logsumexp(-1) for z in (z_s, z_t)]
    log_q, log_p = (z - of_row[:, None] for z, of_row in zip((z_s, z_t), lse))
    entropies = [-(log.exp() * log).sum(-1) for log in (log_q, log_p)]
    of_label = log_q.gather(-1, call.labels[:, None]).squeeze(-1)
    likeliest = z_s.argmax(-1)
    agree, correct = ((likeliest == other).to(wide) for other in (z_t.argmax(-1), call.labels))
    return torch.stack([*lse, *entropies, kl(log_q, log_p), agree, of_label, correct], -1)


def _fused_fdd(call: Call, options: dict[str, Any]) -> Tensor:
    return fdd_kernels.fused_fdd_loss(**call.arguments, **options)


def _fused_decoupled(call: Call, options: dict[str, Any]) -> Tensor:
    return fdd_kernels.fused_decoupled_kd(*_student(call), *_teacher(call), call.labels, **options)


def _fused_topk(call: Call, options: dict[str, Any]) -> Tensor:
    return fdd_kernels.fused_topk_kd(*_student(call), call.ids, call.logprobs, **options)


def _selected(call: Call, options: dict[str, Any]) -> Tensor:
    return fdd_kernels.selected_logprobs(*_student(call), call.labels, backend=options["backend"])


def _statistics(call: Call, options: dict[str, Any]) -> Tensor:
    found = fdd_kernels.row_statistics(
        *_student(call), *_teacher(call), call.labels, backend=options["backend"]
    )
    return torch.stack([getattr(found, name).to(found.kl.dtype) for name in STATISTICS], -1)


OBJECTIVES = {
    "fused_fdd_loss": Objective(_fused_fdd, fdd_rows),
    "fused_decoupled_kd": Objective(_fused_decoupled, _decoupled_rows),
    "fused_topk_kd": Objective(_fused_topk, _topk_rows, teacher=False),
    "selected_logprobs": Objective(_selected, _logprob_rows, teacher=False),
    "row_statistics": Objective(_statistics, _statistics_rows, gradient=False),
    "fused_contrastive_kd": Objective(streamed.fused_contrastive, streamed.contrastive_rows),
    "fused_relation_kd": Objective(streamed.fused_relation, streamed.attention_rows),
    "fused_attention_kd": Objective(streamed.fused_attention, streamed.attention_rows),
    "layer_costs": Objective(streamed.fused_costs, streamed.cost_rows),
    "fused_sinkhorn_kd": Objective(
        streamed.fused_transport, streamed.transport_rows, rows_alone=False
    ),
}


def has_teacher(workload: Workload) -> bool:
    """Tell whether the workload's objective multiplies by the teacher's head."""
    objective = OBJECTIVES[workload.objective]
    return objective.teacher and workload.loss_options.get("loss") != "infonce"


def fused(call: Problem, options: dict[str, Any]) -> Tensor:
    """Compute a call's objective by this package."""
    return OBJECTIVES[objective_of(call)].fused(call, options)


def dense_rows(call: Problem, options: dict[str, Any]) -> Tensor:
    """Compute a call's objective per row in plain PyTorch."""
    return OBJECTIVES[objective_of(call)].dense(call, options)


def chunked_rows(call: Call, options: dict[str, Any]) -> Tensor:
    """Compute the same, each chunk of rows under gradient checkpointing: backward recomputes
    logits.
    """
    chunks = [call.rows(slice(i, i + CHUNK_ROWS)) for i in range(0, call.row_count, CHUNK_ROWS)]
    return torch.cat([checkpoint(dense_rows, c, options, use_reentrant=False) for c in chunks])
