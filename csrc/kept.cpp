// Values that are computed once and kept from the statistics to the gradients, for as many rows as a budget holds; what
// saves the second time that both heads are multiplied. Columns are divided among the threads, and the rows of all
// layers M = L r share each product, so that a head is read once per pass and needs no packing: the head's rows are the
// left operand, the hidden states, transposed once, the right one.
#include <ATen/Parallel.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>

#include "lens.h"

namespace fdd {
namespace {

// Row m of the hidden states of all layers below one another, (M, D), as 4-byte words; returns `out`.
float* read_stacked(const Problem& problem, const Side& side, int64_t padded, int64_t m, float* out) {
  if (m % padded < problem.count())
    side.hidden[m / padded].read_words(problem.rows[m % padded], side.narrow, out);
  else
    std::memset(out, 0, sizeof(float) * side.words());
  return out;
}

// All of them.
Scratch stack(const Problem& problem, const Side& side, int64_t padded) {
  const int64_t words = side.words(), all = problem.layers * padded;
  Scratch out(all * words);
  at::parallel_for(0, all, 16, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) read_stacked(problem, side, padded, m, out.get() + m * words);
  });
  return out;
}

// The same as a right operand (M, D).
Scratch stack_paired(const Problem& problem, const Side& side, int64_t padded) {
  if (!side.narrow) return stack(problem, side, padded);
  Scratch out;
  interleaved(problem.layers * padded, side.width(), &out,
              [&](int64_t m, float* buffer) { return read_stacked(problem, side, padded, m, buffer); });
  return out;
}

// The same as a right operand (D, M); empty for the identity.
Scratch stack_transposed(const Problem& problem, const Side& side, int64_t padded) {
  if (!side.weight.defined()) return Scratch();
  const int64_t words = side.words(), all = problem.layers * padded;
  const Scratch rows = stack(problem, side, padded);
  Scratch out(words * all);
  at::parallel_for(0, (words + kPadding - 1) / kPadding, 1, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kPadding, last = std::min(end * kPadding, words);
    row_kernels().transpose(rows.get() + first, words, all, last - first, out.get() + first * all, all);
  });
  return out;
}

}  // namespace

KeptValues::KeptValues(const Problem& problem, float* memory)
    : problem_(problem),
      memory_(memory),
      width_(problem.tiles.columns),
      ld_(round_up(width_, kPadding)),
      rows_(round_up(problem.count(), kRowPadding)) {}

int64_t KeptValues::size(const Problem& problem) {
  const KeptValues kept(problem, nullptr);
  return kept.tiles() * problem.layers * kept.rows_ * kept.ld_ * (problem.needs_teacher ? 2 : 1);
}

void KeptValues::compute() {
  const Scratch student = stack_transposed(problem_, problem_.student, rows_);
  const Scratch teacher = problem_.needs_teacher ? stack_transposed(problem_, problem_.teacher, rows_) : Scratch();
  at::parallel_for(0, tiles(), 1, [&](int64_t begin, int64_t end) {
    Scratch weight, raw(width_ * problem_.layers * rows_);
    for (int64_t tile = begin; tile < end; ++tile) {
      compute_side(problem_.student, tile, student.get(), &weight, raw.get(), values(tile, 0));
      if (problem_.needs_teacher) compute_side(problem_.teacher, tile, teacher.get(), &weight, raw.get(), values(tile, 1));
    }
    release_products();
  });
}

void KeptValues::compute_side(const Side& side, int64_t tile, const float* hidden_DM, Scratch* weight, float* raw_cM,
                              float* out_Mc) const {
  const int64_t all = problem_.layers * rows_, columns = count(tile);
  if (side.weight.defined()) {
    const Operand head = head_rows(side, first(tile), columns, weight);
    multiply(columns, all, side.width(), head, {hidden_DM, all, side.narrow}, raw_cM, all, false);
    row_kernels().transpose(raw_cM, all, columns, all, out_Mc, ld_);
  } else {
    for (int64_t layer = 0; layer < problem_.layers; ++layer)
      for (int64_t row = 0; row < problem_.count(); ++row)
        side.hidden[layer].read(problem_.rows[row], first(tile), columns, out_Mc + (layer * rows_ + row) * ld_);
  }
  const float* bias = side.bias.empty() ? nullptr : side.bias.data() + first(tile);
  for (int64_t layer = 0; layer < problem_.layers; ++layer)
    for (int64_t row = 0; row < problem_.count(); ++row)
      row_kernels().transform(out_Mc + (layer * rows_ + row) * ld_, columns, bias, side.scale, side.softcap);
}

void gradients_of(const KeptValues& kept, const Statistics& statistics, const Upstream& upstream, const Gradients& out) {
  const Problem& problem = kept.problem();
  const int64_t rows = problem.count(), padded = kept.padded_rows(), all = problem.layers * padded;
  const int64_t width = problem.student.width(), ld = kept.ld();
  const Scratch hidden = out.weight.defined() ? stack_paired(problem, problem.student, padded) : Scratch();
  const bool in_place = out.weight.defined() && out.weight.scalar_type() == at::kFloat;
  // dH of each thread's columns, by its first tile: added up in that order at the end.
  std::map<int64_t, Scratch> sums;
  std::mutex guard;
  at::parallel_for(0, kept.tiles(), 1, [&](int64_t begin, int64_t end) {
    Scratch weight, grad_Mc(all * ld), grad_cM(problem.tiles.columns * all), sum(out.hidden ? all * width : 0),
        narrow(out.weight.defined() && !in_place ? problem.tiles.columns * width : 0);
    Split split;
    if (out.hidden) std::memset(sum.get(), 0, sizeof(float) * all * width);
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t first = kept.first(tile), columns = kept.count(tile);
      std::memset(grad_Mc.get(), 0, sizeof(float) * all * ld);
      for (int64_t row = 0; row < rows; ++row)
        form_row(problem, statistics, upstream, kept.view(tile), grad_Mc.get(), row, row, first, columns);
      if (out.hidden) {
        const Operand head = head_pairs(problem.student, first, columns, &weight);
        split.multiply(all, width, columns, grad_Mc.get(), ld, head, sum.get(), width, true);
      }
      if (!out.weight.defined() && !out.bias) continue;
      row_kernels().transpose(grad_Mc.get(), ld, all, columns, grad_cM.get(), all);
      if (out.weight.defined()) {
        float* target = in_place ? out.weight.data_ptr<float>() + first * width : narrow.get();
        split.multiply(columns, width, all, grad_cM.get(), all, {hidden.get(), width, problem.student.narrow}, target, width,
                         in_place);
        if (!in_place)
          out.weight.narrow(0, first, columns).copy_(at::from_blob(target, {columns, width}, at::kFloat));
      }
      if (out.bias) add_sums(grad_cM.get(), all, columns, all, out.bias + first);
    }
    release_products();
    if (!out.hidden) return;
    const std::lock_guard lock(guard);
    sums.emplace(begin, std::move(sum));
  });
  at::parallel_for(0, out.hidden ? problem.layers * rows : 0, 16, [&](int64_t begin, int64_t end) {
    for (const auto& [_, sum] : sums)
      for (int64_t m = begin; m < end; ++m) {
        const float* part = sum.get() + (m / rows * padded + m % rows) * width;
        for (int64_t i = 0; i < width; ++i) out.hidden[m * width + i] += part[i];
      }
  });
}

}  // namespace fdd
