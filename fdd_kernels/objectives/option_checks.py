"""Checks of options, without torch: the command line shows options before it imports torch."""

from __future__ import annotations

import math
from typing import Any

REDUCTIONS = ("mean", "sum", "none")


def require_choice(name: str, value: Any, choices: tuple) -> None:
    """Refuse what is not one of the choices."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, choices))}")


def require_number(
    name: str, value: Any, *, positive: bool = False, optional: bool = False
) -> None:
    """Refuse what is not a finite number of at least 0, or above 0 if `positive`."""
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}: pass a Python float")
    if not (0 <= value < math.inf) or (positive and value == 0):
        raise ValueError(
            f"{name}={value} must be finite and {'greater than 0' if positive else 'at least 0'}"
        )


def require_divergence(name: str, value: Any, others: tuple[str, ...] = ()) -> None:
    """Refuse text that `parse_divergence` does; `others` are further names, for the message."""
    from fdd_kernels.lens.divergence_text import parse_divergence
    from fdd_kernels.lens.divergences import DIVERGENCES

    if not isinstance(value, str):
        raise TypeError(f'{name} must be a string such as "kl", got {type(value).__name__}')
    try:
        parse_divergence(value)
    except ValueError as error:
        is_unknown = value.partition(":")[0] not in DIVERGENCES
        also = f" or {', '.join(others)}" if others and is_unknown else ""
        raise ValueError(f"{name}={error}{also}") from None


def require_int(name: str, value: Any, *, minimum: int) -> None:
    """Refuse what is not a whole number of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{name}={value} must be at least {minimum}")


def require_head_options(options: Any, student: str = "student_") -> None:
    """Check what the options of several objectives have in common: soft caps and logit scales of
    both models, ignore_index, vocabularies and the backend.

    `student` is the prefix of the student's options in the public function.
    """
    from fdd_kernels.backends import backend_names

    for side, prefix in (("student_", student), ("teacher_", "teacher_")):
        require_number(
            f"{prefix}softcap", getattr(options, f"{side}softcap"), positive=True, optional=True
        )
        scale = getattr(options, f"{side}logit_scale")
        require_number(f"{prefix}logit_scale", scale, positive=True)
    require_int("ignore_index", options.ignore_index, minimum=-(2**63))
    for name in ("vocab_size", "teacher_vocab_size"):
        size = getattr(options, name, None)
        if size is not None:
            require_int(name, size, minimum=1)
    require_choice("backend", options.backend, backend_names())
