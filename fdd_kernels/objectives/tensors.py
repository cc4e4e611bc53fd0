"""Checks of single tensors: made before any work, naming argument, value and remedy."""

from __future__ import annotations

import torch
from torch import Tensor

from fdd_kernels.objectives.numbers import describe

FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32)
MASKS = (torch.bool, *INTEGERS, torch.uint8)


def require_float(name: str, tensor) -> None:
    """Refuse what is not a dense tensor of floating point."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"{name} is a {describe(tensor)}: pass float32, bfloat16, float16 or float64 "
            "(dequantise it first)"
        )
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} has layout {tensor.layout}: pass a dense tensor (.to_dense())")
    require_plain(name, tensor)


def require_plain(name: str, tensor: Tensor) -> None:
    """Refuse a DTensor, which stands for the tensors of several processes."""
    if torch.compiler.is_compiling():
        return
    if hasattr(tensor, "placements"):  # a DTensor, whose module takes long to import
        raise TypeError(
            f"{name} is a DTensor with placements {tensor.placements}: pass all of it "
            "(.full_tensor()), or, of heads that are split over their rows, this process's rows "
            "(.to_local()) together with vocab_group"
        )


def require_dtype(name: str, tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """Refuse what is not a tensor of one of the dtypes."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        expected = " or ".join([str(dtype).split(".")[1] for dtype in dtypes])
        raise TypeError(f"{name} is a {describe(tensor)}: expected {expected}")
    require_plain(name, tensor)


def check_entries(
    name: str,
    tensor,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int, ...],
    device: torch.device,
    first: str,
    remedy: str,
) -> None:
    """Check a tensor with one entry for each position, row or column.

    It must lie on `device`, that of the tensor called `first`. `remedy` ends the message about a
    wrong shape.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape or device.
    """
    require_dtype(name, tensor, dtypes)
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}{remedy}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device} and {first} on {device}: move it")
