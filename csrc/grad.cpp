// The gradients: for each panel of columns, row blocks in parallel recompute their tiles, form G = dL/dx and add G W to
// their own rows; then column tiles in parallel add G^T h to their own rows of dW. Every sum has one owner and one order,
// so the result is the same bits in every run with the same tiles.
#include <ATen/Parallel.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <cstring>

#include "lens.h"

namespace fdd {
namespace {

constexpr int64_t kRowChunk = 256;  // rows of h per product of dW

class Backward {
 public:
  Backward(const Problem& problem, const Statistics& statistics, const Upstream& upstream, const Gradients& out)
      : problem_(problem),
        statistics_(statistics),
        upstream_(upstream),
        out_(out),
        wants_columns_(out.weight.defined() || out.bias),
        ld_rows_(round_up(problem.count(), kPadding)) {}

  void run(const Interrupt& interrupt) {
    const int64_t width = problem_.tiles.panel;
    if (wants_columns_) grad_columns_.resize(problem_.layers * std::min(width, problem_.columns) * ld_rows_);
    for (int64_t start = 0; start < problem_.columns; start += width) {
      interrupt();
      panel_.pack(problem_, start, std::min(width, problem_.columns - start));
      if (out_.hidden) weight_rows_ = head_pairs(problem_.student, start, panel_.count(), &weight_copy_);
      form_gradients();
      if (wants_columns_) reduce_columns();
    }
  }

 private:
  void form_gradients() {
    const Tiles& tiles = problem_.tiles;
    const int64_t blocks = (problem_.count() + tiles.rows - 1) / tiles.rows, width = problem_.student.width();
    at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      TileValues values(problem_);
      Scratch grad(problem_.layers * values.layer_stride());
      Split split;
      for (int64_t block = begin; block < end; ++block) {
        const int64_t first_row = block * tiles.rows, last_row = std::min(first_row + tiles.rows, problem_.count());
        values.set_rows(first_row, last_row);
        for (int64_t local = 0; local < panel_.count(); local += tiles.columns) {
          const int64_t count = std::min(tiles.columns, panel_.count() - local);
          values.compute(panel_, panel_.first() + local, count);
          std::memset(grad.get(), 0, sizeof(float) * problem_.layers * values.layer_stride());
          for (int64_t row = first_row; row < last_row; ++row)
            form_row(problem_, statistics_, upstream_, values.view(), grad.get(), row, row - first_row,
                     panel_.first() + local, count);
          for (int64_t layer = 0; layer < problem_.layers; ++layer) {
            const float* g = grad.get() + layer * values.layer_stride();
            if (out_.hidden)
              split.multiply(last_row - first_row, width, count, g, values.ld(), weight_rows_.from(local * weight_rows_.ld),
                               out_.hidden + (layer * problem_.count() + first_row) * width, width, true);
            if (wants_columns_)
              row_kernels().transpose(g, values.ld(), last_row - first_row, count, columns_of(layer, local) + first_row, ld_rows_);
          }
        }
      }
      release_products();
    });
  }

  float* columns_of(int64_t layer, int64_t local) const {
    return grad_columns_.get() + (layer * panel_.count() + local) * ld_rows_;
  }

  // dW and db of the panel's columns, from G^T of all rows and layers.
  void reduce_columns() {
    const int64_t tile = problem_.tiles.columns, tiles = (panel_.count() + tile - 1) / tile;
    const int64_t width = problem_.student.width();
    const bool in_place = out_.weight.defined() && out_.weight.scalar_type() == at::kFloat;
    at::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
      Scratch copy, sum(out_.weight.defined() && !in_place ? tile * width : 0);
      Split split;
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t local = unit * tile, count = std::min(tile, panel_.count() - local), first = panel_.first() + local;
        float* target = in_place ? out_.weight.data_ptr<float>() + first * width : sum.get();
        if (target && !in_place) std::memset(target, 0, sizeof(float) * count * width);
        for (int64_t layer = 0; layer < problem_.layers; ++layer) {
          const float* g = columns_of(layer, local);
          for (int64_t row = 0; target && row < problem_.count(); row += kRowChunk) {
            const int64_t last = std::min(row + kRowChunk, problem_.count());
            const Operand h = hidden_pairs(problem_, problem_.student, layer, row, last, &copy);
            split.multiply(count, width, last - row, g + row, ld_rows_, h, target, width, true);
          }
          if (out_.bias) add_sums(g, ld_rows_, count, problem_.count(), out_.bias + first);
        }
        if (target && !in_place)
          out_.weight.narrow(0, first, count).copy_(at::from_blob(target, {count, width}, at::kFloat));
      }
      release_products();
    });
  }

  const Problem& problem_;
  const Statistics& statistics_;
  const Upstream& upstream_;
  const Gradients& out_;
  const bool wants_columns_;
  const int64_t ld_rows_;
  Panel panel_;
  Operand weight_rows_{};
  Scratch weight_copy_, grad_columns_;  // grad_columns_: G^T, (L, p, R)
};

}  // namespace

void form_row(const Problem& problem, const Statistics& statistics, const Upstream& gradients, const TileView& values,
              float* grad, int64_t row, int64_t local, int64_t first_column, int64_t count) {
  const RowKernels& kernels = row_kernels();
  const int64_t stride = values.layer_stride, total = statistics.total_rows, at = problem.rows[row];
  const auto grad_row = [&](int64_t layer) { return grad + layer * stride + local * values.ld; };
  const float* pivots_s = statistics.pivots + at;
  const float* pivots_t = statistics.pivots + problem.layers * total + at;
  for (size_t i = 0; i < problem.reads.size(); ++i) {
    const Read& read = problem.reads[i];
    const float* stat = statistics.reads + i * 4 * total + at;      // LSE_S, LSE_T, VALUE, SLOPE
    const float* up = gradients.reads + i * 4 * total + at;
    const RowView student{values.student(read.layer, local), pivots_s[read.layer * total], stat[0]};
    ReadGradient upstream{up[0], up[2 * total], stat[3 * total]};
    if (read.kind == Divergence::kNll) {
      upstream.slope = -1.f;
      kernels.read_gradient(grad_row(read.layer), student, nullptr, read.inv_temperature, count, read.kind, upstream);
      const int64_t label = problem.labels[row] - first_column;
      if (label >= 0 && label < count) grad_row(read.layer)[label] -= upstream.value * read.inv_temperature;
    } else {
      if (read.kind == Divergence::kNone) upstream.value = 0.f;
      const RowView teacher{values.teacher(read.layer, local), pivots_t[read.layer * total], stat[total]};
      kernels.read_gradient(grad_row(read.layer), student, &teacher, read.inv_temperature, count, read.kind, upstream);
    }
  }
  for (size_t i = 0; i < problem.moments.size(); ++i) {
    const MomentTarget& target = problem.moments[i];
    const float* stat = statistics.moments + i * 7 * total + at;  // COUNT, MEAN_S, MEAN_T, M_SS, M_TT, M_ST, M_DD
    const float* up = gradients.moments + i * 7 * total + at;
    const MomentGradient upstream{stat[total], stat[2 * total], up[total] / std::max(stat[0], 1.f), up[3 * total],
                                  up[5 * total], up[6 * total]};
    kernels.moment_gradient(grad_row(target.second), target.first == kOwn ? nullptr : grad_row(target.first),
                            problem.vector(target, values.student(0, local), stride, pivots_s, total),
                            problem.vector(target, values.teacher(0, local), stride, pivots_t, total),
                            problem.excluded_from(first_column), problem.moment_inv_temperature, count, upstream);
  }
  for (int64_t layer = 0; layer < problem.layers; ++layer)
    kernels.chain(grad_row(layer), values.student(layer, local), count, problem.student.scale, problem.student.softcap);
}

void add_sums(const float* in, int64_t ld, int64_t rows, int64_t columns, float* out) {
  for (int64_t r = 0; r < rows; ++r) {
    double total = 0;
    for (int64_t c = 0; c < columns; ++c) total += in[r * ld + c];
    out[r] += float(total);
  }
}

void compute_gradients(const Problem& problem, const Statistics& statistics, const Upstream& upstream,
                       const Gradients& out, const Interrupt& interrupt) {
  if (problem.count() > 0) Backward(problem, statistics, upstream, out).run(interrupt);
}

}  // namespace fdd
