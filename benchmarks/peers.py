"""Other people's fused distillation losses. None has a derivative term, so they do less; each is
called once per layer.

Their versions are pinned in benchmarks/requirements.txt; each import is tried where it is needed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fdd_kernels.testing import Problem

LIGER_CHUNK = 128  # rows; its default, 1024, would be one chunk here


def _labels(problem: Problem) -> Tensor:
    # Distillation looks at them only to skip ignored positions.
    return torch.zeros(
        problem.student_hidden[0].shape[0], dtype=torch.long, device=problem.student_weight.device
    )


def over_layers(divergence: Callable[[Tensor, Tensor], Tensor], problem: Problem) -> Tensor:
    """Output KD plus the mean over the sampled layers, from one call per layer."""
    losses = [divergence(s, t) for s, t in zip(problem.student_hidden, problem.teacher_hidden)]
    *sampled, output = losses
    return output + sum(sampled) / len(sampled) if sampled else output


def liger(
    problem: Problem, options: dict, *, compiled: bool = False, chunk_rows: int = LIGER_CHUNK
) -> Tensor:
    """Liger-Kernel's LigerFusedLinearJSDLoss at beta=0, which is KL(teacher || student)."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    function = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0,
        weight_soft_loss=1.0,
        beta=0.0,
        compiled=compiled,
        chunk_size=chunk_rows,
    )
    labels = _labels(problem)
    return over_layers(
        lambda s, t: function(s, problem.student_weight, t, problem.teacher_weight, labels), problem
    )


def trl(problem: Problem, options: dict) -> Tensor:
    """The chunked divergence of TRL's DistillationTrainer at beta=0."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    mask = torch.ones_like(_labels(problem))[None]

    def divergence(s: Tensor, t: Tensor) -> Tensor:
        return _chunked_divergence_loss(
            s[None],
            t[None],
            problem.student_weight,
            problem.teacher_weight,
            mask,
            beta=0.0,
            student_final_logit_softcapping=options.get("student_softcap"),
            teacher_final_logit_softcapping=options.get("teacher_softcap"),
        )[0]

    return over_layers(divergence, problem)


def orda(problem: Problem, options: dict) -> Tensor:
    """orda-kernel's distillation_loss with a separate teacher, forward KL alone."""
    from orda_kernel import SeparateTeacher, distillation_loss

    labels = _labels(problem)
    backend = "torch" if problem.student_weight.device.type == "cpu" else "auto"

    def divergence(s: Tensor, t: Tensor) -> Tensor:
        teacher = SeparateTeacher(t, problem.teacher_weight)
        return distillation_loss(
            s,
            problem.student_weight,
            labels,
            teacher,
            student_ce_weight=0.0,
            teacher_ce_weight=0.0,
            kl_weight=1.0,
            backend=backend,
        ).loss

    return over_layers(divergence, problem)
