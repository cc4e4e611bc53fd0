"""Bound how far float32 arithmetic may move the terms of a call; see `budgets.py`."""

from collections.abc import Callable

import torch
from torch import Tensor

from fdd_kernels.lens.distances import DISTANCES, Sums
from fdd_kernels.lens.divergence_text import NamedDivergence
from fdd_kernels.lens.divergences import DIVERGENCES
from fdd_kernels.lens.spec import Layers
from fdd_kernels.objectives.fdd.options import FDDLossTerms
from fdd_kernels.objectives.fdd.reference import distance_of
from fdd_kernels.objectives.fdd.terms import RowTerms
from fdd_kernels.testing.dense_call import LAST, DenseCall, centred, dense_call
from fdd_kernels.testing.problems import Problem

PERTURBATIONS = 3  # random movements, where a derivative alone is no bound


def movement(
    value: Callable[..., Tensor],
    vectors: tuple[Tensor, ...],
    independent: tuple[Tensor, ...],
    common: float,
) -> tuple[Tensor, Tensor]:
    """Bound how far value(*vectors) may move, (R,), to first order and beyond it.

    Each element of a vector (R, C) is off by up to its `independent` (R,) at random, which counts
    with three standard deviations, and by up to `common` together with its row, which counts with
    the 1-norm. Beyond the first order (at a minimum, at a tie) a few random movements are measured,
    of which the largest counts.
    """
    leaves = [v.detach().requires_grad_() for v in vectors]
    found = value(*leaves)
    grads = torch.autograd.grad(found.sum(), leaves)
    grads = [g.where(v.isfinite(), 0.0) for g, v in zip(grads, vectors)]
    squares = [(off * g.norm(dim=-1)).square() for g, off in zip(grads, independent)]
    bound = 3 * sum(squares).sqrt() + common * torch.cat(grads, -1).abs().sum(-1)
    generator, beyond = torch.Generator().manual_seed(0), torch.zeros_like(bound)
    for _ in range(PERTURBATIONS):
        moves = []
        for vector, off in zip(vectors, independent):
            move = 2 * torch.rand(vector.shape, generator=generator, dtype=vector.dtype) - 1
            moves.append(off[:, None] * move.to(vector.device))
        moved = value(*[v + move for v, move in zip(vectors, moves)]) - found.detach()
        moved = moved - sum((g * move).sum(-1) for g, move in zip(grads, moves))
        beyond = torch.maximum(beyond, moved.abs().nan_to_num(0.0))
    return bound, beyond


def _angle_rounding(kind: str, s: Tensor, t: Tensor, unit: float) -> Tensor:
    """Bound the cancellation in the distance of vectors (R, C), (R,); 0 if it has no direction.

    1 - cos is a difference of numbers of the size of 1 or, where the vectors are close, of
    |s - t|^2 / (2 |s||t|). Each of them results from a few roundings.
    """
    if not DISTANCES[kind].directional:
        return torch.zeros_like(s[:, 0])
    size = (s - t).square().sum(-1) / (2 * s.norm(dim=-1) * t.norm(dim=-1))
    return 8 * unit * size.clamp(max=1).nan_to_num(1)


def sums_and_grads(kind: str, s: Tensor, t: Tensor) -> tuple[Sums, list[Tensor]]:
    """Compute the sums of a distance of vectors (R, C), and its derivatives by s.s, s.t and
    |s - t|^2, (R,) each.
    """
    squares = torch.stack([s.square().sum(-1), t.square().sum(-1)])
    sums = Sums(
        torch.ones_like(squares[:1]),
        squares[None],
        (s * t).sum(-1)[None],
        (s - t).square().sum(-1)[None],
    )
    grads = [torch.zeros_like(sums.product) for _ in range(3)]
    DISTANCES[kind].write_grad(sums, *grads)
    return sums, [grad[0] for grad in grads]


def _sums_rounding(kind: str, s: Tensor, t: Tensor, summation: float) -> Tensor:
    """Bound the error of a distance of vectors (R, C) by that of its sums, each of which is off by
    `summation` of the sum of its summands' magnitudes.
    """
    sums, (of_ss, of_st, of_dd) = sums_and_grads(kind, s, t)
    ss, tt = sums.squares[0]
    sizes = 2 * of_ss.abs() * ss + of_dd.abs() * sums.difference[0]
    return summation * (sizes + of_st.abs() * (ss.sqrt() * tt.sqrt()))


def _divergence_floor(
    call: DenseCall, layers: Layers, temperature: float, divergence: NamedDivergence
) -> Tensor:
    """Bound the error of one divergence, (R,)."""
    log_q, log_p, off = call.log_probabilities(layers, temperature)
    some = (log_q.isfinite() | log_p.isfinite()).any(0)
    s, t, summation = log_q.detach()[:, some], log_p[:, some], call.summation
    value = lambda a, b: divergence.value(a, b).sum(-1)  # noqa: E731
    # A backend may sum `value` plus multiples of q - p, whose sum is 0. The derivative by log_q
    # then has another multiple of q: with sum(p (log p - log q)) and sum(q (log q - log p)), in
    # one pass, it is `grad`. `plain` bounds how far errors of log_q move a sum whose
    # derivative by log_q is `grad`.
    plain = DIVERGENCES[divergence.name].grad(s, t, *divergence.parameters)
    plain = 3 * torch.maximum(*off) * plain.norm(dim=-1) + summation * plain.abs().sum(-1)
    return sum(movement(value, (s, t), off, summation)) + plain + summation * value(s, t).abs()


def _distance_floor(
    call: DenseCall,
    kind: str,
    vectors: tuple[Tensor, Tensor],
    off: tuple[Tensor, Tensor],
    common: float,
) -> Tensor:
    """Bound the error of the distance of vectors (R, C) whose elements are off by `off`, (R,)."""
    value = lambda a, b: distance_of(kind, a, b)  # noqa: E731
    return (
        movement(value, vectors, off, common)[0]
        + call.summation * value(*vectors)
        + _angle_rounding(kind, *centred(kind, *vectors, None), call.unit)
    )


def _weighted_distance(kind: str, s: Tensor, t: Tensor, z: Tensor) -> Tensor:
    """Compute a weighted distance, (R,), differentiable also by z where weights underflow."""
    w, top = z.softmax(-1), z.argmax(-1, keepdim=True)
    s, t = (v - v.gather(1, top) for v in (s, t))
    s, t = (v - (w * v).sum(-1, keepdim=True) for v in (s, t))
    ss, tt, st, dd = ((w * x).sum(-1)[None] for x in (s * s, t * t, s * t, (s - t).square()))
    return DISTANCES[kind].value(Sums(torch.ones_like(ss), torch.stack([ss, tt], 1), st, dd))[0]


def _weighted_floor(
    call: DenseCall,
    first: Layers,
    second: Layers,
    off: tuple[Tensor, Tensor],
    off_z: Tensor,
) -> Tensor:
    """Bound the error of the weighted distance of a pair: also the weights are off."""
    kind, vectors = call.options.derivative, [v.detach() for v in call.pair_vectors(first, second)]
    value = lambda *vectors: _weighted_distance(kind, *vectors)  # noqa: E731
    about_means = centred(kind, *vectors)
    floor, _ = movement(value, tuple(vectors), (*off, off_z + 4 * call.unit), 0.0)
    floor = (
        floor + call.summation * value(*vectors) + _angle_rounding(kind, *about_means, call.unit)
    )
    floor = floor + _sums_rounding(kind, *about_means, call.summation)
    return floor.masked_fill(call.underflow(first, second), 2.0)


def value_floors(problem: Problem, unit: float | None = None, **options) -> FDDLossTerms:
    """Compute the floor of the error of every term, reduced like the terms; see `budgets.py`.

    `unit` is the roundoff of GEMMs and sums, that of the working dtype unless given.
    """
    call = dense_call(problem, unit, options)
    o, plan, live = call.options, call.plan, call.live()

    def vectors(layers: Layers, temperature: float, softmax: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Return both models' vectors (R, live C) at layers, and how far they may be off, (R,)."""
        found, off = [], 0.0
        for u, d in (call.student[layers.student], call.teacher[layers.teacher]):
            z = u.detach() / temperature
            found.append((z.log_softmax(-1) if softmax else z)[:, live])
            off = torch.maximum(torch.as_tensor(off), (d / temperature)[:, live].amax(-1))
        return *found, off

    rows: dict[str, list[Tensor]] = {"trajectory": [], "output_kd": []}
    for term, weight, *divergence in call.divergences():
        rows[term].append(weight * _divergence_floor(call, *divergence))
    if plan.trajectory and o.trajectory in DISTANCES:
        for i, j, weight in call.layers.weighted():
            s, t, off = vectors(Layers(i, j), o.temperature, softmax=False)
            floor = _distance_floor(call, o.trajectory, (s, t), (off, off), 0.0)
            rows["trajectory"].append(weight * floor)
    per_pair = []
    for first, second in call.pairs():
        (s1, t1, off1), (s2, t2, off2) = (
            vectors(ends, o.temperature_of_deltas, not plan.feature_space)
            for ends in (first, second)
        )
        # A layer minus itself has no direction, whatever its logits round to.
        is_still = DISTANCES[o.derivative].directional and first.teacher == second.teacher
        off = off1 + off2, (off1 + off2) * (not is_still)
        if DISTANCES[o.derivative].weighted:
            per_pair.append(_weighted_floor(call, first, second, off, off2))
            continue
        common = 0.0 if plan.feature_space else 2 * call.summation
        deltas = s2 - s1, t2 - t1
        per_pair.append(_distance_floor(call, o.derivative, deltas, off, common))
    ce = None
    if plan.ce is not None:
        ce = 3 * vectors(LAST, 1.0, softmax=True)[2] + call.summation
    return call.reduce(
        RowTerms(
            output_kd=sum(rows["output_kd"]) if rows["output_kd"] else None,
            trajectory=sum(rows["trajectory"]) if rows["trajectory"] else None,
            derivative=torch.stack(per_pair).mean(0) if per_pair else None,
            ce=ce,
        )
    )
