#include "lens.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>

namespace fdd {

void Side::pack(int64_t first_column, int64_t count, int64_t ld, float* out_DC) const {
  // Columns kPadding at a time through a small buffer, so that both reads and writes run along memory.
  const int64_t depth = words();
  Scratch rows(kPadding * depth);
  for (int64_t j = 0; j < count; j += kPadding) {
    const int64_t lanes = std::min(kPadding, count - j);
    for (int64_t lane = 0; lane < lanes; ++lane) weight.read_words(first_column + j + lane, narrow, rows.get() + lane * depth);
    row_kernels().transpose(rows.get(), depth, lanes, depth, out_DC + j, ld);
  }
}

VectorView Problem::vector(const MomentTarget& target, const float* u, int64_t layer_stride, const float* pivots,
                           int64_t pivot_stride) const {
  VectorView view{u + target.second * layer_stride, nullptr, pivots[target.second * pivot_stride], 0.f};
  if (target.first != kOwn) {
    view.first = u + target.first * layer_stride;
    view.pivot_first = pivots[target.first * pivot_stride];
  }
  return view;
}

void Panel::pack(const Problem& problem, int64_t first, int64_t count) {
  first_ = first;
  count_ = count;
  student_words_ = problem.student.weight.defined() ? problem.student.words() : 0;
  teacher_words_ = problem.needs_teacher && problem.teacher.weight.defined() ? problem.teacher.words() : 0;
  student_.resize(student_words_ * count);
  teacher_.resize(teacher_words_ * count);
  const int64_t tile = problem.tiles.columns, tiles = (count + tile - 1) / tile;
  at::parallel_for(0, 2 * tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t column = unit / 2 * tile, width = std::min(tile, count - column);
      if (unit % 2 == 0 && student_words_)
        problem.student.pack(first + column, width, width, student_.get() + column * student_words_);
      if (unit % 2 == 1 && teacher_words_)
        problem.teacher.pack(first + column, width, width, teacher_.get() + column * teacher_words_);
    }
  });
}

namespace {

// `count` rows of D elements as a left operand; row(i) is the number of the i-th in `from`.
template <class Row>
Operand left_operand(const Side& side, const Matrix& from, int64_t count, Row row, Scratch* copy) {
  const int64_t words = side.words();
  copy->resize(count * words);
  at::parallel_for(0, count, 16, [&](int64_t begin, int64_t end) {  // in a parallel section: at once, by this thread
    for (int64_t i = begin; i < end; ++i) from.read_words(row(i), side.narrow, copy->get() + i * words);
  });
  return {copy->get(), side.width(), side.narrow};
}

// The rows as a right operand whose rows come in pairs.
template <class Row>
Operand right_operand(const Side& side, const Matrix& from, int64_t count, Row row, Scratch* copy) {
  return interleaved(count, side.width(), copy, [&](int64_t i, float* buffer) {
    const void* lies = from.direct(row(i), true);
    if (!lies) from.read_words(row(i), true, buffer);
    return lies ? lies : buffer;
  });
}

}  // namespace

Operand interleaved(int64_t count, int64_t width, Scratch* copy, const std::function<const void*(int64_t, float*)>& row) {
  const int64_t pairs = (count + 1) / 2;
  copy->resize(pairs * width);
  at::parallel_for(0, pairs, 8, [&](int64_t begin, int64_t end) {
    Scratch buffers[2] = {Scratch(width / 2), Scratch(width / 2)};
    for (int64_t pair = begin; pair < end; ++pair) {
      const void* rows[2];
      for (int64_t i = 0; i < 2; ++i) {
        float* buffer = buffers[i].get();
        const bool there = 2 * pair + i < count;
        rows[i] = there ? row(2 * pair + i, buffer) : std::memset(buffer, 0, 2 * width);
      }
      row_kernels().interleave(static_cast<const uint16_t*>(rows[0]), static_cast<const uint16_t*>(rows[1]),
                               copy->halves() + 2 * pair * width, width);
    }
  });
  return {copy->get(), width, true};
}

Operand head_rows(const Side& side, int64_t first, int64_t count, Scratch* copy) {
  const Matrix& weight = side.weight;
  if (const void* rows = weight.direct(first, side.narrow)) return {rows, weight.row_stride(), side.narrow};
  return left_operand(side, weight, count, [&](int64_t i) { return first + i; }, copy);
}

Operand head_pairs(const Side& side, int64_t first, int64_t count, Scratch* copy) {
  if (!side.narrow) return head_rows(side, first, count, copy);
  return right_operand(side, side.weight, count, [&](int64_t i) { return first + i; }, copy);
}

TileValues::TileValues(const Problem& problem)
    : problem_(problem),
      max_rows_(problem.tiles.rows),
      ld_(round_up(problem.tiles.columns, kPadding)),
      values_s_(problem.layers * max_rows_ * ld_),
      values_t_(problem.needs_teacher ? problem.layers * max_rows_ * ld_ : 0),
      copies_s_(problem.layers),
      copies_t_(problem.layers),
      operands_s_(problem.layers),
      operands_t_(problem.layers) {}

Operand hidden_rows(const Problem& problem, const Side& side, int64_t layer, int64_t begin, int64_t end, Scratch* copy) {
  const Matrix& hidden = side.hidden[layer];
  const int64_t* rows = problem.rows.data();
  const bool consecutive = rows[end - 1] - rows[begin] == end - 1 - begin;
  if (consecutive && hidden.direct(0, side.narrow)) return {hidden.direct(rows[begin], side.narrow), hidden.row_stride(), side.narrow};
  return left_operand(side, hidden, end - begin, [&](int64_t i) { return rows[begin + i]; }, copy);
}

Operand hidden_pairs(const Problem& problem, const Side& side, int64_t layer, int64_t begin, int64_t end, Scratch* copy) {
  if (!side.narrow) return hidden_rows(problem, side, layer, begin, end, copy);
  return right_operand(side, side.hidden[layer], end - begin, [&](int64_t i) { return problem.rows[begin + i]; }, copy);
}

void TileValues::set_rows(int64_t begin, int64_t end) {
  begin_ = begin;
  end_ = end;
  for (int64_t layer = 0; layer < problem_.layers; ++layer) {
    operands_s_[layer] = hidden_rows(problem_, problem_.student, layer, begin, end, &copies_s_[layer]);
    if (problem_.needs_teacher && problem_.teacher.weight.defined())
      operands_t_[layer] = hidden_rows(problem_, problem_.teacher, layer, begin, end, &copies_t_[layer]);
  }
}

void TileValues::compute_side(const Side& side, const std::vector<Operand>& operands, const float* packed, int64_t first,
                              int64_t count, float* out) {
  const RowKernels& kernels = row_kernels();
  const int64_t rows = end_ - begin_;
  for (int64_t layer = 0; layer < problem_.layers; ++layer) {
    float* u = out + layer * layer_stride();
    if (side.weight.defined()) {
      multiply(rows, count, side.width(), operands[layer], {packed, count, side.narrow}, u, ld_, false);
    } else {
      for (int64_t r = 0; r < rows; ++r) side.hidden[layer].read(problem_.rows[begin_ + r], first, count, u + r * ld_);
    }
    const float* bias = side.bias.empty() ? nullptr : side.bias.data() + first;
    for (int64_t r = 0; r < rows; ++r) kernels.transform(u + r * ld_, count, bias, side.scale, side.softcap);
  }
}

void TileValues::compute(const Panel& panel, int64_t first, int64_t count) {
  const int64_t column = first - panel.first();
  compute_side(problem_.student, operands_s_, panel.student(column), first, count, values_s_.get());
  if (problem_.needs_teacher)
    compute_side(problem_.teacher, operands_t_, panel.teacher(column), first, count, values_t_.get());
}

}  // namespace fdd
