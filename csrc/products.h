// Matrix products of tiles, and the conversion of any input tensor to the float32 rows that they take.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <cstdlib>
#include <memory>

namespace fdd {

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// c (m, n) = a (m, k) b (k, n), or += with `add`; row-major with leading dimensions. Single-threaded.
void multiply(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
              int64_t ldc, bool add);

// Releases what the product library holds for the calling thread; once at the end of each parallel section.
void release_products();

// "brgemm" (oneDNN's kernels through ATen) or "blas" (ATen's mm) where brgemm does not run.
const char* product_library();

// Uninitialised floats, aligned for the widest vectors.
class Scratch {
 public:
  explicit Scratch(int64_t count = 0) { resize(count); }
  void resize(int64_t count) {
    if (count <= size_) return;
    const size_t bytes = (size_t(count) * sizeof(float) + 127) / 64 * 64;
    data_.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
    if (!data_) throw std::bad_alloc();
    size_ = count;
  }
  float* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  std::unique_ptr<float, Free> data_;
  int64_t size_ = 0;
};

// A 2-D tensor of float32, bfloat16 or float16 with any strides, read as float32.
class Matrix {
 public:
  Matrix() = default;
  explicit Matrix(const at::Tensor& tensor);
  int64_t columns() const { return columns_; }
  bool defined() const { return data_ != nullptr; }
  // Columns [first, first + count) of one row.
  void read(int64_t row, int64_t first, int64_t count, float* out) const;
  // A pointer to the row if it lies in memory as float32, else null.
  const float* direct(int64_t row) const;
  int64_t row_stride() const { return row_stride_; }

 private:
  const char* data_ = nullptr;
  at::ScalarType type_ = at::kFloat;
  int64_t columns_ = 0, row_stride_ = 0, column_stride_ = 0;
};

}  // namespace fdd
