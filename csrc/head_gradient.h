// The gradient of the student's head while it is summed.
#pragma once

#include "problem.h"

namespace fdd {

// Lends a thread tiles of the head's gradient as float32, whatever its dtype. A float32 gradient is
// summed in place. A 16-bit one is rounded once, at its last sum: before, its own memory holds the
// upper halves of the float32 sums, and `Gradients::weight_low` the lower ones.
class HeadGradient {
 public:
  // `most_rows` are the most rows of the head in a tile.
  HeadGradient(const Gradients& out, int64_t most_rows, int64_t width);
  bool wanted() const { return out_.weight.defined(); }
  // Whether the rows that open() returns hold a sum so far. Else they are to be overwritten.
  bool adds() const { return !out_.first_call; }
  // Returns rows [first, first + count) of the sum, (count, D).
  float* open(int64_t first, int64_t count);
  // Stores these rows.
  void close();

 private:
  bool in_place() const { return out_.weight.scalar_type() == at::kFloat; }
  // The halves of the open rows.
  uint16_t* low() const;
  uint16_t* high() const;

  const Gradients& out_;
  const int64_t width_;
  int64_t first_ = 0, count_ = 0;
  Scratch sums_;
};

}  // namespace fdd
