// The elementwise pair of every divergence: the formulas of fdd_kernels/lens/divergences.py.
// Included by row_kernels_impl.h.

namespace fdd::FDD_ISA {
namespace {

template <class Constants>
inline Constants constants_of(const float* floats) {
  Constants constants;
  __builtin_memcpy(&constants, floats, sizeof(constants));
  return constants;
}

// log(rest + share e^x) with rest + share = 1. Where e^x would overflow, `rest` is nothing.
inline Vec log_mixture(Vec x, float share, float rest) {
  const Vec most = select(x > 80.f, splat(80.f), x), e = exp(most);  // NaN stays
  const Vec gap = share * select(abs(x) < kNear, exp_tail(x) * x * x + x, e - 1.f);
  return log_of(rest + share * e, gap) + max(x - 80.f, Vec{});
}

// (q - p) / m of a mixture m with the weights w_q and w_p; x = log q - log p. With r the smaller of
// q and p over the larger, it is 1 - r over the weight of the larger plus that of the smaller times
// r.
inline Vec over_mixture(Vec x, float w_q, float w_p) {
  const Vec r = exp(-abs(x)), gap = expm1_nonpositive(-abs(x));
  return select(x > 0, -gap, gap) / select(x > 0, w_q + w_p * r, w_p + w_q * r);
}

// The part of a token in KL(p || r), given x = log r - log p: p (e^x - 1 - x), never negative. The
// sum of r - p over the vocabulary is 0.
inline Vec kl_of(Vec p, Vec r, Vec x) {
  return select(abs(x) < kNear, p * (exp_tail(x) * x * x), (r - p) - times(p, x));
}

// sign(x), 0 at 0
inline Vec with_sign_of(Vec size, Vec x) {
  return select(x > 0, size, select(x < 0, -size, times(size, x)));
}

// (q^power - p^power) / power, which is log q - log p at power 0; 0 where q = p = 0.
inline Vec power_difference(Vec log_q, Vec log_p, float power, float inv_power) {
  const Vec larger = max(log_q, log_p);
  const Vec x = select(larger == -kInfinity, Vec{}, log_q - log_p);
  if (power == 0) return x;
  return with_sign_of(exp(power * larger) * -expm1_nonpositive(-power * abs(x)) * inv_power, x);
}

// e^(power * log_weight) x with 0 * anything = 0
inline Vec weighted_power(Vec log_weight, float power, Vec x) {
  return power == 0 ? x : times(exp(power * log_weight), x);
}

inline Vec alpha_beta_value(const AlphaBetaConstants& of, Vec log_q, Vec log_p) {
  const Vec x = log_q - log_p, y = of.sum * x;
  Vec series = splat(of.series[AlphaBetaConstants::kTerms - 1]);
  for (int i = AlphaBetaConstants::kTerms - 2; i >= 0; --i) series = series * y + of.series[i];
  const Vec near = exp(of.sum * log_p) * (series * y + 0.5f) * x * x;
  const Vec q = power_difference(log_q, log_p, of.alpha, of.inv_alpha);
  const Vec p = power_difference(log_q, log_p, of.beta, of.inv_beta);
  const Vec far = weighted_power(log_q, of.beta, q) - weighted_power(log_p, of.alpha, p);
  return select(abs(y) < kNear, near, far * of.inv_sum);
}

// `constants` are the request's.
inline Vec divergence_value(Divergence divergence, Vec log_q, Vec log_p, const float* constants) {
  if (divergence == Divergence::kTv) return 0.5f * abs(power_difference(log_q, log_p, 1.f, 1.f));
  if (divergence == Divergence::kAlphaBeta)
    return alpha_beta_value(constants_of<AlphaBetaConstants>(constants), log_q, log_p);
  const Vec q = exp(log_q), p = exp(log_p), x = log_q - log_p;
  switch (divergence) {
    case Divergence::kKl:
      return kl_of(p, q, x);
    case Divergence::kReverseKl:
      return kl_of(q, p, -x);
    case Divergence::kJsd: {  // share: of the teacher
      const auto [share, rest] = constants_of<MixtureConstants>(constants);
      const Vec m = share * p + rest * q;
      return share * kl_of(p, m, log_mixture(x, rest, share)) +
             rest * kl_of(q, m, log_mixture(-x, share, rest));
    }
    case Divergence::kSkewKl: {  // share: of the teacher
      const auto [share, rest] = constants_of<MixtureConstants>(constants);
      return kl_of(p, share * p + rest * q, log_mixture(x, rest, share));
    }
    case Divergence::kSkewReverseKl: {  // share: of the student
      const auto [share, rest] = constants_of<MixtureConstants>(constants);
      return kl_of(q, share * q + rest * p, log_mixture(-x, rest, share));
    }
    case Divergence::kTv:
    case Divergence::kAlphaBeta:
    case Divergence::kNone:
    case Divergence::kNll:
      break;
  }
  return Vec{};
}

inline Vec divergence_grad(Divergence divergence, Vec log_q, Vec log_p, const float* constants) {
  const Vec x = log_q - log_p;
  switch (divergence) {
    case Divergence::kKl:
      return -exp(log_p);
    case Divergence::kReverseKl:
      return times(exp(log_q), x + 1.f);
    case Divergence::kJsd: {
      const auto [share, rest] = constants_of<MixtureConstants>(constants);
      return -rest * times(exp(log_q), log_mixture(-x, share, rest));
    }
    case Divergence::kSkewKl: {
      // (1 - alpha)^2 q (q - p) / m
      const auto [share, rest] = constants_of<MixtureConstants>(constants);
      return rest * rest * times(exp(log_q), over_mixture(x, rest, share));
    }
    case Divergence::kSkewReverseKl: {
      // q ((1 - alpha) y - alpha (e^y - 1 - y)) with y = log(q / m)
      const auto [share, rest] = constants_of<MixtureConstants>(constants);
      const Vec y = -log_mixture(-x, rest, share);
      const Vec tail = select(abs(y) < kNear, exp_tail(y) * y * y, exp(y) - 1.f - y);
      return times(exp(log_q), rest * y - share * tail);
    }
    case Divergence::kTv:
      return 0.5f * times(exp(log_q), with_sign_of(splat(1.f), x));
    case Divergence::kAlphaBeta: {
      const auto of = constants_of<AlphaBetaConstants>(constants);
      return weighted_power(log_q, of.beta,
                            power_difference(log_q, log_p, of.alpha, of.inv_alpha));
    }
    case Divergence::kNone:
    case Divergence::kNll:
      break;
  }
  return Vec{};
}

}  // namespace
}  // namespace fdd::FDD_ISA
