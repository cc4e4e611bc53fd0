"""Make Triton's interpreter faster. What it computes stays the same.

A process with TRITON_INTERPRET=1 tests nothing but interpreted kernels, so these changes stay for
its lifetime.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import triton.language as tl
from triton.runtime import interpreter

BUILDER = interpreter.interpreter_builder


def check_overflow(on: bool) -> None:
    """Check every sum and product of integers for an overflow, which takes a quarter of all time.

    Whether one overflows depends on the sizes of a problem, hardly on its options.
    """
    BUILDER.options = replace(BUILDER.options, sanitize_overflow=on)


def speed_up() -> None:
    """Patch the language once a module of kernels, not at each call of a device function; look the
    types of numpy up in a cache; do not check for overflow.
    """
    interpreter._patch_lang = _once_a_module(interpreter._patch_lang)
    interpreter._get_np_dtype = _cached(interpreter._get_np_dtype)
    check_overflow(False)


def _once_a_module(patch: Callable) -> Callable:
    done = set()
    nothing_to_restore = SimpleNamespace(restore=lambda: None)

    def patch_once(function: Callable) -> SimpleNamespace:
        module = function.__globals__["__name__"]
        if module not in done:
            done.add(module)
            patch(function)  # what it would restore stays patched
        return nothing_to_restore

    return patch_once


def _cached(np_dtype_of: Callable) -> Callable:
    of_scalar = functools.cache(np_dtype_of)

    def np_dtype(kind: tl.dtype):
        # pointers have no hash
        return np_dtype_of(kind.scalar) if kind.scalar.is_ptr() else of_scalar(kind.scalar)

    return np_dtype
