"""The walk over row blocks, and the launch of row kernels over a slab of a block's logits.

One implementation serves both strategies: a block asks `BlockLogits` for slabs of the vocabulary,
which are parts of cached logits or computed anew. Beyond inputs, outputs and statistics a call
allocates

    the scratch for logits, float32 (`logits.new_scratch`), and slabs of a head whose dtype is not
        that of the GEMM, converted (WIDENED_BYTES)
    of a block: its hidden states, and the state of the statistics' tiles
    of gradients: dL/dlogits of a slab (`strategy.GRADIENT_BYTES`), the float32 gradient of the
        block's hidden states, coefficients per row, KL's values per row and tile
    of the head's gradient, float32: all of it where a 16-bit head is trained over several blocks,
        one slab of it where one block gives a 16-bit head's or where float16 is scaled; and that of
        the bias

No atomics: results are the same from run to run.

Shape suffixes: L layers, R rows, r rows of a block, m = L r, C the vocabulary, c tokens of a slab,
D a hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
from torch import Tensor

from fdd_kernels.backends.triton import config
from fdd_kernels.backends.triton.cached.logits import BlockLogits, Slab, new_scratch
from fdd_kernels.backends.triton.launch import Launch
from fdd_kernels.backends.triton.problem import Problem


class Block:
    """A row block, `count` of its rows valid: its hidden states, logits and part of `statistics`.

    Rows are in the order of the call. `scratch` holds the logits of `tokens` tokens.
    """

    def __init__(
        self,
        problem: Problem,
        scratch: Tensor,
        tokens: int,
        first: int,
        rows: int,
        count: Tensor,
        statistics: tuple[Tensor, ...],
    ):
        self.problem, self.spec, self.table = problem, problem.spec, problem.table
        self.first, self.rows, self.layers = first, rows, problem.layers
        self.student_LrD = problem.gather(problem.student, first, rows)
        teacher_LrD = (
            problem.gather(problem.teacher, first, rows) if self.spec.needs_teacher else None
        )
        self.logits = BlockLogits(problem, scratch, tokens, self.student_LrD, teacher_LrD)
        self.statistics = self.of_block(statistics)
        self.count = count
        self.labels = problem.labels[first : first + rows]

    def of_block(self, per_row: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Take the block's part of tensors (..., R)."""
        return tuple([t[..., self.first : self.first + self.rows] for t in per_row])

    def arguments(self) -> dict:
        """Return the arguments that the row kernels have in common."""
        return {
            "count": self.count,
            "table": self.table.values,
            "table_width": self.table.width,
            "rows": self.rows,
            "layers": self.layers,
        }

    def tile_launches(
        self,
        kernel,
        shape: config.RowLaunch,
        slab: Slab,
        *,
        extra_axis: tuple[int, ...] = (),
        **arguments,
    ) -> Iterator[Launch]:
        """Describe a kernel over the rows and tiles of a slab: the full tiles, which need no mask,
        then the ragged last one.
        """
        student, teacher = self.problem.student, self.problem.teacher
        tokens = slab.stop - slab.start
        logits_t = slab.student if slab.teacher is None else slab.teacher

        def of_slab(bias: Tensor | None) -> Tensor:
            return slab.student if bias is None else bias[slab.start : slab.stop]

        full = tokens // shape.block
        architecture = config.architecture_of(self.problem.device)
        common = {
            **self.arguments(),
            "logits_s": slab.student,
            "logits_t": logits_t,
            "bias_s": of_slab(student.bias),
            "bias_t": of_slab(teacher.bias),
            "columns": tokens,
            "ld_s": slab.student.stride(1),
            "ld_t": logits_t.stride(1),
            "state_tile": slab.start // shape.block,
            "scale_s": student.scale,
            "scale_t": teacher.scale,
            "cap_s": student.cap,
            "cap_t": teacher.cap,
            "BIAS_S": student.bias is not None,
            "BIAS_T": slab.teacher is not None and teacher.bias is not None,
            "SCALE_S": student.scale != 1.0,
            "SCALE_T": teacher.scale != 1.0,
            "CAP_S": student.cap > 0,
            "CAP_T": teacher.cap > 0,
            "BLOCK_C": shape.block,
            **arguments,
        }
        for first, tiles in ((0, full), (full, triton.cdiv(tokens, shape.block) - full)):
            if tiles:
                is_full = first < full
                longer = ("BIAS_S", "BIAS_T", "WEIGHTED", "MIXED")
                long = not is_full or any(common.get(name) for name in longer)
                yield Launch(
                    kernel,
                    (self.rows, tiles, *extra_axis),
                    shape.options(long, architecture),
                    {**common, "first_tile": first, "FULL": is_full},
                )


def blocks_of(
    problem: Problem,
    rows: int,
    step: int,
    tokens: int,
    statistics: tuple[Tensor, ...],
    scratch: Tensor | None = None,
) -> Iterator[Block]:
    """Walk over blocks of `step` of the first `rows` rows.

    `scratch` holds the logits of `tokens` tokens; None: it is allocated here.
    """
    if not rows:
        return
    if scratch is None:
        scratch = new_scratch(problem, step, tokens)
    starts = torch.arange(0, rows, step, dtype=torch.int32, device=problem.device)
    # Four of each: Triton compiles a kernel once more for a pointer that 16 does not divide.
    counts = (problem.count - starts).clamp(max=step).unsqueeze(1).repeat(1, 4)
    for i, first in enumerate(range(0, rows, step)):
        count = counts[i, :1]
        yield Block(problem, scratch, tokens, first, min(step, rows - first), count, statistics)
