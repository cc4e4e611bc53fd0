// The elementwise part of both operations on one row of a tile, compiled per instruction set.
//
// A row holds the logits u = softcap(scale * (h W^T + b)) of one layer; z = (u - shift) *
// inv_temperature. Rows are padded to a multiple of kPadding floats: a kernel may load elements
// behind n but must not use them.
#pragma once

#include <cstdint>
#include <utility>

#include "divergences.h"
#include "layout.h"

namespace fdd {

constexpr int64_t kPadding = 16;

// One model's view of a row: its logits, and the numbers that turn them into log-probabilities. The
// shift is the row's largest logit: z is then small where probabilities are not, and rounding it
// moves no probability by more than its own last digits.
struct RowView {
  const float* logits;
  float shift;
  float log_sum_exp;  // of z
};

// Running softmax of a row: the largest logits, which the sums are relative to, and sums of
// e_s = e^z_s and e_t. With e the exponentials of the model under whose distribution the divergence
// is an expectation, e' the other's, and x = z' - z. With a mixture in the teacher's place e_t is
// the mixture's, relative to `max_mix`.
struct SoftmaxState {
  float max_s, max_t;
  double max_mix;
  double total_s, total_t;
  double weighted;    // sum of -e x
  double excess;      // sum of e (e^x - 1 - x)
  double difference;  // sum of e' - e
};

// Running moments of a pair of vectors (s, t) about their means, over the tokens so far; d = s - t.
// All are of logits, before the temperature. Means are relative to the origin: 0, or s and t of the
// token with the largest weight, whose distance from the mean is a small number if the weight is
// nearly all there is.
struct MomentState {
  double count;  // of tokens; weighted: the sum of weights, of which the largest is 1
  double origin_s, origin_t, mean_s, mean_t, m_ss, m_tt, m_st, m_dd;
  float largest;  // weighted: the teacher's logit of the largest weight
};

// A vector of one model: u of `second`, minus u of `first` unless that is null.
struct VectorView {
  const float* second;
  const float* first;
  float shift_second, shift_first;
};

struct RequestGradient {
  float log_sum_exp, value;  // upstream gradients of LSE_S and VALUE
  float grad_sum;            // the statistic GRAD_SUM
};

struct MomentGradient {
  float mean_s, mean_t;                // the statistics
  float of_mean, of_ss, of_st, of_dd;  // upstream gradients; of_mean is divided by the count
  bool weighted;
  float log_total, top_s, top_t;  // weighted: the statistics COUNT, TOP_S and TOP_T
};

struct RowKernels {
  const char* name;
  // u = softcap(scale * (x + bias)) in place; bias may be null, softcap 0 is none.
  void (*transform)(float* x, int64_t n, const float* bias, float scale, float softcap);
  // Largest finite element, 0 if there is none.
  float (*largest)(const float* logits, int64_t n);
  // Adds a tile to the running softmax. Teacher null: the student alone. Below 1, `teacher_mix` is
  // the teacher's share in the mixture that takes its place. The last three sums are those of the
  // expectation.
  void (*softmax)(const float* student, const float* teacher, float teacher_mix,
                  float inv_temperature, int64_t n, Expectation of, SoftmaxState* state);
  // `excluded` (n) is -inf at tokens to leave out, 0 elsewhere; null: none.
  void (*moments)(VectorView s, VectorView t, const float* excluded, int64_t n,
                  MomentState* state);
  // The same with the weights e^z of t.second.
  void (*weighted_moments)(VectorView s, VectorView t, const float* excluded, float inv_temperature,
                           int64_t n, MomentState* state);
  // Adds the sums of the divergence's value and grad, with both log-sum-exps known.
  void (*divergence)(RowView student, RowView teacher, float teacher_mix, float inv_temperature,
                     int64_t n, Divergence divergence, const float* constants,
                     double* value, double* grad_sum);
  // grad += dL/du of one request.
  void (*request_gradient)(float* grad, RowView student, const RowView* teacher, float teacher_mix,
                           float inv_temperature, int64_t n, Divergence divergence,
                           const float* constants, RequestGradient upstream);
  // grad_second += dL/du, grad_first -= dL/du of one pair of vectors; grad_first may be null.
  void (*moment_gradient)(float* grad_second, float* grad_first, VectorView s, VectorView t,
                          const float* excluded, float inv_temperature, int64_t n,
                          MomentGradient upstream);
  // dL/du -> dL/dx in place, from u before any shift.
  void (*chain)(float* grad, const float* u, int64_t n, float scale, float softcap);
  void (*from_bfloat16)(const uint16_t* in, float* out, int64_t n);
  void (*from_half)(const uint16_t* in, float* out, int64_t n);
  // Rounds finite numbers to the nearest bfloat16, ties to even; `low` is the rest, rounded too.
  void (*to_bfloat16)(const float* in, uint16_t* high, uint16_t* low, int64_t n);
  // out (columns, rows) = in (rows, columns) transposed, with leading dimensions; 4-byte words.
  void (*transpose)(const float* in, int64_t ld_in, int64_t rows, int64_t columns, float* out,
                    int64_t ld_out);
  // The same past the caches, where the processor can and `out` is aligned: for much that is not
  // read again at once.
  void (*transpose_to_memory)(const float* in, int64_t ld_in, int64_t rows, int64_t columns,
                              float* out, int64_t ld_out);
  // out (n, 2) from two rows of n.
  void (*interleave)(const uint16_t* first, const uint16_t* second, uint16_t* out, int64_t n);
  // The inverse.
  void (*separate)(const uint16_t* in, uint16_t* first, uint16_t* second, int64_t n);
};

const RowKernels& row_kernels_generic();  // on every architecture
const RowKernels& row_kernels_avx2();     // these two on x86-64 alone
const RowKernels& row_kernels_avx512();

// The widest set that this processor runs, or the one that FDD_KERNELS_ISA names (generic, avx2,
// avx512; on AArch64 neon alone).
const RowKernels& row_kernels();

}  // namespace fdd
