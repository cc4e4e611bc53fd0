// The statistics: tiles of columns one after another, blocks of rows in parallel; each row belongs
// to one thread.
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "problem.h"

namespace fdd {
namespace {

// KL(p || q) from the running sums, whose weights are p and sum to `total`. Where student and
// teacher are close, log(Q / P) + E_p[-x] is a small difference, while E_p[e^x - 1 - x] is a sum of
// positive numbers. The two differ by log(Q / P) - (Q - P) / P, which is of the second order in how
// far Q / P is from 1.
double kl_of(const SoftmaxState& sums, double total, double other) {
  const double off = sums.difference / total;
  const double value = std::abs(off) < 0.5
                           ? sums.excess / total - (off - std::log1p(off))
                           : sums.weighted / total + std::log(other) - std::log(total);
  return value < 0 ? 0 : value;  // NaN stays
}

// Running state of every valid row, indexed [request or pair][position in problem.rows].
struct State {
  std::vector<SoftmaxState> softmax;
  std::vector<MomentState> moments;
  std::vector<float> label_logit;       // per request
  std::vector<double> value, grad_sum;  // per request

  explicit State(const Problem& problem) {
    const float lowest = -std::numeric_limits<float>::infinity();
    const size_t requests = problem.requests.size() * problem.rows.size();
    softmax.assign(requests, SoftmaxState{lowest, lowest, lowest, 0, 0, 0, 0, 0});
    MomentState no_tokens{};
    no_tokens.largest = lowest;
    moments.assign(problem.moments.size() * problem.rows.size(), no_tokens);
    label_logit.assign(requests, 0);
    value.assign(requests, 0);
    grad_sum.assign(requests, 0);
  }
};

class Rows {
 public:
  Rows(const Problem& problem, const Statistics& out, const CachedLogits* cached)
      : problem_(problem), out_(out), cached_(cached), state_(problem) {}

  // Visits every row of every tile, a row's tiles in the order of their columns.
  template <class Visit>
  void for_each_tile(const Interrupt& interrupt, Visit visit) {
    if (cached_) return for_each_cached_tile(visit);
    const Tiles& tiles = problem_.tiles;
    const int64_t blocks = (problem_.count() + tiles.rows - 1) / tiles.rows;
    Panel panel;
    for (int64_t start = 0; start < problem_.columns; start += tiles.panel) {
      interrupt();
      panel.pack(problem_, start, std::min(tiles.panel, problem_.columns - start));
      at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
        TileLogits logits(problem_);
        for (int64_t block = begin; block < end; ++block) {
          const int64_t first_row = block * tiles.rows,
                        last_row = std::min(first_row + tiles.rows, problem_.count());
          logits.set_rows(first_row, last_row);
          for (int64_t column = start; column < start + panel.count(); column += tiles.columns) {
            const int64_t count = std::min(tiles.columns, start + panel.count() - column);
            logits.compute(panel, column, count);
            const TileView view = logits.view();
            for (int64_t row = first_row; row < last_row; ++row)
              visit(view, row, row - first_row, column, count);
          }
        }
        release_gemm();
      });
    }
  }

  template <class Visit>
  void for_each_cached_tile(Visit visit) {
    at::parallel_for(0, problem_.count(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t tile = 0; tile < cached_->tiles(); ++tile) {
        const TileView view = cached_->view(tile);
        for (int64_t row = begin; row < end; ++row)
          visit(view, row, row, cached_->first(tile), cached_->count(tile));
      }
    });
  }

  void first_pass(const Interrupt& interrupt) {
    const RowKernels& kernels = row_kernels();
    for_each_tile(interrupt, [&](const TileView& logits, int64_t row, int64_t local, int64_t column,
                                 int64_t count) {
      if (column == 0 && !problem_.requests.empty()) {
        for (int64_t layer = 0; layer < problem_.layers(kStudent); ++layer)
          *shift(kStudent, layer, row) = kernels.largest(logits.student(layer, local), count);
        for (int64_t layer = 0; layer < problem_.layers(kTeacher); ++layer)
          *shift(kTeacher, layer, row) = kernels.largest(logits.teacher(layer, local), count);
      }
      for (size_t i = 0; i < problem_.requests.size(); ++i) {
        const Request& request = problem_.requests[i];
        const bool is_nll = request.divergence == Divergence::kNll;
        const size_t at = i * problem_.rows.size() + row;
        const float* student = logits.student(request.layers[kStudent], local);
        const float* teacher = is_nll ? nullptr : logits.teacher(request.layers[kTeacher], local);
        kernels.softmax(student, teacher, request.teacher_mix, request.inv_temperature, count,
                        request.expectation, &state_.softmax[at]);
        if (!is_nll) continue;
        const int64_t label = problem_.labels[row] - column;
        if (label >= 0 && label < count) state_.label_logit[at] = student[label];
      }
      for (size_t i = 0; i < problem_.moments.size(); ++i) {
        const PairMoments& pair = problem_.moments[i];
        const VectorView
            s = vector_of(pair, kStudent, logits, local, shift(kStudent, 0, row), out_.total_rows),
            t = vector_of(pair, kTeacher, logits, local, shift(kTeacher, 0, row), out_.total_rows);
        const float* excluded = problem_.excluded_from(column);
        MomentState* state = &state_.moments[i * problem_.rows.size() + row];
        if (pair.weighted)
          kernels.weighted_moments(s, t, excluded, pair.inv_temperature, count, state);
        else
          kernels.moments(s, t, excluded, count, state);
      }
    });
  }

  void second_pass(const Interrupt& interrupt) {
    const RowKernels& kernels = row_kernels();
    for_each_tile(
        interrupt, [&](const TileView& logits, int64_t row, int64_t local, int64_t, int64_t count) {
          for (size_t i = 0; i < problem_.requests.size(); ++i) {
            const Request& request = problem_.requests[i];
            if (!request.second_pass()) continue;
            const auto [student_layer, teacher_layer] = request.layers;
            const RowView student{logits.student(student_layer, local),
                                  *shift(kStudent, student_layer, row), *stat(i, kLseS, row)};
            const RowView teacher{logits.teacher(teacher_layer, local),
                                  *shift(kTeacher, teacher_layer, row), *stat(i, kLseT, row)};
            const size_t at = i * problem_.rows.size() + row;
            kernels.divergence(student, teacher, request.teacher_mix, request.inv_temperature,
                               count, request.divergence, request.constants.data(),
                               &state_.value[at], &state_.grad_sum[at]);
          }
        });
  }

  void finish_first_pass() {
    for (size_t i = 0; i < problem_.requests.size(); ++i)
      for (int64_t row = 0; row < problem_.count(); ++row) {
        const Request& request = problem_.requests[i];
        const auto [student_layer, teacher_layer] = request.layers;
        const size_t at = i * problem_.rows.size() + row;
        const SoftmaxState& softmax = state_.softmax[at];
        set_shift(kStudent, student_layer, row, softmax.max_s);
        const double lse_s = std::log(softmax.total_s);
        *stat(i, kLseS, row) = float(lse_s);
        if (request.divergence == Divergence::kNll) {
          const double off = double(*shift(kStudent, student_layer, row)) - state_.label_logit[at];
          *stat(i, kValue, row) = float(lse_s + off * request.inv_temperature);
          continue;
        }
        set_shift(kTeacher, teacher_layer, row, softmax.max_t);
        double lse_t = std::log(softmax.total_t);
        if (const double mix = request.teacher_mix; mix < 1) {
          const double shift_mix = (1 - mix) * *shift(kStudent, student_layer, row) +
                                   mix * *shift(kTeacher, teacher_layer, row);
          lse_t += (softmax.max_mix - shift_mix) * request.inv_temperature;
        }
        *stat(i, kLseT, row) = float(lse_t);
        if (request.expectation == Expectation::kTeacher) {
          *stat(i, kValue, row) = float(kl_of(softmax, softmax.total_t, softmax.total_s));
          *stat(i, kGradSum, row) = -1.f;
        } else if (request.expectation == Expectation::kStudent) {
          *stat(i, kValue, row) = float(kl_of(softmax, softmax.total_s, softmax.total_t));
          *stat(i, kGradSum, row) = *stat(i, kValue, row) + 1.f;
        }
      }
    for (size_t i = 0; i < problem_.moments.size(); ++i)
      for (int64_t row = 0; row < problem_.count(); ++row) {
        const std::array<double, kMomentStats> stats = moment_stats(i, row);
        for (int64_t k = 0; k < kMomentStats; ++k)
          out_.moments[(i * kMomentStats + k) * out_.total_rows + problem_.rows[row]] =
              float(stats[k]);
      }
  }

  void finish_second_pass() {
    for (size_t i = 0; i < problem_.requests.size(); ++i) {
      if (!problem_.requests[i].second_pass()) continue;
      for (int64_t row = 0; row < problem_.count(); ++row) {
        *stat(i, kValue, row) = float(state_.value[i * problem_.rows.size() + row]);
        *stat(i, kGradSum, row) = float(state_.grad_sum[i * problem_.rows.size() + row]);
      }
    }
  }

 private:
  float* shift(ModelIndex model, int64_t layer, int64_t row) {
    return out_.shifts_of(model) + layer * out_.total_rows + problem_.rows[row];
  }
  // Replaces the first tile's largest logit by the row's as the shift, and restates the means of
  // the pair moments about it. Sums without a finite logit keep their shift.
  void set_shift(ModelIndex model, int64_t layer, int64_t row, float largest) {
    float* own = shift(model, layer, row);
    if (!std::isfinite(largest) || largest == *own) return;
    const double moved = double(largest) - *own;
    *own = largest;
    for (size_t i = 0; i < problem_.moments.size(); ++i) {
      const PairMoments& pair = problem_.moments[i];
      MomentState& m = state_.moments[i * problem_.rows.size() + row];
      double& origin = model == kStudent ? m.origin_s : m.origin_t;
      if (pair.second[model] == layer) origin -= moved;
      if (pair.first && (*pair.first)[model] == layer) origin += moved;
    }
  }
  // The statistics of pair moments, once the shifts are the final ones.
  std::array<double, kMomentStats> moment_stats(size_t index, int64_t row) {
    const PairMoments& pair = problem_.moments[index];
    const MomentState& m = state_.moments[index * problem_.rows.size() + row];
    std::array<double, kMomentStats> stats{};
    const double inv = pair.inv_temperature;
    if (pair.weighted) {
      const double off = double(m.largest) - *shift(kTeacher, pair.second[kTeacher], row);
      stats[kCount] = std::log(m.count) + off * inv;
    } else {
      stats[kCount] = m.count;
    }
    if (m.count == 0) return stats;
    const double of_squares = inv * inv / (pair.weighted ? m.count : 1);
    stats[kMeanS] = inv * (m.origin_s + m.mean_s);
    stats[kMeanT] = inv * (m.origin_t + m.mean_t);
    stats[kMSS] = of_squares * m.m_ss;
    stats[kMTT] = of_squares * m.m_tt;
    stats[kMST] = of_squares * m.m_st;
    stats[kMDD] = of_squares * m.m_dd;
    if (pair.weighted) {
      stats[kTopS] = -inv * m.mean_s;
      stats[kTopT] = -inv * m.mean_t;
    }
    return stats;
  }
  float* stat(size_t request, RequestStat which, int64_t row) {
    return out_.requests + (request * kRequestStats + which) * out_.total_rows + problem_.rows[row];
  }

  const Problem& problem_;
  const Statistics& out_;
  const CachedLogits* cached_;
  State state_;
};

void run(const Problem& problem, const Statistics& out, const CachedLogits* cached,
         const Interrupt& interrupt) {
  if (problem.count() == 0) return;
  Rows rows(problem, out, cached);
  rows.first_pass(interrupt);
  rows.finish_first_pass();
  const auto& requests = problem.requests;
  if (std::any_of(requests.begin(), requests.end(),
                  [](const Request& r) { return r.second_pass(); })) {
    rows.second_pass(interrupt);
    rows.finish_second_pass();
  }
}

}  // namespace

void compute_statistics(const Problem& problem, const Statistics& out, const Interrupt& interrupt) {
  run(problem, out, nullptr, interrupt);
}

void statistics_of(const CachedLogits& cached, const Statistics& out) {
  run(cached.problem(), out, &cached, nullptr);
}

}  // namespace fdd
