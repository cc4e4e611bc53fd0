#include "products.h"

#include <ATen/native/CPUBlas.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>

#include <algorithm>
#include <cmath>

#include "row_kernels.h"

namespace fdd {
namespace {

constexpr int64_t kPieceDepth = 256;
constexpr int64_t kPieceColumns = 256;

// Whether brgemm multiplies float32 on this processor: tried once on a small product.
bool brgemm_works() {
#ifdef CPUBLAS_BRGEMM_F32F32F32
  static const bool works = [] {
    float a[16 * 16], b[16 * 16], c[16 * 16];
    for (int i = 0; i < 256; ++i) a[i] = float(i % 7) - 3.f, b[i] = float(i % 5) - 2.f;
    try {
      at::native::cpublas::brgemm(16, 16, 16, 16, 16, 16, false, a, b, c, false);
      at::native::cpublas::brgemm_release(false);
    } catch (const std::exception&) {
      return false;
    }
    for (int i = 0; i < 16; ++i)
      for (int j = 0; j < 16; ++j) {
        float expected = 0;
        for (int k = 0; k < 16; ++k) expected += a[16 * i + k] * b[16 * k + j];
        if (c[16 * i + j] != expected) return false;
      }
    return true;
  }();
  return works;
#else
  return false;
#endif
}

}  // namespace

void multiply(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
              int64_t ldc, bool add) {
  if (m == 0 || n == 0) return;
#ifdef CPUBLAS_BRGEMM_F32F32F32
  if (brgemm_works()) {
    // In pieces of b that stay in the second cache level while the rows of a pass by, and whose sums, one product after
    // another, are short enough to round no worse than a BLAS.
    for (int64_t column = 0; column < n; column += kPieceColumns) {
      const int64_t columns = std::min(kPieceColumns, n - column);
      const int64_t pieces = (k + kPieceDepth - 1) / kPieceDepth, depth = round_up((k + pieces - 1) / pieces, 16);
      for (int64_t first = 0; first < k; first += depth)
        at::native::cpublas::brgemm(m, columns, std::min(depth, k - first), lda, ldb, ldc, add || first, a + first,
                                    b + first * ldb + column, c + column, false);
    }
    return;
  }
#endif
  const auto view = [](const float* data, int64_t rows, int64_t columns, int64_t stride) {
    return at::from_blob(const_cast<float*>(data), {rows, columns}, {stride, 1}, at::kFloat);
  };
  at::Tensor out = view(c, m, n, ldc);
  if (add)
    out.addmm_(view(a, m, k, lda), view(b, k, n, ldb));
  else
    at::mm_out(out, view(a, m, k, lda), view(b, k, n, ldb));
}

void release_products() {
#ifdef CPUBLAS_BRGEMM_F32F32F32
  if (brgemm_works()) at::native::cpublas::brgemm_release(false);
#endif
}

const char* product_library() { return brgemm_works() ? "brgemm" : "blas"; }

Matrix::Matrix(const at::Tensor& tensor)
    : data_(static_cast<const char*>(tensor.const_data_ptr())),
      type_(tensor.scalar_type()),
      columns_(tensor.size(1)),
      row_stride_(tensor.stride(0)),
      column_stride_(tensor.stride(1)) {
  TORCH_CHECK(type_ == at::kFloat || type_ == at::kBFloat16 || type_ == at::kHalf, "unsupported dtype ", type_);
}

const float* Matrix::direct(int64_t row) const {
  if (type_ != at::kFloat || (column_stride_ != 1 && columns_ > 1) || row_stride_ < columns_) return nullptr;
  return reinterpret_cast<const float*>(data_) + row * row_stride_;
}

void Matrix::read(int64_t row, int64_t first, int64_t count, float* out) const {
  const int64_t start = row * row_stride_ + first * column_stride_;
  if (type_ == at::kFloat) {
    const float* in = reinterpret_cast<const float*>(data_) + start;
    for (int64_t i = 0; i < count; ++i) out[i] = in[i * column_stride_];
    return;
  }
  const auto convert = type_ == at::kHalf ? row_kernels().from_half : row_kernels().from_bfloat16;
  const uint16_t* in = reinterpret_cast<const uint16_t*>(data_) + start;
  if (column_stride_ == 1) return convert(in, out, count);
  for (int64_t i = 0; i < count; ++i) convert(in + i * column_stride_, out + i, 1);
}

}  // namespace fdd
