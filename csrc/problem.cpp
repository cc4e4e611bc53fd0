#include "problem.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>

namespace fdd {

void Model::pack(int64_t first_column, int64_t count, int64_t ld, float* out_DC) const {
  // Takes kPadding columns at a time through a small buffer: loads and stores run along memory.
  const int64_t depth = words();
  Scratch rows(kPadding * depth);
  for (int64_t j = 0; j < count; j += kPadding) {
    const int64_t lanes = std::min(kPadding, count - j);
    for (int64_t lane = 0; lane < lanes; ++lane)
      weight.read_words(first_column + j + lane, bf16, rows.get() + lane * depth);
    row_kernels().transpose(rows.get(), depth, lanes, depth, out_DC + j, ld);
  }
}

VectorView vector_of(const PairMoments& pair, ModelIndex model, const TileView& logits, int64_t row,
                     const float* shifts, int64_t shift_stride) {
  const int64_t second = pair.second[model];
  VectorView view{logits.of(model, second, row), nullptr, shifts[second * shift_stride], 0.f};
  if (pair.first) {
    const int64_t first = (*pair.first)[model];
    view.first = logits.of(model, first, row);
    view.shift_first = shifts[first * shift_stride];
  }
  return view;
}

void Panel::pack(const Problem& problem, int64_t first, int64_t count) {
  first_ = first;
  count_ = count;
  student_words_ = problem.student.weight.defined() ? problem.student.words() : 0;
  teacher_words_ =
      problem.needs_teacher && problem.teacher.weight.defined() ? problem.teacher.words() : 0;
  student_.resize(student_words_ * count);
  teacher_.resize(teacher_words_ * count);
  const int64_t tile = problem.tiles.columns, tiles = (count + tile - 1) / tile;
  at::parallel_for(0, 2 * tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t column = unit / 2 * tile, width = std::min(tile, count - column);
      if (unit % 2 == 0 && student_words_)
        problem.student.pack(first + column, width, width,
                             student_.get() + column * student_words_);
      if (unit % 2 == 1 && teacher_words_)
        problem.teacher.pack(first + column, width, width,
                             teacher_.get() + column * teacher_words_);
    }
  });
}

namespace {

// Copies `count` rows of D elements as an operand A; row(i) is the number of the i-th in `from`.
template <class Row>
Operand operand_a(const Model& model, const Matrix& from, int64_t count, Row row, Scratch* copy) {
  const int64_t words = model.words();
  copy->resize(count * words);
  // Inside a parallel section the calling thread does it all.
  at::parallel_for(0, count, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      from.read_words(row(i), model.bf16, copy->get() + i * words);
  });
  return {copy->get(), model.width(), model.bf16};
}

// Copies the rows as a bf16 operand B.
template <class Row>
Operand operand_b(const Model& model, const Matrix& from, int64_t count, Row row, Scratch* copy) {
  return interleaved(count, model.width(), copy, [&](int64_t i, float* buffer) {
    const void* in_place = from.direct(row(i), true);
    if (!in_place) from.read_words(row(i), true, buffer);
    return in_place ? in_place : buffer;
  });
}

}  // namespace

Operand interleaved(int64_t count, int64_t width, Scratch* copy,
                    const std::function<const void*(int64_t, float*)>& row) {
  const int64_t pairs = (count + 1) / 2;
  copy->resize(pairs * width);
  at::parallel_for(0, pairs, 8, [&](int64_t begin, int64_t end) {
    Scratch buffers[2] = {Scratch(width / 2), Scratch(width / 2)};
    for (int64_t pair = begin; pair < end; ++pair) {
      const void* rows[2];
      for (int64_t i = 0; i < 2; ++i) {
        float* buffer = buffers[i].get();
        const bool exists = 2 * pair + i < count;
        rows[i] = exists ? row(2 * pair + i, buffer) : std::memset(buffer, 0, 2 * width);
      }
      row_kernels().interleave(static_cast<const uint16_t*>(rows[0]),
                               static_cast<const uint16_t*>(rows[1]),
                               copy->halves() + 2 * pair * width, width);
    }
  });
  return {copy->get(), width, true};
}

Operand head_as_a(const Model& model, int64_t first, int64_t count, Scratch* copy) {
  const Matrix& weight = model.weight;
  if (const void* rows = weight.direct(first, model.bf16))
    return {rows, weight.row_stride(), model.bf16};
  return operand_a(model, weight, count, [&](int64_t i) { return first + i; }, copy);
}

Operand head_as_b(const Model& model, int64_t first, int64_t count, Scratch* copy) {
  if (!model.bf16) return head_as_a(model, first, count, copy);
  return operand_b(model, model.weight, count, [&](int64_t i) { return first + i; }, copy);
}

TileLogits::TileLogits(const Problem& problem)
    : problem_(problem),
      max_rows_(problem.tiles.rows),
      ld_(round_up(problem.tiles.columns, kPadding)),
      logits_s_(problem.layers(kStudent) * max_rows_ * ld_),
      logits_t_(problem.layers(kTeacher) * max_rows_ * ld_),
      copies_s_(problem.layers(kStudent)),
      copies_t_(problem.layers(kTeacher)),
      operands_s_(problem.layers(kStudent)),
      operands_t_(problem.layers(kTeacher)) {}

Operand hidden_as_a(const Problem& problem, const Model& model, int64_t layer, int64_t begin,
                    int64_t end, Scratch* copy) {
  const Matrix& hidden = model.hidden[layer];
  const int64_t* rows = problem.rows.data();
  const bool consecutive = rows[end - 1] - rows[begin] == end - 1 - begin;
  if (consecutive && hidden.direct(0, model.bf16))
    return {hidden.direct(rows[begin], model.bf16), hidden.row_stride(), model.bf16};
  return operand_a(model, hidden, end - begin, [&](int64_t i) { return rows[begin + i]; }, copy);
}

Operand hidden_as_b(const Problem& problem, const Model& model, int64_t layer, int64_t begin,
                    int64_t end, Scratch* copy) {
  if (!model.bf16) return hidden_as_a(problem, model, layer, begin, end, copy);
  return operand_b(
      model, model.hidden[layer], end - begin, [&](int64_t i) { return problem.rows[begin + i]; },
      copy);
}

void TileLogits::set_rows(int64_t begin, int64_t end) {
  begin_ = begin;
  end_ = end;
  for (int64_t layer = 0; layer < problem_.layers(kStudent); ++layer)
    operands_s_[layer] =
        hidden_as_a(problem_, problem_.student, layer, begin, end, &copies_s_[layer]);
  if (!problem_.teacher.weight.defined()) return;
  for (int64_t layer = 0; layer < problem_.layers(kTeacher); ++layer)
    operands_t_[layer] =
        hidden_as_a(problem_, problem_.teacher, layer, begin, end, &copies_t_[layer]);
}

void TileLogits::compute_model(const Model& model, const std::vector<Operand>& operands,
                               const float* packed, int64_t first, int64_t count, float* out) {
  const RowKernels& kernels = row_kernels();
  const int64_t rows = end_ - begin_;
  for (int64_t layer = 0; layer < model.layers(); ++layer) {
    float* logits = out + layer * layer_stride();
    if (model.weight.defined()) {
      // Both passes need the same bits, or exp(logit - log-sum-exp) does not sum to 1. A product by
      // brgemm does not depend on the shape of its tile; one by a BLAS may.
      gemm_by(has_brgemm(model.bf16), rows, count, model.width(), operands[layer],
              {packed, count, model.bf16}, logits, ld_, false);
    } else {
      for (int64_t r = 0; r < rows; ++r)
        model.hidden[layer].read(problem_.rows[begin_ + r], first, count, logits + r * ld_);
    }
    const float* bias = model.bias.empty() ? nullptr : model.bias.data() + first;
    for (int64_t r = 0; r < rows; ++r)
      kernels.transform(logits + r * ld_, count, bias, model.scale, model.softcap);
  }
}

void TileLogits::compute(const Panel& panel, int64_t first, int64_t count) {
  const int64_t column = first - panel.first();
  compute_model(problem_.student, operands_s_, panel.student(column), first, count,
                logits_s_.get());
  if (problem_.needs_teacher)
    compute_model(problem_.teacher, operands_t_, panel.teacher(column), first, count,
                  logits_t_.get());
}

}  // namespace fdd
