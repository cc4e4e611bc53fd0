"""Fused Feature Dynamics Distillation losses: full vocabulary, every sampled layer, bounded
memory.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from fdd_kernels import _moved
from fdd_kernels.version import __version__

if TYPE_CHECKING:
    from fdd_kernels.hf.distiller import Distiller
    from fdd_kernels.objectives.alignment.costs import layer_costs
    from fdd_kernels.objectives.alignment.matching import align_layers
    from fdd_kernels.objectives.fdd.api import FusedFDDLoss, fdd_loss_reference, fused_fdd_loss
    from fdd_kernels.objectives.fdd.options import FDDConfig, FDDLossTerms

__all__ = [
    "Distiller",
    "FDDConfig",
    "FDDLossTerms",
    "FusedFDDLoss",
    "__version__",
    "align_layers",
    "fdd_loss_reference",
    "fused_fdd_loss",
    "layer_costs",
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
    "Distiller": "hf.distiller",
}


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"fdd_kernels.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
