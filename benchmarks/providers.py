"""Who computes the loss: one entry each, with what it computes, where it runs and why not if it
does not.
"""

from __future__ import annotations

import functools
import importlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from benchmarks import dense, peers
from benchmarks.workloads import Workload
from fdd_kernels import fused_fdd_loss
from fdd_kernels.backends import why_unavailable
from fdd_kernels.testing import Problem

WHOLE = "the whole objective"
NO_DERIVATIVE = "output KD and trajectory, one call per layer; no derivative"


@dataclass(frozen=True)
class Provider:
    """A way to compute the loss.

    `loss(problem, options)` is what is timed: its scalar mean over rows. `rows(problem, options)`
    gives (R,) for the accuracy check; without it the check calls `loss` row by row. `computes` is
    the part of the objective, `drops` the option values that turn the workload's objective into
    that part. `rounds_logits`: logits are rounded to the inputs' dtype on the way, and the accuracy
    check allows for that.
    """

    name: str
    title: str
    computes: str
    loss: Callable[[Problem, dict[str, Any]], Tensor]
    rows: Callable[[Problem, dict[str, Any]], Tensor] | None = None
    drops: dict[str, Any] = field(default_factory=dict)
    rounds_logits: bool = False
    package: str | None = None
    module: str | None = None
    softcap: bool = True
    feature_space: bool = True
    frozen_head_note: str | None = None
    unavailable_on: Callable[[torch.device], str | None] = lambda device: None

    def unavailable(self, device: torch.device) -> str | None:
        """Why it cannot run on this machine; None if it can."""
        if self.module is not None:
            try:
                importlib.import_module(self.module)
            except Exception as error:  # whatever a package raises on import is the reason
                first = (str(error).strip().splitlines() or [""])[0]
                return (
                    f"cannot be imported ({type(error).__name__}: {first}); pip install -r "
                    "benchmarks/requirements.txt"
                )
        return self.unavailable_on(device)

    def unsupported(self, workload: Workload) -> str | None:
        """Why it cannot compute any of this workload's objective; None if it can."""
        if workload.feature_space and not self.feature_space:
            return "has no feature space"
        if not self.softcap and any("softcap" in name for name in workload.loss_options):
            return "has no soft cap"
        return None

    def part(self, workload: Workload) -> str:
        """What it computes of this workload's objective."""
        if workload.layers == 1 and not workload.loss_options.get("output_in_dynamics"):
            text = "output KD, which is all there is"
        elif workload.feature_space:
            text = WHOLE
        else:
            text = self.computes
        note = self.frozen_head_note if not workload.train_head else None
        return f"{text}; {note}" if note else text

    def options(self, workload: Workload) -> dict[str, Any]:
        """The options of the part that it computes."""
        return workload.loss_options | self.drops

    def version(self) -> str | None:
        """Of the package it comes from; None if that is not installed."""
        try:
            return version(self.package) if self.package else None
        except PackageNotFoundError:
            return None


def _dense(problem: Problem, options: dict) -> Tensor:
    return dense.dense_rows(problem, options).mean()


@functools.cache
def _compiled() -> Callable:
    return torch.compile(dense.dense_rows)


def _compiled_loss(problem: Problem, options: dict) -> Tensor:
    return _compiled()(problem, options).mean()


def _chunked(problem: Problem, options: dict) -> Tensor:
    return dense.chunked_rows(problem, options).mean()


def _no_compiler(device: torch.device) -> str | None:
    if device.type == "cpu" and not (
        shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
    ):
        return "torch.compile needs a C++ compiler on the CPU"
    return None


def _ours(backend: str) -> Provider:
    def loss(problem: Problem, options: dict) -> Tensor:
        return fused_fdd_loss(**problem.arguments, **options, backend=backend)

    def rows(problem: Problem, options: dict) -> Tensor:
        return fused_fdd_loss(**problem.arguments, **options, backend=backend, reduction="none")

    def unavailable(device: torch.device) -> str | None:
        if device.type == "cpu" and backend == "triton":
            return "Triton kernels run on a GPU; interpreting them would measure the interpreter"
        return why_unavailable(backend, device)

    return Provider(
        backend,
        f"fdd_kernels, backend {backend}",
        WHOLE,
        loss,
        rows,
        package="fdd_kernels",
        unavailable_on=unavailable,
    )


_PEER = {"drops": {"beta": 0.0}, "feature_space": False}

PROVIDERS: dict[str, Provider] = {
    p.name: p
    for p in (
        Provider(
            "dense",
            "dense PyTorch, eager",
            WHOLE,
            _dense,
            dense.dense_rows,
            rounds_logits=True,
            package="torch",
        ),
        Provider(
            "dense-compile",
            "dense PyTorch, torch.compile",
            WHOLE,
            _compiled_loss,
            lambda p, o: _compiled()(p, o),
            rounds_logits=True,
            package="torch",
            unavailable_on=_no_compiler,
        ),
        Provider(
            "dense-chunked",
            f"dense PyTorch, checkpointed over {dense.CHUNK_ROWS} rows",
            WHOLE,
            _chunked,
            dense.chunked_rows,
            rounds_logits=True,
            package="torch",
        ),
        _ours("torch"),
        _ours("cpu"),
        _ours("triton"),
        Provider(
            "liger",
            "Liger-Kernel, chunked JSD loss, not compiled",
            f"{NO_DERIVATIVE}; its forward computes the gradients",
            peers.liger,
            rounds_logits=True,
            package="liger-kernel",
            module="liger_kernel.chunked_loss",
            softcap=False,
            frozen_head_note="computes the head's gradient all the same",
            **_PEER,
        ),
        Provider(
            "trl",
            "TRL, chunked divergence",
            f"{NO_DERIVATIVE}, plus the student's entropy",
            peers.trl,
            package="trl",
            module="trl.trainer.distillation_trainer",
            **_PEER,
        ),
        Provider(
            "orda",
            "orda-kernel",
            f"{NO_DERIVATIVE}; on a CPU its dense fallback",
            peers.orda,
            rounds_logits=True,
            package="orda-kernel",
            module="orda_kernel",
            softcap=False,
            **_PEER,
        ),
    )
}


def choose(names: list[str] | None) -> list[Provider]:
    """The providers of these names, all if None.

    Raises:
        ValueError: an unknown name; lists the known ones.
    """
    for name in names or ():
        if name not in PROVIDERS:
            raise ValueError(f"unknown provider {name!r}: choose from {', '.join(PROVIDERS)}")
    return [p for p in PROVIDERS.values() if not names or p.name in names]
