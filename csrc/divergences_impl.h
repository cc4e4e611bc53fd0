// The elementwise pair of every divergence: the formulas of fdd_kernels/lens/divergences.py.
// Included by row_kernels_impl.h.

namespace fdd::FDD_ISA {
namespace {

// log((1 - share) + share e^x)
inline Vec log_mixture(Vec x, float share) {
  const Vec small = expm1_nonpositive(-abs(x));
  return max(x, Vec{}) + log1p_nonpositive(select(x > 0, (1.f - share) * small, share * small));
}

// The part of a token in KL(p || r), given x = log r - log p: p (e^x - 1 - x), never negative. The
// sum of r - p over the vocabulary is 0.
inline Vec kl_of(Vec p, Vec r, Vec x) {
  return select(abs(x) < kNear, p * (exp_tail(x) * x * x), (r - p) - times(p, x));
}

// `parameters` are the request's; no divergence has any today.
inline Vec divergence_value(Divergence divergence, Vec log_q, Vec log_p, const float* parameters) {
  const Vec q = exp(log_q), p = exp(log_p), x = log_q - log_p;
  switch (divergence) {
    case Divergence::kKl:
      return kl_of(p, q, x);
    case Divergence::kReverseKl:
      return kl_of(q, p, -x);
    case Divergence::kJsd: {
      const Vec m = 0.5f * (p + q);
      return 0.5f * (kl_of(p, m, log_mixture(x, 0.5f)) + kl_of(q, m, log_mixture(-x, 0.5f)));
    }
    case Divergence::kSkewKl:
      return kl_of(p, kSkew * p + (1.f - kSkew) * q, log_mixture(x, 1.f - kSkew));
    case Divergence::kNone:
    case Divergence::kNll:
      break;
  }
  return Vec{};
}

inline Vec divergence_grad(Divergence divergence, Vec log_q, Vec log_p, const float* parameters) {
  switch (divergence) {
    case Divergence::kKl:
      return -exp(log_p);
    case Divergence::kReverseKl:
      return times(exp(log_q), log_q - log_p + 1.f);
    case Divergence::kJsd:
      return -0.5f * times(exp(log_q), log_mixture(log_p - log_q, 0.5f));
    case Divergence::kSkewKl: {
      // (1 - SKEW)^2 q (q - p) / m: with m = SKEW p + (1 - SKEW) q and r the smaller of q and p
      // over the larger, (q - p) / m is 1 - r over the weight of the larger plus that of the
      // smaller times r.
      const Vec x = log_q - log_p, gap = expm1_nonpositive(-abs(x));       // r - 1
      const Vec weight = select(x > 0, splat(kSkew), splat(1.f - kSkew));  // of the smaller
      const Vec ratio = select(x > 0, -gap, gap) / (1.f + weight * gap);
      return (1.f - kSkew) * (1.f - kSkew) * times(exp(log_q), ratio);
    }
    case Divergence::kNone:
    case Divergence::kNll:
      break;
  }
  return Vec{};
}

}  // namespace
}  // namespace fdd::FDD_ISA
