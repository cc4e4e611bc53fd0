"""Refuse arguments of TRL's trainers on generated text that the FDD loss would leave out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from fdd_kernels.data import IGNORED
from fdd_kernels.hf.positions import TOKEN_WEIGHTS
from fdd_kernels.hf.teachers import Teacher, require_model
from fdd_kernels.integrations.trl_sft import columns_of
from fdd_kernels.objectives.fdd.options import FDDConfig

# Options of SFTConfig that change which tokens count, or how, and that GKDTrainer leaves out; with
# what they may be.
SFT_OPTIONS = {
    "loss_type": ("nll",),
    "packing": (False,),
    "eval_packing": (None, False),
    "padding_free": (False,),
    "assistant_only_loss": (False,),
    "completion_only_loss": (None, True),
}
_IMAGES = ("image", "images")


def require_options(name: str, args: Any, config_class: type, fixed: Mapping[str, tuple]) -> None:
    """Raise ValueError for options of TRL that this loss does not follow."""
    for server in ("teacher_model_server_url", "use_teacher_server"):
        if getattr(args, server, None):
            raise ValueError(
                f"{server}={getattr(args, server)!r}: a server gives log-probabilities, but {name} "
                "compares hidden states. Load the teacher here and give teacher=..., or use TRL's "
                "trainer without FDD"
            )
    for loading in ("teacher_model_init_kwargs", "teacher_model_revision"):
        if getattr(args, loading, None) is not None:
            raise ValueError(
                f"{loading}={getattr(args, loading)!r} would be ignored: load the teacher with it "
                f"and give {name}(teacher=...)"
            )
    default = {field.name: field.default for field in dataclasses.fields(config_class)}["beta"]
    if args.beta != default:
        raise ValueError(
            f"beta={args.beta} would be ignored: leave it at its default, {default}, and give "
            f'fdd_config=FDDConfig(output_divergence="jsd:{args.beta}"), which is the same '
            "divergence"
        )
    for option, accepted in fixed.items():
        if getattr(args, option, accepted[0]) not in accepted:
            raise ValueError(
                f"{option}={getattr(args, option)!r} would be ignored: {name}'s loss is the FDD "
                f"loss on every token of an answer. Leave {option}={accepted[0]!r}"
            )


def require_teacher(name: str, teacher: object, options: Mapping[str, Any]) -> None:
    """Raise TypeError unless there is one teacher, a model."""
    if "teacher_model" in options:
        raise TypeError(f"{name} takes the teacher once: give teacher=..., not teacher_model=...")
    if isinstance(teacher, Teacher):
        raise TypeError(
            f"teacher is a {type(teacher).__name__}, which holds fixed texts, but {name} generates "
            "its own: give the teacher's model"
        )
    require_model("teacher", teacher)


def require_texts(name: str, sets: Mapping[str, Any]) -> None:
    """Raise ValueError for data with columns that the loss cannot use."""
    for columns in columns_of(sets):
        if TOKEN_WEIGHTS in columns:
            raise ValueError(
                f"the data has {TOKEN_WEIGHTS}, but generated tokens are not those of the data: "
                "leave the column out, or use FDDSFTTrainer"
            )
        found = [column for column in _IMAGES if column in columns]
        if found:
            raise ValueError(
                f"the data has {found[0]}, but {name} compares texts alone: leave the column out"
            )


def require_ignored(config: FDDConfig | None) -> None:
    """Raise ValueError unless the loss ignores the label that TRL writes."""
    if config is not None and config.ignore_index != IGNORED:
        raise ValueError(
            f"fdd_config.ignore_index={config.ignore_index}, but TRL labels the tokens of a prompt "
            f"with {IGNORED}: leave ignore_index={IGNORED}"
        )
