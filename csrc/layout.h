// Constants that the Python side defines. tests/kernels/test_cpu_kernels.py compares every one.
#pragma once

namespace fdd {

// fdd_kernels/lens/layout.py: index of a statistic among those of a request or of a pair of
// vectors.
enum RequestStat { kLseS, kLseT, kValue, kGradSum, kRequestStats };
enum MomentStat { kCount, kMeanS, kMeanT, kMSS, kMTT, kMST, kMDD, kTopS, kTopT, kMomentStats };

// A token with a larger weight is the likeliest of its row, however weights are rounded.
constexpr float kCertain = 0.625f;

}  // namespace fdd
