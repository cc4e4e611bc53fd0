"""The exact earth mover's distance between few layers.

Shape suffixes: S layers of the student, T of the teacher.
"""

from __future__ import annotations

import numpy as np

# Masses and costs are rounded to integers of so many bits, relative to the total mass and to the
# spread of the costs: no rounding then hides which of two paths is shorter. A path over all layers,
# fewer than 2^12, stays within 63 bits.
_BITS = 50
_UNREACHED = 2**62


def optimal_flow(costs: np.ndarray, student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    """Compute the flow F (S, T) with the given row and column sums that minimises sum(F * costs).

    Successive shortest paths, each found by Bellman and Ford's relaxation. As many units as fit are
    sent along the cheapest path from a layer of the student with mass left to one of the teacher
    with room left; a path may take back what an earlier one sent.

    Args:
        costs: (S, T) float64, finite.
        student, teacher: (S,) and (T,) float64, at least 0, of the same sum above 0.

    Returns:
        (S, T) float64, optimal but for the rounding of masses and costs to 2^-50 of their range.
    """
    total = student.sum()
    left, room = _units(student), _units(teacher)
    costs = costs - costs.min()
    spread = costs.max()
    lengths = np.rint(costs / (spread if spread > 0 else 1.0) * 2.0**_BITS).astype(np.int64)
    flow = np.zeros_like(lengths)
    while left.any():
        path = _cheapest_path(lengths, flow, left > 0, room > 0)
        steps_back = [(i, j) for (_, j), (i, _) in zip(path, path[1:])]
        start, end = path[0][0], path[-1][1]
        amount = min(left[start], room[end], *[flow[step] for step in steps_back])
        for step in path:
            flow[step] += amount
        for step in steps_back:
            flow[step] -= amount
        left[start] -= amount
        room[end] -= amount
    return flow * (total * 2.0**-_BITS)


def _units(masses: np.ndarray) -> np.ndarray:
    """Round masses to integers of the sum 2^_BITS."""
    ends = masses.cumsum()
    return np.diff(np.rint(ends / ends[-1] * 2.0**_BITS).astype(np.int64), prepend=0)


def _cheapest_path(
    lengths: np.ndarray, flow: np.ndarray, sources: np.ndarray, sinks: np.ndarray
) -> list[tuple[int, int]]:
    """Find the cheapest path from `sources` (S,) to `sinks` (T,), its forward steps in order.

    A step forward, from a layer of the student to one of the teacher, costs its length. A step
    back, where flow can be taken back, costs minus its length.
    """
    to_student = np.where(sources, 0, _UNREACHED)
    to_teacher = np.full(len(sinks), _UNREACHED)
    from_teacher, from_student = np.full(len(sources), -1), np.full(len(sinks), -1)
    while True:
        # Predecessors change only where a path became shorter: they never form a circle.
        _relax(to_student[:, None] + lengths, to_teacher, from_student)
        back = np.where(flow > 0, to_teacher - lengths, _UNREACHED)
        if not _relax(back.T, to_student, from_teacher):
            break
    at = int(np.where(sinks, to_teacher, _UNREACHED).argmin())
    path = []
    while at >= 0:
        student = int(from_student[at])
        path.append((student, at))
        at = int(from_teacher[student])
    return path[::-1]


def _relax(offers: np.ndarray, distances: np.ndarray, predecessors: np.ndarray) -> bool:
    """Take the best of the offers (from, to) in place; say whether any distance became shorter."""
    best = offers.argmin(0)
    offered = offers[best, np.arange(len(distances))]
    shorter = offered < distances
    distances[shorter], predecessors[shorter] = offered[shorter], best[shorter]
    return bool(shorter.any())
