#include "head_gradient.h"

#include <ATen/ops/from_blob.h>

#include "memory.h"

namespace fdd {

HeadGradient::HeadGradient(const Gradients& out, int64_t most_rows, int64_t width)
    : out_(out), width_(width), sums_(wanted() && !in_place() ? most_rows * width : 0) {}

uint16_t* HeadGradient::low() const {
  return reinterpret_cast<uint16_t*>(out_.weight_low.data_ptr<int16_t>()) + first_ * width_;
}

uint16_t* HeadGradient::high() const {
  return static_cast<uint16_t*>(out_.weight.data_ptr()) + first_ * width_;
}

float* HeadGradient::open(int64_t first, int64_t count) {
  first_ = first;
  count_ = count;
  if (in_place()) {
    float* rows = out_.weight.data_ptr<float>() + first * width_;
    if (!adds()) populate(rows, sizeof(float) * count * width_);
    return rows;
  }
  if (adds()) row_kernels().interleave(low(), high(), sums_.halves(), count * width_);
  return sums_.get();
}

void HeadGradient::close() {
  if (in_place()) return;
  if (!out_.last_call)
    return row_kernels().separate(sums_.halves(), low(), high(), count_ * width_);
  out_.weight.narrow(0, first_, count_)
      .copy_(at::from_blob(sums_.get(), {count_, width_}, at::kFloat));
}

}  // namespace fdd
