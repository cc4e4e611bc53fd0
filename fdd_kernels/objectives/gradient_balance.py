"""Weights that keep the gradients of a loss's terms in a fixed ratio."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fdd_kernels.objectives.option_checks import require_int, require_number
from fdd_kernels.objectives.schedules import (
    NoFormError,
    Schedule,
    as_number,
    as_numbers,
    number_text,
    numbers_text,
)


class GradientBalance(Schedule):
    """Weights that keep the terms' gradients, at the student's states, in a fixed ratio.

    Every `every` steps, with n_k the length of term k's gradient over all states::

        w_k = ratio_k * mean of n / n_k

    so that every weighted gradient has the length ratio_k times the mean length. A term with a
    large gradient thus raises the weights of the others, and with them the length of the whole
    gradient: look at the logged weights, and clip or lower the learning rate. A term whose
    gradient is 0 or not finite has the length measured before; a term without one has the weight 1
    and is in no mean. As GradNorm (Chen et al., ICML 2018) without its training rates, and solved
    for the weights instead of learning them. One backward pass to the states for each term and
    measurement.

    Args:
        ratios: for each term the wanted share, greater than 0, such as {"output_kd": 1.0,
            "trajectory": 1.0}.
        every: steps from one measurement to the next; the first is at step 0, or at the first step
            with a gradient.
        smoothing: share of the earlier lengths in a moving average, in [0, 1).

    Raises:
        TypeError, ValueError: a number out of range.
    """

    _state = ("step", "weights", "lengths")
    _form = "term=ratio,...[;every=steps][;smoothing=number]"

    def __init__(
        self, ratios: Mapping[str, float], every: int = 100, smoothing: float = 0.0
    ) -> None:
        if not ratios:
            raise ValueError("ratios is empty: pass a number for each term")
        for name, ratio in ratios.items():
            require_number(f"ratio of {name!r}", ratio, positive=True)
        require_int("every", every, minimum=1)
        require_number("smoothing", smoothing)
        if smoothing >= 1:
            raise ValueError(f"smoothing={smoothing} must be below 1")
        self.ratios = {name: float(ratio) for name, ratio in ratios.items()}
        self.every, self.smoothing = every, float(smoothing)
        self.weights: dict[str, float] = dict.fromkeys(ratios, 1.0)
        self.lengths: dict[str, float] = {}

    @classmethod
    def _of(cls, text: str) -> Schedule:
        ratios, *rest = text.split(";")
        given = [part.partition("=")[::2] for part in rest]
        kinds = {"every": int, "smoothing": float}
        options = {name: as_number(value, kinds.get(name, _unknown)) for name, value in given}
        if len(options) < len(given):
            raise NoFormError
        return cls(as_numbers(ratios), **options)

    def __str__(self) -> str:
        every = f";every={self.every}" if self.every != 100 else ""
        smoothing = f";smoothing={number_text(self.smoothing)}" if self.smoothing else ""
        return numbers_text(self.ratios) + every + smoothing

    @property
    def is_due(self) -> bool:
        """Whether the current step measures: also while no length was found yet."""
        return self.step % self.every == 0 or not self.lengths

    def update(
        self,
        terms: Mapping[str, Tensor],
        states: Tensor | Sequence[Tensor],
        process_group: torch.distributed.ProcessGroup | None = None,
    ) -> dict[str, float]:
        """Measure if it is time, go to the next step and return the weights of this one.

        Args:
            terms: the terms' values, scalars, without their weights; their graph stays.
            states: hidden states of the student that the terms depend on.
            process_group: whose processes share the weights: lengths are over the states of all.

        Raises:
            ValueError: terms other than those of `ratios`.
        """
        if set(terms) != set(self.ratios):
            raise ValueError(f"terms are {sorted(terms)}, ratios {sorted(self.ratios)}: match them")
        lengths = {}
        if self.is_due:
            states = [states] if isinstance(states, Tensor) else list(states)
            lengths = {k: gradient_length(term, states, process_group) for k, term in terms.items()}
        return self.advance(lengths)

    def advance(self, lengths: Mapping[str, float] | None = None) -> dict[str, float]:
        """Take the lengths that were measured, if any, go to the next step and return the weights
        of this one.
        """
        self._balance(lengths or {})
        self.step += 1
        return dict(self.weights)

    def _balance(self, measured: Mapping[str, float]) -> None:
        for name, length in measured.items():
            if 0 < length < math.inf:
                before = self.lengths.get(name, length)
                self.lengths[name] = self.smoothing * before + (1 - self.smoothing) * length
        if self.lengths:
            mean = math.fsum(self.lengths.values()) / len(self.lengths)
            for name, length in self.lengths.items():
                self.weights[name] = self.ratios[name] * mean / length


def _unknown(value: str) -> float:
    """Refuse an option of another name than "every" and "smoothing"."""
    raise ValueError(value)


def gradient_length(
    term: Tensor,
    states: Sequence[Tensor],
    process_group: torch.distributed.ProcessGroup | None = None,
) -> float:
    """Return the length of a term's gradient over all states, of all processes of the group."""
    found = (torch.zeros_like(term),)  # of a term that is not computed
    if term.requires_grad:
        found = torch.autograd.grad(term, states, retain_graph=True, materialize_grads=True)
    norms = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float64) for g in found])
    squares = norms.square().sum()
    if process_group is not None:
        torch.distributed.all_reduce(squares, group=process_group)
    return math.sqrt(float(squares))
