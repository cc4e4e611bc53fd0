"""TRL's SFTTrainer with the FDD loss: its data preparation, packing and completion-only labels, our loss."""

from __future__ import annotations

from trl import SFTTrainer

from fdd_kernels.integrations.hf_trainer import FDDTrainerMixin


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
        TypeError, ValueError: see `FDDTrainer`.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        loss_type = getattr(self.args, "loss_type", "nll")
        if loss_type not in ("nll", "chunked_nll"):
            raise ValueError(f"FDDSFTTrainer's loss is the FDD loss: leave loss_type at its default, not {loss_type!r}")
        if getattr(self, "aux_loss_enabled", False):
            raise ValueError("FDDSFTTrainer adds no auxiliary loss of experts: set router_aux_loss_coef=0.0")
