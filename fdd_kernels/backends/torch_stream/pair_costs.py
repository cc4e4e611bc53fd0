"""Distances between the predictions of all pairs of rows of a group, streamed over the vocabulary.

Shape suffixes: b rows of a group, c tokens of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fdd_kernels.backends.torch_stream.problem import TorchModel, TorchProblem
from fdd_kernels.common.sizes import GIB, MIB
from fdd_kernels.lens.inputs import LensInputs
from fdd_kernels.lens.spec import LensSpec

# Of all tiles of a group at hand; at least one token's.
GROUP_BYTES = {"cpu": 128 * MIB}
ACCELERATOR_GROUP_BYTES = GIB
# Tiles (b, c) at hand: of both models logits and probabilities, of the student's gradient two.
TILES = 6


def tile_columns(of_token: int, columns: int, itemsize: int, device_type: str) -> int:
    """Choose the tokens of a tile, of which each takes so many numbers."""
    budget = GROUP_BYTES.get(device_type, ACCELERATOR_GROUP_BYTES)
    return max(1, min(columns, budget // (itemsize * of_token)))


class GroupOfRows:
    """The predictions of both models at some rows, tile by tile, at a temperature.

    Logits are computed again in every walk over several tiles. Those of a vocabulary that is one
    tile are held.
    """

    def __init__(self, problem: TorchProblem, rows: Tensor, temperature: float):
        self.problem, self.temperature = problem, temperature
        self.models = problem.student, problem.teacher
        self.hidden = [model.rows(rows) for model in self.models]
        converted = [m.weight.shape[1] for m in self.models if m.weight.dtype != problem.dtype]
        of_token = max(TILES * len(rows), *converted, 1)
        self.size = tile_columns(
            of_token, problem.spec.columns, problem.dtype.itemsize, problem.device.type
        )
        self._held: dict[int, Tensor] = {}

    def tiles(self) -> Iterator[slice]:
        """Yield the tiles of the vocabulary."""
        for first in range(0, self.problem.spec.columns, self.size):
            yield slice(first, min(first + self.size, self.problem.spec.columns))

    def logits(self, side: int, columns: slice) -> Tensor:
        """Compute the logits u of a tile, (b, c), of the student (0) or the teacher (1)."""
        if side in self._held:
            return self._held[side]
        model: TorchModel = self.models[side]
        u = model.logits(self.hidden[side], model.weight_tile(columns), columns)[0]
        if self.size == self.problem.spec.columns:
            self._held[side] = u
        return u

    def log_sum_exps(self) -> Tensor:
        """Compute those of both models' logits over the temperature, (2, b, 1)."""
        found = []
        for side in (0, 1):
            parts = [
                (self.logits(side, tile) / self.temperature).logsumexp(-1) for tile in self.tiles()
            ]
            found.append(torch.stack(parts, -1).logsumexp(-1, keepdim=True))
        return torch.stack(found)

    def probabilities(self, columns: slice, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the student's logits u, and both models' probabilities, of a tile."""
        u = [self.logits(side, columns) for side in (0, 1)]
        q, p = ((u[side] / self.temperature - lse[side]).exp_() for side in (0, 1))
        return u[0], q, p


def pair_costs(
    inputs: LensInputs, spec: LensSpec, groups: list[Tensor], temperature: float
) -> tuple[Tensor, list[Tensor]]:
    """Compute sum over tokens of |q_i - p_j| for all pairs of rows of each group.

    Returns:
        The costs (b, b) of all groups in one vector, and log-sum-exps (2, b, 1) of each.
    """
    problem, costs, lses = TorchProblem(inputs, spec), [], []
    for rows in groups:
        group = GroupOfRows(problem, rows, temperature)
        lse, cost = group.log_sum_exps(), 0.0
        for tile in group.tiles():
            _, q, p = group.probabilities(tile, lse)
            cost = cost + torch.cdist(q, p, p=1.0)
        costs.append(cost.reshape(-1))
        lses.append(lse)
    empty = inputs.student_weight.new_zeros(0, dtype=problem.dtype)
    return torch.cat([empty, *costs]), lses


def pair_cost_gradients(
    inputs: LensInputs,
    spec: LensSpec,
    groups: list[Tensor],
    temperature: float,
    lses: list[Tensor],
    upstream: Tensor,
    needed: list[bool],
) -> list[Tensor]:
    """Compute the gradients of sum(upstream * costs) that `needed` marks of [student_hidden,
    student_weight, student_bias], in the dtype of sums; the gradient of |0| is 0.

    dL/dq of a tile is known when it is at hand, dL/dz = q (dL/dq - sum of q dL/dq over all tokens)
    after one more walk over the vocabulary.
    """
    problem = TorchProblem(inputs, spec)
    student = (*inputs.student_hidden, inputs.student_weight, inputs.student_bias)
    gradients = [
        torch.zeros_like(t, dtype=problem.dtype, memory_format=torch.contiguous_format)
        if need
        else None
        for t, need in zip(student, needed)
    ]
    of_hidden, of_weight, of_bias = gradients
    sizes = [len(rows) ** 2 for rows in groups]
    for rows, lse, of_costs in zip(groups, lses, upstream.split(sizes)):
        group, of_costs = GroupOfRows(problem, rows, temperature), of_costs.view(len(rows), -1)
        common, tiles = 0.0, list(group.tiles())
        for tile in tiles:
            u, q, p = group.probabilities(tile, lse)
            of_q = _of_first(q, p, of_costs)
            common = common + (q * of_q).sum(-1, keepdim=True)
        for tile in tiles:
            if len(tiles) > 1:
                u, q, p = group.probabilities(tile, lse)
                of_q = _of_first(q, p, of_costs)
            grad = problem.student.chain(of_q.sub_(common).mul_(q).div_(temperature), u)
            del q, p, of_q
            if of_bias is not None:
                of_bias[tile] += grad.sum(0)
            if of_weight is not None:
                of_weight[tile].addmm_(grad.T, group.hidden[0][0])
            if of_hidden is not None:
                of_hidden.index_add_(0, rows, grad @ problem.student.weight_tile(tile))
    return [g for g in gradients if g is not None]


def _of_first(q: Tensor, p: Tensor, of_costs: Tensor) -> Tensor:
    """Compute sum over j of of_costs_ij sign(q_i - p_j), (b, c).

    It is what autograd calls for `torch.cdist`. The distances, its last argument, have no part in
    the gradient of absolute values.
    """
    of_costs = of_costs.contiguous()
    return torch.ops.aten._cdist_backward(of_costs, q, p, 1.0, of_costs)
