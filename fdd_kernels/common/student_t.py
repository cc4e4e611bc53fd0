"""The 95% interval of a mean, by Student's t."""

from __future__ import annotations

import math
import statistics

import numpy as np

# Quantiles of Student's t at 0.975 for 1 to 9 degrees of freedom; from 10 on the expansion in their
# inverse is exact to three digits.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def t_quantile(freedom: int) -> float:
    """Return the quantile of Student's t at 0.975."""
    if freedom <= len(_T):
        return _T[freedom - 1]
    z = statistics.NormalDist().inv_cdf(0.975)
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )


def half_width(values: np.ndarray) -> float:
    """Return half of the 95% interval of the mean of `values` (n,); infinite for fewer than two."""
    if len(values) < 2:
        return math.inf
    return t_quantile(len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
