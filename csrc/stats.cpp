// The statistics: tiles of columns one after another, blocks of rows in parallel; each row belongs to one thread.
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "lens.h"

namespace fdd {
namespace {

enum ReadStat { kLseS, kLseT, kValue, kSlope, kReadStats };
enum MomentStat { kCount, kMeanS, kMeanT, kMSS, kMTT, kMST, kMDD, kMomentStats };

bool needs_second_pass(Divergence kind) {
  switch (kind) {
    case Divergence::kJsd:
    case Divergence::kSkewKl:
      return true;
    case Divergence::kNone:
    case Divergence::kKl:
    case Divergence::kReverseKl:
    case Divergence::kNll:
      break;
  }
  return false;
}

// KL(p || q) from the running sums, whose weights are p and sum to `total`. Where student and teacher are close,
// log(Q / P) + E_p[-x] is a small difference, while E_p[e^x - 1 - x] is a sum of positive numbers; the two differ by
// log(Q / P) - (Q - P) / P, which is of the second order in how far Q / P is from 1.
double kl_of(const SoftmaxState& sums, double total, double other) {
  const double off = sums.difference / total;
  const double value = std::abs(off) < 0.5 ? sums.excess / total - (off - std::log1p(off))
                                           : sums.weighted / total + std::log(other) - std::log(total);
  return value < 0 ? 0 : value;  // NaN stays
}

// Running state of every row that counts, indexed [read or target][position in problem.rows].
struct State {
  std::vector<SoftmaxState> softmax;
  std::vector<MomentState> moments;
  std::vector<float> label_value;     // u at the label, per read
  std::vector<double> value, slope;  // per read

  explicit State(const Problem& problem) {
    const float lowest = -std::numeric_limits<float>::infinity();
    const size_t reads = problem.reads.size() * problem.rows.size();
    softmax.assign(reads, SoftmaxState{lowest, lowest, 0, 0, 0, 0, 0});
    moments.assign(problem.moments.size() * problem.rows.size(), MomentState{});
    label_value.assign(reads, 0);
    value.assign(reads, 0);
    slope.assign(reads, 0);
  }
};

class Rows {
 public:
  Rows(const Problem& problem, const Statistics& out, const KeptValues* kept)
      : problem_(problem), out_(out), kept_(kept), state_(problem) {}

  // Visits every row of every tile, a row's tiles in the order of their columns.
  template <class Visit>
  void for_each_tile(const Interrupt& interrupt, Visit visit) {
    if (kept_) return for_each_kept_tile(visit);
    const Tiles& tiles = problem_.tiles;
    const int64_t blocks = (problem_.count() + tiles.rows - 1) / tiles.rows;
    Panel panel;
    for (int64_t start = 0; start < problem_.columns; start += tiles.panel) {
      interrupt();
      panel.pack(problem_, start, std::min(tiles.panel, problem_.columns - start));
      at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
        TileValues values(problem_);
        for (int64_t block = begin; block < end; ++block) {
          const int64_t first_row = block * tiles.rows, last_row = std::min(first_row + tiles.rows, problem_.count());
          values.set_rows(first_row, last_row);
          for (int64_t column = start; column < start + panel.count(); column += tiles.columns) {
            const int64_t count = std::min(tiles.columns, start + panel.count() - column);
            values.compute(panel, column, count);
            const TileView view = values.view();
            for (int64_t row = first_row; row < last_row; ++row) visit(view, row, row - first_row, column, count);
          }
        }
        release_products();
      });
    }
  }

  template <class Visit>
  void for_each_kept_tile(Visit visit) {
    at::parallel_for(0, problem_.count(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t tile = 0; tile < kept_->tiles(); ++tile) {
        const TileView view = kept_->view(tile);
        for (int64_t row = begin; row < end; ++row) visit(view, row, row, kept_->first(tile), kept_->count(tile));
      }
    });
  }

  void first_pass(const Interrupt& interrupt) {
    const RowKernels& kernels = row_kernels();
    for_each_tile(interrupt, [&](const TileView& values, int64_t row, int64_t local, int64_t column, int64_t count) {
      if (column == 0 && !problem_.reads.empty()) {
        for (int64_t layer = 0; layer < problem_.layers; ++layer) {
          *pivot(0, layer, row) = kernels.largest(values.student(layer, local), count);
          if (problem_.needs_teacher) *pivot(1, layer, row) = kernels.largest(values.teacher(layer, local), count);
        }
      }
      for (size_t i = 0; i < problem_.reads.size(); ++i) {
        const Read& read = problem_.reads[i];
        const size_t at = i * problem_.rows.size() + row;
        const float* student = values.student(read.layer, local);
        const float* teacher = read.kind == Divergence::kNll ? nullptr : values.teacher(read.layer, local);
        kernels.softmax(student, teacher, read.inv_temperature, count, read.kind, &state_.softmax[at]);
        if (read.kind != Divergence::kNll) continue;
        const int64_t label = problem_.labels[row] - column;
        if (label >= 0 && label < count) state_.label_value[at] = student[label];
      }
      for (size_t i = 0; i < problem_.moments.size(); ++i) {
        const VectorView s = problem_.vector(problem_.moments[i], values.student(0, local), values.layer_stride,
                                             pivot(0, 0, row), out_.total_rows);
        const VectorView t = problem_.vector(problem_.moments[i], values.teacher(0, local), values.layer_stride,
                                             pivot(1, 0, row), out_.total_rows);
        kernels.moments(s, t, problem_.excluded_from(column), problem_.moment_inv_temperature, count,
                        &state_.moments[i * problem_.rows.size() + row]);
      }
    });
  }

  void second_pass(const Interrupt& interrupt) {
    const RowKernels& kernels = row_kernels();
    for_each_tile(interrupt, [&](const TileView& values, int64_t row, int64_t local, int64_t, int64_t count) {
      for (size_t i = 0; i < problem_.reads.size(); ++i) {
        const Read& read = problem_.reads[i];
        if (!needs_second_pass(read.kind)) continue;
        const RowView student{values.student(read.layer, local), *pivot(0, read.layer, row), *stat(i, kLseS, row)};
        const RowView teacher{values.teacher(read.layer, local), *pivot(1, read.layer, row), *stat(i, kLseT, row)};
        const size_t at = i * problem_.rows.size() + row;
        kernels.divergence(student, teacher, read.inv_temperature, count, read.kind, &state_.value[at], &state_.slope[at]);
      }
    });
  }

  void finish_first_pass() {
    for (size_t i = 0; i < problem_.reads.size(); ++i)
      for (int64_t row = 0; row < problem_.count(); ++row) {
        const Read& read = problem_.reads[i];
        const size_t at = i * problem_.rows.size() + row;
        const SoftmaxState& softmax = state_.softmax[at];
        set_pivot(0, read.layer, row, softmax.max_s);
        const double lse_s = std::log(softmax.total_s);
        *stat(i, kLseS, row) = float(lse_s);
        if (read.kind == Divergence::kNll) {
          const double off = double(*pivot(0, read.layer, row)) - state_.label_value[at];
          *stat(i, kValue, row) = float(lse_s + off * read.inv_temperature);
          continue;
        }
        set_pivot(1, read.layer, row, softmax.max_t);
        *stat(i, kLseT, row) = float(std::log(softmax.total_t));
        if (read.kind == Divergence::kKl) {
          *stat(i, kValue, row) = float(kl_of(softmax, softmax.total_t, softmax.total_s));
          *stat(i, kSlope, row) = -1.f;
        } else if (read.kind == Divergence::kReverseKl) {
          *stat(i, kValue, row) = float(kl_of(softmax, softmax.total_s, softmax.total_t));
          *stat(i, kSlope, row) = *stat(i, kValue, row) + 1.f;
        }
      }
    for (size_t i = 0; i < problem_.moments.size(); ++i)
      for (int64_t row = 0; row < problem_.count(); ++row) {
        const MomentState& m = state_.moments[i * problem_.rows.size() + row];
        const double values[kMomentStats] = {m.count, m.mean_s, m.mean_t, m.m_ss, m.m_tt, m.m_st, m.m_dd};
        for (int64_t k = 0; k < kMomentStats; ++k)
          out_.moments[(i * kMomentStats + k) * out_.total_rows + problem_.rows[row]] = float(values[k]);
      }
  }

  void finish_second_pass() {
    for (size_t i = 0; i < problem_.reads.size(); ++i) {
      if (!needs_second_pass(problem_.reads[i].kind)) continue;
      for (int64_t row = 0; row < problem_.count(); ++row) {
        *stat(i, kValue, row) = float(state_.value[i * problem_.rows.size() + row]);
        *stat(i, kSlope, row) = float(state_.slope[i * problem_.rows.size() + row]);
      }
    }
  }

 private:
  float* pivot(int64_t side, int64_t layer, int64_t row) {
    return out_.pivots + (side * problem_.layers + layer) * out_.total_rows + problem_.rows[row];
  }
  // The row's largest value takes the place of the first tile's, and the means of the deltas are restated about it. Sums
  // without a finite value keep theirs.
  void set_pivot(int64_t side, int64_t layer, int64_t row, float largest) {
    float* own = pivot(side, layer, row);
    if (!std::isfinite(largest) || largest == *own) return;
    const double moved = (double(largest) - *own) * problem_.moment_inv_temperature;
    *own = largest;
    for (size_t i = 0; i < problem_.moments.size(); ++i) {
      MomentState& m = state_.moments[i * problem_.rows.size() + row];
      double& mean = side == 0 ? m.mean_s : m.mean_t;
      if (problem_.moments[i].second == layer) mean -= moved;
      if (problem_.moments[i].first == layer) mean += moved;
    }
  }
  float* stat(size_t read, int64_t which, int64_t row) {
    return out_.reads + (read * kReadStats + which) * out_.total_rows + problem_.rows[row];
  }

  const Problem& problem_;
  const Statistics& out_;
  const KeptValues* kept_;
  State state_;
};

void run(const Problem& problem, const Statistics& out, const KeptValues* kept, const Interrupt& interrupt) {
  if (problem.count() == 0) return;
  Rows rows(problem, out, kept);
  rows.first_pass(interrupt);
  rows.finish_first_pass();
  if (std::any_of(problem.reads.begin(), problem.reads.end(), [](const Read& r) { return needs_second_pass(r.kind); })) {
    rows.second_pass(interrupt);
    rows.finish_second_pass();
  }
}

}  // namespace

void compute_statistics(const Problem& problem, const Statistics& out, const Interrupt& interrupt) {
  run(problem, out, nullptr, interrupt);
}

void statistics_of(const KeptValues& kept, const Statistics& out) { run(kept.problem(), out, &kept, nullptr); }

}  // namespace fdd
