"""Checks of token ids and of their teacher's log-probabilities."""

from __future__ import annotations

import torch
from torch import Tensor

from fdd_kernels.objectives.numbers import looks_at
from fdd_kernels.objectives.tensors import FLOAT_DTYPES, INTEGERS, require_dtype

PADDING = -1
# A log-probability that is rounded to bfloat16 moves by at most this share of itself ...
_BFLOAT16 = 2.0**-8
# ... and one that is computed in float32, from logits of up to 2^10 in size, by this much.
_FLOAT32 = 2.0**-24 * 2**10


def check_ids(
    name: str, ids: Tensor, hidden: Tensor, of: str, *, may_be_single: bool = False
) -> None:
    """Check ids (..., K), or (...) if they `may_be_single`, against the hidden states (..., D).

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape or device.
    """
    require_dtype(name, ids, INTEGERS)
    _check_shape(name, ids, hidden, of, may_be_single)


def check_logprobs(name: str, logprobs: Tensor, ids: Tensor, hidden: Tensor, of: str) -> None:
    """Check the type, shape and device of the teacher's log-probabilities (..., K).

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape or device, or one that asks for gradient.
    """
    require_dtype(name, logprobs, FLOAT_DTYPES)
    _check_shape(name, logprobs, hidden, of, False)
    if logprobs.shape != ids.shape:
        raise ValueError(
            f"{name} has shape {tuple(logprobs.shape)} and ids {tuple(ids.shape)}: one "
            "log-probability per id"
        )
    if torch.is_grad_enabled() and logprobs.requires_grad:
        raise ValueError(
            f"{name} requires grad, but the loss never sends gradient to the teacher: pass "
            ".detach()"
        )


def _check_shape(name: str, tensor: Tensor, hidden: Tensor, of: str, may_be_single: bool) -> None:
    if not isinstance(hidden, Tensor):
        return  # refused elsewhere
    leading = hidden.shape[:-1]
    if not (may_be_single and tensor.shape == leading) and (
        tensor.shape[:-1] != leading or tensor.ndim != hidden.ndim or tensor.shape[-1] == 0
    ):
        forms = f"{(*leading, 'K')}" + (f" or {tuple(leading)}" if may_be_single else "")
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, but {of} {tuple(hidden.shape)}: it must be "
            f"{forms} with K at least 1"
        )
    if tensor.device != hidden.device:
        raise ValueError(f"{name} is on {tensor.device} and {of} on {hidden.device}: move it")


def check_top_k(ids: Tensor, logprobs: Tensor, valid: Tensor | None, columns: int) -> None:
    """Check the numbers in valid rows of ids and log-probabilities, (R, K) each.

    Raises:
        ValueError: an id out of range or twice in a row, or probabilities that sum above 1 even if
            each log-probability was rounded up to bfloat16. On a CPU in eager mode; on other
            devices if FDD_KERNELS_DEBUG=1, since a look at the numbers would wait for the device.
    """
    if not (looks_at(ids) and looks_at(logprobs)):
        return
    if valid is not None:
        ids, logprobs = ids[valid], logprobs[valid]
    padding = (ids == PADDING) & (logprobs == -torch.inf)
    wrong = ~padding & ((ids < 0) | (ids >= columns))
    if wrong.any():
        raise ValueError(
            f"ids contains {int(ids[wrong][0])}, which is no token in [0, {columns}): correct it, "
            f"or mark padding by the id {PADDING} with the log-probability -inf"
        )
    ordered = ids.sort(-1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != PADDING)
    if twice.any():
        raise ValueError(
            f"ids contains {int(ordered[:, 1:][twice][0])} twice in one row: a token has one "
            f"probability, remove it or mark it as padding ({PADDING} with -inf)"
        )
    if logprobs.isnan().any():
        raise ValueError("logprobs contains NaN: mask the position, or pass the teacher's numbers")
    # No number below v (1 + u), u bfloat16's unit roundoff, rounds to v; v is not above 0.
    least = (logprobs.double() * (1 + _BFLOAT16)).exp().sum(-1)
    wrong = least > 1 + _FLOAT32
    if wrong.any():
        row = logprobs[wrong][0].double()
        raise ValueError(
            f"logprobs has a row whose probabilities sum to {float(row.exp().sum()):.4g}, above 1 "
            "by more than the rounding of log-probabilities to bfloat16: pass natural logarithms "
            "of the teacher's probabilities at `temperature`, over the whole vocabulary"
        )
