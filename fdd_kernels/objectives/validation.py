"""Checks that every objective shares: made before any work, naming argument, value and remedy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fdd_kernels.backends import is_recording
from fdd_kernels.objectives.inputs import LossInputs
from fdd_kernels.objectives.numbers import check_token_weights, describe
from fdd_kernels.objectives.tensors import (
    FLOAT_DTYPES,
    INTEGERS,
    MASKS,
    check_entries,
    require_float,
)


def check_tensors(inputs: LossInputs, *, paired: bool = True) -> LossInputs:
    """Check hidden states and heads, and return them with the states as tuples.

    With `paired` both models must have as many hidden states.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape or device, or a teacher that asks for
            gradient.
    """
    student = _as_states("student_hidden", inputs.student_hidden)
    teacher = _as_states("teacher_hidden", inputs.teacher_hidden)
    inputs = replace(inputs, student_hidden=student, teacher_hidden=teacher)
    if paired and len(teacher) != len(student):
        raise ValueError(
            f"student_hidden has {len(student)} layers and teacher_hidden {len(teacher)}: layers "
            "are paired by rank, pass as many of each, or layer_weights with a row for each layer "
            "of the student and a column for each of the teacher"
        )
    if inputs.student_weight is None:
        raise TypeError(
            "student_weight is None: pass the student's LM head (V, width), or a projection to the "
            "teacher's width"
        )
    check_heads(inputs, "student_", "student_hidden[0]")
    return inputs


def check_heads(inputs: LossInputs, prefix: str, first: str) -> None:
    """Check the heads against hidden states that have been checked, and where all tensors are.

    The student's tensors are named with `prefix`, and its first hidden state `first`.

    Raises:
        TypeError, ValueError: as `check_tensors`.
    """
    student, teacher = inputs.student_hidden, inputs.teacher_hidden
    if teacher and tuple(teacher[0].shape[:-1]) != inputs.leading_shape:
        raise ValueError(
            f"teacher_hidden has leading shape {tuple(teacher[0].shape[:-1])}, student_hidden "
            f"{inputs.leading_shape}: both models must have seen the same tokens"
        )
    _check_head(prefix, student, inputs.student_weight, inputs.student_bias)
    if teacher:
        _check_head("teacher_", teacher, inputs.teacher_weight, inputs.teacher_bias)
    check_places(inputs.named_floats(), first, student[0])


def check_places(named: dict[str, Tensor | None], first: str, tensor: Tensor) -> None:
    """Refuse tensors on other devices than `tensor`, called `first`, and teachers with gradient.

    Raises:
        ValueError: names the tensor.
    """
    device = tensor.device
    for name, other in named.items():
        if other is not None and other.device != device:
            raise ValueError(
                f"{name} is on {other.device} and {first} on {device}: move one of them"
            )
    if device.type == "meta" and not torch.compiler.is_compiling() and not is_recording():
        raise ValueError(
            f"{first} is a {describe(tensor)}, which holds no numbers: make the "
            "models on a device and load their values, or trace the loss under "
            "torch._subclasses.FakeTensorMode"
        )
    _check_teacher_is_constant(named)


def check_tokens(inputs: LossInputs) -> None:
    """Check labels and mask against the hidden states."""
    for name, tensor, dtypes in (
        ("labels", inputs.labels, INTEGERS),
        ("mask", inputs.mask, MASKS),
    ):
        if tensor is not None:
            _check_positions(name, tensor, dtypes, inputs.leading_shape, inputs.device)
    if inputs.token_weights is not None:
        check_row_weights(inputs.token_weights, inputs.leading_shape, inputs.device)


def check_row_weights(
    weights: Tensor, leading_shape: tuple[int, ...], device: torch.device
) -> None:
    """Check token weights against the hidden states' leading shape."""
    _check_positions("token_weights", weights, FLOAT_DTYPES, leading_shape, device)
    check_token_weights(weights)


def _check_positions(
    name: str, tensor, dtypes: tuple, leading_shape: tuple[int, ...], device: torch.device
) -> None:
    remedy = (
        f", but the hidden states have {leading_shape} before their width: one entry per hidden "
        "state"
    )
    check_entries(name, tensor, dtypes, leading_shape, device, "student_hidden", remedy)


def check_transforms(inputs: LossInputs, backend: str, **more: Tensor) -> None:
    """Refuse torch.func's transforms and forward-mode AD, which only the reference supports.

    `more` are further tensors of the call, by name.

    Raises:
        RuntimeError: names the tensor, the transform and the remedy.
    """
    if backend == "reference" or torch.compiler.is_compiling():
        return
    others = {
        "labels": inputs.labels,
        "mask": inputs.mask,
        "token_weights": inputs.token_weights,
        **more,
    }
    for name, tensor in (inputs.named_floats() | others).items():
        wrapped = tensor is not None and torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        dual = (
            tensor is not None
            and forward_ad._current_level >= 0
            and forward_ad.unpack_dual(tensor).tangent is not None
        )
        if wrapped or dual:
            way = (
                "a transform of torch.func (vmap, jvp, grad, ...)" if wrapped else "forward-mode AD"
            )
            raise RuntimeError(
                f'{name} is under {way}, which the backend "{backend}" does not support: use '
                'backward() or torch.autograd.grad, or backend="reference"'
            )


def compared_tokens(inputs: LossInputs, vocab_size: int | None) -> int:
    """Return how many tokens of the vocabulary are compared; features in feature space.

    Without a teacher's hidden states the student's vocabulary is all there is.

    Raises:
        ValueError: heads of different vocabularies, or a `vocab_size` that does not fit them.
    """
    student_weight, teacher_weight = inputs.student_weight, inputs.teacher_weight
    student_rows = student_weight.shape[0]
    if not inputs.teacher_hidden:
        if vocab_size is not None and vocab_size > student_rows:
            raise ValueError(
                f"vocab_size={vocab_size} is larger than the vocabulary, which has {student_rows} "
                "tokens"
            )
        return student_rows if vocab_size is None else vocab_size
    teacher_width = inputs.teacher_hidden[0].shape[-1]
    if teacher_weight is None:
        if vocab_size is not None:
            raise ValueError(
                f"vocab_size={vocab_size} was given with teacher_weight=None: feature space has no "
                "vocabulary"
            )
        if student_rows != teacher_width:
            raise ValueError(
                f"student_weight has shape {tuple(student_weight.shape)}, but with "
                f"teacher_weight=None it must project to the teacher's width {teacher_width}: "
                f"({teacher_width}, {student_weight.shape[1]})"
            )
        return teacher_width
    smaller = min(student_rows, teacher_weight.shape[0])
    if vocab_size is None:
        if student_rows != teacher_weight.shape[0]:
            raise ValueError(
                f"student_weight has {student_rows} rows and teacher_weight "
                f"{teacher_weight.shape[0]}: the vocabularies differ. If one is only padded, pass "
                f"vocab_size=N (at most {smaller}) to compare the first N tokens"
            )
        return student_rows
    if vocab_size > smaller:
        raise ValueError(
            f"vocab_size={vocab_size} is larger than a vocabulary (student {student_rows}, teacher "
            f"{teacher_weight.shape[0]})"
        )
    return vocab_size


def check_shift(shift: bool, labels: Tensor | None) -> None:
    """Refuse to shift labels that are not there, or have no dimension to shift along."""
    if shift and (labels is None or labels.ndim == 0):
        raise ValueError(
            "shift=True shifts the labels along their last dimension: pass labels of shape (..., "
            "sequence)"
        )


def check_feature_options(options: object, names: Sequence[str]) -> None:
    """Refuse options of logits in feature space: `names` are those not None, 1 or "kl" by default.

    Raises:
        ValueError: names the first option that was given.
    """
    for name in names:
        value = getattr(options, name)
        if value not in (None, 1.0, "kl"):
            raise ValueError(
                f"{name}={value} was given with teacher_weight=None: feature space compares raw "
                "features, without softmax, soft cap or scale"
            )


def check_num_items(reduction: str, num_items_in_batch) -> None:
    """Refuse what cannot divide a sum; a tensor, whose value would take a host sync, may be 0.

    Raises:
        TypeError, ValueError: not a number above 0, or a reduction that divides nothing.
    """
    if num_items_in_batch is None:
        return
    if reduction == "none":
        raise ValueError(
            'num_items_in_batch divides a sum, but reduction="none" returns one value per token'
        )
    if isinstance(num_items_in_batch, Tensor):
        if num_items_in_batch.numel() != 1:
            raise ValueError(
                f"num_items_in_batch has shape {tuple(num_items_in_batch.shape)}: pass one number"
            )
    elif isinstance(num_items_in_batch, bool) or not isinstance(num_items_in_batch, (int, float)):
        raise TypeError(
            "num_items_in_batch must be a number or a tensor, got "
            f"{type(num_items_in_batch).__name__}"
        )
    elif not 0 < num_items_in_batch < math.inf:
        raise ValueError(
            f"num_items_in_batch={num_items_in_batch} must be greater than 0: skip a batch without "
            "valid tokens, or pass a tensor, for which 0 gives a loss of 0"
        )


def _as_states(name: str, states) -> tuple[Tensor, ...]:
    if isinstance(states, Tensor):
        states = (states,)
    if not isinstance(states, Sequence):
        raise TypeError(
            f"{name} must be a tensor or a sequence of tensors, got {type(states).__name__}"
        )
    if not len(states):
        raise ValueError(f"{name} is empty: pass at least the final hidden state")
    for index, state in enumerate(states):
        require_float(f"{name}[{index}]", state)
        if state.ndim < 1 or state.shape != states[0].shape:
            raise ValueError(
                f"{name}[{index}] has shape {tuple(state.shape)}, {name}[0] has "
                f"{tuple(states[0].shape)}: all layers of a model must have one shape (..., width)"
            )
    if states[0].shape[-1] == 0:
        raise ValueError(f"{name} has width 0: shape {tuple(states[0].shape)}")
    return tuple(states)


def _check_head(
    prefix: str, states: tuple[Tensor, ...], weight: Tensor | None, bias: Tensor | None
) -> None:
    width = states[0].shape[-1]
    if weight is not None:
        require_float(f"{prefix}weight", weight)
        if weight.ndim != 2 or weight.shape[1] != width or weight.shape[0] == 0:
            raise ValueError(
                f"{prefix}weight has shape {tuple(weight.shape)}, but {prefix}hidden has width "
                f"{width}: it must be (vocabulary, {width}) as in torch.nn.Linear"
            )
    if bias is not None:
        require_float(f"{prefix}bias", bias)
        if weight is None:
            raise ValueError(
                f"{prefix}bias was given without {prefix}weight: add it to the hidden states "
                "instead"
            )
        if bias.shape != weight.shape[:1]:
            raise ValueError(
                f"{prefix}bias has shape {tuple(bias.shape)}, {prefix}weight "
                f"{tuple(weight.shape)}: it must be ({weight.shape[0]},)"
            )


def _check_teacher_is_constant(named: dict[str, Tensor | None]) -> None:
    for name, tensor in named.items():
        is_teacher = tensor is not None and (name.startswith("teacher") or name.endswith("_t"))
        if is_teacher and torch.is_grad_enabled() and tensor.requires_grad:
            raise ValueError(
                f"{name} requires grad, but the loss never sends gradient to the teacher: run the "
                "teacher under torch.no_grad() and call teacher.requires_grad_(False), or pass "
                ".detach()"
            )
