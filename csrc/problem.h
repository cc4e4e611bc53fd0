// One call of the operations: inputs, softmax requests and pair moments, and tiles of logits. See
// fdd_kernels/lens/spec.py.
//
// Names carry shapes: L layers of a model, which may have more than the other, R rows, r rows of a
// block, C tokens of the vocabulary (columns of the logits), c tokens of a tile, p tokens of a
// panel, D a width.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <array>
#include <functional>
#include <optional>
#include <vector>

#include "gemm.h"
#include "row_kernels.h"

namespace fdd {

// Index of a model where both lie in an array.
enum ModelIndex { kStudent, kTeacher };

// A layer of each model, indexed by ModelIndex.
using Layers = std::array<int64_t, 2>;

struct Request {
  Layers layers;
  float inv_temperature;
  Divergence divergence;
  Expectation expectation;
  std::vector<float> constants;  // of the divergence: divergence_constants() of its parameters
  float teacher_mix;             // below 1: the mixture's share of the teacher's logits

  // Whether VALUE and GRAD_SUM are summed in a second pass, with both log-sum-exps known.
  bool second_pass() const {
    return divergence != Divergence::kNone && divergence != Divergence::kNll &&
           expectation == Expectation::kNone;
  }
};

struct PairMoments {
  std::optional<Layers> first;  // none: the vectors are those of `second` alone
  Layers second;
  float inv_temperature;
  bool weighted;
};

// Sizes chosen by fdd_kernels/backends/cpu/tiling.py: rows and columns of a tile, and columns of a
// panel, whose head rows are packed at a time.
struct Tiles {
  int64_t rows, columns, panel;
  bool whole = false;  // of cached logits: one tile of all columns, GEMMs of the whole block
};

struct Model {
  std::vector<Matrix> hidden;  // per layer, (R, D)
  Matrix weight;               // (C', D); undefined: the identity
  std::vector<float> bias;     // (C) padded, or empty
  float scale = 1.f, softcap = 0.f;
  bool bf16 = false;  // head and hidden states are multiplied as bfloat16

  int64_t layers() const { return int64_t(hidden.size()); }
  // Whether logits are more than products.
  bool transforms() const { return !bias.empty() || scale != 1.f || softcap != 0.f; }
  int64_t width() const { return hidden[0].columns(); }
  // 4-byte words of a row of W or of a hidden state as an operand. Transposing words also
  // transposes a bf16 operand B, whose rows come in pairs.
  int64_t words() const { return bf16 ? width() / 2 : width(); }
  // Packs columns of W^T as an operand B (D, c).
  void pack(int64_t first_column, int64_t count, int64_t ld, float* out_DC) const;
};

struct Problem {
  Model student, teacher;
  bool needs_teacher = false;
  int64_t columns = 0;
  std::vector<int64_t> rows;    // the valid rows, as positions in the tensors
  std::vector<int64_t> labels;  // per position in `rows`; empty without NLL
  std::vector<Request> requests;
  std::vector<PairMoments> moments;
  // (C) padded: -inf at tokens that moments leave out, 0 elsewhere; empty: none is left out.
  std::vector<float> excluded;
  Tiles tiles{};
  // Whether the cached logits of a model lie in the memory of the head's gradient.
  std::array<bool, 2> in_gradient{};
  // Whether the teacher's hidden states are its logits and are read where they lie.
  bool teacher_in_place = false;

  int64_t count() const { return int64_t(rows.size()); }
  // Layers that are compared: 0 of a teacher that nothing is compared with.
  int64_t layers(ModelIndex model) const {
    return model == kStudent ? student.layers() : needs_teacher ? teacher.layers() : 0;
  }
  int64_t all_layers() const { return layers(kStudent) + layers(kTeacher); }
  const float* excluded_from(int64_t column) const {
    return excluded.empty() ? nullptr : excluded.data() + column;
  }
  // Row `row` of `rows` of a layer of the teacher in place.
  const float* teacher_row(int64_t layer, int64_t row) const {
    return static_cast<const float*>(teacher.hidden[layer].direct(rows[row], false));
  }
};

// The packed heads of a panel of columns, shared by all threads.
class Panel {
 public:
  // Packs columns [first, first + count) of both heads in parallel.
  void pack(const Problem& problem, int64_t first, int64_t count);
  int64_t first() const { return first_; }
  int64_t count() const { return count_; }
  const float* student(int64_t column) const { return student_.get() + column * student_words_; }
  const float* teacher(int64_t column) const { return teacher_.get() + column * teacher_words_; }

 private:
  int64_t first_ = 0, count_ = 0, student_words_ = 0, teacher_words_ = 0;
  Scratch student_, teacher_;
};

// Positions [begin, end) of problem.rows of one layer as an operand (r, D), A or B: a view where
// memory allows it, else a copy in `copy`.
Operand hidden_as_a(const Problem& problem, const Model& model, int64_t layer, int64_t begin,
                    int64_t end, Scratch* copy);
Operand hidden_as_b(const Problem& problem, const Model& model, int64_t layer, int64_t begin,
                    int64_t end, Scratch* copy);
// Copies the hidden states of all layers as 4-byte words to `out`, rows `ld` words apart: `padded`
// rows of each layer, those beyond problem.count() of zeros.
void stack_hidden(const Problem& problem, const Model& model, int64_t padded, int64_t ld,
                  float* out);
// Rows [first, first + count) of a head as an operand (count, D), likewise.
Operand head_as_a(const Model& model, int64_t first, int64_t count, Scratch* copy);
Operand head_as_b(const Model& model, int64_t first, int64_t count, Scratch* copy);

// Interleaves `count` bf16 rows in pairs (VNNI2) and pads an odd last row with zeros. `row(i,
// buffer)` returns a pointer to row i and may use `buffer` as storage.
Operand interleaved(int64_t count, int64_t width, Scratch* copy,
                    const std::function<const void*(int64_t, float*)>& row);

// The logits of a tile: all layers of a block of rows, of both models.
struct TileView {
  const float *logits_s, *logits_t;
  int64_t layer_stride, ld;
  // Of a teacher in place: where its hidden states are, and the tile's first column.
  const Problem* teacher_states = nullptr;
  int64_t first = 0;
  const float* student(int64_t layer, int64_t row) const {
    return logits_s + layer * layer_stride + row * ld;
  }
  const float* teacher(int64_t layer, int64_t row) const {
    if (teacher_states) return teacher_states->teacher_row(layer, row) + first;
    return logits_t + layer * layer_stride + row * ld;
  }
  const float* of(ModelIndex model, int64_t layer, int64_t row) const {
    return model == kStudent ? student(layer, row) : teacher(layer, row);
  }
};

// The vector of one model of a pair, from that model's logits and shifts of one row.
VectorView vector_of(const PairMoments& pair, ModelIndex model, const TileView& logits, int64_t row,
                     const float* shifts, int64_t shift_stride);

// Computes tiles of logits from a panel; one per thread.
class TileLogits {
 public:
  explicit TileLogits(const Problem& problem);
  // Selects a block of rows: positions [begin, end) of problem.rows.
  void set_rows(int64_t begin, int64_t end);
  // Computes the logits of `count` columns from `first`, which the panel holds.
  void compute(const Panel& panel, int64_t first, int64_t count);
  TileView view() const { return {logits_s_.get(), logits_t_.get(), layer_stride(), ld_}; }
  int64_t layer_stride() const { return max_rows_ * ld_; }
  int64_t ld() const { return ld_; }

 private:
  void compute_model(const Model& model, const std::vector<Operand>& operands, const float* packed,
                     int64_t first, int64_t count, float* out);

  const Problem& problem_;
  int64_t max_rows_, ld_, begin_ = 0, end_ = 0;
  Scratch logits_s_, logits_t_;
  std::vector<Scratch> copies_s_, copies_t_;
  std::vector<Operand> operands_s_, operands_t_;
};

// Statistics as one float array each, in the layout of layout.h: shifts (2, L, R), requests
// (requests, kRequestStats, R), moments (pairs, kMomentStats, R). L counts the layers of the model
// that has more, R all rows of the tensors.
struct Statistics {
  float* shifts;
  float* requests;
  float* moments;
  int64_t layers, total_rows;
  // The shifts of one model, (L, R).
  float* shifts_of(ModelIndex model) const { return shifts + model * layers * total_rows; }
};

// Upstream gradients in the layout of the statistics.
struct Upstream {
  const float* requests;
  const float* moments;
};

// Where gradients of the student go; undefined or null: not wanted. `bias` is added to.
struct Gradients {
  // (L, problem.count(), D), rows in the order of problem.rows: written from cached logits, else
  // added to.
  float* hidden = nullptr;
  // (C', D) contiguous; the first of the calls that sum it writes `columns` rows. Of a dtype other
  // than float32 it is rounded to by the last.
  at::Tensor weight;
  // (C', D) int16: lets several calls sum a 16-bit gradient (see HeadGradient).
  at::Tensor weight_low;
  bool first_call = true, last_call = true;
  float* bias = nullptr;  // (C')
};

// All logits of the problem's rows, in memory that the caller keeps between the two operations:
// tiles of problem.tiles.columns columns, one after another (cached_logits.cpp), or one tile whose
// products are GEMMs of the whole block (whole_gemms.cpp). A tile of a model in
// problem.in_gradient lies in the rows of the head's float32 gradient (C', D) that are the tile's
// columns: these are written after the last use of the tile.
//
// Rows of tiles are padded with zeros to a multiple of kRowPadding, so that the GEMM library meets
// few shapes: it compiles a kernel for each. M = L * padded rows of all layers of a model.
class CachedLogits {
 public:
  static constexpr int64_t kRowPadding = 8;
  // Floats of memory that a problem needs beside the gradient.
  static int64_t size(const Problem& problem);
  // `gradient` may be null if no model is in it.
  CachedLogits(const Problem& problem, float* memory, float* gradient);
  void compute();
  // Memory for the hidden states' gradients (L, r, D): where GEMMs are whole, the beginning of
  // `memory`, that of the logits.
  at::Tensor hidden_gradients(const at::Tensor& memory) const;
  // Once: the logits are lost. out.hidden is null or of hidden_gradients().
  void gradients(const Statistics& statistics, const Upstream& upstream,
                 const Gradients& out) const;
  const Problem& problem() const { return problem_; }
  int64_t tiles() const { return (problem_.columns + width_ - 1) / width_; }
  int64_t first(int64_t tile) const { return tile * width_; }
  int64_t count(int64_t tile) const { return std::min(width_, problem_.columns - first(tile)); }
  TileView view(int64_t tile) const {
    const bool in_place = problem_.teacher_in_place;
    return {logits(tile, kStudent), in_place ? nullptr : logits(tile, kTeacher), rows_ * ld(tile),
            ld(tile), in_place ? &problem_ : nullptr, first(tile)};
  }
  int64_t ld(int64_t tile) const { return round_up(count(tile), kPadding); }
  // Of the widest tile.
  int64_t most_ld() const { return round_up(width_, kPadding); }
  // Whether every tile's rows of the gradient hold its logits.
  bool fits_gradient() const;

 private:
  void compute_model(const Model& model, int64_t tile, const float* hidden_DM, Scratch* weight,
                     float* raw_cM, float* out_Mc) const;

  // Floats of the student's stacked hidden states, in front of the logits where GEMMs are whole.
  // Their gradients take their place.
  int64_t states_size() const {
    return problem_.tiles.whole
               ? round_up(problem_.layers(kStudent) * rows_ * problem_.student.width(), kPadding)
               : 0;
  }
  void compute_tiles();
  void compute_whole();
  void gradients_of_tiles(const Statistics& statistics, const Upstream& upstream,
                          const Gradients& out) const;
  void gradients_whole(const Statistics& statistics, const Upstream& upstream,
                       const Gradients& out) const;

  // Layers of a model whose logits are computed: not of a teacher in place.
  int64_t cached_layers(ModelIndex model) const {
    return model == kTeacher && problem_.teacher_in_place ? 0 : problem_.layers(model);
  }
  // Layers whose logits lie in the gradient, or beside it.
  int64_t layers(bool in_gradient) const {
    int64_t all = 0;
    for (const ModelIndex model : {kStudent, kTeacher})
      if (problem_.in_gradient[model] == in_gradient) all += cached_layers(model);
    return all;
  }
  // A tile has the layers of the student first.
  float* logits(int64_t tile, ModelIndex model) const {
    const bool in_gradient = problem_.in_gradient[model];
    float* const begin = in_gradient ? gradient_ + first(tile) * problem_.student.width()
                                     : memory_ + states_size() +
                                           tile * layers(false) * rows_ * most_ld();
    const bool second = model == kTeacher && problem_.in_gradient[kStudent] == in_gradient;
    return begin + (second ? problem_.layers(kStudent) * rows_ * ld(tile) : 0);
  }

  const Problem& problem_;
  float *memory_, *gradient_;
  int64_t width_, rows_;
};

// Called between panels from the calling thread; may throw to stop.
using Interrupt = std::function<void()>;

void compute_statistics(const Problem& problem, const Statistics& out, const Interrupt& interrupt);
void compute_gradients(const Problem& problem, const Statistics& statistics,
                       const Upstream& upstream, const Gradients& out, const Interrupt& interrupt);
// The same from cached logits.
void statistics_of(const CachedLogits& cached, const Statistics& out);

// One row of a gradient of a tile, all layers of the student.
struct GradientRow {
  float* begin;
  int64_t layer_stride;
};

// grad += dL/dx of one row of a tile: `row` counts within problem.rows, `local` within the tile.
void form_row(const Problem& problem, const Statistics& statistics, const Upstream& upstream,
              const TileView& logits, GradientRow grad, int64_t row, int64_t local,
              int64_t first_column, int64_t count);

// out[r] += the sum of row r of in (rows, columns).
void add_sums(const float* in, int64_t ld, int64_t rows, int64_t columns, float* out);

}  // namespace fdd
