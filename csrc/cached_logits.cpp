// Logits cached between statistics and gradients, so that both head GEMMs run once.
//
// Threads divide the vocabulary. The rows of all layers of a model, M = L r, share each GEMM: its
// head is loaded once per pass and needs no packing. Rows of the head are operand A, and the hidden
// states, transposed once, operand B.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>

#include "head_gradient.h"
#include "memory.h"
#include "problem.h"

namespace fdd {
namespace {

// Copies row m of the stacked hidden states of all layers (M, D) as 4-byte words; returns `out`.
float* read_stacked(const Problem& problem, const Model& model, int64_t padded, int64_t m,
                    float* out) {
  if (m % padded < problem.count())
    model.hidden[m / padded].read_words(problem.rows[m % padded], model.bf16, out);
  else
    std::memset(out, 0, sizeof(float) * model.words());
  return out;
}

// The stacked hidden states as an operand B (M, D) in `out`.
Operand stack_paired(const Problem& problem, const Model& model, int64_t padded, Scratch* out) {
  if (model.bf16)
    return interleaved(model.layers() * padded, model.width(), out, [&](int64_t m, float* buffer) {
      return read_stacked(problem, model, padded, m, buffer);
    });
  const int64_t ld = leading_dimension(model.width());
  out->resize(model.layers() * padded * ld);
  stack_hidden(problem, model, padded, ld, out->get());
  return {out->get(), ld};
}

// The same as an operand B (D, M); empty for the identity.
Scratch stack_transposed(const Problem& problem, const Model& model, int64_t padded) {
  if (!model.weight.defined()) return Scratch();
  const int64_t words = model.words(), all = model.layers() * padded;
  const int64_t ld = leading_dimension(words);
  const Scratch rows(all * ld);
  Scratch out(words * all);
  stack_hidden(problem, model, padded, ld, rows.get());
  at::parallel_for(0, (words + kPadding - 1) / kPadding, 1, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kPadding, last = std::min(end * kPadding, words);
    row_kernels().transpose(rows.get() + first, ld, all, last - first, out.get() + first * all,
                            all);
  });
  return out;
}

}  // namespace

void stack_hidden(const Problem& problem, const Model& model, int64_t padded, int64_t ld,
                  float* out) {
  at::parallel_for(0, model.layers() * padded, 16, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m)
      read_stacked(problem, model, padded, m, out + m * ld);
  });
}

CachedLogits::CachedLogits(const Problem& problem, float* memory, float* gradient)
    : problem_(problem),
      memory_(memory),
      gradient_(gradient),
      width_(problem.tiles.columns),
      rows_(problem.tiles.whole ? problem.count() : round_up(problem.count(), kRowPadding)) {}

int64_t CachedLogits::size(const Problem& problem) {
  const CachedLogits cached(problem, nullptr, nullptr);
  return cached.states_size() +
         cached.tiles() * cached.layers(false) * cached.rows_ * cached.most_ld();
}

bool CachedLogits::fits_gradient() const {
  for (int64_t tile = 0; tile < tiles(); ++tile)
    if (layers(true) * rows_ * ld(tile) > count(tile) * problem_.student.width()) return false;
  return true;
}

at::Tensor CachedLogits::hidden_gradients(const at::Tensor& memory) const {
  const std::array<int64_t, 3> shape{problem_.layers(kStudent), problem_.count(),
                                     problem_.student.width()};
  if (!problem_.tiles.whole) return at::empty(shape, at::kFloat);
  return memory.narrow(0, 0, shape[0] * shape[1] * shape[2]).view(shape);
}

void CachedLogits::compute() { return problem_.tiles.whole ? compute_whole() : compute_tiles(); }

void CachedLogits::gradients(const Statistics& statistics, const Upstream& upstream,
                             const Gradients& out) const {
  return problem_.tiles.whole ? gradients_whole(statistics, upstream, out)
                              : gradients_of_tiles(statistics, upstream, out);
}

void CachedLogits::compute_tiles() {
  const Scratch student = stack_transposed(problem_, problem_.student, rows_);
  const Scratch teacher =
      problem_.needs_teacher ? stack_transposed(problem_, problem_.teacher, rows_) : Scratch();
  const int64_t most_layers = std::max(cached_layers(kStudent), cached_layers(kTeacher));
  at::parallel_for(0, tiles(), 1, [&](int64_t begin, int64_t end) {
    Scratch weight, raw(width_ * most_layers * rows_);
    for (int64_t tile = begin; tile < end; ++tile) {
      if (layers(true))
        populate(gradient_ + first(tile) * problem_.student.width(),
                 sizeof(float) * layers(true) * rows_ * ld(tile));
      compute_model(problem_.student, tile, student.get(), &weight, raw.get(),
                    logits(tile, kStudent));
      if (cached_layers(kTeacher))
        compute_model(problem_.teacher, tile, teacher.get(), &weight, raw.get(),
                      logits(tile, kTeacher));
    }
    release_gemm();
  });
}

void CachedLogits::compute_model(const Model& model, int64_t tile, const float* hidden_DM,
                                 Scratch* weight, float* raw_cM, float* out_Mc) const {
  const int64_t all = model.layers() * rows_, columns = count(tile), ld_out = ld(tile);
  if (model.weight.defined()) {
    const Operand head = head_as_a(model, first(tile), columns, weight);
    gemm(columns, all, model.width(), head, {hidden_DM, all, model.bf16}, raw_cM, all, false);
    const auto transpose =
        model.transforms() ? row_kernels().transpose : row_kernels().transpose_to_memory;
    transpose(raw_cM, all, columns, all, out_Mc, ld_out);
  } else {
    for (int64_t layer = 0; layer < model.layers(); ++layer)
      for (int64_t row = 0; row < problem_.count(); ++row)
        model.hidden[layer].read(problem_.rows[row], first(tile), columns,
                                 out_Mc + (layer * rows_ + row) * ld_out);
  }
  const float* bias = model.bias.empty() ? nullptr : model.bias.data() + first(tile);
  for (int64_t layer = 0; layer < model.layers(); ++layer)
    for (int64_t row = 0; row < problem_.count(); ++row)
      row_kernels().transform(out_Mc + (layer * rows_ + row) * ld_out, columns, bias, model.scale,
                              model.softcap);
}

void CachedLogits::gradients_of_tiles(const Statistics& statistics, const Upstream& upstream,
                                      const Gradients& out) const {
  const int64_t rows = problem_.count(), layers = problem_.layers(kStudent), all = layers * rows_,
                width = problem_.student.width();
  Scratch stacked;
  const Operand hidden = out.weight.defined()
                             ? stack_paired(problem_, problem_.student, rows_, &stacked)
                             : Operand();
  // dH of each thread's columns, by its first tile: added in that order at the end.
  std::map<int64_t, Scratch> sums;
  std::mutex guard;
  at::parallel_for(0, tiles(), 1, [&](int64_t begin, int64_t end) {
    Scratch weight, grad_Mc(all * most_ld()), grad_cM(problem_.tiles.columns * all),
        sum(out.hidden ? all * width : 0);
    HeadGradient head_gradient(out, problem_.tiles.columns, width);
    SplitGemm split;
    for (int64_t tile = begin; tile < end; ++tile) {
      const TileView logits = view(tile);
      const int64_t first = this->first(tile), columns = count(tile), ld = logits.ld;
      std::memset(grad_Mc.get(), 0, sizeof(float) * all * ld);
      for (int64_t row = 0; row < rows; ++row)
        form_row(problem_, statistics, upstream, logits,
                 {grad_Mc.get() + row * ld, logits.layer_stride}, row, row, first, columns);
      if (out.hidden) {
        const Operand head = head_as_b(problem_.student, first, columns, &weight);
        split.gemm(all, width, columns, grad_Mc.get(), ld, head, sum.get(), width, tile > begin);
      }
      if (!out.weight.defined() && !out.bias) continue;
      row_kernels().transpose(grad_Mc.get(), ld, all, columns, grad_cM.get(), all);
      if (out.weight.defined()) {
        split.gemm(columns, width, all, grad_cM.get(), all, hidden,
                   head_gradient.open(first, columns), width, head_gradient.adds());
        head_gradient.close();
      }
      if (out.bias) add_sums(grad_cM.get(), all, columns, all, out.bias + first);
    }
    release_gemm();
    if (!out.hidden) return;
    const std::lock_guard lock(guard);
    sums.emplace(begin, std::move(sum));
  });
  at::parallel_for(0, out.hidden ? layers * rows : 0, 16, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      float* total = out.hidden + m * width;
      for (const auto& [first, sum] : sums) {
        const float* part = sum.get() + (m / rows * rows_ + m % rows) * width;
        if (first == 0)
          std::memcpy(total, part, sizeof(float) * width);
        else
          for (int64_t i = 0; i < width; ++i) total[i] += part[i];
      }
    }
  });
}

}  // namespace fdd
