// One call of the operations: inputs, what is computed of them, and tiles of raw values. See fdd_kernels/lens/spec.py.
//
// Names carry shapes: R rows, r rows of a block, C columns, c columns of a tile, p columns of a panel, D a width.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <functional>
#include <optional>
#include <vector>

#include "products.h"
#include "row_kernels.h"

namespace fdd {

constexpr int64_t kOwn = -1;

struct Read {
  int64_t layer;
  float inv_temperature;
  Divergence kind;
};

struct MomentTarget {
  int64_t first, second;  // layers; first may be kOwn
};

// How the work is cut; chosen by fdd_kernels/backends/cpu.py.
struct Tiles {
  int64_t rows, columns, panel;  // rows and columns of a tile; columns whose head rows are packed at a time
};

struct Side {
  std::vector<Matrix> hidden;  // per layer, (R, D)
  Matrix weight;               // (C', D); undefined: the identity
  std::vector<float> bias;     // (C) padded, or empty
  float scale = 1.f, softcap = 0.f;
  bool narrow = false;  // head and hidden states are multiplied as bfloat16

  int64_t width() const { return hidden[0].columns(); }
  // 4-byte words of a row of W or of a hidden state as an operand. Transposing words transposes a right operand, also a
  // narrow one, whose rows come in pairs.
  int64_t words() const { return narrow ? width() / 2 : width(); }
  // Columns of W as a right operand (D, c), packed.
  void pack(int64_t first_column, int64_t count, int64_t ld, float* out_DC) const;
};

struct Problem {
  Side student, teacher;
  bool needs_teacher = false;
  int64_t layers = 0, columns = 0;
  std::vector<int64_t> rows;    // the rows that count, as positions in the tensors
  std::vector<int64_t> labels;  // per position in `rows`; empty without NLL
  std::vector<Read> reads;
  std::vector<MomentTarget> moments;
  std::vector<float> excluded;  // (C) padded, for the moments: -inf where a bias is, 0 elsewhere; empty: nowhere
  float moment_inv_temperature = 1.f;
  Tiles tiles{};

  int64_t count() const { return int64_t(rows.size()); }
  const float* excluded_from(int64_t column) const { return excluded.empty() ? nullptr : excluded.data() + column; }
  VectorView vector(const MomentTarget& target, const float* u, int64_t layer_stride, const float* pivots,
                    int64_t pivot_stride) const;
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

// Positions [begin, end) of problem.rows of one layer as a left operand (r, D): where they lie if they can, else copied.
Operand hidden_rows(const Problem& problem, const Side& side, int64_t layer, int64_t begin, int64_t end, Scratch* copy);
// The same as a right operand.
Operand hidden_pairs(const Problem& problem, const Side& side, int64_t layer, int64_t begin, int64_t end, Scratch* copy);

// `count` rows of an even number of bfloat16 as a narrow right operand, an odd one beside zeros; row(i, buffer) says where the
// i-th lies, which may be the buffer, once it is written there.
Operand interleaved(int64_t count, int64_t width, Scratch* copy, const std::function<const void*(int64_t, float*)>& row);

// Raw values u of a tile: all layers of a block of rows, both models.
struct TileView {
  const float *values_s, *values_t;
  int64_t layer_stride, ld;
  const float* student(int64_t layer, int64_t row) const { return values_s + layer * layer_stride + row * ld; }
  const float* teacher(int64_t layer, int64_t row) const { return values_t + layer * layer_stride + row * ld; }
};

// Computes tiles from a panel; one per thread.
class TileValues {
 public:
  explicit TileValues(const Problem& problem);
  // Takes a block of rows: positions [begin, end) of problem.rows.
  void set_rows(int64_t begin, int64_t end);
  // Computes u for `count` columns from `first`, which the panel holds.
  void compute(const Panel& panel, int64_t first, int64_t count);
  TileView view() const { return {values_s_.get(), values_t_.get(), layer_stride(), ld_}; }
  int64_t layer_stride() const { return max_rows_ * ld_; }
  int64_t ld() const { return ld_; }

 private:
  void compute_side(const Side& side, const std::vector<Operand>& operands, const float* packed, int64_t first,
                    int64_t count, float* out);

  const Problem& problem_;
  int64_t max_rows_, ld_, begin_ = 0, end_ = 0;
  Scratch values_s_, values_t_;
  std::vector<Scratch> copies_s_, copies_t_;
  std::vector<Operand> operands_s_, operands_t_;
};

// All values of the problem's rows, in memory that the caller keeps between the two operations: tiles of
// problem.tiles.columns columns, one after another.
//
// Rows are padded with zeros to a multiple of kRowPadding, M = L * padded rows of all layers, so that the product library
// meets few shapes: it compiles a kernel for each.
class KeptValues {
 public:
  static constexpr int64_t kRowPadding = 8;
  static int64_t size(const Problem& problem);
  KeptValues(const Problem& problem, float* memory);
  void compute();
  const Problem& problem() const { return problem_; }
  int64_t tiles() const { return (problem_.columns + width_ - 1) / width_; }
  int64_t first(int64_t tile) const { return tile * width_; }
  int64_t count(int64_t tile) const { return std::min(width_, problem_.columns - first(tile)); }
  TileView view(int64_t tile) const { return {values(tile, 0), values(tile, 1), rows_ * ld_, ld_}; }
  int64_t ld() const { return ld_; }
  int64_t padded_rows() const { return rows_; }

 private:
  void compute_side(const Side& side, int64_t tile, const float* hidden_DM, Scratch* weight, float* raw_cM,
                    float* out_Mc) const;

  float* values(int64_t tile, int64_t side) const {
    return memory_ + (tile * (problem_.needs_teacher ? 2 : 1) + side) * problem_.layers * rows_ * ld_;
  }

  const Problem& problem_;
  float* memory_;
  int64_t width_, ld_, rows_;
};

// Statistics as one float array each, in the layout of spec.py: pivots (2, L, R), reads (reads, 4, R), moments
// (moments, 7, R), where R counts all rows of the tensors.
struct Statistics {
  float* pivots;
  float* reads;
  float* moments;
  int64_t total_rows;
};

// Called between panels from the calling thread; may throw to stop.
using Interrupt = std::function<void()>;

void compute_statistics(const Problem& problem, const Statistics& out, const Interrupt& interrupt);
// The same from values that are all kept.
void statistics_of(const KeptValues& kept, const Statistics& out);

struct Upstream {
  const float* reads;    // (reads, 4, R)
  const float* moments;  // (moments, 7, R)
};

// Where gradients go, already zeroed; undefined or null: not wanted.
struct Gradients {
  float* hidden = nullptr;  // (L, problem.count(), Ds), rows in the order of problem.rows; added to
  at::Tensor weight;        // (C', Ds) contiguous; float32 is added to, any other dtype written once per column
  float* bias = nullptr;    // (C'); added to
};

void compute_gradients(const Problem& problem, const Statistics& statistics, const Upstream& upstream,
                       const Gradients& out, const Interrupt& interrupt);
// The same from values that are all kept.
void gradients_of(const KeptValues& kept, const Statistics& statistics, const Upstream& upstream, const Gradients& out);

// grad += dL/dx of one row of a tile, all layers: `row` counts within problem.rows, `local` within the tile; grad has the
// tile's layout.
void form_row(const Problem& problem, const Statistics& statistics, const Upstream& upstream, const TileView& values,
              float* grad, int64_t row, int64_t local, int64_t first_column, int64_t count);

// out[r] += the sum of row r of in (rows, columns).
void add_sums(const float* in, int64_t ld, int64_t rows, int64_t columns, float* out);
// Rows [first, first + count) of a head as a left operand (count, D): where they lie if they can, else copied.
Operand head_rows(const Side& side, int64_t first, int64_t count, Scratch* copy);
// The same as a right operand.
Operand head_pairs(const Side& side, int64_t first, int64_t count, Scratch* copy);

}  // namespace fdd
