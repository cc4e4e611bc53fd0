"""Fused distillation losses of other packages (versions: benchmarks/requirements.txt).

None has a derivative term, so each does less work. Each is called once per layer, and imported when
it is called.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fdd_kernels.testing import Problem

LIGER_CHUNK = 128  # rows; its default of 1024 would be one chunk here


def _labels(problem: Problem) -> Tensor:
    """Make zeros (R,): the packages use labels only to skip ignored positions."""
    states = problem.student_hidden[0]
    return torch.zeros(len(states), dtype=torch.long, device=states.device)


def over_layers(divergence: Callable[[Tensor, Tensor], Tensor], problem: Problem) -> Tensor:
    """Add output KD and the mean over the sampled layers, from one call per layer."""
    losses = [divergence(s, t) for s, t in zip(problem.student_hidden, problem.teacher_hidden)]
    *sampled, output = losses
    return output + sum(sampled) / len(sampled) if sampled else output


def liger(
    problem: Problem, options: dict, *, compiled: bool = False, chunk_rows: int = LIGER_CHUNK
) -> Tensor:
    """Call Liger-Kernel's LigerFusedLinearJSDLoss at beta=0, which is KL(teacher || student)."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    weights = {"weight_hard_loss": 0.0, "weight_soft_loss": 1.0, "beta": 0.0}
    function = LigerFusedLinearJSDLoss(**weights, compiled=compiled, chunk_size=chunk_rows)
    heads, labels = (problem.student_weight, problem.teacher_weight), _labels(problem)
    return over_layers(lambda s, t: function(s, heads[0], t, heads[1], labels), problem)


def trl(problem: Problem, options: dict) -> Tensor:
    """Call the chunked divergence of TRL's DistillationTrainer at beta=0."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    heads, mask = (problem.student_weight, problem.teacher_weight), _labels(problem)[None] + 1
    caps = {
        f"{model}_final_logit_softcapping": options.get(f"{model}_softcap")
        for model in ("student", "teacher")
    }

    def divergence(s: Tensor, t: Tensor) -> Tensor:
        return _chunked_divergence_loss(s[None], t[None], *heads, mask, beta=0.0, **caps)[0]

    return over_layers(divergence, problem)


def orda(problem: Problem, options: dict) -> Tensor:
    """Call orda-kernel's distillation_loss with a separate teacher, forward KL alone."""
    from orda_kernel import SeparateTeacher, distillation_loss

    head, labels = problem.student_weight, _labels(problem)
    weights = {"student_ce_weight": 0.0, "teacher_ce_weight": 0.0, "kl_weight": 1.0}
    backend = "torch" if head.device.type == "cpu" else "auto"

    def divergence(s: Tensor, t: Tensor) -> Tensor:
        teacher = SeparateTeacher(t, problem.teacher_weight)
        return distillation_loss(s, head, labels, teacher, **weights, backend=backend).loss

    return over_layers(divergence, problem)
