"""The contract of row blocks: objectives that need the logits of a row at hand.

A backend cuts the rows into blocks. It computes a block's logits, (r, V) of each model, and calls a
row function, which returns numbers per row and, if asked, the gradient of the student's logits. The
teacher's vocabulary may be another one: its head has the tokens that are compared alone.

Shape suffixes: R rows, r rows of a block, V tokens compared.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fdd_kernels.lens.spec import LensSpec, encode_numbers

# Matrices (r, V) of 4 bytes an entry that a row function may hold, the logits of both models among
# them; `row_function(matrices=)` says more.
MATRICES = 4

# upstream (r, outputs) -> dL/du of the student's logits (r, V), in closed form: the operator that
# calls it is below autograd. Called at most once.
GradOf = Callable[[Tensor], Tensor]


class RowBlock(NamedTuple):
    """What a row function gets; it may overwrite the logits.

    Attributes:
        student, teacher: logits u = softcap(logit_scale * (h W^T + b)), (r, V); the teacher's are
            None in a call without a teacher.
        per_row: what else the call has for these rows, each (r, ...), such as labels.
        shared: what it has for all rows, each whole, such as numbers (V, ...) of columns.
        others: functions that compute the logits of further teachers, one matrix at a time.
        asks_gradient: whether the gradient is going to be asked for.
        hidden_from: of causal attention, the first column that some row does not see.
    """

    student: Tensor
    teacher: Tensor | None
    per_row: tuple[Tensor, ...]
    shared: tuple[Tensor, ...] = ()
    others: tuple[Callable[[], Tensor], ...] = ()
    asks_gradient: bool = True
    hidden_from: int = 0


# (block, *words, *numbers) of a `RowSpec` -> values (r, outputs) and the way to the gradient, None
# where there is none. Rows must not depend on one another.
RowFunction = Callable[..., tuple[Tensor, GradOf | None]]
ROW_FUNCTIONS: dict[str, RowFunction] = {}


# What rows of attention do not see: columns after themselves, and those of other sequences.
CAUSAL, PACKED = "causal", "packed"


def row_function(
    function: RowFunction | None = None,
    *,
    matrices: float = MATRICES,
    of_attention: bool = False,
) -> RowFunction:
    """Register a row function, which holds at most `matrices`, under its name.

    With `of_attention` its call has, in place of hidden states and heads, queries (G * T, d) and
    keys (G * T, d) of G groups of T = V rows each, of keys maybe fewer groups; every group of rows
    has columns of its own. Tensors per row are (B * T, ...) for G a multiple of B, and those that
    are shared (B * T, ...) too, for columns. A block has scores (g * r, c), and tensors (g, r, ...)
    and (g, c, ...). With `CAUSAL` in its second word a row sees no column after itself; with
    `PACKED` none with another number than its own in the second tensor per row, where equal numbers
    lie side by side. The backend may leave such columns out of a block.
    """
    if function is None:
        return functools.partial(row_function, matrices=matrices, of_attention=of_attention)
    function.matrices, function.of_attention = matrices, of_attention
    ROW_FUNCTIONS[function.__name__] = function
    return function


@dataclass(frozen=True)
class RowSpec:
    """The whole job of one call.

    Attributes:
        head: V, logit scales and soft caps; it has no requests and no moments.
        function: a name of `ROW_FUNCTIONS`, or a row function that is not registered.
        words, numbers: its parameters.
        outputs: how many numbers it returns per row.
    """

    head: LensSpec
    function: str | RowFunction
    words: tuple[str, ...]
    numbers: tuple[float, ...]
    outputs: int

    @property
    def matrices(self) -> float:
        """Return how many matrices (r, V) the row function may hold."""
        return getattr(self._function, "matrices", MATRICES)

    @property
    def _function(self) -> RowFunction:
        named = isinstance(self.function, str)
        return ROW_FUNCTIONS[self.function] if named else self.function

    @property
    def of_attention(self) -> bool:
        """Whether every group of rows has columns of its own; see `row_function`."""
        return getattr(self._function, "of_attention", False)

    def leaves_out(self, flag: str) -> bool:
        """Say whether rows of attention do not see what `CAUSAL` or `PACKED` names."""
        return self.of_attention and flag in self.words[1].split(",")

    def encode(self) -> tuple[str | RowSpec, Tensor, int, int]:
        """Return the spec as operator arguments: structure, numbers, V, outputs.

        No operator takes a function that is not registered: the spec itself is then the structure.
        """
        if not isinstance(self.function, str):
            return self, torch.empty(0), self.head.columns, self.outputs
        _, of_head, columns = self.head.encode()
        numbers = torch.cat([of_head, encode_numbers(self.numbers)]) if self.numbers else of_head
        return "|".join((self.function, *self.words)), numbers, columns, self.outputs

    @staticmethod
    def decode(structure: str | RowSpec, numbers: Tensor, columns: int, outputs: int) -> RowSpec:
        """Invert `encode`."""
        if not isinstance(structure, str):
            return structure
        function, *words = structure.split("|")
        head = LensSpec.decode("|", numbers[:4], columns)
        return RowSpec(head, function, tuple(words), tuple(numbers[4:].tolist()), outputs)

    def of_block(self, block: RowBlock) -> tuple[Tensor, GradOf | None]:
        """Call the row function."""
        return self._function(block, *self.words, *self.numbers)
