"""The backend "torch": the two operations in plain PyTorch, streamed over rows and columns, on any
device.

Products, sums and statistics are float32 (float64 for float64 inputs) whatever the inputs are, and
logits are never rounded below that. Beyond inputs, outputs and statistics it allocates tiles and
accumulators of bounded size.

Shape suffixes: L layers, R rows, r rows of a block, C columns, c columns of a tile, D a hidden
width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fdd_kernels.backends.call_shape import FLOAT, CallShape
from fdd_kernels.lens.divergences import DIVERGENCES, is_near, kl_of
from fdd_kernels.lens.inputs import LensInputs
from fdd_kernels.lens.layout import (
    COUNT,
    GRAD_SUM,
    LSE_S,
    LSE_T,
    M_DD,
    M_SS,
    M_ST,
    M_TT,
    MEAN_S,
    MEAN_T,
    MOMENT_STATS,
    REQUEST_STATS,
    VALUE,
)
from fdd_kernels.lens.spec import NLL, LensSpec, PairMoments, Request, of_pair

MIB = 2**20
# Tiles of logits: inside the last cache level of a CPU; large enough to fill an accelerator.
TILE_BYTES = {"cpu": 32 * MIB}
ACCELERATOR_TILE_BYTES = 128 * MIB
# of the hidden states of a row block, and of the head's rows of a column tile
OPERAND_BYTES = 48 * MIB
ACCUMULATOR_BYTES = 96 * MIB  # of a gradient that is accumulated in a wider dtype than its own
RUNTIME_BYTES = 6 * MIB  # generated code, buffers of the matrix library
# Tiles of one layer that are held while gradients are formed: for each layer (the student's values
# before and after the shift, the teacher's, their gradient, and that of the tile before), for a
# read's temporaries, for a moment's.
LAYER_TILES, READ_TILES, MOMENT_TILES = 5, 6, 4


@dataclass(frozen=True)
class Tiles:
    """How the work is cut: `rows` and `columns` of a tile, `resident_rows` whose gradient is
    accumulated at a time.
    """

    rows: int
    columns: int
    resident_rows: int


def choose_tiles(
    layers: int,
    rows: int,
    columns: int,
    student_width: int,
    teacher_width: int,
    itemsize: int,
    device_type: str,
) -> Tiles:
    """Tile sizes that keep every buffer within the byte budgets of this file."""
    # The student's logits twice (before and after the shift), the teacher's and the gradient for
    # every layer, and about twelve temporaries of one layer.
    elements = TILE_BYTES.get(device_type, ACCELERATOR_TILE_BYTES) // (itemsize * (4 * layers + 12))
    width = student_width + teacher_width
    most_columns = max(1, OPERAND_BYTES // (itemsize * width))
    most_rows = max(1, OPERAND_BYTES // (itemsize * width * layers))
    tile_columns = max(1, min(columns, 2048, most_columns))
    tile_rows = max(1, min(rows, most_rows, elements // tile_columns))
    tile_columns = max(1, min(columns, most_columns, max(tile_columns, elements // tile_rows)))
    resident = max(tile_rows, ACCUMULATOR_BYTES // (itemsize * layers * student_width))
    return Tiles(tile_rows, tile_columns, resident)


class _Side:
    """One model: its hidden states and head, read in tiles."""

    def __init__(
        self,
        hidden: list[Tensor],
        weight: Tensor | None,
        bias: Tensor | None,
        logit_scale: float,
        softcap: float | None,
        dtype: torch.dtype,
    ):
        self.hidden, self.weight, self.bias = hidden, weight, bias
        self.logit_scale, self.softcap, self.dtype = logit_scale, softcap, dtype

    def rows(self, rows: Tensor | slice) -> Tensor:
        """The hidden states of a row block: (L, r, D)."""
        return torch.stack([h[rows].to(self.dtype) for h in self.hidden])

    def weight_tile(self, columns: slice) -> Tensor | None:
        """The head's rows of a column tile, (c, D); None for the identity."""
        return None if self.weight is None else self.weight[columns].to(self.dtype)

    def values(self, hidden_LrD: Tensor, weight_cD: Tensor | None, columns: slice) -> Tensor:
        """u = softcap(logit_scale * (h W^T + b)) of one tile: (L, r, c), a new tensor."""
        if weight_cD is None:
            return hidden_LrD[..., columns].clone()
        layers, rows, width = hidden_LrD.shape
        u = (hidden_LrD.reshape(layers * rows, width) @ weight_cD.T).view(layers, rows, -1)
        if self.bias is not None:
            u += self.bias[columns].to(self.dtype)
        if self.logit_scale != 1.0:
            u *= self.logit_scale
        if self.softcap is not None:
            u.div_(self.softcap).tanh_().mul_(self.softcap)
        return u

    def chain(self, grad_u: Tensor, u: Tensor) -> Tensor:
        """dL/du -> dL/dx with x = h W^T + b, in place; u is the value before any shift is
        subtracted.
        """
        if self.softcap is not None:
            grad_u *= 1 - (u / self.softcap).square()
        if self.logit_scale != 1.0:
            grad_u *= self.logit_scale
        return grad_u


class _Problem:
    """The inputs of one call, cut into row blocks and column tiles."""

    def __init__(self, inputs: LensInputs, spec: LensSpec):
        self.dtype, self.device, self.total_rows = (
            inputs.statistics_dtype,
            inputs.device,
            inputs.rows,
        )
        self.spec, self.labels = spec, inputs.labels
        self.student = _Side(
            inputs.student_hidden,
            inputs.student_weight,
            inputs.student_bias,
            spec.student_logit_scale,
            spec.student_softcap,
            self.dtype,
        )
        self.teacher = _Side(
            inputs.teacher_hidden,
            inputs.teacher_weight,
            inputs.teacher_bias,
            spec.teacher_logit_scale,
            spec.teacher_softcap,
            self.dtype,
        )
        self.layers = len(inputs.student_hidden)
        self.valid_rows = None if inputs.valid is None else inputs.valid.nonzero().squeeze(1)
        self.count = self.total_rows if inputs.valid is None else len(self.valid_rows)
        teacher_width = inputs.teacher_hidden[0].shape[-1] if spec.needs_teacher else 0
        self.tiles = choose_tiles(
            self.layers,
            max(self.count, 1),
            spec.columns,
            inputs.student_hidden[0].shape[-1],
            teacher_width,
            self.dtype.itemsize,
            self.device.type,
        )

    def row_blocks(self, size: int, start: int = 0, stop: int | None = None):
        """Row selections of at most `size` valid rows; with the first and last position among the
        valid rows.
        """
        stop = self.count if stop is None else stop
        for first in range(start, stop, size):
            last = min(first + size, stop)
            rows = slice(first, last) if self.valid_rows is None else self.valid_rows[first:last]
            yield rows, first, last

    def live_tile(self, columns: slice) -> Tensor | None:
        """(c,) bool: the columns of a tile where no bias is -inf in front of no soft cap; None:
        there are no biases.
        """
        live = None
        for side in (self.student, self.teacher):
            if side.bias is not None and side.softcap is None:
                own = side.bias[columns] != -torch.inf
                live = own if live is None else live & own
        return live

    def column_tiles(self):
        for first in range(0, self.spec.columns, self.tiles.columns):
            yield slice(first, min(first + self.tiles.columns, self.spec.columns))

    def label_columns(self, rows, columns: slice) -> tuple[Tensor, Tensor]:
        """For each row of a block: whether its label is in the column tile, and at which of its
        columns (else 0).
        """
        local = self.labels[rows] - columns.start
        inside = (local >= 0) & (local < columns.stop - columns.start)
        return inside, local.where(inside, 0)


class _Tops:
    """The largest u of every row so far, of both models: (2, L, r). Logits are taken relative to
    it.
    """

    def __init__(self, layers: int, rows: int, like: Tensor):
        self.top = like.new_full((2, layers, rows), -torch.inf)
        # the same, and 0 while every u so far is -inf
        self.shift = like.new_zeros((2, layers, rows))

    def subtract(self, u_s: Tensor, u_t: Tensor | None) -> tuple[Tensor, Tensor]:
        """Make a tile relative to the new tops, in place.

        Returns how far the old tops lie below them (-inf without one), and how far the shifts rose:
        (2, L, r).
        """
        largest = torch.stack([u_s.amax(-1), self.top[1] if u_t is None else u_t.amax(-1)])
        top, old = torch.maximum(self.top, largest), self.shift
        self.shift = torch.where(top == -torch.inf, 0.0, top)
        below, self.top = self.top - self.shift, top
        u_s -= self.shift[0, ..., None]
        if u_t is not None:
            u_t -= self.shift[1, ..., None]
        return below, self.shift - old


class _Softmax:
    """Running sum of e^z of a row block, z relative to the tops."""

    def __init__(self, like: Tensor):
        self.total = torch.zeros_like(like)

    def add(self, below: Tensor, z_rc: Tensor) -> tuple[Tensor, Tensor]:
        """Take in a tile; the factor by which the tops' rise scales e^z, and the tile's e^z."""
        scale, e_rc = below.exp(), z_rc.exp()
        self.total = self.total * scale + e_rc.sum(-1)
        return scale, e_rc


class _Expectation:
    """KL(p || r) of a row block in one pass: with e and e' = e e^x the two models' e^z, sums of

        weighted -e x,    excess e (e^x - 1 - x),    difference e' - e

    Where the models are close, log(R / P) + E_p[-x] is a small difference, while E_p[e^x - 1 - x]
    is a sum of positive numbers; they differ by log(R / P) - (R - P) / P, which is of the second
    order in how far R / P is from 1.
    """

    def __init__(self, like: Tensor):
        self.weighted, self.excess, self.difference = (torch.zeros_like(like) for _ in range(3))

    def add(
        self,
        total: Tensor,
        scale: Tensor,
        other_scale: Tensor,
        moved: Tensor,
        e_rc: Tensor,
        other_rc: Tensor,
        x_rc: Tensor,
    ) -> None:
        """Restate what was summed, of the sum `total` of e, about tops that moved x by `moved`;
        take in a tile.
        """
        first, second, gap = _orders(scale, other_scale, moved)
        kept = scale > 0
        self.excess = (
            torch.where(kept, scale * self.excess, 0.0) + total * second + self.difference * gap
        )
        self.weighted = torch.where(kept, scale * self.weighted, 0.0) - total * first
        self.difference = other_scale * self.difference + total * gap
        first, second, gap = _orders(e_rc, other_rc, x_rc)
        self.weighted -= first.sum(-1)
        self.excess += second.sum(-1)
        self.difference += gap.sum(-1)

    def value(self, total: Tensor, other: Tensor) -> Tensor:
        """KL from the sums of e and e'."""
        off = self.difference / total
        log_ratio = off.clamp(min=-0.5).log1p()
        near = self.excess / total - kl_of(torch.ones_like(off), 1 + off, log_ratio)
        return torch.where(
            off.abs() < 0.5, near, self.weighted / total + other.log() - total.log()
        ).clamp(min=0)


def _orders(e: Tensor, other: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """e x, e (e^x - 1 - x) and e (e^x - 1), given other = e e^x; 0 * anything = 0."""
    first, second = torch.where(e == 0, 0.0, e * x), kl_of(e, other, x)
    return first, second, torch.where(is_near(x), first + second, other - e)


def _at_temperature(u: Tensor, temperature: float) -> Tensor:
    return u if temperature == 1.0 else u / temperature


def _vectors(u_s: Tensor, u_t: Tensor, pair: PairMoments, temperature: float) -> list[Tensor]:
    """Compute s and t of a pair, new tensors (r, c); 0 where two layers have the same logits."""
    vectors = []
    for model, u_LrC in enumerate((u_s, u_t)):
        second = u_LrC[pair.second[model]]
        if pair.first is None:
            vectors.append(second / temperature)
        else:
            vectors.append((second - u_LrC[pair.first[model]]).div_(temperature))
    return vectors


def _tile_moments(s: Tensor, t: Tensor, live: Tensor | None) -> Tensor:
    """(MOMENT_STATS, r) of one tile's vectors s and t, both (r, c), over the columns that are
    `live`; overwrites them.
    """
    out = s.new_empty((MOMENT_STATS, len(s)))
    if live is None:
        count = s.new_full((), s.shape[-1])
    else:
        count = live.sum().to(s.dtype)
        s, t = torch.where(live, s, 0.0), torch.where(live, t, 0.0)
    out[COUNT], divisor = count, count.clamp(min=1)
    for vector, mean in ((s, MEAN_S), (t, MEAN_T)):
        # About the first column first: the sum then has no large common part to round.
        base = vector[:, :1].clone()
        vector -= base
        offset = (vector if live is None else torch.where(live, vector, 0.0)).sum(-1) / divisor
        vector -= offset[:, None]
        out[mean] = base[:, 0] + offset
        if live is not None:
            vector *= live
    out[M_SS], out[M_TT], out[M_ST] = (s * s).sum(-1), (t * t).sum(-1), (s * t).sum(-1)
    out[M_DD] = s.sub_(t).square_().sum(-1)
    return out


def _restate_means(moments: Tensor, spec: LensSpec, rise: Tensor) -> None:
    """The means of the columns so far about shifts that rose by `rise` (2, L, r), in place."""
    for moment, pair in zip(moments, spec.moments):
        of_vectors = of_pair(rise, pair)
        moment[MEAN_S : MEAN_T + 1] -= torch.where(
            moment[COUNT] > 0, of_vectors / spec.moment_temperature, 0.0
        )


def _merge_moments(a: Tensor, b: Tensor) -> Tensor:
    """Moments of the union of two sets of columns (Chan, Golub and LeVeque's update):
    (MOMENT_STATS, r).
    """
    count = a[COUNT] + b[COUNT]
    weight_b = b[COUNT] / count.clamp(min=1)
    cross = a[COUNT] * weight_b
    delta_s, delta_t = b[MEAN_S] - a[MEAN_S], b[MEAN_T] - a[MEAN_T]
    out = a + b
    out[MEAN_S], out[MEAN_T] = a[MEAN_S] + delta_s * weight_b, a[MEAN_T] + delta_t * weight_b
    out[M_SS] += cross * delta_s * delta_s
    out[M_TT] += cross * delta_t * delta_t
    out[M_ST] += cross * delta_s * delta_t
    out[M_DD] += cross * (delta_s - delta_t).square()
    return out


def stats(inputs: LensInputs, spec: LensSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics: shifts (2, L, R), requests (requests, 4, R), moments (moments, 7, R); see
    `spec.py`.
    """
    problem = _Problem(inputs, spec)
    new = inputs.student_weight.new_zeros
    shifts = new((2, problem.layers, problem.total_rows), dtype=problem.dtype)
    requests = new((len(spec.requests), REQUEST_STATS, problem.total_rows), dtype=problem.dtype)
    moments = new((len(spec.moments), MOMENT_STATS, problem.total_rows), dtype=problem.dtype)
    for rows, _, _ in problem.row_blocks(problem.tiles.rows):
        shifts[..., rows], requests[..., rows], moments[..., rows] = _block_stats(problem, rows)
    return shifts, requests, moments


def _block_stats(problem: _Problem, rows) -> tuple[Tensor, Tensor, Tensor]:
    """The statistics of one row block, all layers, every column."""
    spec, student, teacher = problem.spec, problem.student, problem.teacher
    student_LrD = student.rows(rows)
    teacher_LrD = teacher.rows(rows) if spec.needs_teacher else None
    layers, count = student_LrD.shape[:2]
    tops = _Tops(layers, count, student_LrD)
    moments = student_LrD.new_zeros((len(spec.moments), MOMENT_STATS, count))
    requests = student_LrD.new_zeros((len(spec.requests), REQUEST_STATS, count))
    per_row = student_LrD.new_zeros(count)
    of_student, of_teacher = ([_Softmax(per_row) for _ in spec.requests] for _ in range(2))
    expectations = [_Expectation(per_row) for _ in spec.requests]
    labels = torch.zeros_like(requests[:, 0])  # u at the label

    for columns in problem.column_tiles():
        u_s = student.values(student_LrD, student.weight_tile(columns), columns)
        u_t = (
            teacher.values(teacher_LrD, teacher.weight_tile(columns), columns)
            if spec.needs_teacher
            else None
        )
        for index, request in enumerate(spec.requests):
            if request.divergence == NLL:
                inside, at = problem.label_columns(rows, columns)
                labels[index] = torch.where(
                    inside, u_s[request.student_layer].gather(1, at[:, None])[:, 0], labels[index]
                )
        if spec.requests:
            below, rise = tops.subtract(u_s, u_t)
            _restate_means(moments, spec, rise)
        for index, request in enumerate(spec.requests):
            below_s = below[0, request.student_layer] / request.temperature
            below_t = below[1, request.teacher_layer] / request.temperature
            z_s = _at_temperature(u_s[request.student_layer], request.temperature)
            total_s, total_t = of_student[index].total, of_teacher[index].total
            scale_s, e_s = of_student[index].add(below_s, z_s)
            if request.divergence == NLL:
                continue
            z_t = _at_temperature(u_t[request.teacher_layer], request.temperature)
            scale_t, e_t = of_teacher[index].add(below_t, z_t)
            of = expectation_of(request)
            if of == "teacher":
                expectations[index].add(
                    total_t, scale_t, scale_s, below_s - below_t, e_t, e_s, z_s - z_t
                )
            elif of == "student":
                expectations[index].add(
                    total_s, scale_s, scale_t, below_t - below_s, e_s, e_t, z_t - z_s
                )
        for index, pair in enumerate(spec.moments):
            s, t = _vectors(u_s, u_t, pair, spec.moment_temperature)
            moments[index] = _merge_moments(
                moments[index], _tile_moments(s, t, problem.live_tile(columns))
            )

    shifts = tops.shift
    for index, request in enumerate(spec.requests):
        total_s, total_t = of_student[index].total, of_teacher[index].total
        requests[index, LSE_S] = total_s.log()
        if request.divergence == NLL:
            requests[index, VALUE] = (
                total_s.log()
                + (shifts[0, request.student_layer] - labels[index]) / request.temperature
            )
            continue
        requests[index, LSE_T] = total_t.log()
        of = expectation_of(request)
        if of == "teacher":
            requests[index, VALUE] = expectations[index].value(total_t, total_s)
            requests[index, GRAD_SUM] = -1.0
        elif of == "student":
            requests[index, VALUE] = expectations[index].value(total_s, total_t)
            requests[index, GRAD_SUM] = requests[index, VALUE] + 1.0
    _second_pass(problem, student_LrD, teacher_LrD, shifts, requests)
    return shifts, requests, moments


def _second_pass(
    problem: _Problem,
    student_LrD: Tensor,
    teacher_LrD: Tensor | None,
    shifts: Tensor,
    requests: Tensor,
) -> None:
    """Add to `requests` what takes both log-sum-exps, which stand there: of one row block, over
    every column.
    """
    student, teacher, spec = problem.student, problem.teacher, problem.spec
    indices = [i for i, request in enumerate(spec.requests) if needs_second_pass(request)]
    for columns in problem.column_tiles() if indices else ():
        u_s = (
            student.values(student_LrD, student.weight_tile(columns), columns)
            - shifts[0, ..., None]
        )
        u_t = (
            teacher.values(teacher_LrD, teacher.weight_tile(columns), columns)
            - shifts[1, ..., None]
        )
        for index in indices:
            request = spec.requests[index]
            log_q, log_p = _log_probabilities(request, u_s, u_t, requests[index])
            divergence = DIVERGENCES[request.divergence]
            requests[index, VALUE] += divergence.value(log_q, log_p, *request.parameters).sum(-1)
            requests[index, GRAD_SUM] += divergence.grad(log_q, log_p, *request.parameters).sum(-1)


def add_second_pass(inputs: LensInputs, spec: LensSpec, shifts: Tensor, requests: Tensor) -> None:
    """Add VALUE and GRAD_SUM over the given columns to the `requests` that need both log-sum-exps,
    perhaps of more columns.
    """
    problem = _Problem(inputs, spec)
    for rows, _, _ in problem.row_blocks(problem.tiles.rows):
        of_block = requests[..., rows].clone()
        _second_pass(
            problem,
            problem.student.rows(rows),
            problem.teacher.rows(rows),
            shifts[..., rows],
            of_block,
        )
        requests[..., rows] = of_block


def expectation_of(request: Request) -> str | None:
    """The model under whose distribution the request's divergence is an expectation, summed in one
    pass; None: neither.
    """
    return (
        DIVERGENCES[request.divergence].expectation_of
        if request.divergence in DIVERGENCES
        else None
    )


def needs_second_pass(request: Request) -> bool:
    """Whether the request's divergence is summed with both log-sum-exps known."""
    return request.divergence in DIVERGENCES and expectation_of(request) is None


def _log_probabilities(
    request: Request, u_s: Tensor, u_t: Tensor, request_stats: Tensor
) -> tuple[Tensor, Tensor]:
    """log q and log p of one tile, (r, c) each, from u relative to the shifts."""
    log_q = (
        _at_temperature(u_s[request.student_layer], request.temperature)
        - request_stats[LSE_S, :, None]
    )
    log_p = (
        _at_temperature(u_t[request.teacher_layer], request.temperature)
        - request_stats[LSE_T, :, None]
    )
    return log_q, log_p


def grad(
    inputs: LensInputs, spec: LensSpec, per_row: tuple[Tensor, ...], needed: list[bool]
) -> list[Tensor]:
    """Gradients of [*student_hidden, student_weight, student_bias] marked in `needed`.

    `per_row` are the three statistics and the upstream gradients of the last two. A gradient of a
    low-precision head is accumulated in float32; where neither that of the whole head nor that of
    all hidden states fits the accumulator budget, the columns are walked twice, once for each.
    """
    problem = _Problem(inputs, spec)
    student_hidden, student_weight, student_bias = (
        inputs.student_hidden,
        inputs.student_weight,
        inputs.student_bias,
    )
    *needs_hidden, needs_weight, needs_bias = needed
    grad_hidden = [
        torch.zeros_like(h, memory_format=torch.contiguous_format) if need else None
        for h, need in zip(student_hidden, needs_hidden)
    ]
    grad_weight = (
        torch.zeros_like(student_weight, memory_format=torch.contiguous_format)
        if needs_weight
        else None
    )
    grad_bias = torch.zeros_like(student_bias, dtype=problem.dtype) if needs_bias else None

    all_rows = max(problem.count, 1)
    resident = problem.tiles.resident_rows if any(needs_hidden) else all_rows
    # Written once per set of resident rows: with one set, or in a dtype wide enough, no accumulator
    # is needed.
    summed_in_place = (
        not needs_weight or problem.count <= resident or student_weight.dtype == problem.dtype
    )
    if summed_in_place:
        _accumulate(problem, per_row, grad_hidden, grad_weight, grad_bias, resident)
    elif student_weight.numel() * problem.dtype.itemsize <= ACCUMULATOR_BYTES:
        accumulator = torch.zeros_like(grad_weight, dtype=problem.dtype)
        _accumulate(problem, per_row, grad_hidden, accumulator, grad_bias, resident)
        grad_weight.copy_(accumulator)
    else:
        _accumulate(problem, per_row, grad_hidden, None, None, resident)
        _accumulate(problem, per_row, [], grad_weight, grad_bias, all_rows)
    if grad_bias is not None:
        grad_bias = grad_bias.to(student_bias.dtype)
    return [g for g in (*grad_hidden, grad_weight, grad_bias) if g is not None]


def _accumulate(
    problem: _Problem, per_row, grad_hidden, grad_weight, grad_bias, resident_rows: int
) -> None:
    """Add the gradients into the tensors given, one per layer, or none, for the hidden states; None
    is not computed.

    For each set of resident rows the columns are outermost, so a tile of the head's gradient is
    summed over these rows in the working dtype and written once.
    """
    student, teacher = problem.student, problem.teacher
    width = student.hidden[0].shape[-1]
    want_hidden = any(g is not None for g in grad_hidden)
    for start in range(0, problem.count, resident_rows):
        stop = min(start + resident_rows, problem.count)
        summed = None
        if want_hidden:
            summed = student.hidden[0].new_zeros(
                (problem.layers, stop - start, width), dtype=problem.dtype
            )
        for columns in problem.column_tiles():
            weight_cD = student.weight_tile(columns)
            teacher_cD = teacher.weight_tile(columns) if problem.spec.needs_teacher else None
            summed_cD = torch.zeros_like(weight_cD) if grad_weight is not None else None
            for rows, first, last in problem.row_blocks(problem.tiles.rows, start, stop):
                student_LrD = student.rows(rows)
                teacher_LrD = teacher.rows(rows) if problem.spec.needs_teacher else None
                grad_x = _tile_gradient(
                    problem, per_row, rows, columns, student_LrD, weight_cD, teacher_LrD, teacher_cD
                )
                if grad_bias is not None:
                    grad_bias[columns] += grad_x.sum((0, 1))
                flat = grad_x.reshape(-1, grad_x.shape[-1])
                if summed is not None:
                    summed[:, first - start : last - start] += (flat @ weight_cD).view(
                        problem.layers, -1, width
                    )
                if summed_cD is not None:
                    summed_cD.addmm_(flat.T, student_LrD.reshape(-1, width))
            if grad_weight is not None:
                grad_weight[columns] += summed_cD
        if want_hidden:
            rows, _, _ = next(problem.row_blocks(stop - start, start, stop))
            for layer, out in enumerate(grad_hidden):
                if out is not None:
                    out[rows] = summed[layer].to(out.dtype)


def _tile_gradient(
    problem: _Problem,
    per_row,
    rows,
    columns: slice,
    student_LrD,
    weight_cD,
    teacher_LrD,
    teacher_cD,
):
    """dL/dx of one tile, x = h W^T + b of the student: (L, r, c)."""
    spec, student, teacher = problem.spec, problem.student, problem.teacher
    shifts, requests, moments, grad_requests, grad_moments = (
        stat[..., rows, None] for stat in per_row
    )
    raw_s = student.values(student_LrD, weight_cD, columns)
    u_s = raw_s - shifts[0]
    u_t = None
    if spec.needs_teacher:
        u_t = teacher.values(teacher_LrD, teacher_cD, columns)
        u_t -= shifts[1]
    grad_u = torch.zeros_like(u_s)
    for index, request in enumerate(spec.requests):
        upstream, stat = grad_requests[index], requests[index]
        log_q = _at_temperature(u_s[request.student_layer], request.temperature) - stat[LSE_S]
        q = log_q.exp()
        if request.divergence is None:
            grad_z = q * upstream[LSE_S]
        elif request.divergence == NLL:
            inside, at = problem.label_columns(rows, columns)
            grad_z = q * (upstream[LSE_S] + upstream[VALUE])
            grad_z.scatter_add_(1, at[:, None], torch.where(inside[:, None], -upstream[VALUE], 0.0))
        else:
            log_p = _at_temperature(u_t[request.teacher_layer], request.temperature) - stat[LSE_T]
            grad_z = (
                DIVERGENCES[request.divergence]
                .grad(log_q, log_p, *request.parameters)
                .sub_(q * stat[GRAD_SUM])
                .mul_(upstream[VALUE])
            )
            grad_z += q * upstream[LSE_S]
        grad_u[request.student_layer].add_(grad_z, alpha=1 / request.temperature)
    for index, pair in enumerate(spec.moments):
        upstream, stat = grad_moments[index], moments[index]
        s, t = _vectors(u_s, u_t, pair, spec.moment_temperature)
        live = problem.live_tile(columns)
        s -= stat[MEAN_S]
        t -= stat[MEAN_T]
        grad_vector = (
            (2 * upstream[M_SS]) * s
            + upstream[M_ST] * t
            + upstream[MEAN_S] / stat[COUNT].clamp(min=1)
        )
        grad_vector += (2 * upstream[M_DD]) * s.sub_(t)
        if live is not None:
            grad_vector = torch.where(live, grad_vector, 0.0)
        grad_u[pair.second.student].add_(grad_vector, alpha=1 / spec.moment_temperature)
        if pair.first is not None:
            grad_u[pair.first.student].sub_(grad_vector, alpha=1 / spec.moment_temperature)
    return student.chain(grad_u, raw_s)


def memory(shape: CallShape) -> dict[str, int]:
    """Bytes that are in use at the peak of a call by part, beside gradients and statistics."""
    layers, rows, width = shape.layers, shape.rows, shape.student_width
    tiles = choose_tiles(
        layers, rows, shape.columns, width, shape.teacher_width, FLOAT, shape.device
    )
    block, resident = min(tiles.rows, rows), min(rows, tiles.resident_rows)
    converted = width + (shape.teacher_width if shape.teacher_head else 0) if shape.narrow else 0
    head_sum = FLOAT * shape.columns * width
    several = shape.narrow and shape.train_head and rows > resident
    count = LAYER_TILES * layers + READ_TILES + (MOMENT_TILES if shape.moments else 0)
    return {
        "sums of hidden gradients": FLOAT * layers * resident * width,
        "sum of the head's gradient": head_sum if several and head_sum <= ACCUMULATOR_BYTES else 0,
        "operands": FLOAT * layers * block * (width + shape.teacher_width)
        + FLOAT * tiles.columns * ((width if shape.train_head else 0) + converted),
        "tiles": FLOAT * block * tiles.columns * count,
        "runtime": RUNTIME_BYTES,
    }
