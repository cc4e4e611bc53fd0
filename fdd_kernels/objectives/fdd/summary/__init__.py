"""A teacher summary: sufficient statistics of each token, for students with one frozen linear head.

With W, b the student's head, s its logit scale divided by the temperature, p the teacher's
distribution at a layer and q the student's, z_s = s (W h + b), the forward KL needs of the teacher

    KL(p || q) = -H(p) - s (u . h + E_p[b]) + logsumexp(z_s),      u = E_p[W] = W^T p    (width Ds)

and the deltas t = z_t^(l+1) - z_t^l and s W d, d = h^(l+1) - h^l, need of t only its mean, its sum
of squares about the mean, and a = (W - m)^T t with m the mean of the head's rows:

    sum about the means of (s W d)^2 = s^2 d . G d,   G = (W - m)^T (W - m)
    sum about the means of (s W d) t = s d . a        mean = s m . d

All of it is exact over the whole vocabulary. `SummaryMaker` makes the summary once; `SummaryLoss`
computes the loss from it with neither teacher nor teacher head. From row statistics on it takes the
same way as every backend (`objectives/fdd/terms.py`).

Where student and teacher nearly agree, the difference E_q[W] - u, which is the gradient of KL, has
fewer digits than the sum over (p - q) W of `fused_fdd_loss`: its error is that of float32 relative
to E_q[W], not to the difference.
"""

from fdd_kernels.objectives.fdd.summary.loss import SummaryLoss
from fdd_kernels.objectives.fdd.summary.maker import SummaryMaker, check_options, summary_widths

# The names of one release ago.
StatisticsLoss, StatisticsMaker, statistics_widths = SummaryLoss, SummaryMaker, summary_widths

__all__ = ["SummaryLoss", "SummaryMaker", "check_options", "summary_widths"]
