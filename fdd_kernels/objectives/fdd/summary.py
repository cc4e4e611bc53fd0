"""A teacher reduced to sufficient statistics of each token, for students whose LM head is linear
and frozen.

With W, b the student's head, s its logit scale divided by the temperature, p the teacher's
distribution at a layer and q the student's, z_s = s (W h + b), the forward KL needs of the teacher
only

    KL(p || q) = -H(p) - s (u . h + E_p[b]) + logsumexp(z_s),        u = E_p[W] = W^T p
    (width Ds)

and the deltas t = z_t^(l+1) - z_t^l and s W d, d = h^(l+1) - h^l, need of t only its mean, its sum
of squares about the mean, and a = (W - m)^T t with m the mean of the head's rows:

    sum about the means of (s W d)^2 = s^2 d . G d,   G = (W - m)^T (W - m);   of (s W d) t = s d .
    a;   mean = s m . d

All of it is exact over the whole vocabulary. `StatisticsMaker` makes the statistics, once;
`StatisticsLoss` computes the loss from them with neither teacher nor teacher head. What follows
from them is in `terms.py`, as for every backend.

Where student and teacher nearly agree, the difference E_q[W] - u, which is the gradient of KL, has
fewer digits than the sum over (p - q) W that `fused_fdd_loss` takes: the error is that of float32
relative to E_q[W], not to the difference.

Shape suffixes: L layers, R rows, r rows of a block, c columns of a tile, D the student's width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fdd_kernels.backends import resolve_backend
from fdd_kernels.backends.torch_stream import MIB, choose_tiles
from fdd_kernels.engine.autograd import log_sum_exps
from fdd_kernels.lens.layout import (
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
from fdd_kernels.lens.spec import NLL, Layers, LensSpec, PairMoments, Request
from fdd_kernels.objectives.fdd.options import FDDLossTerms, LossOptions
from fdd_kernels.objectives.fdd.plan import Plan, check_normaliser, lay_out
from fdd_kernels.objectives.fdd.terms import combine, normaliser_of, row_terms_from_statistics

# Columns of the array "scalars": three for each request, then three for each pair.
_NEGATIVE_ENTROPY, _EXPECTED_BIAS, _LSE = range(3)
_COUNT, _MEAN, _SQUARES = range(3)
_HEAD_BYTES = 32 * MIB  # of the head's rows that are converted at a time


def check_options(options: LossOptions) -> None:
    """Refuse what these statistics cannot serve.

    Raises:
        ValueError: naming the option, and what can serve it.
    """
    if options.alpha and options.trajectory != "kl":
        raise ValueError(
            f"trajectory={options.trajectory!r} needs more of the teacher than its statistics: "
            'only "kl" can be computed from '
            "them. Use the teacher, or a cache of its hidden states"
        )
    if options.student_softcap is not None:
        raise ValueError(
            f"student_softcap={options.student_softcap}: a soft-capped head is not linear, and the "
            "teacher's statistics for "
            "it do not exist. Use the teacher, or a cache of its hidden states"
        )


def _everything(options: LossOptions, columns: int, layers: int, rows: int) -> Plan:
    """The plan of all that the statistics can serve: every request and every pair of layers."""
    check_options(options)
    options = replace(
        options,
        alpha=1.0,
        beta=1.0,
        output_kd_weight=1.0,
        ce_weight=0.0,
        trajectory="kl",
        derivative="cosine",
    )
    return lay_out(options, columns, layers, (rows,), False, "torch")


def statistics_widths(options: LossOptions, layers: int, student_width: int) -> dict[str, int]:
    """Name and width of each array of `StatisticsMaker`; `layers` counts the final state."""
    spec = _everything(options, 1, layers, 0).spec
    widths = {f"expectation_{i}": student_width for i in range(len(spec.requests))}
    widths |= {f"correlation_{i}": student_width for i in range(len(spec.moments))}
    return widths | {"scalars": 3 * (len(spec.requests) + len(spec.moments))}


class _Head:
    """The student's head over the compared columns."""

    def __init__(self, weight: Tensor, bias: Tensor | None, columns: int) -> None:
        self.weight, self.columns = weight.detach()[:columns], columns
        self.bias = None if bias is None else bias.detach()[:columns]

    def tiles(
        self, dtype: torch.dtype, columns: int | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        columns = columns or max(1, _HEAD_BYTES // (self.weight.shape[1] * dtype.itemsize))
        for first in range(0, self.columns, columns):
            tile = slice(first, min(first + columns, self.columns))
            yield tile, self.weight[tile].to(dtype)

    def mean(self, live: Tensor) -> Tensor:
        """m, the mean of the rows that are `live` (C,): (D,) in float64."""
        total = sum((live[tile].double() @ rows for tile, rows in self.tiles(torch.float64)), 0.0)
        return total / live.sum().clamp(min=1)

    def gram(self, live: Tensor, mean: Tensor) -> Tensor:
        """G, (D, D), in the dtype of `mean`."""
        total = 0.0
        for tile, rows in self.tiles(mean.dtype):
            centred = (rows - mean) * live[tile, None]
            total = total + (centred.T @ centred).double()
        return total.to(mean.dtype)


def _finite_columns(bias: Tensor | None, columns: int, device: torch.device) -> Tensor:
    """(C,) bool: columns that the bias does not exclude."""
    return (
        torch.ones(columns, dtype=torch.bool, device=device)
        if bias is None
        else bias[:columns].isfinite()
    )


class StatisticsMaker:
    """Makes all that `StatisticsLoss` needs of a teacher, in tiles of the vocabulary.

    Args:
        options: temperatures, `output_in_dynamics`, `vocab_size` and the teacher's soft cap and
            scale are used; weights are not: the statistics serve any.
        student_weight, student_bias: the student's head (V, Ds), (V,); constant from now on.

    Raises:
        ValueError: see `check_options`.
    """

    def __init__(
        self, options: LossOptions, student_weight: Tensor, student_bias: Tensor | None = None
    ) -> None:
        check_options(options)
        self.options = options
        self.head = _Head(student_weight, student_bias, options.vocab_size or len(student_weight))
        self._mean: tuple[Tensor, Tensor] | None = None

    def _mean_of(self, live: Tensor) -> Tensor:
        """m over the `live` columns (C,), which follow from both models' biases: found when they
        are first met.
        """
        if self._mean is None or not torch.equal(self._mean[0], live):
            self._mean = live, self.head.mean(live)
        return self._mean[1]

    @torch.no_grad()
    def __call__(
        self,
        teacher_hidden: Sequence[Tensor],
        teacher_weight: Tensor,
        teacher_bias: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The statistics of R rows.

        Args:
            teacher_hidden: L tensors (R, Dt) in depth order, the last the final state.
            teacher_weight, teacher_bias: the teacher's head (V, Dt), (V,).

        Returns:
            "expectation_i" (R, Ds) for each request of a layer, "correlation_i" (R, Ds) for each
                pair of layers, and "scalars";
            float32, or float64 for float64 inputs. See `statistics_widths`.
        """
        options, head = self.options, self.head
        tensors = (*teacher_hidden, teacher_weight, head.weight)
        dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
        rows, layers, width = len(teacher_hidden[0]), len(teacher_hidden), head.weight.shape[1]
        spec = _everything(options, head.columns, layers, rows).spec
        live = _finite_columns(head.bias, head.columns, head.weight.device)
        if options.teacher_softcap is None:
            live = live & _finite_columns(teacher_bias, head.columns, live.device)
        mean = self._mean_of(live).to(dtype)
        sizes = choose_tiles(
            layers,
            max(rows, 1),
            head.columns,
            width,
            teacher_weight.shape[1],
            dtype.itemsize,
            live.device.type,
        )
        blocks = []
        for first in range(0, rows, sizes.rows):
            hidden_LrD = torch.stack(
                [h[first : first + sizes.rows].to(dtype) for h in teacher_hidden]
            )
            block = _Block(spec, hidden_LrD, head, mean, live)
            for tile, head_cD in head.tiles(dtype, sizes.columns):
                u = hidden_LrD @ teacher_weight[tile].to(dtype).T
                if teacher_bias is not None:
                    u += teacher_bias[tile].to(dtype)
                u *= options.teacher_logit_scale
                if options.teacher_softcap is not None:
                    u.div_(options.teacher_softcap).tanh_().mul_(options.teacher_softcap)
                block.add(tile, head_cD, u)
            blocks.append(block.finish())
        if not blocks:
            widths = statistics_widths(options, layers, width)
            return {
                name: head.weight.new_zeros((0, width), dtype=dtype)
                for name, width in widths.items()
            }
        return {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}


class _Block:
    """Running statistics of a block of rows."""

    def __init__(
        self, spec: LensSpec, hidden_LrD: Tensor, head: _Head, mean: Tensor, live: Tensor
    ) -> None:
        self.spec, self.head, self.head_mean, self.live = spec, head, mean, live
        rows, width, new = hidden_LrD.shape[1], head.weight.shape[1], hidden_LrD.new_zeros
        self.shifts: Tensor | None = None  # (L, r, 1)
        self.largest = new(len(spec.requests), rows, 1).fill_(-torch.inf)
        # Sums over columns of exp(z - largest) times 1, z, the student's bias, and its head's rows.
        self.sums, self.expectations = (
            new(len(spec.requests), 3, rows),
            new(len(spec.requests), rows, width),
        )
        self.bases = new(len(spec.moments), rows, 1)
        self.counts, self.means, self.squares = (new(len(spec.moments), rows) for _ in range(3))
        self.correlations = new(len(spec.moments), rows, width)

    def add(self, tile: slice, head_cD: Tensor, u_Lrc: Tensor) -> None:
        """Take in one tile of the teacher's values."""
        if first_tile := self.shifts is None:
            largest = u_Lrc.amax(-1, keepdim=True)
            self.shifts = largest.where(largest.isfinite(), 0.0)
        u_Lrc = u_Lrc - self.shifts
        bias = None if self.head.bias is None else self.head.bias[tile].to(u_Lrc.dtype)
        for i, request in enumerate(self.spec.requests):
            z = u_Lrc[request.teacher_layer] / request.temperature
            largest = torch.maximum(self.largest[i], z.amax(-1, keepdim=True))
            # finite while every column so far is excluded
            shift = largest.clamp(min=torch.finfo(z.dtype).min)
            scale, weights = (self.largest[i] - shift).exp(), (z - shift).exp()
            self.largest[i] = largest
            of_z = torch.where(weights > 0, weights * z, 0.0).sum(-1)
            of_bias = (
                torch.zeros_like(of_z)
                if bias is None
                else torch.where(weights > 0, weights * bias, 0.0).sum(-1)
            )
            self.sums[i] = self.sums[i] * scale[:, 0] + torch.stack(
                [weights.sum(-1), of_z, of_bias]
            )
            self.expectations[i] = torch.addmm(self.expectations[i] * scale, weights, head_cD)
        live, centred_cD = self.live[tile], head_cD - self.head_mean
        added = live.sum()
        for i, pair in enumerate(self.spec.moments):
            a, b = pair.first.teacher, pair.second.teacher
            t = (u_Lrc[b] - u_Lrc[a]) / self.spec.moment_temperature
            t = torch.where(live, t, 0.0)
            if first_tile:  # a common part, subtracted before sums are taken
                self.bases[i] = t.sum(-1, keepdim=True) / added.clamp(min=1)
            t = torch.where(live, t - self.bases[i], 0.0)
            self.correlations[i].addmm_(t, centred_cD)
            # Chan, Golub and LeVeque's update of mean and sum of squares.
            mean = t.sum(-1) / added.clamp(min=1)
            squares = torch.where(live, t - mean[:, None], 0.0).square().sum(-1)
            count = self.counts[i] + added
            part, delta = added / count.clamp(min=1), mean - self.means[i]
            self.squares[i] += squares + delta.square() * self.counts[i] * part
            self.means[i] += delta * part
            self.counts[i] = count

    def finish(self) -> dict[str, Tensor]:
        found, scalars = {}, []
        for i in range(len(self.spec.requests)):
            total, of_z, of_bias = self.sums[i]
            lse = self.largest[i, :, 0] + total.log()
            found[f"expectation_{i}"] = self.expectations[i] / total[:, None]
            scalars += [of_z / total - lse, of_bias / total, lse]
        for i in range(len(self.spec.moments)):
            found[f"correlation_{i}"] = self.correlations[i]
            scalars += [self.counts[i], self.means[i] + self.bases[i, :, 0], self.squares[i]]
        return found | {"scalars": torch.stack(scalars, -1)}


class StatisticsLoss:
    """The FDD loss of a student with a frozen linear head, from what `StatisticsMaker` makes.

    Args:
        options: the loss; temperatures, `output_in_dynamics` and `vocab_size` must be those of the
            statistics.
        layers: how many hidden states a model gives, the final one included.
        student_weight, student_bias: the head (V, Ds), (V,); constant from now on.

    Raises:
        ValueError: an objective that the statistics cannot serve, a trainable head.
    """

    def __init__(
        self,
        options: LossOptions,
        layers: int,
        student_weight: Tensor,
        student_bias: Tensor | None = None,
    ) -> None:
        check_options(options)
        for name, tensor in (("student_weight", student_weight), ("student_bias", student_bias)):
            if tensor is not None and tensor.requires_grad:
                raise ValueError(
                    f"{name} requires grad, but the teacher's statistics hold for one head only: "
                    "freeze it "
                    "(train_head=False, or LoRA without the head), or use a cache of the teacher's "
                    "hidden states"
                )
        self.options, self.layers = options, layers
        self.columns = options.vocab_size or len(student_weight)
        self.weight, self.bias, self.version = student_weight, student_bias, student_weight._version
        self.available = _everything(options, self.columns, layers, 0).spec
        self._gram: tuple[Tensor, Tensor, Tensor] | None = None

    def _deltas(self, count: Tensor) -> tuple[Tensor, Tensor]:
        """m and G over the `count` columns that both models have; found at the first call."""
        if self._gram is None:
            live = _finite_columns(self.bias, self.columns, self.weight.device)
            head = _Head(self.weight, self.bias, self.columns)
            mean = head.mean(live).to(
                torch.float64 if self.weight.dtype == torch.float64 else torch.float32
            )
            self._gram = live.sum(), mean, head.gram(live, mean)
        if bool((count != self._gram[0]).any()):
            raise ValueError(
                "the teacher's statistics leave out other columns than the student's bias does "
                "(-inf in the teacher's bias "
                "alone): use a cache of the teacher's hidden states"
            )
        return self._gram[1:]

    def __call__(
        self,
        student_hidden: Sequence[Tensor],
        statistics: dict[str, Tensor],
        labels: Tensor | None = None,
        *,
        num_items_in_batch: Tensor | float | None = None,
    ) -> FDDLossTerms:
        """The loss of R rows, all of which count.

        Args:
            student_hidden: L tensors (R, Ds).
            statistics: of `StatisticsMaker` for the same rows.
            labels: (R,) already shifted, needed for CE alone.
            num_items_in_batch: see `fused_fdd_loss`.

        Raises:
            TypeError, ValueError: the head has changed, CE without labels, a bad
                `num_items_in_batch`.
        """
        if self.weight._version != self.version:
            raise ValueError(
                "the student's head has changed since the loss was made: the teacher's statistics "
                "are of another head"
            )
        options, rows = self.options, len(student_hidden[0])
        check_normaliser(options, num_items_in_batch)
        if options.ce_weight and labels is None:
            raise ValueError(
                f"ce_weight={options.ce_weight} needs labels: pass labels, or ce_weight=0"
            )
        plan = lay_out(
            options,
            self.columns,
            self.layers,
            (rows,),
            False,
            resolve_backend(options.backend, self.weight.device),
        )
        hidden = [student_hidden[i] for i in plan.layers]
        lse = log_sum_exps(plan, hidden, self.weight, self.bias)
        hidden = [h.to(lse.dtype) for h in hidden]
        requests = [
            self._request(plan, request, lse[i], hidden, statistics, labels)
            for i, request in enumerate(plan.spec.requests)
        ]
        moments = [self._moment(plan, pair, hidden, statistics) for pair in plan.spec.moments]
        row_terms = row_terms_from_statistics(
            plan,
            lse.new_empty(0),
            _stacked(requests, REQUEST_STATS, lse),
            _stacked(moments, MOMENT_STATS, lse),
        )
        normaliser = normaliser_of(options, rows, None, num_items_in_batch, lse.device)
        return combine(row_terms, options, None, (rows,), normaliser)

    def _scalars(self, statistics: dict[str, Tensor], index: int) -> Tensor:
        return statistics["scalars"][:, 3 * index : 3 * index + 3].unbind(-1)

    def _request(
        self, plan: Plan, request: Request, lse: Tensor, hidden, statistics, labels
    ) -> Tensor:
        """The statistics of one request, (READ_STATS, R), as `spec.py` defines them."""
        out = [torch.zeros_like(lse)] * REQUEST_STATS
        scale = self.options.student_logit_scale / request.temperature
        state = hidden[request.student_layer]
        out[LSE_S] = lse
        if request.divergence == NLL:
            own = (state * F.embedding(labels.long(), self.weight).to(lse.dtype)).sum(-1)
            if self.bias is not None:
                own = own + self.bias[labels.long()]
            out[VALUE] = lse - scale * own
            return torch.stack(out)
        at = self.available.requests.index(
            Request(*[plan.layers[request.student_layer]] * 2, request.temperature, "kl")
        )
        negative_entropy, expected_bias, out[LSE_T] = self._scalars(statistics, at)
        expected = (state * statistics[f"expectation_{at}"]).sum(-1) + expected_bias
        out[VALUE] = negative_entropy - scale * expected + lse
        return torch.stack(out)

    def _moment(self, plan: Plan, pair: PairMoments, hidden, statistics) -> Tensor:
        """The moments of one pair of layers, (MOMENT_STATS, R), as `spec.py` defines them."""
        at = self.available.moments.index(
            PairMoments(*[Layers(*[plan.layers[i] for i in layers]) for layers in pair])
        )
        count, mean_t, squares_t = self._scalars(statistics, len(self.available.requests) + at)
        mean, gram = self._deltas(count)
        scale = self.options.student_logit_scale / plan.spec.moment_temperature
        delta = scale * (hidden[pair.second.student] - hidden[pair.first.student])
        out = [count] * MOMENT_STATS  # which is what stands at COUNT
        out[MEAN_S], out[MEAN_T], out[M_TT] = delta @ mean, mean_t, squares_t
        out[M_SS] = ((delta @ gram) * delta).sum(-1)
        out[M_ST] = (delta * statistics[f"correlation_{at}"]).sum(-1)
        out[M_DD] = (out[M_SS] + out[M_TT] - 2 * out[M_ST]).clamp(min=0)
        return torch.stack(out)


def _stacked(parts: list[Tensor], size: int, like: Tensor) -> Tensor:
    return torch.stack(parts) if parts else like.new_zeros((0, size, like.shape[-1]))
