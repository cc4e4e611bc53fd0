"""Objectives that the compiler leaves to eager mode."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

import torch


def outside_compiler(why: str, name: str | None = None) -> Callable[[Callable], Callable]:
    """Leave a function, and all that it calls, to eager mode; errors say its name, or another, and
    `why`.
    """
    return functools.partial(_left_out, why, name)


def _left_out(why: str, name: str | None, function: Callable) -> Callable:
    @functools.wraps(function)
    def run(*args, **kwargs):
        if torch.compiler.is_compiling():
            # Without fullgraph the compiler gives up on the caller's frame and calls it eagerly.
            raise RuntimeError(
                f"{name or function.__name__} is not a graph that torch.compile can record "
                f"({why}): leave out fullgraph=True, or call it from a function under "
                "torch.compiler.disable"
            )
        is_loaded = "torch._dynamo" in sys.modules
        return (torch.compiler.disable(function) if is_loaded else function)(*args, **kwargs)

    return run
