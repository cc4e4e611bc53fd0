"""Who computes the loss: one entry each with its part of the loss and why it cannot run here.

The backends of this package come from their registry: a new one is a provider without a line here.
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

from benchmarks import objectives, peers
from benchmarks.call import LOSS, Call
from benchmarks.inputs import build_problem
from benchmarks.workloads import Workload
from fdd_kernels.backends import BACKENDS, preference, why_unavailable

WHOLE = "the whole objective"
NO_DERIVATIVE = "output KD and trajectory, one call per layer; no derivative"
Loss = Callable[[Call, dict[str, Any]], Tensor]


@dataclass(frozen=True)
class Provider:
    """A way to compute the loss.

    `loss(problem, options)` is timed: its scalar mean over rows. `rows(problem, options)` gives
    (R,) for the accuracy check, which otherwise calls `loss` row by row. `kind` is "dense",
    "backends" or "packages". `computes` is the part of the loss, `drops` the option values that
    reduce the loss to it. With `rounds_logits` logits are rounded to the inputs' dtype, and the
    check allows for that.
    """

    name: str
    title: str
    kind: str
    color: str
    loss: Loss
    rows: Loss | None = None
    computes: str = WHOLE
    drops: dict[str, Any] = field(default_factory=dict)
    rounds_logits: bool = False
    package: str | None = None
    module: str | None = None
    softcap: bool = True
    feature_space: bool = True
    frozen_head_note: str | None = None
    refusal: Callable[[Workload], str | None] = lambda workload: None
    unavailable_on: Callable[[torch.device], str | None] = lambda device: None

    def unavailable(self, device: torch.device) -> str | None:
        """Say why it cannot run on this machine; None if it can."""
        if self.module is not None:
            try:
                importlib.import_module(self.module)
            except Exception as error:  # a package may raise anything on import
                first = (str(error).strip().splitlines() or [""])[0]
                why = f"cannot be imported ({type(error).__name__}: {first})"
                return f"{why}; pip install -r benchmarks/requirements.txt"
        return self.unavailable_on(device)

    def unsupported(self, workload: Workload) -> str | None:
        """Say why it cannot compute any part of this workload's loss; None if it can."""
        if workload.group == "objectives" or workload.objective != LOSS:
            called = self.kind != "packages"
            return self.refusal(workload) if called else "is not called for other objectives"
        if workload.feature_space and not self.feature_space:
            return "has no feature space"
        if not self.softcap and any("softcap" in name for name in workload.loss_options):
            return "has no soft cap"
        return None

    def part(self, workload: Workload) -> str:
        """Describe the part of this workload's loss that it computes."""
        text = WHOLE if workload.feature_space else self.computes
        if workload.objective != LOSS:
            text = workload.objective
        elif workload.layers == 1 and not workload.loss_options.get("output_in_dynamics"):
            text = "output KD, which is all there is"
        note = self.frozen_head_note if not workload.train_head else None
        return f"{text}; {note}" if note else text

    def options(self, workload: Workload) -> dict[str, Any]:
        """Return the options of the part that it computes."""
        return workload.loss_options | self.drops

    def version(self) -> str | None:
        """Return the installed version of its package; None if there is none."""
        try:
            return version(self.package) if self.package else None
        except PackageNotFoundError:
            return None


def gradients_of(
    loss_of: Loss, problem: Call, options: dict[str, Any]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Run one forward and backward pass: the loss, and the gradients of `problem.leaves` by
    name; none of an objective without gradient.
    """
    leaves = problem.leaves
    loss = loss_of(problem, options)
    if not loss.requires_grad:
        return loss, {}
    # In feature space the final state has no term and so no gradient.
    found = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    return loss.detach(), dict(zip(leaves, found))


@functools.cache
def _compiled() -> Callable:
    return torch.compile(objectives.dense_rows)


def _compiled_rows(problem: Call, options: dict[str, Any]) -> Tensor:
    return _compiled()(problem, options)


def _no_compiler(device: torch.device) -> str | None:
    found = any(map(shutil.which, ("g++", "c++", "clang++")))
    return None if device.type != "cpu" or found else "torch.compile needs a C++ compiler on a CPU"


def _dense(name: str, title: str, color: str, rows: Loss, **about: Any) -> Provider:
    about |= {"rounds_logits": True, "package": "torch"}
    loss = lambda problem, options: rows(problem, options).mean()  # noqa: E731
    return Provider(name, f"dense PyTorch, {title}", "pytorch", color, loss, rows, **about)


def _backend(name: str) -> Provider:
    backend = BACKENDS[name]

    def rows(problem: Call, options: dict, reduction: str = "none") -> Tensor:
        return objectives.fused(problem, options | {"backend": name, "reduction": reduction})

    def loss(problem: Call, options: dict) -> Tensor:
        return rows(problem, options, "mean").mean()

    def unavailable(device: torch.device) -> str | None:
        reason = why_unavailable(name, device)
        if reason is None and device.type not in backend.devices:
            reason = f"runs on {' or '.join(backend.devices)}; its interpreter is not measured"
        return reason

    def refusal(workload: Workload) -> str | None:
        """Call it at tiny shape: it refuses before any work."""
        on_gpu = "cuda" in backend.devices and torch.cuda.is_available()
        call = build_problem(workload.resized(1, 64, 16, 16), "cuda" if on_gpu else "cpu")
        try:
            rows(call, workload.loss_options)
        except ValueError as error:
            return str(error)
        return None

    title, about = f"fdd_kernels, backend {name}", {"package": "fdd_kernels"}
    about |= {"unavailable_on": unavailable, "refusal": refusal}
    return Provider(name, title, "backends", backend.color, loss, rows, **about)


def _package(name: str, title: str, color: str, loss: Loss, *, part: str, **about: Any) -> Provider:
    about |= {"computes": f"{NO_DERIVATIVE}{part}", "drops": {"beta": 0.0}}
    return Provider(name, title, "packages", color, loss, feature_space=False, **about)


_CHUNKED = f"checkpointed over {objectives.CHUNK_ROWS} rows"
_ALL = (
    _dense("dense", "eager", "#6c757d", objectives.dense_rows),
    _dense(
        "dense-compile", "torch.compile", "#5b7db1", _compiled_rows, unavailable_on=_no_compiler
    ),
    _dense("dense-chunked", _CHUNKED, "#adb5bd", objectives.chunked_rows),
    *map(_backend, sorted(BACKENDS)),
    _package(
        "liger",
        "Liger-Kernel, chunked JSD loss, not compiled",
        "#00798c",
        peers.liger,
        part="; its forward computes the gradients",
        rounds_logits=True,
        package="liger-kernel",
        module="liger_kernel.chunked_loss",
        softcap=False,
        frozen_head_note="computes the head's gradient all the same",
    ),
    _package(
        "trl",
        "TRL, chunked divergence",
        "#30638e",
        peers.trl,
        part=", plus the student's entropy",
        package="trl",
        module="trl.trainer.distillation_trainer",
    ),
    _package(
        "orda",
        "orda-kernel",
        "#003d5b",
        peers.orda,
        part="; on a CPU its dense fallback",
        rounds_logits=True,
        package="orda-kernel",
        module="orda_kernel",
        softcap=False,
    ),
)
PROVIDERS: dict[str, Provider] = {provider.name: provider for provider in _ALL}


def default_backend(device: str) -> str:
    """Name the backend that "auto" prefers on a device."""
    return preference(device)[0]


def of_workload(workload: Workload, providers: list[Provider], device: str) -> list[Provider]:
    """Choose the providers that a workload names, by name, kind, or "default":
    `default_backend`.
    """
    if workload.providers is None:
        return providers
    names = {default_backend(device) if n == "default" else n for n in workload.providers}
    return [p for p in providers if p.name in names or p.kind in names]


def choose(names: list[str] | None) -> list[Provider]:
    """Choose providers by name, all if None.

    Raises:
        ValueError: an unknown name; lists the known ones.
    """
    for name in names or ():
        if name not in PROVIDERS:
            raise ValueError(f"unknown provider {name!r}: choose from {', '.join(PROVIDERS)}")
    return [p for p in PROVIDERS.values() if not names or p.name in names]
