"""Make the teacher summary of tokens, in tiles of the vocabulary.

Shape suffixes: L layers, R rows, r rows of a block, c tokens of a tile, D the student's width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fdd_kernels.backends.torch_stream import choose_tiles, scale_and_cap_
from fdd_kernels.common.sizes import MIB
from fdd_kernels.lens.distances import DISTANCES
from fdd_kernels.lens.divergence_text import NamedDivergence, parse_divergence
from fdd_kernels.lens.spec import LensSpec
from fdd_kernels.objectives.fdd.options import LossOptions
from fdd_kernels.objectives.fdd.plan import Plan, build_plan

_HEAD_BYTES = 32 * MIB  # of the head's rows that are converted at a time


def check_options(options: LossOptions) -> None:
    """Refuse options that a summary cannot serve.

    Raises:
        ValueError: naming the option, and what can serve it.
    """
    for name, given in (
        ("layer_weights", options.pairs_all_layers),
        ("derivative_layers", options.derivative_layers is not None),
    ):
        if given:
            raise ValueError(
                f"{name}={getattr(options, name)} compares a layer of the student with other "
                "layers of the teacher than its own, the one that a summary has: use the teacher, "
                "or a cache of its hidden states"
            )
    for name, weight in (
        ("trajectory", options.alpha),
        ("output_divergence", options.output_kd_weight),
    ):
        divergence = getattr(options, name)
        if weight and not _is_kl(divergence):
            raise ValueError(
                f"{name}={divergence!r} needs more of the teacher than its summary: only "
                '"kl" can be computed from it. Use the teacher, or a cache of its hidden states'
            )
    if options.beta and options.derivative and DISTANCES[options.derivative].weighted:
        raise ValueError(
            f"derivative={options.derivative!r} weighs tokens by each position's teacher, of which "
            "a summary would need (width x width) numbers: use the teacher, a cache of its hidden "
            "states, or another derivative"
        )
    if options.teacher_mix < 1 and (options.alpha or options.output_kd_weight):
        raise ValueError(
            f"teacher_mix={options.teacher_mix} mixes the student's logits into the target, which "
            "a teacher summary cannot know: use the teacher, a cache of its hidden states, or "
            "teacher_mix=1"
        )
    if options.student_softcap is not None:
        raise ValueError(
            f"student_softcap={options.student_softcap}: a soft-capped head is not linear, and a "
            "teacher summary for it does not exist. Use the teacher, or a cache of its hidden "
            "states"
        )


def _is_kl(divergence: str) -> bool:
    return divergence not in DISTANCES and parse_divergence(divergence) == NamedDivergence("kl")


def plan_of_everything(options: LossOptions, columns: int, layers: int, rows: int) -> Plan:
    """Plan all that a summary can serve: every request and every pair of layers."""
    check_options(options)
    options = replace(
        options,
        alpha=1.0,
        beta=1.0,
        output_kd_weight=1.0,
        ce_weight=0.0,
        trajectory="kl",
        derivative="cosine",
        output_divergence="kl",
        layer_weights=None,
        teacher_mix=1.0,
    )
    return build_plan(options, columns, layers, leading_shape=(rows,))


def summary_widths(options: LossOptions, layers: int, student_width: int) -> dict[str, int]:
    """Name each array of a summary with its width; `layers` counts the final state.

    "scalars" has three numbers per request (negative entropy, expected bias, log-sum-exp), then
    three per pair (count, mean, sum of squares). A request for log-sum-exps alone
    (`derivative_temperature`) has no expectation.
    """
    spec = plan_of_everything(options, 1, layers, 0).spec
    widths = {
        f"expectation_{i}": student_width for i, r in enumerate(spec.requests) if r.divergence
    }
    widths |= {f"correlation_{i}": student_width for i in range(len(spec.moments))}
    return widths | {"scalars": 3 * (len(spec.requests) + len(spec.moments))}


class Head:
    """The student's head over the compared tokens."""

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
        """Compute m, the mean of the `live` rows (V,): (D,) in float64."""
        total = sum((live[tile].double() @ rows for tile, rows in self.tiles(torch.float64)), 0.0)
        return total / live.sum().clamp(min=1)

    def gram(self, live: Tensor, mean: Tensor) -> Tensor:
        """Compute G, (D, D), in the dtype of `mean`."""
        total = 0.0
        for tile, rows in self.tiles(mean.dtype):
            centred = (rows - mean) * live[tile, None]
            total = total + (centred.T @ centred).double()
        return total.to(mean.dtype)


def finite_tokens(bias: Tensor | None, columns: int, device: torch.device) -> Tensor:
    """Find the tokens that the bias does not exclude, (V,) bool."""
    return (
        torch.ones(columns, dtype=torch.bool, device=device)
        if bias is None
        else bias[:columns].isfinite()
    )


class SummaryMaker:
    """Makes all that `SummaryLoss` needs of a teacher.

    Args:
        options: temperatures, `output_in_dynamics`, `vocab_size` and the teacher's soft cap and
            scale are used; weights are not: a summary serves any.
        student_weight, student_bias: the student's head (V, Ds), (V,); constant from now on.

    Raises:
        ValueError: see `check_options`.
    """

    def __init__(
        self, options: LossOptions, student_weight: Tensor, student_bias: Tensor | None = None
    ) -> None:
        check_options(options)
        self.options = options
        self.head = Head(student_weight, student_bias, options.vocab_size or len(student_weight))
        self._mean: tuple[Tensor, Tensor] | None = None

    def _mean_of(self, live: Tensor) -> Tensor:
        """Compute m over the `live` tokens (V,); cached until they change."""
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
        """Make the summary of R rows.

        Args:
            teacher_hidden: L tensors (R, Dt) in depth order, the last the final state.
            teacher_weight, teacher_bias: the teacher's head (V, Dt), (V,).

        Returns:
            "expectation_i" (R, Ds) for each KL of a layer, "correlation_i" (R, Ds) for each pair of
            layers, and "scalars"; float32, or float64 for float64 inputs. See `summary_widths`.
        """
        options, head = self.options, self.head
        tensors = (*teacher_hidden, teacher_weight, head.weight)
        dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
        rows, layers, width = len(teacher_hidden[0]), len(teacher_hidden), head.weight.shape[1]
        spec = plan_of_everything(options, head.columns, layers, rows).spec
        live = finite_tokens(head.bias, head.columns, head.weight.device)
        if options.teacher_softcap is None:
            live = live & finite_tokens(teacher_bias, head.columns, live.device)
        mean = self._mean_of(live).to(dtype)
        sizes = choose_tiles(
            (layers, layers),
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
                scale_and_cap_(u, options.teacher_logit_scale, options.teacher_softcap)
                block.add(tile, head_cD, u)
            blocks.append(block.finish())
        if not blocks:
            widths = summary_widths(options, layers, width)
            return {
                name: head.weight.new_zeros((0, width), dtype=dtype)
                for name, width in widths.items()
            }
        return {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}


class _Block:
    """Running sums of a row block."""

    def __init__(
        self, spec: LensSpec, hidden_LrD: Tensor, head: Head, mean: Tensor, live: Tensor
    ) -> None:
        self.spec, self.head, self.head_mean, self.live = spec, head, mean, live
        rows, width, new = hidden_LrD.shape[1], head.weight.shape[1], hidden_LrD.new_zeros
        self.shifts: Tensor | None = None  # (L, r, 1)
        self.largest = new(len(spec.requests), rows, 1).fill_(-torch.inf)
        # Sums over tokens of exp(z - largest) times 1, z, the student's bias, and its head's rows.
        self.sums, self.expectations = (
            new(len(spec.requests), 3, rows),
            new(len(spec.requests), rows, width),
        )
        self.bases = new(len(spec.moments), rows, 1)
        self.counts, self.means, self.squares = (new(len(spec.moments), rows) for _ in range(3))
        self.correlations = new(len(spec.moments), rows, width)

    def add(self, tile: slice, head_cD: Tensor, u_Lrc: Tensor) -> None:
        """Add one tile of the teacher's logits."""
        if first_tile := self.shifts is None:
            largest = u_Lrc.amax(-1, keepdim=True)
            self.shifts = largest.where(largest.isfinite(), 0.0)
        u_Lrc = u_Lrc - self.shifts
        bias = None if self.head.bias is None else self.head.bias[tile].to(u_Lrc.dtype)
        for i, request in enumerate(self.spec.requests):
            z = u_Lrc[request.teacher_layer] / request.temperature
            largest = torch.maximum(self.largest[i], z.amax(-1, keepdim=True))
            # finite while every token so far is excluded
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
            if request.divergence is not None:
                self.expectations[i] = torch.addmm(self.expectations[i] * scale, weights, head_cD)
        live, centred_cD = self.live[tile], head_cD - self.head_mean
        added = live.sum()
        for i, pair in enumerate(self.spec.moments):
            a, b = pair.first.teacher, pair.second.teacher
            t = (u_Lrc[b] - u_Lrc[a]) / pair.temperature
            t = torch.where(live, t, 0.0)
            if first_tile:  # a common part, subtracted before sums are taken
                self.bases[i] = t.sum(-1, keepdim=True) / added.clamp(min=1)
            t = torch.where(live, t - self.bases[i], 0.0)
            self.correlations[i].addmm_(t, centred_cD)
            # As `merge_moments`, whose sums are of both models: here are the teacher's alone.
            mean = t.sum(-1) / added.clamp(min=1)
            squares = torch.where(live, t - mean[:, None], 0.0).square().sum(-1)
            count = self.counts[i] + added
            part, delta = added / count.clamp(min=1), mean - self.means[i]
            self.squares[i] += squares + delta.square() * self.counts[i] * part
            self.means[i] += delta * part
            self.counts[i] = count

    def finish(self) -> dict[str, Tensor]:
        found, scalars = {}, []
        for i, request in enumerate(self.spec.requests):
            total, of_z, of_bias = self.sums[i]
            lse = self.largest[i, :, 0] + total.log()
            if request.divergence is not None:
                found[f"expectation_{i}"] = self.expectations[i] / total[:, None]
            scalars += [of_z / total - lse, of_bias / total, lse]
        for i in range(len(self.spec.moments)):
            found[f"correlation_{i}"] = self.correlations[i]
            scalars += [self.counts[i], self.means[i] + self.bases[i, :, 0], self.squares[i]]
        return found | {"scalars": torch.stack(scalars, -1)}
