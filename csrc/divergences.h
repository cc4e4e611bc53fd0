// The divergences that are compiled in. A new one is an entry of `Divergence`, its name here, a
// case in each of the two functions of divergences_impl.h and in parameter_count() of
// divergences.cpp (-Werror=switch finds a missing one).
#pragma once

#include <utility>
#include <vector>

namespace fdd {

// kNone: log-sum-exps alone. kNll: the student's cross-entropy at the label.
enum class Divergence {
  kNone,
  kNll,
  kKl,
  kReverseKl,
  kJsd,
  kSkewKl,
  kSkewReverseKl,
  kTv,
  kAlphaBeta
};

constexpr std::pair<const char*, Divergence> kDivergences[] = {
    {"", Divergence::kNone},
    {"nll", Divergence::kNll},
    {"kl", Divergence::kKl},
    {"reverse_kl", Divergence::kReverseKl},
    {"jsd", Divergence::kJsd},
    {"skew_kl", Divergence::kSkewKl},
    {"skew_reverse_kl", Divergence::kSkewReverseKl},
    {"tv", Divergence::kTv},
    {"alpha_beta", Divergence::kAlphaBeta},
};

// The model under whose distribution the divergence is an expectation, summed in one pass
// (lens/divergences.py: expectation_of).
enum class Expectation { kNone, kTeacher, kStudent };

// What divergences_impl.h takes instead of the parameters. In float, 1 - alpha would lose its
// digits where alpha is close to 1.
struct MixtureConstants {
  float share, rest;  // the parameter and 1 - the parameter, both above 0
};
struct AlphaBetaConstants {
  static constexpr int kTerms = 6;
  float alpha, beta;  // 0 where a power of a probability is 1 to the last digit
  float sum, inv_alpha, inv_beta, inv_sum;
  float series[kTerms];  // coefficients of y, y^2, ... with y = sum * x
};

// One of the structures above as an array. Throws std::invalid_argument for another number of
// parameters than the divergence has.
std::vector<float> divergence_constants(Divergence divergence,
                                        const std::vector<double>& parameters);

}  // namespace fdd
