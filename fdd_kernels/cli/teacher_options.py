"""Load the teacher of a command: its dtype, quantised, spread over devices, or from disk. Imports
no torch before it loads.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fdd_kernels.cli.parsing import require_choice
from fdd_kernels.common.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import nn

DTYPES = ("auto", "float32", "bfloat16")
QUANTIZATIONS = {"bnb4": "bitsandbytes", "bnb8": "bitsandbytes", "torchao-int8": "torchao"}
PLACES = ("auto", "balanced", "balanced_low_0", "sequential", "cpu", "disk")


@dataclass(frozen=True, kw_only=True)
class TeacherOptions:
    """Options of the teacher and of loading it.

    Args:
        teacher: a directory or name of a transformers causal LM with its tokenizer.
        teacher_quantization: bnb4 (nf4) or bnb8 of bitsandbytes, or torchao-int8 (weights only).
        teacher_device_map: placement of its weights: auto, balanced, balanced_low_0 or sequential
            spread them over all devices, cpu, disk (all stay on disk and are loaded module by
            module), or a device such as cuda:1.
        teacher_offload_folder: the folder for weights on disk.
    """

    teacher: str | None = None
    teacher_quantization: str | None = None
    teacher_device_map: str | None = None
    teacher_offload_folder: Path | None = None

    def __post_init__(self) -> None:
        quantization, place = self.teacher_quantization, self.teacher_device_map
        require_choice(self, teacher_quantization=QUANTIZATIONS)
        if (
            quantization is not None
            and importlib.util.find_spec(QUANTIZATIONS[quantization]) is None
        ):
            library = QUANTIZATIONS[quantization]
            raise UserError(
                f"teacher_quantization={quantization} needs {library}: pip install {library}"
            )
        if (
            place is not None
            and place not in PLACES
            and not place.startswith(("cuda", "xpu", "mps", "npu", "hpu"))
        ):
            raise UserError(
                f"teacher_device_map={place!r} is not one of {', '.join(PLACES)}, nor a device "
                "such as cuda:1"
            )
        if place == "disk" and self.teacher_offload_folder is None:
            raise UserError(
                "teacher_device_map=disk needs teacher_offload_folder, the folder for the weights"
            )
        if place == "disk" and quantization is not None:
            raise UserError(
                f"teacher_quantization={quantization} cannot be kept on disk: give another "
                "teacher_device_map"
            )
        if self.teacher_offload_folder is not None and place is None:
            raise UserError(
                "teacher_offload_folder without teacher_device_map has no effect: give auto or disk"
            )


def load_teacher(options: TeacherOptions, dtype: torch.dtype) -> nn.Module:
    """Load the teacher in evaluation mode, without gradients.

    Raises:
        UserError: it cannot be loaded with these options.
    """
    from fdd_kernels.cli.loading import as_user_error, load_model

    keywords: dict[str, Any] = {}
    if options.teacher_quantization is not None:
        keywords["quantization_config"] = _quantization(options.teacher_quantization, dtype)
    if options.teacher_device_map not in (None, "disk"):
        keywords["device_map"] = options.teacher_device_map
        if options.teacher_offload_folder is not None:
            keywords["offload_folder"] = str(options.teacher_offload_folder)
    if not keywords:
        teacher = load_model(options.teacher, "teacher").to(dtype)
    else:
        teacher = load_model(options.teacher, "teacher", **{_dtype_keyword(): dtype}, **keywords)
    if options.teacher_quantization == "torchao-int8" and not any(
        _of_torchao(p) for p in teacher.parameters()
    ):
        raise UserError(
            f"teacher_quantization=torchao-int8 finds nothing to quantise in {options.teacher}: "
            "torchao quantises torch.nn.Linear, and this model has none (GPT-2 has Conv1D); give "
            "bnb8 or bnb4"
        )
    teacher.requires_grad_(False)
    if options.teacher_device_map == "disk":
        from accelerate import disk_offload

        with as_user_error(f"cannot keep the teacher in {options.teacher_offload_folder}"):
            options.teacher_offload_folder.mkdir(parents=True, exist_ok=True)
            disk_offload(
                teacher, str(options.teacher_offload_folder), execution_device=_execution_device()
            )
    return teacher


def _of_torchao(parameter: torch.Tensor) -> bool:
    return type(parameter).__module__.startswith("torchao") or type(
        parameter.data
    ).__module__.startswith("torchao")


def _dtype_keyword() -> str:
    """The name of from_pretrained's argument for the dtype."""
    import transformers

    return (
        "dtype"
        if tuple(int(part) for part in transformers.__version__.split(".")[:2]) >= (4, 56)
        else "torch_dtype"
    )


def _execution_device() -> torch.device:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _quantization(name: str, dtype: torch.dtype):
    if name == "torchao-int8":
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    from transformers import BitsAndBytesConfig

    if name == "bnb8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )
