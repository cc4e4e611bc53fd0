"""The statistics of a call: every row block walks the vocabulary once, and a second time for
divergences that need both log-sum-exps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fdd_kernels.backends.torch_stream.problem import (
    TorchProblem,
    at_temperature,
    log_probabilities,
    pair_vectors,
    request_logits,
)
from fdd_kernels.backends.torch_stream.running import (
    Expectation,
    RowMax,
    Softmax,
    no_moments,
    shifts_of,
    tile_moments,
    weighted_tile_moments,
)
from fdd_kernels.lens.divergences import DIVERGENCES, expectation_of, needs_second_pass
from fdd_kernels.lens.inputs import LensInputs
from fdd_kernels.lens.layout import (
    GRAD_SUM,
    LSE_S,
    LSE_T,
    MOMENT_STATS,
    REQUEST_STATS,
    VALUE,
    Statistics,
    lower_shifts,
    merge_moments,
)
from fdd_kernels.lens.spec import NLL, LensSpec, Request, of_request


def stats(inputs: LensInputs, spec: LensSpec) -> Statistics:
    """Compute the statistics of all rows; 0 where a row is not valid."""
    problem = TorchProblem(inputs, spec)

    def new(*shape: int) -> Tensor:
        return inputs.student_weight.new_zeros((*shape, problem.total_rows), dtype=problem.dtype)

    statistics = Statistics(
        new(2, problem.layers),
        new(len(spec.requests), REQUEST_STATS),
        new(len(spec.moments), MOMENT_STATS),
    )
    for rows, _, _ in problem.row_blocks(problem.tiles.rows):
        for whole, of_block in zip(statistics, _block_stats(problem, rows)):
            whole[..., rows] = of_block
    return statistics


class _RunningRequest:
    """The sums of one softmax request over the tiles so far, (r,) each."""

    def __init__(self, request: Request, like: Tensor):
        self.request, self.expectation_of = request, expectation_of(request.divergence)
        self.student, self.teacher = Softmax(like), Softmax(like)
        self.expectation = Expectation(like)
        self.label_logit = torch.zeros_like(like)
        # Of a mixture, relative to the mixed shifts: their own largest logit may lie far below.
        self.largest = torch.full_like(like, -torch.inf)
        self.mixture_shift = torch.zeros_like(like)

    def add(self, u_s: Tensor, u_t: Tensor | None, below: Tensor, rise: Tensor) -> None:
        """Take in a tile of logits (L, r, c) relative to the new shifts; `below` and `rise`
        (2, L, r) as `RowMax.subtract`.
        """
        request, temperature = self.request, self.request.temperature
        below_s = below[0, request.student_layer] / temperature
        total_s, total_t = self.student.total, self.teacher.total
        if request.divergence == NLL:
            self.student.add(below_s, at_temperature(u_s[request.student_layer], temperature))
            return
        z_s, z_t = request_logits(request, u_s, u_t)
        scale_s, e_s = self.student.add(below_s, z_s)
        below_t = below[1, request.teacher_layer] / temperature
        if request.teacher_mix < 1:
            below_t, z_t = self._subtract_own_largest(z_t, of_request(rise, request)[1])
        scale_t, e_t = self.teacher.add(below_t, z_t)
        if self.expectation_of == "teacher":
            self.expectation.add(total_t, scale_t, scale_s, below_s - below_t, e_t, e_s, z_s - z_t)
        elif self.expectation_of == "student":
            self.expectation.add(total_s, scale_s, scale_t, below_t - below_s, e_s, e_t, z_t - z_s)

    def _subtract_own_largest(self, z_rc: Tensor, rise: Tensor) -> tuple[Tensor, Tensor]:
        """Make the mixture's z relative to its own largest so far, once the mixed shifts rose.

        Returns how far the old one lies below it, and z.
        """
        old = self.largest - rise / self.request.temperature
        self.largest = torch.maximum(old, z_rc.amax(-1))
        self.mixture_shift = torch.where(self.largest == -torch.inf, 0.0, self.largest)
        return old - self.mixture_shift, z_rc - self.mixture_shift[:, None]

    def finish(self, shifts: Tensor, out: Tensor) -> None:
        """Write the statistics that are known after one pass into `out` (REQUEST_STATS, r)."""
        total_s, total_t = self.student.total, self.teacher.total
        out[LSE_S] = total_s.log()
        if self.request.divergence == NLL:
            above_label = shifts[0, self.request.student_layer] - self.label_logit
            out[VALUE] = out[LSE_S] + above_label / self.request.temperature
            return
        out[LSE_T] = self.mixture_shift + total_t.log()
        if self.expectation_of == "teacher":
            out[VALUE], out[GRAD_SUM] = self.expectation.value(total_t, total_s), -1.0
        elif self.expectation_of == "student":
            out[VALUE] = self.expectation.value(total_s, total_t)
            out[GRAD_SUM] = out[VALUE] + 1.0


def _block_stats(problem: TorchProblem, rows: Tensor | slice) -> Statistics:
    """Compute the statistics of one row block: all layers, the whole vocabulary."""
    student_LrD = problem.student.rows(rows)
    teacher_LrD = problem.teacher.rows(rows) if problem.spec.needs_teacher else None
    found = _first_pass(problem, rows, student_LrD, teacher_LrD)
    _second_pass(problem, student_LrD, teacher_LrD, found.shifts, found.requests)
    return found


def _first_pass(
    problem: TorchProblem, rows: Tensor | slice, student_LrD: Tensor, teacher_LrD: Tensor | None
) -> Statistics:
    """Compute all but VALUE and GRAD_SUM of the requests that need both log-sum-exps."""
    spec, student, teacher = problem.spec, problem.student, problem.teacher
    count = student_LrD.shape[1]
    row_max = RowMax(problem.layers, count, student_LrD)
    moments = no_moments(spec.moments, count, student_LrD)
    requests = student_LrD.new_zeros((len(spec.requests), REQUEST_STATS, count))
    per_row = student_LrD.new_zeros(count)
    running = [_RunningRequest(request, per_row) for request in spec.requests]

    for columns in problem.column_tiles():
        u_s = student.logits(student_LrD, student.weight_tile(columns), columns)
        u_t = None
        if spec.needs_teacher:
            u_t = teacher.logits(teacher_LrD, teacher.weight_tile(columns), columns)
        for sums in running:
            if sums.request.divergence == NLL:
                inside, at = problem.label_columns(rows, columns)
                of_label = u_s[sums.request.student_layer].gather(1, at[:, None])[:, 0]
                sums.label_logit = torch.where(inside, of_label, sums.label_logit)
        if running:
            below, rise = row_max.subtract(u_s, u_t)
            for of_pair, pair in zip(moments, spec.moments):
                lower_shifts(of_pair, pair, -rise)
        for sums in running:
            sums.add(u_s, u_t, below, rise)
        live = problem.live_tile(columns) if spec.moments else None
        for index, pair in enumerate(spec.moments):
            s, t = pair_vectors(u_s, u_t, pair)
            if pair.weighted:
                z = at_temperature(u_t[pair.second.teacher], pair.temperature)
                of_tile = weighted_tile_moments(s, t, z, live)
            else:
                of_tile = tile_moments(s, t, live)
            moments[index] = merge_moments(moments[index], of_tile, pair.weighted)

    for sums, out in zip(running, requests):
        sums.finish(row_max.shift, out)
    return Statistics(row_max.shift, requests, moments)


def _second_pass(
    problem: TorchProblem,
    student_LrD: Tensor,
    teacher_LrD: Tensor | None,
    shifts: Tensor,
    requests: Tensor,
) -> None:
    """Add VALUE and GRAD_SUM over the vocabulary to the `requests` of one row block that need both
    log-sum-exps; these must be there.
    """
    student, teacher, spec = problem.student, problem.teacher, problem.spec
    indices = [i for i, r in enumerate(spec.requests) if needs_second_pass(r.divergence)]
    for columns in problem.column_tiles() if indices else ():
        u_s = student.logits(student_LrD, student.weight_tile(columns), columns)
        u_t = teacher.logits(teacher_LrD, teacher.weight_tile(columns), columns)
        u_s -= shifts_of(u_s, shifts[0])
        u_t -= shifts_of(u_t, shifts[1])
        for index in indices:
            request = spec.requests[index]
            log_q, log_p = log_probabilities(request, u_s, u_t, requests[index])
            divergence = DIVERGENCES[request.divergence]
            requests[index, VALUE] += divergence.value(log_q, log_p, *request.parameters).sum(-1)
            requests[index, GRAD_SUM] += divergence.grad(log_q, log_p, *request.parameters).sum(-1)


def add_second_pass(inputs: LensInputs, spec: LensSpec, shifts: Tensor, requests: Tensor) -> None:
    """Add VALUE and GRAD_SUM over the given part of the vocabulary to the `requests` that need both
    log-sum-exps, which may be those of a larger vocabulary.
    """
    problem = TorchProblem(inputs, spec)
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
