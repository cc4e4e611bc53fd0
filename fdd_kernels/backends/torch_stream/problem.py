"""The inputs of one call, cut into row blocks and vocabulary tiles, and what a tile's logits mean
for a request or a pair of vectors.

Shape suffixes: L layers, R rows, r rows of a block, C the vocabulary, c tokens of a tile, D a
hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fdd_kernels.backends.torch_stream import tiling
from fdd_kernels.lens.inputs import LensInputs
from fdd_kernels.lens.layout import LSE_S, LSE_T
from fdd_kernels.lens.spec import LensSpec, PairMoments, Request


def scale_and_cap_(x: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Compute softcap(scale * x) in place."""
    if scale != 1.0:
        x *= scale
    if softcap is not None:
        x.div_(softcap).tanh_().mul_(softcap)
    return x


class TorchModel:
    """One model: its hidden states and head, converted tile by tile."""

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
        """Convert the hidden states of a row block: (L, r, D)."""
        return torch.stack([h[rows].to(self.dtype) for h in self.hidden])

    def weight_tile(self, columns: slice) -> Tensor | None:
        """Convert the head's rows of a tile, (c, D); None for the identity."""
        return None if self.weight is None else self.weight[columns].to(self.dtype)

    def logits(self, hidden_LrD: Tensor, weight_cD: Tensor | None, columns: slice) -> Tensor:
        """Compute u = softcap(logit_scale * (h W^T + b)) of one tile: (L, r, c), a new tensor."""
        if weight_cD is None:
            return hidden_LrD[..., columns].clone()
        layers, rows, width = hidden_LrD.shape
        u = (hidden_LrD.reshape(layers * rows, width) @ weight_cD.T).view(layers, rows, -1)
        if self.bias is not None:
            u += self.bias[columns].to(self.dtype)
        return scale_and_cap_(u, self.logit_scale, self.softcap)

    def chain(self, grad_u: Tensor, u: Tensor) -> Tensor:
        """Turn dL/du into dL/dx with x = h W^T + b, in place; u is the logit before any shift."""
        if self.softcap is not None:
            grad_u *= 1 - (u / self.softcap).square()
        if self.logit_scale != 1.0:
            grad_u *= self.logit_scale
        return grad_u


class TorchProblem:
    """The inputs of one call, cut into row blocks and vocabulary tiles."""

    def __init__(self, inputs: LensInputs, spec: LensSpec):
        self.dtype, self.device = inputs.statistics_dtype, inputs.device
        self.total_rows, self.layers = inputs.rows, inputs.layers
        self.spec, self.labels = spec, inputs.labels
        self.student = TorchModel(
            inputs.student_hidden,
            inputs.student_weight,
            inputs.student_bias,
            spec.student_logit_scale,
            spec.student_softcap,
            self.dtype,
        )
        self.teacher = TorchModel(
            inputs.teacher_hidden,
            inputs.teacher_weight,
            inputs.teacher_bias,
            spec.teacher_logit_scale,
            spec.teacher_softcap,
            self.dtype,
        )
        self.valid_rows = None if inputs.valid is None else inputs.valid.nonzero().squeeze(1)
        self.count = self.total_rows if inputs.valid is None else len(self.valid_rows)
        teacher_width = inputs.teacher_hidden[0].shape[-1] if spec.needs_teacher else 0
        self.tiles = tiling.choose_tiles(
            inputs.depths,
            max(self.count, 1),
            spec.columns,
            inputs.student_hidden[0].shape[-1],
            teacher_width,
            self.dtype.itemsize,
            self.device.type,
        )

    def row_blocks(
        self, size: int, start: int = 0, stop: int | None = None
    ) -> Iterator[tuple[Tensor | slice, int, int]]:
        """Yield selections of at most `size` valid rows, with the first and last position among
        the valid rows.
        """
        stop = self.count if stop is None else stop
        for first in range(start, stop, size):
            last = min(first + size, stop)
            rows = slice(first, last) if self.valid_rows is None else self.valid_rows[first:last]
            yield rows, first, last

    def column_tiles(self) -> Iterator[slice]:
        """Yield the tiles of the vocabulary."""
        for first in range(0, self.spec.columns, self.tiles.columns):
            yield slice(first, min(first + self.tiles.columns, self.spec.columns))

    def live_tile(self, columns: slice) -> Tensor | None:
        """Mark the tokens of a tile that moments are taken over, (c,) bool; None: all.

        Tokens with a bias of -inf in a model without soft cap are left out.
        """
        live = None
        for model in (self.student, self.teacher):
            if model.bias is not None and model.softcap is None:
                own = model.bias[columns] != -torch.inf
                live = own if live is None else live & own
        return live

    def label_columns(self, rows: Tensor | slice, columns: slice) -> tuple[Tensor, Tensor]:
        """Find each row's label in a tile: whether it is there, and its column of the tile or 0."""
        local = self.labels[rows] - columns.start
        inside = (local >= 0) & (local < columns.stop - columns.start)
        return inside, local.where(inside, 0)


def at_temperature(u: Tensor, temperature: float) -> Tensor:
    """Divide by the temperature; 1 costs nothing."""
    return u if temperature == 1.0 else u / temperature


def request_logits(request: Request, u_s: Tensor, u_t: Tensor) -> tuple[Tensor, Tensor]:
    """Compute z of the student and of the teacher, or of the mixture in its place, (r, c) each."""
    z_s = at_temperature(u_s[request.student_layer], request.temperature)
    z_t = at_temperature(u_t[request.teacher_layer], request.temperature)
    if request.teacher_mix < 1:
        excluded = (z_s == -torch.inf) | (z_t == -torch.inf)
        z_t = (1 - request.teacher_mix) * z_s + request.teacher_mix * z_t
        z_t = z_t.masked_fill(excluded, -torch.inf)
    return z_s, z_t


def log_probabilities(
    request: Request, u_s: Tensor, u_t: Tensor, request_stats: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute log q and log p of one tile, (r, c) each, from logits (L, r, c) minus the shifts.

    `request_stats` are the request's statistics, (REQUEST_STATS, r).
    """
    z_s, z_t = request_logits(request, u_s, u_t)
    return z_s - request_stats[LSE_S, :, None], z_t - request_stats[LSE_T, :, None]


def pair_vectors(u_s: Tensor, u_t: Tensor, pair: PairMoments) -> list[Tensor]:
    """Compute s and t of a pair, new tensors (r, c); 0 where two layers have the same logits."""
    vectors = []
    for model, u_LrC in enumerate((u_s, u_t)):
        second = u_LrC[pair.second[model]]
        if pair.first is None:
            vectors.append(second / pair.temperature)
        else:
            vectors.append((second - u_LrC[pair.first[model]]).div_(pair.temperature))
    return vectors
