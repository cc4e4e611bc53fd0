"""Weights of pairs of layers from their costs: the public function `align_layers`.

Shape suffixes: S layers of the student, T of the teacher.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fdd_kernels.objectives.alignment.methods import METHODS, SMOOTH, TRANSPORT
from fdd_kernels.objectives.alignment.transport import optimal_flow
from fdd_kernels.objectives.layer_pairs import monotone_path
from fdd_kernels.objectives.logits.eager import outside_compiler
from fdd_kernels.objectives.numbers import describe, looks_at
from fdd_kernels.objectives.option_checks import require_choice, require_int, require_number

Masses = Sequence[float] | Tensor | None


def align_layers(
    costs: Tensor,
    method: str = "argmin",
    *,
    epsilon: float | None = None,
    masses: tuple[Masses, Masses] | None = None,
    iterations: int = 100,
    detach: bool = True,
) -> Tensor:
    """Compute weights of the pairs of layers from their costs, (Ls, Lt).

    Each row, a layer of the student, sums to its mass a_i, 1 / Ls unless given: the loss
    `(weights * costs).sum()` is then a mean over the student's layers. With C the costs, F the
    weights, and b_j the masses of the teacher's layers::

        "argmin"     F_ij = a_i at the cheapest teacher layer of each row
        "monotone"   F_ij = a_i at j(i), with j(1) <= j(2) <= ... of the least sum_i a_i C_i,j(i)
                     (dynamic programming; of equal sums the path nearest to the diagonal)
        "attention"  F_ij = a_i softmax_j(-C_ij / epsilon)
        "sinkhorn"   argmin over F with row sums a and column sums b of sum F C + epsilon F log F,
                     by `iterations` steps in the log domain: columns, then rows
        "emd"        argmin over F with row sums a and column sums b of sum F C, exact

    Sources: "emd" is BERT-EMD's many-to-many mapping (Li et al., EMNLP 2020); "attention" has the
    form of SemCKD's weights (Chen et al., AAAI 2021), which come from learned queries and keys per
    sample, not from costs; "sinkhorn" is Cuturi's regularised transport (NeurIPS 2013).

    Args:
        costs: (Ls, Lt) finite numbers, as of `layer_costs`.
        method: as above. "argmin" lets several student layers share a teacher layer, in any order.
        epsilon: the temperature of "attention" and "sinkhorn", in units of the costs. By default it
            follows their spread: their standard deviation for "attention", a tenth of it for
            "sinkhorn" (1 where all costs are equal).
        masses: (a, b), each Ls or Lt numbers of at least 0 with one above 0, or None: equal masses.
            The sums of the two must be equal. Only "sinkhorn" and "emd" take b.
        iterations: steps of "sinkhorn". The last one sets the row sums; column sums approach b.
        detach: the weights are constants. With False they are differentiable in the costs, for
            "attention" and "sinkhorn" alone; a default epsilon stays a constant.

    Returns:
        (Ls, Lt) in float32 on the costs' device, float64 for float64 costs. "monotone"
        and "emd" wait for the device and compute on the host.

    Raises:
        TypeError, ValueError: naming the argument, its value and the remedy, before any work.
            Numbers on a GPU are looked at with FDD_KERNELS_DEBUG=1, and by "emd".
        RuntimeError: "emd" under torch.compile with fullgraph=True; without, it is left to eager
            mode.
    """
    _check_options(method, epsilon, iterations, detach)
    if method == "emd":
        return _exact_flow(costs, masses)
    costs, student, teacher = _checked(costs, method, masses, detach)
    if method == "argmin":
        return _hard(costs.argmin(1), student, costs)
    if method == "monotone":
        return _hard(_monotone_columns(student[:, None] * costs), student, costs)
    if epsilon is None:
        spread = costs.detach().std(correction=0)
        epsilon = SMOOTH[method] * torch.where(spread > 0, spread, 1 / SMOOTH[method])
    # Their least number has no part in the weights, but a large one would round the scores.
    scores = (costs.detach().amin() - costs) / epsilon
    if method == "attention":
        return student[:, None] * scores.softmax(1)
    return _sinkhorn_flow(scores, student.log(), teacher.log(), iterations)


@outside_compiler('method="emd" is computed on the host', "align_layers")
def _exact_flow(costs: Tensor, masses: tuple[Masses, Masses] | None) -> Tensor:
    """Compute the weights of "emd"."""
    costs, *of_layers = _checked(costs, "emd", masses, detach=True)
    flow = optimal_flow(*[t.double().cpu().numpy() for t in (costs, *of_layers)])
    return torch.from_numpy(flow).to(costs)


def _checked(
    costs: Tensor, method: str, masses: tuple[Masses, Masses] | None, detach: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Check costs and masses; return the costs in float32 or better, and the masses."""
    _check_costs(costs, method)
    costs = costs.detach() if detach else costs
    costs = costs.to(torch.promote_types(costs.dtype, torch.float32))
    return costs, *_checked_masses(masses, costs, method)


def _hard(chosen: Tensor, masses: Tensor, costs: Tensor) -> Tensor:
    """Place each row's mass at its chosen column; `chosen` (S,) are integers."""
    return torch.zeros_like(costs).scatter(1, chosen[:, None], masses[:, None])


@torch.library.custom_op(
    "fdd_kernels::monotone_columns", mutates_args=(), schema="(Tensor costs) -> Tensor"
)
def _monotone_columns(costs_ST):
    """Find the columns of `monotone_path` on the host, (S,) int64."""
    return torch.tensor(monotone_path(costs_ST.tolist()), device=costs_ST.device)


@_monotone_columns.register_fake
def _(costs_ST):
    return costs_ST.new_empty(costs_ST.shape[0], dtype=torch.int64)


def _sinkhorn_flow(
    scores_ST: Tensor, log_student: Tensor, log_teacher: Tensor, iterations: int
) -> Tensor:
    """Scale e^scores to column sums, then to row sums, so many times."""
    of_rows = torch.zeros_like(log_student)
    for _ in range(iterations):
        of_columns = log_teacher - (of_rows[:, None] + scores_ST).logsumexp(0)
        of_rows = log_student - (of_columns + scores_ST).logsumexp(1)
    return (of_rows[:, None] + of_columns + scores_ST).exp()


def _check_options(method: str, epsilon: float | None, iterations: int, detach: bool) -> None:
    require_choice("method", method, METHODS)
    require_number("epsilon", epsilon, positive=True, optional=True)
    if epsilon is not None and method not in SMOOTH:
        raise ValueError(
            f"epsilon={epsilon} has no effect on method={method!r}: leave it at None, or use "
            'method="attention" or "sinkhorn"'
        )
    require_int("iterations", iterations, minimum=1)
    if not isinstance(detach, bool):
        raise TypeError(f"detach must be a bool, got {type(detach).__name__}")
    if not detach and method not in SMOOTH:
        raise ValueError(
            f"detach=False asks for gradient through the weights, but those of method={method!r} "
            'are steps: pass detach=True, or method="attention" or "sinkhorn"'
        )


def _check_costs(costs: Tensor, method: str) -> None:
    if not isinstance(costs, Tensor):
        raise TypeError(f"costs must be a tensor, got {type(costs).__name__}")
    if not costs.is_floating_point():
        raise TypeError(f"costs is a {describe(costs)}: pass floating-point costs")
    if costs.ndim != 2:
        raise ValueError(
            f"costs has shape {tuple(costs.shape)}: pass (student layers, teacher layers), the "
            "mean over tokens of costs per row"
        )
    if not costs.numel():
        raise ValueError(
            f"costs has shape {tuple(costs.shape)}: there must be at least one layer of each model"
        )
    if looks_at(costs) or method == "emd":
        bad = int((~costs.detach().isfinite()).sum())
        if bad:
            raise ValueError(
                f"costs has {bad} entries that are NaN or infinite ({describe(costs)}): look for "
                "NaN in the hidden states, or for a token that only the teacher can predict"
            )


def _checked_masses(
    masses: tuple[Masses, Masses] | None, costs: Tensor, method: str
) -> tuple[Tensor, Tensor]:
    """Return the masses (S,) and (T,) of both models, of one sum."""
    if masses is None:
        masses = None, None
    if not (isinstance(masses, (tuple, list)) and len(masses) == 2):
        raise ValueError(
            f"masses must be a pair (student's, teacher's), each perhaps None, got {masses!r}"
        )
    named = zip(("masses[0]", "masses[1]"), masses, costs.shape)
    student, teacher = (
        None if given is None else _masses_of(name, given, count, costs)
        for name, given, count in named
    )
    if teacher is not None and method not in TRANSPORT:
        raise ValueError(
            f"masses[1]={masses[1]!r} are sums of the teacher's columns, which "
            f'method={method!r} leaves free: pass None there, or method="sinkhorn" or "emd"'
        )
    if student is None:
        total = 1.0 if teacher is None else teacher.sum()
        student = torch.full_like(costs[:, 0].detach(), 1.0) * total / len(costs)
    if teacher is None:
        return student, torch.ones_like(costs[0].detach()) * student.sum() / len(costs[0])
    sums = student.sum(), teacher.sum()
    # Each number may be rounded to float32, and each sum of theirs.
    tolerance = torch.finfo(torch.float32).eps * sum(costs.shape)
    if looks_at(costs) or method == "emd":
        a, b = (float(total) for total in sums)
        if abs(a - b) > tolerance * max(a, b):
            raise ValueError(
                f"masses sum to {a:g} over the student's layers and to {b:g} over the teacher's: "
                "divide each by its sum"
            )
    return student, teacher * (sums[0] / sums[1])


def _masses_of(name: str, given: Sequence[float] | Tensor, count: int, costs: Tensor) -> Tensor:
    """Return given masses as a tensor like the costs."""
    if isinstance(given, Tensor) and given.requires_grad:
        raise ValueError(f"{name} requires grad, but masses are constants: pass them detached")
    try:
        found = torch.as_tensor(given, dtype=costs.dtype, device=costs.device)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"{name} must be numbers, one per layer, or a tensor, got {given!r}"
        ) from None
    if found.shape != (count,):
        raise ValueError(
            f"{name} has shape {tuple(found.shape)}, but costs has {count} such layers: pass one "
            "mass for each"
        )
    if looks_at(found):
        legal = (found >= 0) & (found < torch.inf)
        if not legal.all() or not found.any():
            raise ValueError(
                f"{name}={found.tolist()} must be finite and at least 0, one of them above 0"
            )
    return found
