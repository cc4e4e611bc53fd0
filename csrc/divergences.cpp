#include "divergences.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

namespace fdd {
namespace {

template <class Constants>
std::vector<float> as_floats(const Constants& constants) {
  std::vector<float> floats(sizeof(constants) / sizeof(float));
  std::memcpy(floats.data(), &constants, sizeof(constants));
  return floats;
}

size_t parameter_count(Divergence divergence) {
  switch (divergence) {
    case Divergence::kJsd:
    case Divergence::kSkewKl:
    case Divergence::kSkewReverseKl:
      return 1;
    case Divergence::kAlphaBeta:
      return 2;
    case Divergence::kNone:
    case Divergence::kNll:
    case Divergence::kKl:
    case Divergence::kReverseKl:
    case Divergence::kTv:
      break;
  }
  return 0;
}

MixtureConstants mixture(double share) {
  const double least = std::numeric_limits<float>::min();
  return {float(std::max(share, least)), float(std::max(1 - share, least))};
}

// The coefficients of _alpha_beta_value in fdd_kernels/lens/divergences.py: x^2 / 2 times the sum
// over n >= 2 of c_n y^(n - 2) 2 / n!, with c_n = c_(n - 1) + (beta / sum)^(n - 2).
AlphaBetaConstants alpha_beta(double alpha, double beta) {
  const double sum = alpha + beta, ratio = beta / sum, none = 1e-20;
  AlphaBetaConstants of{};
  if (alpha > none) of.alpha = float(alpha), of.inv_alpha = float(1 / alpha);
  if (beta > none) of.beta = float(beta), of.inv_beta = float(1 / beta);
  of.sum = float(sum);
  of.inv_sum = float(1 / sum);
  double coefficient = 1, power = 1, factorial = 2;
  for (int i = 0; i < AlphaBetaConstants::kTerms; ++i) {
    power *= ratio;
    coefficient += power;
    factorial *= i + 3;
    of.series[i] = float(coefficient / factorial);
  }
  return of;
}

}  // namespace

std::vector<float> divergence_constants(Divergence divergence,
                                        const std::vector<double>& parameters) {
  const size_t count = parameter_count(divergence);
  if (parameters.size() != count)
    throw std::invalid_argument("the divergence takes " + std::to_string(count) +
                                " parameter(s), not " + std::to_string(parameters.size()));
  if (count == 1) return as_floats(mixture(parameters[0]));
  if (count == 2) return as_floats(alpha_beta(parameters[0], parameters[1]));
  return {};
}

}  // namespace fdd
