"""Draw random problems of a language model's kind, and evaluate them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fdd_kernels.objectives.fdd.api import fdd_loss_reference, fused_fdd_loss
from fdd_kernels.objectives.fdd.options import FDDLossTerms
from fdd_kernels.objectives.inputs import LossInputs


@dataclass(frozen=True)
class Problem(LossInputs):
    """The tensors of one call of `fused_fdd_loss`, with what tests do to them."""

    def map(self, function: Callable[[Tensor], Tensor]) -> Problem:
        """Apply `function` to every tensor of floats; whether they require grad stays."""

        def apply(value):
            if isinstance(value, tuple):
                return tuple([apply(v) for v in value])
            if not isinstance(value, Tensor) or not value.is_floating_point():
                return value
            return function(value.detach()).detach().requires_grad_(value.requires_grad)

        return replace(self, **{f.name: apply(getattr(self, f.name)) for f in fields(self)})

    def to(self, dtype: torch.dtype) -> Problem:
        """Convert every tensor of floats."""
        return self.map(lambda t: t.to(dtype))

    def frozen(self, *names: str) -> Problem:
        """Detach the tensors of these names."""
        return replace(self, **{n: _detached(getattr(self, n)) for n in names})

    @property
    def arguments(self) -> dict[str, Any]:
        """Return the call's keyword arguments except `num_items_in_batch`, which is an option."""
        names = [f.name for f in fields(self) if f.name != "num_items_in_batch"]
        return {name: getattr(self, name) for name in names}

    @property
    def leaves(self) -> dict[str, Tensor]:
        """List what requires grad by name: student_hidden[0], ..., student_weight, student_bias."""
        named = {f"student_hidden[{i}]": h for i, h in enumerate(self.student_hidden)}
        named |= {"student_weight": self.student_weight, "student_bias": self.student_bias}
        return {name: t for name, t in named.items() if t is not None and t.requires_grad}


def _detached(value):
    return (
        tuple([v.detach() for v in value])
        if isinstance(value, tuple)
        else None
        if value is None
        else value.detach()
    )


def random_problem(
    leading: tuple[int, ...] = (2, 5),
    columns: int = 37,
    student_width: int = 8,
    teacher_width: int = 12,
    layers: int = 3,
    teacher_layers: int | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    spread: float = 2.0,
    bias: str | None = None,
    labels: bool = False,
    mask: bool = False,
    token_weights: bool = False,
    near: float | None = None,
    feature_space: bool = False,
    contiguous: bool = True,
) -> Problem:
    """Draw a problem like a language model's: a layer's hidden states are the previous layer's plus
    an update.

    Args:
        leading: leading shape of the hidden states; `columns` the vocabulary (the teacher's width
            in feature space).
        teacher_layers: hidden states of the teacher; None: as many as the student's `layers`.
        spread: standard deviation of the logits.
        bias: None, "plain", or "padded": -inf in the last eighth of the columns of both models.
        labels, mask: with labels, about a quarter of them -100; with a mask, about a quarter of it
            False.
        token_weights: with weights from 0 to 3, about a quarter of them 0.
        near: the teacher is the student plus noise of this relative size (of equal width); 0: the
            same model.
        contiguous: False gives strided views, hidden states, heads, labels and mask.
    """
    generator = torch.Generator().manual_seed(seed)
    live = max(1, columns - max(1, columns // 8))
    teacher_layers = layers if teacher_layers is None else teacher_layers
    depth = max(layers, teacher_layers)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def model(width: int) -> dict[str, Any]:
        hidden = [normal(*leading, width)]
        for _ in range(depth - 1):
            hidden.append(0.8 * hidden[-1] + 0.6 * normal(*leading, width))
        return {
            "hidden": hidden,
            "weight": spread / math.sqrt(width) * normal(columns, width),
            "bias": normal(columns),
        }

    student = model(student_width)
    if near is None:
        teacher = model(teacher_width)
    else:
        teacher = {"hidden": [h * (1 + near * normal(*h.shape)) for h in student["hidden"]]}
        teacher |= {
            k: student[k] * (1 + near * normal(*student[k].shape)) for k in ("weight", "bias")
        }
    if feature_space:
        # The student's weight projects to the teacher's width, which is `columns`.
        teacher = {"hidden": model(columns)["hidden"], "weight": None, "bias": None}
    if bias is None:
        teacher["bias"] = student["bias"] = None
    if bias == "padded":
        for side in (student, teacher):
            if side["bias"] is not None:
                side["bias"][live:] = -torch.inf

    def finish(tensor: Tensor | None, trainable: bool) -> Tensor | None:
        if tensor is None:
            return None
        tensor = tensor.to(device, dtype)
        return (tensor if contiguous else strided(tensor)).requires_grad_(trainable)

    def tokens(present: bool, draw: Callable[[], Tensor]) -> Tensor | None:
        return (
            (draw().to(device) if contiguous else strided(draw().to(device))) if present else None
        )

    def draw_labels() -> Tensor:
        drawn = torch.randint(
            0, live if bias == "padded" else columns, leading, generator=generator
        )
        return drawn.where(torch.rand(leading, generator=generator) < 0.75, -100)

    return Problem(
        student_hidden=tuple([finish(h, True) for h in student["hidden"][:layers]]),
        student_weight=finish(student["weight"], True),
        teacher_hidden=tuple([finish(h, False) for h in teacher["hidden"][:teacher_layers]]),
        teacher_weight=finish(teacher["weight"], False),
        labels=tokens(labels, draw_labels),
        student_bias=finish(student["bias"], True),
        teacher_bias=finish(teacher["bias"], False),
        mask=tokens(mask, lambda: torch.rand(leading, generator=generator) < 0.75),
        token_weights=tokens(
            token_weights,
            lambda: (4 * torch.rand(leading, generator=generator) - 1).clamp(min=0),
        ),
    )


def strided(tensor: Tensor) -> Tensor:
    """Copy a tensor into a view that is contiguous in no dimension."""
    return torch.stack([tensor, torch.zeros_like(tensor)], dim=-1)[..., 0]


class Outcome(NamedTuple):
    """The terms of a call and the gradients of its leaves, by name."""

    terms: FDDLossTerms
    gradients: dict[str, Tensor]


def evaluate(
    problem: Problem,
    function: Callable = fused_fdd_loss,
    upstream: Tensor | float | None = None,
    **options,
) -> Outcome:
    """Run `function` and backpropagate `upstream` through its loss.

    `upstream` has the loss's shape; None stands for ones.
    """
    problem = problem.map(lambda t: t)  # fresh leaves over the same memory
    terms = function(**problem.arguments, **options, return_terms=True)
    if upstream is None:
        upstream = torch.ones_like(terms.loss)
    upstream = torch.as_tensor(upstream, dtype=terms.loss.dtype, device=terms.loss.device)
    leaves = problem.leaves
    upstream = upstream.expand_as(terms.loss)
    found = ()
    if leaves:  # a state that no term uses has a gradient of 0
        found = torch.autograd.grad(
            terms.loss, list(leaves.values()), upstream, materialize_grads=True
        )
    return Outcome(FDDLossTerms(*[t.detach() for t in terms]), dict(zip(leaves, found)))


def exact(problem: Problem, upstream=None, **options) -> Outcome:
    """Evaluate the float64 reference on the same numbers."""
    return evaluate(problem.to(torch.float64), fdd_loss_reference, upstream, **options)
