// The divergences that are compiled in. A new one is an entry of `Divergence`, its name here, and a
// case in each of the two functions of divergences_impl.h (-Werror=switch finds a missing one).
#pragma once

#include <utility>

namespace fdd {

// kNone: log-sum-exps alone. kNll: the student's cross-entropy at the label.
enum class Divergence { kNone, kNll, kKl, kReverseKl, kJsd, kSkewKl };

constexpr std::pair<const char*, Divergence> kDivergences[] = {
    {"", Divergence::kNone},   {"nll", Divergence::kNll},
    {"kl", Divergence::kKl},   {"reverse_kl", Divergence::kReverseKl},
    {"jsd", Divergence::kJsd}, {"skew_kl", Divergence::kSkewKl},
};

// The model under whose distribution the divergence is an expectation, summed in one pass
// (lens/divergences.py: expectation_of).
enum class Expectation { kNone, kTeacher, kStudent };

}  // namespace fdd
