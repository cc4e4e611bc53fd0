"""TRL's SFTTrainer with the FDD loss: its data preparation, packing and completion-only labels, our loss."""

from __future__ import annotations

from torch import nn
from trl import SFTTrainer

from fdd_kernels.integrations.hf_trainer import FDDTrainerMixin
from fdd_kernels.teachers import Teacher


class FDDSFTTrainer(FDDTrainerMixin, SFTTrainer):
    """A `trl.SFTTrainer` whose loss is Feature Dynamics Distillation from `teacher`; for the rest see `FDDTrainer`.

    Args:
        *args, **kwargs: as for `trl.SFTTrainer`; `model` is the student, `peft_config` makes it a LoRA student.
        teacher: as for `FDDTrainer`.
        fdd_config: layers and loss options.

    Positions whose label is -100 do not count: prompts with completion-only or assistant-only loss, padding, and the first
    token of each packed sequence. TRL's own metrics (entropy, token accuracy) are not computed, since they need logits.

    Raises:
        ValueError: an option of SFTConfig that changes the loss (`loss_type`, `router_aux_loss_coef`).
        TypeError: a teacher cache, whose windows are not those that TRL prepares.
        TypeError, ValueError: see `FDDTrainer`.
    """

    def __init__(self, *args, teacher: nn.Module, **kwargs) -> None:
        if isinstance(teacher, Teacher):
            raise TypeError(
                f"FDDSFTTrainer prepares windows of its own, which a {type(teacher).__name__} does not hold: use FDDTrainer "
                "with the cache's dataset, or a live teacher"
            )
        super().__init__(*args, teacher=teacher, **kwargs)
        loss_type = getattr(self.args, "loss_type", "nll")
        if loss_type not in ("nll", "chunked_nll"):
            raise ValueError(f"FDDSFTTrainer's loss is the FDD loss: leave loss_type at its default, not {loss_type!r}")
        if getattr(self, "aux_loss_enabled", False):
            raise ValueError("FDDSFTTrainer adds no auxiliary loss of experts: set router_aux_loss_coef=0.0")
