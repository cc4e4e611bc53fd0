"""Drop-ins for existing trainers."""

from fdd_kernels.integrations.hf_trainer import FDDTrainer

__all__ = ["FDDTrainer"]
