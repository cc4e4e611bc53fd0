// Cached logits by GEMMs of the whole block: each product is one call of the BLAS on all threads,
// and between them threads divide the rows. All is float32, and the logits are one tile of all
// columns. dL/dlogits takes the place of the student's logits, dL/dh that of the stacked hidden
// states. For which problems: fdd_kernels/backends/cpu/tiling.py, `whole_rows`.
#include <ATen/Parallel.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>

#include <cstring>
#include <vector>

#include "problem.h"

namespace fdd {
namespace {

constexpr int64_t kLeastRows = 4, kLeastColumns = 256;  // of a thread

at::Tensor matrix(float* data, int64_t rows, int64_t columns, int64_t ld) {
  return at::from_blob(data, {rows, columns}, {ld, 1}, at::kFloat);
}

// The head's rows of the columns (C, D).
at::Tensor head(const Problem& problem, const Model& model) {
  return model.weight.view().narrow(0, 0, problem.columns);
}

// `states` is memory for the stacked hidden states.
void compute_logits(const Problem& problem, const Model& model, float* states, int64_t ld,
                    float* out) {
  const int64_t count = problem.count(), all = model.layers() * count, width = model.width();
  if (model.weight.defined()) {
    stack_hidden(problem, model, count, width, states);
    at::Tensor logits = matrix(out, all, problem.columns, ld);
    at::mm_out(logits, matrix(states, all, width, width), head(problem, model).t());
    if (!model.transforms()) return;
  }
  at::parallel_for(0, all, kLeastRows, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      float* row = out + m * ld;
      if (!model.weight.defined())
        model.hidden[m / count].read(problem.rows[m % count], 0, problem.columns, row);
      const float* bias = model.bias.empty() ? nullptr : model.bias.data();
      row_kernels().transform(row, problem.columns, bias, model.scale, model.softcap);
    }
  });
}

}  // namespace

void CachedLogits::compute_whole() {
  if (cached_layers(kTeacher)) {
    const Scratch states(problem_.layers(kTeacher) * rows_ * problem_.teacher.width());
    compute_logits(problem_, problem_.teacher, states.get(), most_ld(), logits(0, kTeacher));
  }
  compute_logits(problem_, problem_.student, memory_, most_ld(), logits(0, kStudent));
}

void CachedLogits::gradients_whole(const Statistics& statistics, const Upstream& upstream,
                                   const Gradients& out) const {
  const int64_t count = problem_.count(), layers = problem_.layers(kStudent), ld = most_ld(),
                width = problem_.student.width();
  float* const student = logits(0, kStudent);
  const TileView all = view(0);
  at::parallel_for(0, count, kLeastRows, [&](int64_t begin, int64_t end) {
    Scratch grad(layers * ld);
    for (int64_t row = begin; row < end; ++row) {
      std::memset(grad.get(), 0, sizeof(float) * layers * ld);
      form_row(problem_, statistics, upstream, all, {grad.get(), ld}, row, row, 0,
               problem_.columns);
      for (int64_t layer = 0; layer < layers; ++layer)
        std::memcpy(student + layer * all.layer_stride + row * ld, grad.get() + layer * ld,
                    sizeof(float) * ld);
    }
  });
  const at::Tensor grad = matrix(student, layers * count, problem_.columns, ld);
  at::Tensor states = matrix(memory_, layers * count, width, width);
  if (out.weight.defined()) {
    at::Tensor weight = out.weight.narrow(0, 0, problem_.columns);
    if (out.first_call)
      at::mm_out(weight, grad.t(), states);
    else
      weight.addmm_(grad.t(), states);
  }
  if (out.hidden) {
    TORCH_INTERNAL_ASSERT(out.hidden == memory_);
    at::mm_out(states, grad, head(problem_, problem_.student));
  }
  if (!out.bias) return;
  at::parallel_for(0, problem_.columns, kLeastColumns, [&](int64_t begin, int64_t end) {
    std::vector<double> sums(end - begin);
    for (int64_t m = 0; m < layers * count; ++m)
      for (int64_t c = begin; c < end; ++c) sums[c - begin] += student[m * ld + c];
    for (int64_t c = begin; c < end; ++c) out.bias[c] += float(sums[c - begin]);
  });
}

}  // namespace fdd
