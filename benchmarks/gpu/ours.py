"""This package's strategies: which there are in this version, how one is chosen, and the call that
is measured.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fdd_kernels import fused_fdd_loss
from fdd_kernels.testing import Problem

STRATEGY, CACHE_BYTES = "FDD_KERNELS_TRITON_STRATEGY", "FDD_KERNELS_CACHE_BYTES"
STRATEGIES = ("auto", "cached", "slabbed", "one_pass")


def missing(strategy: str) -> str | None:
    """Why a strategy cannot be measured; None if it is in this version."""
    if importlib.util.find_spec("fdd_kernels.backends.triton.gemm") is None and strategy in (
        "cached",
        "slabbed",
    ):
        return "not in this version"
    return None


@contextlib.contextmanager
def chosen(strategy: str, cache_bytes: int | None = None) -> Iterator[None]:
    """Calls within use this strategy, with this many bytes of scratch (None: the default)."""
    before = {name: os.environ.get(name) for name in (STRATEGY, CACHE_BYTES)}
    wanted = {STRATEGY: strategy, CACHE_BYTES: None if cache_bytes is None else str(cache_bytes)}
    try:
        _set(wanted)
        yield
    finally:
        _set(before)


def _set(environment: dict[str, str | None]) -> None:
    for name, value in environment.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


def loss(problem: Problem, options: dict[str, Any]) -> Tensor:
    """The call that is measured."""
    return fused_fdd_loss(**problem.arguments, **options, backend="triton")


def gradients(
    loss_of: Callable[[Problem, dict], Tensor], problem: Problem, options: dict
) -> tuple[Tensor, list[Tensor]]:
    """One forward and backward pass: the loss and the gradients of `problem.leaves`."""
    found = loss_of(problem, options)
    return found.detach(), list(
        torch.autograd.grad(found, list(problem.leaves.values()), materialize_grads=True)
    )
