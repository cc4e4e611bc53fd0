"""Record the launches of a loss with its gradients by the Triton backend, on tensors without memory
(device "meta"): needs no GPU, and nothing runs.

The public function is called. The registry's entry is changed, so that it accepts the device.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

from fdd_kernels import fused_fdd_loss
from fdd_kernels.backends import BACKENDS, Backend
from fdd_kernels.backends.triton.launch import Launch, recorded

STRATEGY, CACHE_BYTES = "FDD_KERNELS_TRITON_STRATEGY", "FDD_KERNELS_CACHE_BYTES"


@contextmanager
def environment(wanted: dict[str, str | None]) -> Iterator[None]:
    """Set these variables within, or remove them where the value is None."""
    with mock.patch.dict(os.environ):
        for name, value in wanted.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        yield


def record_loss(
    problem: dict[str, Any],
    options: dict[str, Any],
    changes: Callable[[Backend, list[Launch]], dict[str, Callable]],
) -> list[Launch]:
    """Record the launches of `fused_fdd_loss` with its gradients.

    `changes(entry, launches)` returns functions that take the place of the entry's; the list has
    the launches so far when they run.
    """
    entry = BACKENDS["triton"]
    # autocast knows no device "meta"
    no_autocast = {
        "autocast": lambda *_, **__: nullcontext(),
        "is_autocast_enabled": lambda *_: False,
    }
    with recorded() as launches, mock.patch.multiple(torch, **no_autocast):
        changed = replace(entry, unavailable=lambda device: None, **changes(entry, launches))
        with mock.patch.dict(BACKENDS, triton=changed):
            fused_fdd_loss(**problem, **options, backend="triton")
    return launches
