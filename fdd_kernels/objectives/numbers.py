"""Checks that look at the numbers in tensors, for which a host may have to wait for the device.

On a CPU they are always made. Elsewhere they wait for FDD_KERNELS_DEBUG=1, or leave an assertion to
the device.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from fdd_kernels.backends import is_recording
from fdd_kernels.objectives.inputs import LossInputs

DEBUG_SWITCH = "FDD_KERNELS_DEBUG"


def describe(tensor: Tensor) -> str:
    """Say shape, dtype and device of a tensor, for error messages."""
    return (
        f"{str(tensor.dtype).removeprefix('torch.')} tensor of shape {tuple(tensor.shape)} on "
        f"{tensor.device}"
    )


def debugging() -> bool:
    """Say whether FDD_KERNELS_DEBUG asks for checks that may wait for a device."""
    return os.environ.get(DEBUG_SWITCH, "0") not in ("", "0")


def looks_at(tensor: Tensor) -> bool:
    """Say whether checks may look at a tensor's numbers.

    Always on a CPU, elsewhere if FDD_KERNELS_DEBUG=1; never in compiled code, under fake tensors or
    under a transform.
    """
    if torch.compiler.is_compiling() or is_recording() or torch._C._len_torch_dispatch_stack():
        return False
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor) or tensor.device.type == "meta":
        return False
    return tensor.device.type == "cpu" or debugging()


def check_numbers(inputs: LossInputs) -> None:
    """Refuse NaN and infinities if FDD_KERNELS_DEBUG=1; a bias may be -inf (a padded vocabulary).

    Raises:
        ValueError: names the tensor, and how many of its entries are not finite.
    """
    if torch.compiler.is_compiling() or not debugging():
        return
    for name, tensor in inputs.named_floats().items():
        if tensor is None:
            continue
        bad = ~tensor.detach().isfinite()
        if name.endswith("bias"):
            bad &= ~tensor.detach().isneginf()
        if bad.any():
            raise ValueError(
                f"{name} has {int(bad.sum())} entries that are NaN or infinite ({describe(tensor)})"
            )


def check_token_weights(weights: Tensor) -> None:
    """Refuse weights that ask for gradient, and negative ones or ones that are not finite.

    Raises:
        ValueError: on a CPU in eager mode, on other devices if FDD_KERNELS_DEBUG=1: a look at the
            numbers would wait for the device.
    """
    if weights.requires_grad:
        raise ValueError("token_weights requires grad, but is a constant: pass it detached")
    if looks_at(weights):
        legal = (weights >= 0) & (weights < torch.inf)
        if not legal.all():
            raise ValueError(
                f"token_weights contains {float(weights[~legal][0])}: weights are finite and at "
                "least 0"
            )


def check_labels(labels: Tensor, ignore_index: int, columns: int, name: str = "labels") -> None:
    """Refuse tokens, called `name`, that are neither `ignore_index` nor below `columns`.

    Raises:
        ValueError: on a CPU in eager mode; on other devices and in compiled code an assertion fails
            at run time.
    """
    legal = (labels == ignore_index) | ((labels >= 0) & (labels < columns))
    if labels.device.type != "cpu" or torch.compiler.is_compiling():
        torch._assert_async(legal.all(), f"{name} outside [0, {columns}) that are not ignore_index")
    elif not legal.all():
        raise ValueError(
            f"{name} contains {int(labels[~legal][0])}, which is neither "
            f"ignore_index={ignore_index} nor a token in [0, {columns}): mark the position with "
            "ignore_index or correct the token"
        )
