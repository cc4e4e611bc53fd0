"""Intervals of ratios of sums, by the paired bootstrap over sequences (Efron and Tibshirani, "An
Introduction to the Bootstrap", 1993, chapter 13).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import NamedTuple

import numpy as np

CONFIDENCE, RESAMPLES, SEED = 0.95, 1000, 0
# Numbers of the resamples that are held at once.
_HELD = 1 << 22


class Ratio(NamedTuple):
    """A metric of a whole text: transform(sum of numerators / sum of denominators).

    Attributes:
        numerators, denominators: of each sequence, (n,).
        transform: applied to arrays of ratios.
    """

    numerators: np.ndarray
    denominators: np.ndarray
    transform: Callable[[np.ndarray], np.ndarray] = lambda ratio: ratio


class Estimate(NamedTuple):
    """A metric and its values on all resamples, (RESAMPLES,); none of fewer than two sequences."""

    mean: float
    draws: np.ndarray | None

    def minus(self, other: Estimate) -> Estimate:
        """Return the difference, sequence by sequence the same resamples."""
        paired = self.draws is not None and other.draws is not None
        with np.errstate(invalid="ignore"):  # infinite numbers have no difference
            draws = self.draws - other.draws if paired else None
        return Estimate(self.mean - other.mean, draws)

    def record(self) -> dict[str, float | None]:
        """Return the mean and the percentile interval; no interval where a resample has no finite
        number, as bits per byte of texts without a byte.
        """
        if self.draws is None or not np.isfinite(self.draws).all():
            return {"mean": self.mean, "low": None, "high": None}
        tail = (1 - CONFIDENCE) / 2
        low, high = np.quantile(self.draws, [tail, 1 - tail])
        return {"mean": self.mean, "low": float(low), "high": float(high)}


def paired_bootstrap(ratios: Mapping[Hashable, Ratio]) -> dict[Hashable, Estimate]:
    """Estimate ratios over the same n sequences, all on the same resamples of them."""
    if not ratios:
        return {}
    numerators = np.stack([ratio.numerators for ratio in ratios.values()], -1)
    denominators = np.stack([ratio.denominators for ratio in ratios.values()], -1)
    both = np.concatenate([numerators, denominators], -1)
    count, split = len(both), numerators.shape[1]
    generator, draws = np.random.default_rng(SEED), []
    held = max(1, _HELD // max(count, 1))
    for start in range(0, RESAMPLES if count > 1 else 0, held):
        chosen = [
            np.bincount(generator.integers(count, size=count), minlength=count)
            for _ in range(min(held, RESAMPLES - start))
        ]
        draws.append(np.stack(chosen).astype(np.float64) @ both)
    total = both.sum(0, keepdims=True)
    resampled = np.concatenate(draws) if draws else None
    found = {}
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        for index, (key, ratio) in enumerate(ratios.items()):
            of_all, of_draws = (
                None if sums is None else ratio.transform(sums[:, index] / sums[:, split + index])
                for sums in (total, resampled)
            )
            found[key] = Estimate(float(of_all[0]), of_draws)
    return found
