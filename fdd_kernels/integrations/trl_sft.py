"""TRL's SFTTrainer with the FDD loss; data preparation, packing and completion-only labels are
TRL's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn
from trl import SFTTrainer

from fdd_kernels.hf.positions import TOKEN_WEIGHTS
from fdd_kernels.hf.tasks import require_causal_lm, task_of
from fdd_kernels.hf.teachers import Teacher
from fdd_kernels.hf.wrappers import unwrap
from fdd_kernels.integrations.hf_trainer import FDDTrainerMixin


class FDDSFTTrainer(FDDTrainerMixin, SFTTrainer):
    """A `trl.SFTTrainer` whose loss is Feature Dynamics Distillation from `teacher`; for the rest
    see `FDDTrainer`.

    Args:
        *args, **kwargs: as for `trl.SFTTrainer`; `model` is the student, `peft_config` makes it a
            LoRA student.
        teacher: as for `FDDTrainer`. TRL must not change the windows of a teacher cache: give
            `args=SFTConfig(dataset_kwargs={"skip_prepare_dataset": True}, ...)`,
            `data_collator=fdd_kernels.data.pad_windows` and
            `train_dataset=datasets.Dataset.from_list(cache.dataset("train"))`.
        fdd_config: layers and loss options.

    Positions whose label is -100 are not valid: prompts with completion-only or assistant-only
    loss, padding, and the first token of each packed sequence. The router loss of a student with
    experts is weighted by SFTConfig's `router_aux_loss_coef`, or by the model's own coefficient if
    that is None. TRL's own metrics (entropy, token accuracy) need logits and are not computed.

    Raises:
        ValueError: an option of SFTConfig that changes the loss (`loss_type`); a teacher cache, or
            data with `token_weights`, without `skip_prepare_dataset` or without a collator.
        TypeError: the student is no causal LM; and see `FDDTrainer`.
        ValueError: see `FDDTrainer`.
    """

    def __init__(
        self, model, args=None, data_collator=None, *rest, teacher: nn.Module | Teacher, **kwargs
    ) -> None:
        if isinstance(model, nn.Module):
            require_causal_lm(task_of(unwrap(model)), "FDDSFTTrainer")
        prepared = getattr(args, "dataset_kwargs", None) or {}
        is_ready = prepared.get("skip_prepare_dataset") and data_collator
        if isinstance(teacher, Teacher) and not is_ready:
            raise ValueError(
                f"dataset_kwargs={prepared}, data_collator={data_collator}: TRL would prepare and "
                f"collate data of its own, which a {type(teacher).__name__} does not hold. Give "
                "SFTConfig(dataset_kwargs={'skip_prepare_dataset': True}), "
                "data_collator=fdd_kernels.data.pad_windows and "
                "train_dataset=Dataset.from_list(cache.dataset('train'))"
            )
        sets = dict(zip(("train_dataset", "eval_dataset"), rest)) | kwargs
        if not is_ready and any(TOKEN_WEIGHTS in names for names in columns_of(sets)):
            raise ValueError(
                f"the data has {TOKEN_WEIGHTS}, which TRL's preparation and collator leave out: "
                "tokenize the data, and give "
                "SFTConfig(dataset_kwargs={'skip_prepare_dataset': True}) and "
                "data_collator=fdd_kernels.data.pad_windows"
            )
        super().__init__(model, args, data_collator, *rest, teacher=teacher, **kwargs)
        loss_type = getattr(self.args, "loss_type", "nll")
        if loss_type not in ("nll", "chunked_nll"):
            raise ValueError(
                "FDDSFTTrainer's loss is the FDD loss: leave loss_type at its default, not "
                f"{loss_type!r}"
            )


def columns_of(sets: Mapping[str, Any]) -> Iterator[Iterable[str]]:
    """Yield the column names of all data sets; of a stream that does not know, its first row's."""
    for name in ("train_dataset", "eval_dataset"):
        given = sets.get(name)
        for of_name in given.values() if isinstance(given, dict) else [given]:
            names = getattr(of_name, "column_names", ())
            # TRL itself looks at the first row too.
            yield next(iter(of_name), ()) if names is None else names
