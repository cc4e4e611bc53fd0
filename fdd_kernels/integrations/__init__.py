"""The FDD loss in existing trainers. Each is imported on first use, with the library it needs."""

import importlib

_HOME = {
    "FDDTrainer": "hf_trainer",
    "FDDTrainerMixin": "hf_trainer",
    "FDDSFTTrainer": "trl_sft",
    "FDDDistillationTrainer": "trl_on_policy",
    "FDDGKDTrainer": "trl_on_policy",
    "FDDLightningModule": "lightning_module",
    "AtomicCheckpoints": "checkpoints",
    "CheckpointError": "checkpoints",
    "NonFiniteLossError": "finite",
    "require_finite": "finite",
}
__all__ = list(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
