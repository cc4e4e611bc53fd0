"""Fused Feature Dynamics Distillation losses: full vocabulary, every sampled layer, bounded
memory.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from fdd_kernels import _moved
from fdd_kernels.version import __version__

if TYPE_CHECKING:
    from fdd_kernels.hf.alignment_plot import plot_layer_alignment
    from fdd_kernels.hf.distiller import Distiller
    from fdd_kernels.objectives.alignment.costs import layer_costs
    from fdd_kernels.objectives.alignment.matching import align_layers
    from fdd_kernels.objectives.contrastive.api import fused_contrastive_kd
    from fdd_kernels.objectives.fdd.advantage import advantage_kd
    from fdd_kernels.objectives.fdd.api import FusedFDDLoss, fdd_loss_reference, fused_fdd_loss
    from fdd_kernels.objectives.fdd.options import FDDConfig, FDDLossTerms
    from fdd_kernels.objectives.features.deltas import RowDeltas, row_deltas
    from fdd_kernels.objectives.features.gram import gram_loss
    from fdd_kernels.objectives.features.relational import relational_kd
    from fdd_kernels.objectives.features.rows import attention_transfer, norm_direction_loss
    from fdd_kernels.objectives.gradient_balance import GradientBalance
    from fdd_kernels.objectives.logits.decoupled import fused_decoupled_kd
    from fdd_kernels.objectives.logits.divergence import fused_logit_kd
    from fdd_kernels.objectives.logits.gold import fused_gold_loss
    from fdd_kernels.objectives.logits.rank import fused_rank_kd
    from fdd_kernels.objectives.logits.rows import fused_rows
    from fdd_kernels.objectives.logits.selected import selected_logprobs
    from fdd_kernels.objectives.logits.sinkhorn import fused_sinkhorn_kd
    from fdd_kernels.objectives.logits.statistics import RowStatistics, row_statistics
    from fdd_kernels.objectives.logits.top_k import fused_topk_kd
    from fdd_kernels.objectives.relations.api import fused_attention_kd, fused_relation_kd
    from fdd_kernels.objectives.schedules import Stages, WeightSchedule
    from fdd_kernels.objectives.taid import TAIDSchedule

__all__ = [
    "Distiller",
    "FDDConfig",
    "FDDLossTerms",
    "FusedFDDLoss",
    "GradientBalance",
    "RowDeltas",
    "RowStatistics",
    "Stages",
    "TAIDSchedule",
    "WeightSchedule",
    "__version__",
    "advantage_kd",
    "align_layers",
    "attention_transfer",
    "fdd_loss_reference",
    "fused_attention_kd",
    "fused_contrastive_kd",
    "fused_decoupled_kd",
    "fused_fdd_loss",
    "fused_gold_loss",
    "fused_logit_kd",
    "fused_rank_kd",
    "fused_relation_kd",
    "fused_rows",
    "fused_sinkhorn_kd",
    "fused_topk_kd",
    "gram_loss",
    "layer_costs",
    "norm_direction_loss",
    "plot_layer_alignment",
    "relational_kd",
    "row_deltas",
    "row_statistics",
    "selected_logprobs",
]

_moved.install()

# Imported on first use, so that `fdd-kernels --help` does not import torch.
_HOMES = {
    "FusedFDDLoss": "objectives.fdd.api",
    "fdd_loss_reference": "objectives.fdd.api",
    "fused_fdd_loss": "objectives.fdd.api",
    "layer_costs": "objectives.alignment.costs",
    "align_layers": "objectives.alignment.matching",
    "FDDConfig": "objectives.fdd.options",
    "FDDLossTerms": "objectives.fdd.options",
    "RowStatistics": "objectives.logits.statistics",
    "fused_decoupled_kd": "objectives.logits.decoupled",
    "fused_gold_loss": "objectives.logits.gold",
    "fused_logit_kd": "objectives.logits.divergence",
    "fused_rank_kd": "objectives.logits.rank",
    "fused_rows": "objectives.logits.rows",
    "fused_sinkhorn_kd": "objectives.logits.sinkhorn",
    "fused_topk_kd": "objectives.logits.top_k",
    "row_statistics": "objectives.logits.statistics",
    "selected_logprobs": "objectives.logits.selected",
    "Distiller": "hf.distiller",
    "plot_layer_alignment": "hf.alignment_plot",
    "fused_attention_kd": "objectives.relations.api",
    "fused_relation_kd": "objectives.relations.api",
    "fused_contrastive_kd": "objectives.contrastive.api",
    "advantage_kd": "objectives.fdd.advantage",
    "RowDeltas": "objectives.features.deltas",
    "row_deltas": "objectives.features.deltas",
    "gram_loss": "objectives.features.gram",
    "relational_kd": "objectives.features.relational",
    "attention_transfer": "objectives.features.rows",
    "norm_direction_loss": "objectives.features.rows",
    "GradientBalance": "objectives.gradient_balance",
    "Stages": "objectives.schedules",
    "TAIDSchedule": "objectives.taid",
    "WeightSchedule": "objectives.schedules",
}


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"fdd_kernels.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
