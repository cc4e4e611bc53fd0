// GEMMs of tiles, and the conversion of any input tensor to their operands: float32, or bfloat16
// where the processor multiplies it faster.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <cstdlib>
#include <memory>

namespace fdd {

inline int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Whether rows `ld` words apart, a multiple of 4 KiB, share few sets of the caches.
inline bool share_sets(int64_t ld) { return ld % 1024 == 0; }

// The leading dimension of a matrix of our own.
inline int64_t leading_dimension(int64_t columns) {
  return columns + (share_sets(columns) ? 16 : 0);
}

// An operand of a GEMM, row-major with a leading dimension in elements. A bf16 operand B (k, n) has
// its rows interleaved in pairs (VNNI2), (k / 2, n, 2); k is padded with zeros to an even number.
struct Operand {
  const void* data = nullptr;
  int64_t ld = 0;
  bool bf16 = false;
  // The operand from element `count` on.
  Operand from(int64_t count) const {
    return {static_cast<const char*>(data) + count * (bf16 ? 2 : 4), ld, bf16};
  }
};

// c (m, n) = a (m, k) b (k, n), or += with `add`; both operands bf16 or neither. Inside a parallel
// section, by the calling thread alone.
void gemm(int64_t m, int64_t n, int64_t k, Operand a, Operand b, float* c, int64_t ldc, bool add);

// The same by brgemm, which must run on this processor, or by ATen's mm.
void gemm_by(bool brgemm, int64_t m, int64_t n, int64_t k, Operand a, Operand b, float* c,
             int64_t ldc, bool add);

// Releases resources of the GEMM library that the calling thread holds; once at the end of each
// parallel section.
void release_gemm();

// Whether brgemm (oneDNN's kernels through ATen) multiplies float32, or bfloat16, on this processor.
bool has_brgemm(bool bf16);

// What `gemm` multiplies float32 by: "brgemm", or "blas" (ATen's mm) where that is faster or brgemm
// does not run. FDD_KERNELS_GEMM forces one of them; another value throws std::invalid_argument.
const char* gemm_library();

// Whether bfloat16 operands stay bfloat16: the processor has instructions for them (AMX,
// AVX512_BF16), or FDD_KERNELS_BF16_PRODUCTS is 1; with 0 never. Products of bfloat16 are exact in
// float32: only speed and, in the gradients, the rounding of `SplitGemm` depend on it.
bool bf16_gemm();

// Uninitialised floats, aligned for the widest vectors.
class Scratch {
 public:
  explicit Scratch(int64_t count = 0) { resize(count); }
  uint16_t* halves() const { return reinterpret_cast<uint16_t*>(get()); }
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
  bool is_bfloat16() const { return type_ == at::kBFloat16; }
  // Copies columns [first, first + count) of one row as float32.
  void read(int64_t row, int64_t first, int64_t count, float* out) const;
  // Copies one row as 4-byte words: float32, or pairs of bfloat16 if `bf16`.
  void read_words(int64_t row, bool bf16, float* out) const;
  // A pointer to the row if it lies in memory as float32, or as bfloat16 if `bf16`; else null.
  const void* direct(int64_t row, bool bf16) const;
  int64_t row_stride() const { return row_stride_; }
  // The tensor again; float32 alone.
  at::Tensor view() const;

 private:
  const char* data_ = nullptr;
  at::ScalarType type_ = at::kFloat;
  int64_t rows_ = 0, columns_ = 0, row_stride_ = 0, column_stride_ = 0;
};

// A GEMM with a float32 operand A. Beside a bf16 operand B it splits A into a sum of two bfloat16,
// which have 16 bits of precision together, and runs two GEMMs. Rounded to one bfloat16, gradients
// would be off by as much as the rounding of their output.
class SplitGemm {
 public:
  // c (m, n) += a (m, k) b (k, n), or = without `add`.
  void gemm(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, Operand b, float* c,
            int64_t ldc, bool add);

 private:
  Scratch high_, low_;
};

}  // namespace fdd
