"""Which layers of student and teacher are compared, in plain numbers.

Needs no torch: the command line shows options before it imports torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from fdd_kernels.objectives.option_checks import require_int, require_number

# Of each layer of the student, or of each pair of layers (student, teacher).
LayerWeights = tuple[float, ...] | tuple[tuple[float, ...], ...]


class LayerPairs(NamedTuple):
    """The pairs of one call.

    Attributes:
        weights: W (Ls, Lt) of the trajectory: rows are layers of the student.
        derivative: j(i) (Ls,): the teacher's layer that takes the place of layer i in deltas.
    """

    weights: tuple[tuple[float, ...], ...]
    derivative: tuple[int, ...]

    def weighted(self) -> list[tuple[int, int, float]]:
        """List (i, j, W_ij / Ls) of the pairs that have a weight."""
        count = len(self.weights)
        return [
            (i, j, weight / count)
            for i, row in enumerate(self.weights)
            for j, weight in enumerate(row)
            if weight
        ]


def checked_layer_weights(value: Any) -> LayerWeights | None:
    """Return weights of layers as tuples of numbers.

    Raises:
        TypeError, ValueError: names the entry, or what has no numbers.
    """
    entries = _entries("layer_weights", value, "numbers")
    if entries is None:
        return None
    if not any(isinstance(row, (list, tuple)) for row in entries):
        for weight in entries:
            require_number("layer_weights entry", weight)
        return tuple(entries)
    rows = [_entries(f"layer_weights row {i}", row, "numbers") for i, row in enumerate(entries)]
    for i, row in enumerate(rows):
        for weight in row:
            require_number(f"layer_weights row {i} entry", weight)
        if not row or len(row) != len(rows[0]):
            raise ValueError(
                f"layer_weights row {i} has {len(row)} numbers and row 0 {len(rows[0])}: give "
                "every layer of the student one number for each layer of the teacher"
            )
    return tuple([tuple(row) for row in rows])


def checked_derivative_layers(value: Any) -> tuple[int, ...] | None:
    """Return the teacher's layers of the derivative as a tuple of ints.

    Raises:
        TypeError, ValueError: no ints of at least 0, or ints that decrease.
    """
    layers = _entries("derivative_layers", value, "ints")
    if layers is None:
        return None
    for layer in layers:
        require_int("derivative_layers entry", layer, minimum=0)
    if layers != sorted(layers):
        raise ValueError(
            f"derivative_layers={tuple(layers)} must not decrease: give a later layer of the "
            "student the same layer of the teacher or a later one"
        )
    return tuple(layers)


def _entries(name: str, value: Any, of: str) -> list | None:
    """List the entries of a sequence; those that are tensors as numbers."""
    value = _constant(name, value)
    if value is None:
        return None
    if isinstance(value, (str, int, float)):
        raise TypeError(f"{name} must be a sequence of {of}, got {value!r}")
    return [_constant(name, entry) for entry in value]


def _constant(name: str, value: Any) -> Any:
    """Return a tensor or an array as nested lists, anything else as it is."""
    if isinstance(value, (int, float, str, list, tuple)):  # the compiler may have symbols for them
        return value
    if getattr(value, "requires_grad", False):
        raise ValueError(f"{name} requires grad, but weights are constants: pass .detach()")
    return value.tolist() if hasattr(value, "tolist") else value


def pair_layers(
    weights: LayerWeights | None,
    derivative_layers: tuple[int, ...] | None,
    students: int,
    teachers: int,
) -> LayerPairs:
    """Complete the two options for so many layers of trajectory and derivative in each model.

    A vector of weights, or none, pairs layers by rank.

    Raises:
        ValueError: an option of another number of layers, or models of different depth without a
            matrix of weights.
    """
    is_matrix = bool(weights) and isinstance(weights[0], tuple)
    if is_matrix and (len(weights), len(weights[0])) != (students, teachers):
        raise ValueError(
            f"layer_weights has shape ({len(weights)}, {len(weights[0])}), but the trajectory has "
            f"{students} layers of the student and {teachers} of the teacher: give a row for each "
            "layer of the student, a column for each of the teacher"
        )
    if not is_matrix and students != teachers:
        raise ValueError(
            f"{students} layers of the student and {teachers} of the teacher are paired by rank: "
            "pass as many of each, or layer_weights with a row for each layer of the student and a "
            "column for each of the teacher"
        )
    if not is_matrix and weights is not None and len(weights) != students:
        raise ValueError(
            f"layer_weights={weights} has {len(weights)} entries and the trajectory {students} "
            "layers: give one for each"
        )
    if derivative_layers is not None and len(derivative_layers) != students:
        raise ValueError(
            f"derivative_layers={derivative_layers} has {len(derivative_layers)} entries and the "
            f"derivative {students} layers of the student: give one for each"
        )
    if derivative_layers and derivative_layers[-1] >= teachers:
        raise ValueError(
            f"derivative_layers={derivative_layers} names layer {derivative_layers[-1]} of the "
            f"teacher, but there are {teachers}, counted from 0"
        )
    matrix = weights
    if not is_matrix:
        own = (1.0,) * students if weights is None else weights
        matrix = tuple(
            [tuple([w if i == j else 0.0 for j in range(teachers)]) for i, w in enumerate(own)]
        )
    if derivative_layers is None:
        derivative_layers = tuple(range(students))
        if is_matrix:
            derivative_layers = monotone_path([[-w for w in row] for row in weights])
    return LayerPairs(matrix, derivative_layers)


def monotone_path(costs: Sequence[Sequence[float]], *, strictly: bool = False) -> tuple[int, ...]:
    """Find the columns j(1) <= j(2) <= ... of the least sum of costs[i][j(i)].

    The best sum that ends in column j is the row's cost there plus the least of the best sums of
    the row before up to j. Of equal sums the path nearest to the diagonal wins. With `strictly`
    j(1) < j(2) < ..., for which there must be at least as many columns as rows.
    """
    if strictly:  # j(i) - i does not decrease
        spare = len(costs[0]) - len(costs)
        rows_from_i = [row[i : i + spare + 1] for i, row in enumerate(costs)]
        return tuple([i + j for i, j in enumerate(monotone_path(rows_from_i))])
    rows, columns = len(costs), len(costs[0])
    best = [(0.0, 0, ())] * columns  # of each column: sum, distance to the diagonal, path
    for i, row in enumerate(costs):
        before, least = best, best[0]
        best = []
        for j, cost in enumerate(row):
            if before[j][:2] < least[:2]:
                least = before[j]
            distance = abs(i * (columns - 1) - j * (rows - 1))
            best.append((least[0] + cost, least[1] + distance, (*least[2], j)))
    least = best[0]
    for found in best:
        if found[:2] < least[:2]:
            least = found
    return least[2]
