"""The contract of row blocks: objectives that need the logits of a row at hand.

A backend cuts the rows into blocks. It computes a block's logits, (r, V) of each model, and calls a
row function, which returns numbers per row and, if asked, the gradient of the student's logits.

Shape suffixes: R rows, r rows of a block, V tokens compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fdd_kernels.lens.spec import LensSpec, encode_numbers

# Matrices (r, V) that a row function may hold, the logits of both models among them.
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
        per_column: what it has for the columns, each (V, ...).
        others: functions that compute the logits of further teachers, one matrix at a time.
    """

    student: Tensor
    teacher: Tensor | None
    per_row: tuple[Tensor, ...]
    per_column: tuple[Tensor, ...] = ()
    others: tuple[Callable[[], Tensor], ...] = ()


# (block, *words, *numbers) of a `RowSpec` -> values (r, outputs) and the way to the gradient, None
# where there is none. Rows must not depend on one another.
RowFunction = Callable[..., tuple[Tensor, GradOf | None]]
ROW_FUNCTIONS: dict[str, RowFunction] = {}
# How many of a call's tensors, the last ones, are per column; none where it is not listed.
PER_COLUMN: dict[str, int] = {}
ATTENTION: set[str] = set()
CAUSAL = "causal"  # among what leaves out columns


def row_function(function: RowFunction) -> RowFunction:
    """Register a row function under its name."""
    ROW_FUNCTIONS[function.__name__] = function
    return function


def column_function(per_column: int) -> Callable[[RowFunction], RowFunction]:
    """Register a row function that takes `per_column` tensors per column."""

    def register(function: RowFunction) -> RowFunction:
        PER_COLUMN[function.__name__] = per_column
        return row_function(function)

    return register


def attention_function(function: RowFunction) -> RowFunction:
    """Register a row function of attention's scores.

    Its inputs are queries (G * T, d) in place of hidden states and keys (G * T, d) in place of the
    head, of G groups with T = V rows each, and of keys maybe fewer groups. Its first word says what
    is compared, the second lists what leaves out columns. The tensors of the call, per row its
    position and its sequence's id, and the same and whether it is seen per column, are (B * T) for
    G a multiple of B. A block has (g * r, c) scores and tensors (g, r) and (g, c).
    """
    ATTENTION.add(function.__name__)
    return column_function(3)(function)


def split_columns(name: str, tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Split a call's tensors into those per row and those per column."""
    count = len(tensors) - PER_COLUMN.get(name, 0)
    return list(tensors[:count]), list(tensors[count:])


@dataclass(frozen=True)
class RowSpec:
    """The whole job of one call.

    Attributes:
        head: V, logit scales and soft caps; it has no requests and no moments.
        function: a name of `ROW_FUNCTIONS`.
        words, numbers: its parameters.
        outputs: how many numbers it returns per row.
    """

    head: LensSpec
    function: str
    words: tuple[str, ...]
    numbers: tuple[float, ...]
    outputs: int

    def encode(self) -> tuple[str, Tensor, int, int]:
        """Return the spec as operator arguments: structure, numbers, V, outputs."""
        _, of_head, columns = self.head.encode()
        numbers = torch.cat([of_head, encode_numbers(self.numbers)]) if self.numbers else of_head
        return "|".join((self.function, *self.words)), numbers, columns, self.outputs

    @staticmethod
    def decode(structure: str, numbers: Tensor, columns: int, outputs: int) -> RowSpec:
        """Invert `encode`."""
        function, *words = structure.split("|")
        head = LensSpec.decode("|", numbers[:4], columns)
        return RowSpec(head, function, tuple(words), tuple(numbers[4:].tolist()), outputs)

    @property
    def is_attention(self) -> bool:
        """Whether every group of rows has columns of its own; see `attention_function`."""
        return self.function in ATTENTION

    @property
    def is_causal(self) -> bool:
        """Whether a row of attention sees no column after itself."""
        return self.is_attention and CAUSAL in self.words[1].split(",")

    def of_block(self, block: RowBlock) -> tuple[Tensor, GradOf | None]:
        """Call the row function."""
        return ROW_FUNCTIONS[self.function](block, *self.words, *self.numbers)
