// The gradients. For each panel of columns, row blocks in parallel recompute their tiles of logits,
// form G = dL/dx and add G W to their own rows; then column tiles in parallel add G^T h to their
// own rows of dW. Every sum has one owner and one order: all runs with the same tiles give the same
// bits.
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>

#include "head_gradient.h"
#include "problem.h"

namespace fdd {
namespace {

constexpr int64_t kRowChunk = 256;  // rows of h per GEMM of dW

class Backward {
 public:
  Backward(const Problem& problem, const Statistics& statistics, const Upstream& upstream,
           const Gradients& out)
      : problem_(problem),
        statistics_(statistics),
        upstream_(upstream),
        out_(out),
        wants_columns_(out.weight.defined() || out.bias),
        layers_(problem.layers(kStudent)),
        ld_rows_(round_up(problem.count(), kPadding)) {}

  void run(const Interrupt& interrupt) {
    const int64_t width = problem_.tiles.panel;
    if (wants_columns_)
      grad_columns_.resize(layers_ * std::min(width, problem_.columns) * ld_rows_);
    for (int64_t start = 0; start < problem_.columns; start += width) {
      interrupt();
      panel_.pack(problem_, start, std::min(width, problem_.columns - start));
      if (out_.hidden)
        weight_rows_ = head_as_b(problem_.student, start, panel_.count(), &weight_copy_);
      form_gradients();
      if (wants_columns_) reduce_columns();
    }
  }

 private:
  void form_gradients() {
    const Tiles& tiles = problem_.tiles;
    const int64_t blocks = (problem_.count() + tiles.rows - 1) / tiles.rows,
                  width = problem_.student.width();
    at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      TileLogits logits(problem_);
      Scratch grad(layers_ * logits.layer_stride());
      SplitGemm split;
      for (int64_t block = begin; block < end; ++block) {
        const int64_t first_row = block * tiles.rows,
                      last_row = std::min(first_row + tiles.rows, problem_.count());
        logits.set_rows(first_row, last_row);
        for (int64_t local = 0; local < panel_.count(); local += tiles.columns) {
          const int64_t count = std::min(tiles.columns, panel_.count() - local);
          logits.compute(panel_, panel_.first() + local, count);
          std::memset(grad.get(), 0, sizeof(float) * layers_ * logits.layer_stride());
          for (int64_t row = first_row; row < last_row; ++row)
            form_row(problem_, statistics_, upstream_, logits.view(),
                     {grad.get() + (row - first_row) * logits.ld(), logits.layer_stride()}, row,
                     row - first_row, panel_.first() + local, count);
          for (int64_t layer = 0; layer < layers_; ++layer) {
            const float* g = grad.get() + layer * logits.layer_stride();
            if (out_.hidden)
              split.gemm(last_row - first_row, width, count, g, logits.ld(),
                         weight_rows_.from(local * weight_rows_.ld),
                         out_.hidden + (layer * problem_.count() + first_row) * width, width, true);
            if (wants_columns_)
              row_kernels().transpose(g, logits.ld(), last_row - first_row, count,
                                      columns_of(layer, local) + first_row, ld_rows_);
          }
        }
      }
      release_gemm();
    });
  }

  float* columns_of(int64_t layer, int64_t local) const {
    return grad_columns_.get() + (layer * panel_.count() + local) * ld_rows_;
  }

  // dW and db of the panel's columns, from G^T of all rows and layers.
  void reduce_columns() {
    const int64_t tile = problem_.tiles.columns, tiles = (panel_.count() + tile - 1) / tile;
    const int64_t width = problem_.student.width();
    at::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
      HeadGradient head(out_, tile, width);
      Scratch copy;
      SplitGemm split;
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t local = unit * tile, count = std::min(tile, panel_.count() - local),
                      first = panel_.first() + local;
        float* target = head.wanted() ? head.open(first, count) : nullptr;
        for (int64_t layer = 0; layer < layers_; ++layer) {
          const float* g = columns_of(layer, local);
          for (int64_t row = 0; target && row < problem_.count(); row += kRowChunk) {
            const int64_t last = std::min(row + kRowChunk, problem_.count());
            const Operand h = hidden_as_b(problem_, problem_.student, layer, row, last, &copy);
            split.gemm(count, width, last - row, g + row, ld_rows_, h, target, width,
                       head.adds() || layer || row);
          }
          if (out_.bias) add_sums(g, ld_rows_, count, problem_.count(), out_.bias + first);
        }
        if (target) head.close();
      }
      release_gemm();
    });
  }

  const Problem& problem_;
  const Statistics& statistics_;
  const Upstream& upstream_;
  const Gradients& out_;
  const bool wants_columns_;
  const int64_t layers_, ld_rows_;
  Panel panel_;
  Operand weight_rows_{};
  Scratch weight_copy_, grad_columns_;  // grad_columns_: G^T, (L, p, R)
};

}  // namespace

void form_row(const Problem& problem, const Statistics& statistics, const Upstream& gradients,
              const TileView& logits, GradientRow grad, int64_t row, int64_t local,
              int64_t first_column, int64_t count) {
  const RowKernels& kernels = row_kernels();
  const int64_t total = statistics.total_rows, at = problem.rows[row];
  const auto grad_row = [&](int64_t layer) { return grad.begin + layer * grad.layer_stride; };
  const float* shifts_s = statistics.shifts_of(kStudent) + at;
  const float* shifts_t = statistics.shifts_of(kTeacher) + at;
  for (size_t i = 0; i < problem.requests.size(); ++i) {
    const Request& request = problem.requests[i];
    const auto [student_layer, teacher_layer] = request.layers;
    const float* stat = statistics.requests + i * kRequestStats * total + at;
    const float* up = gradients.requests + i * kRequestStats * total + at;
    const RowView student{logits.student(student_layer, local), shifts_s[student_layer * total],
                          stat[kLseS * total]};
    RequestGradient upstream{up[kLseS * total], up[kValue * total], stat[kGradSum * total]};
    float* out = grad_row(student_layer);
    if (request.divergence == Divergence::kNll) {
      upstream.grad_sum = -1.f;
      kernels.request_gradient(out, student, nullptr, 1.f, request.inv_temperature, count,
                               request.divergence, nullptr, upstream);
      const int64_t label = problem.labels[row] - first_column;
      if (label >= 0 && label < count) out[label] -= upstream.value * request.inv_temperature;
    } else {
      if (request.divergence == Divergence::kNone) upstream.value = 0.f;
      const RowView teacher{logits.teacher(teacher_layer, local), shifts_t[teacher_layer * total],
                            stat[kLseT * total]};
      kernels.request_gradient(out, student, &teacher, request.teacher_mix,
                               request.inv_temperature, count, request.divergence,
                               request.constants.data(), upstream);
    }
  }
  for (size_t i = 0; i < problem.moments.size(); ++i) {
    const PairMoments& pair = problem.moments[i];
    const float* stat = statistics.moments + i * kMomentStats * total + at;
    const float* up = gradients.moments + i * kMomentStats * total + at;
    const float of_tokens = stat[kCount * total];
    const MomentGradient upstream{
        stat[kMeanS * total],
        stat[kMeanT * total],
        pair.weighted ? up[kMeanS * total] : up[kMeanS * total] / std::max(of_tokens, 1.f),
        up[kMSS * total],
        up[kMST * total],
        up[kMDD * total],
        pair.weighted,
        of_tokens,
        stat[kTopS * total],
        stat[kTopT * total]};
    float* grad_first = pair.first ? grad_row((*pair.first)[kStudent]) : nullptr;
    kernels.moment_gradient(
        grad_row(pair.second[kStudent]), grad_first,
        vector_of(pair, kStudent, logits, local, shifts_s, total),
        vector_of(pair, kTeacher, logits, local, shifts_t, total),
        problem.excluded_from(first_column), pair.inv_temperature, count, upstream);
  }
  for (int64_t layer = 0; layer < problem.layers(kStudent); ++layer)
    kernels.chain(grad_row(layer), logits.student(layer, local), count, problem.student.scale,
                  problem.student.softcap);
}

void add_sums(const float* in, int64_t ld, int64_t rows, int64_t columns, float* out) {
  for (int64_t r = 0; r < rows; ++r) {
    double total = 0;
    for (int64_t c = 0; c < columns; ++c) total += in[r * ld + c];
    out[r] += float(total);
  }
}

void compute_gradients(const Problem& problem, const Statistics& statistics,
                       const Upstream& upstream, const Gradients& out, const Interrupt& interrupt) {
  if (problem.count() > 0) Backward(problem, statistics, upstream, out).run(interrupt);
}

}  // namespace fdd
