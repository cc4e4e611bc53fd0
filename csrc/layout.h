// Constants that the Python side defines. tests/kernels/test_cpu_kernels.py compares every one.
#pragma once

namespace fdd {

// fdd_kernels/lens/layout.py: index of a statistic among those of a request or of a pair of
// vectors.
enum RequestStat { kLseS, kLseT, kValue, kGradSum, kRequestStats };
enum MomentStat { kCount, kMeanS, kMeanT, kMSS, kMTT, kMST, kMDD, kMomentStats };

// fdd_kernels/lens/divergences.py: SKEW, the teacher's weight in the mixture of skew_kl.
constexpr float kSkew = 0.1f;

}  // namespace fdd
