"""Fused Feature Dynamics Distillation losses: the whole vocabulary, every sampled layer, no logits in memory."""

from fdd_kernels.api import FusedFDDLoss, fdd_loss_reference, fused_fdd_loss
from fdd_kernels.config import FDDConfig, FDDLossTerms
from fdd_kernels.version import __version__

__all__ = ["Distiller", "FDDConfig", "FDDLossTerms", "FusedFDDLoss", "__version__", "fdd_loss_reference", "fused_fdd_loss"]


def __getattr__(name: str):
    # Distiller needs transformers' models, the losses do not: it is imported when it is asked for.
    if name == "Distiller":
        from fdd_kernels.distiller import Distiller

        return Distiller
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
