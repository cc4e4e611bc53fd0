#include "lens.h"

#include <ATen/Parallel.h>

#include <algorithm>

namespace fdd {

void Side::pack(int64_t first_column, int64_t count, int64_t ld, float* out_DC) const {
  // Columns kPadding at a time through a small buffer, so that both reads and writes run along memory.
  const int64_t depth = width();
  Scratch rows(kPadding * depth);
  for (int64_t j = 0; j < count; j += kPadding) {
    const int64_t lanes = std::min(kPadding, count - j);
    for (int64_t lane = 0; lane < lanes; ++lane) weight.read(first_column + j + lane, 0, depth, rows.get() + lane * depth);
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t lane = 0; lane < lanes; ++lane) out_DC[k * ld + j + lane] = rows.get()[lane * depth + k];
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
  student_width_ = problem.student.weight.defined() ? problem.student.width() : 0;
  teacher_width_ = problem.needs_teacher && problem.teacher.weight.defined() ? problem.teacher.width() : 0;
  student_.resize(student_width_ * count);
  teacher_.resize(teacher_width_ * count);
  const int64_t tile = problem.tiles.columns, tiles = (count + tile - 1) / tile;
  at::parallel_for(0, 2 * tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t column = unit / 2 * tile, width = std::min(tile, count - column);
      if (unit % 2 == 0 && student_width_)
        problem.student.pack(first + column, width, width, student_.get() + column * student_width_);
      if (unit % 2 == 1 && teacher_width_)
        problem.teacher.pack(first + column, width, width, teacher_.get() + column * teacher_width_);
    }
  });
}

Operand head_rows(const Matrix& weight, int64_t first, int64_t count, Scratch* copy) {
  if (weight.direct(first)) return {weight.direct(first), weight.row_stride()};
  const int64_t width = weight.columns();
  copy->resize(count * width);
  at::parallel_for(0, count, 16, [&](int64_t begin, int64_t end) {  // in a parallel section: at once, by this thread
    for (int64_t c = begin; c < end; ++c) weight.read(first + c, 0, width, copy->get() + c * width);
  });
  return {copy->get(), width};
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
  if (consecutive && hidden.direct(0)) return {hidden.direct(rows[begin]), hidden.row_stride()};
  const int64_t width = side.width();
  copy->resize((end - begin) * width);
  for (int64_t r = begin; r < end; ++r) hidden.read(rows[r], 0, width, copy->get() + (r - begin) * width);
  return {copy->get(), width};
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
  const int64_t rows = end_ - begin_, width = side.width();
  for (int64_t layer = 0; layer < problem_.layers; ++layer) {
    float* u = out + layer * layer_stride();
    if (side.weight.defined()) {
      multiply(rows, count, width, operands[layer].data, operands[layer].ld, packed, count, u, ld_, false);
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
