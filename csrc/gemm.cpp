#include "gemm.h"

#include <ATen/Context.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "row_kernels.h"

namespace fdd {
namespace {

constexpr int64_t kPieceColumns = 512;

// Rows of a piece of B.
int64_t piece_depth(int64_t ldb) { return share_sets(ldb) ? 256 : 512; }

// How many rows of an operand B of type T are interleaved.
template <class T>
constexpr int64_t kTogether = sizeof(T) == 2 ? 2 : 1;

// c (m, n) = a (m, k) b (k, n), or += with `add`, by oneDNN's kernels; throws if none is for T.
template <class T>
void brgemm(int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b, int64_t ldb,
            float* c, int64_t ldc, bool add) {
#if defined(CPUBLAS_BRGEMM_F32F32F32) && defined(CPUBLAS_BRGEMM_BF16BF16F32)
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, a, b, c, kTogether<T> > 1);
#else
  TORCH_CHECK(false, "this PyTorch has no brgemm");
#endif
}

template <class T>
void release_brgemm() {
#if defined(CPUBLAS_BRGEMM_F32F32F32) && defined(CPUBLAS_BRGEMM_BF16BF16F32)
  at::native::cpublas::brgemm_release(kTogether<T> > 1);
#endif
}

// FDD_KERNELS_GEMM: "brgemm", "blas", or empty.
const std::string& wanted_library() {
  static const std::string wanted = [] {
    const char* value = std::getenv("FDD_KERNELS_GEMM");
    const std::string library = value ? value : "";
    if (!library.empty() && library != "brgemm" && library != "blas")
      throw std::invalid_argument("FDD_KERNELS_GEMM=" + library + " is not one of brgemm, blas");
    return library;
  }();
  return wanted;
}

// Whether brgemm multiplies T on this processor, with or without instructions for T: tried once on
// a small GEMM. Not with FDD_KERNELS_GEMM=blas.
template <class T>
bool brgemm_works() {
  static const bool works = [] {
    if (wanted_library() == "blas") return false;
    T a[16 * 32], b[32 * 16];
    float c[16 * 16];
    for (int i = 0; i < 512; ++i) a[i] = float(i % 7) - 3.f, b[i] = float(i % 5) - 2.f;
    try {
      brgemm(16, 16, 32, a, 32, b, 16, c, 16, false);
      release_brgemm<T>();
    } catch (const std::exception&) {
      return false;
    }
    for (int i = 0; i < 16; ++i)
      for (int j = 0; j < 16; ++j) {
        float expected = 0;
        for (int k = 0; k < 32; ++k)
          expected += float(a[32 * i + k]) *
                      float(b[(k / kTogether<T> * 16 + j) * kTogether<T> + k % kTogether<T>]);
        if (c[16 * i + j] != expected) return false;
      }
    return true;
  }();
  return works;
}

// Whether MKL is there and faster than brgemm: on x86 without AVX-512, where brgemm loses time by
// reading B in place (Zen 3, one thread, B (768, 320): 62 GFLOP/s, MKL 82).
bool blas_is_faster() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return at::hasMKL() && !__builtin_cpu_supports("avx512f");
#else
  return false;
#endif
}

template <class T>
bool uses_brgemm() {
  static const bool uses =
      brgemm_works<T>() && (wanted_library() == "brgemm" || !blas_is_faster());
  return uses;
}

bool has_bfloat16_instructions() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512bf16") || __builtin_cpu_supports("amx-bf16");
#else
  return false;
#endif
}

// bfloat16 where brgemm does not run: for tests, on processors without such instructions.
void gemm_without_brgemm(int64_t m, int64_t n, int64_t k, const at::BFloat16* a, int64_t lda,
                         const at::BFloat16* b, int64_t ldb, float* c, int64_t ldc, bool add) {
  for (int64_t i = 0; i < m; ++i) {
    float* out = c + i * ldc;
    if (!add) std::memset(out, 0, sizeof(float) * n);
    for (int64_t p = 0; p < k; p += 2) {
      const float even = a[i * lda + p], odd = a[i * lda + p + 1];
      const at::BFloat16* pairs = b + p * ldb;
      for (int64_t j = 0; j < n; ++j)
        out[j] += even * float(pairs[2 * j]) + odd * float(pairs[2 * j + 1]);
    }
  }
}

void gemm_without_brgemm(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda,
                         const float* b, int64_t ldb, float* c, int64_t ldc, bool add) {
  const auto view = [](const float* data, int64_t rows, int64_t columns, int64_t stride) {
    return at::from_blob(const_cast<float*>(data), {rows, columns}, {stride, 1}, at::kFloat);
  };
  at::Tensor out = view(c, m, n, ldc);
  if (add)
    out.addmm_(view(a, m, k, lda), view(b, k, n, ldb));
  else
    at::mm_out(out, view(a, m, k, lda), view(b, k, n, ldb));
}

// Takes pieces of B that stay in L2 while the rows of A stream by. The sums over the depth of a
// piece are short enough to round no worse than a BLAS.
template <class T>
void gemm_of(bool by_brgemm, int64_t m, int64_t n, int64_t k, Operand operand_a, Operand operand_b,
             float* c, int64_t ldc, bool add) {
  const T *a = static_cast<const T*>(operand_a.data), *b = static_cast<const T*>(operand_b.data);
  k = round_up(k, kTogether<T>);
  if (!by_brgemm)
    return gemm_without_brgemm(m, n, k, a, operand_a.ld, b, operand_b.ld, c, ldc, add);
  const int64_t most = piece_depth(operand_b.ld), pieces = (k + most - 1) / most,
                depth = round_up((k + pieces - 1) / pieces, 32);
  for (int64_t column = 0; column < n; column += kPieceColumns) {
    const int64_t columns = std::min(kPieceColumns, n - column);
    for (int64_t first = 0; first < k; first += depth)
      brgemm(m, columns, std::min(depth, k - first), a + first, operand_a.ld,
             b + first * operand_b.ld + kTogether<T> * column, operand_b.ld, c + column, ldc,
             add || first);
  }
}

}  // namespace

void gemm(int64_t m, int64_t n, int64_t k, Operand a, Operand b, float* c, int64_t ldc, bool add) {
  const bool by_brgemm = b.bf16 ? uses_brgemm<at::BFloat16>() : uses_brgemm<float>();
  gemm_by(by_brgemm, m, n, k, a, b, c, ldc, add);
}

void gemm_by(bool brgemm, int64_t m, int64_t n, int64_t k, Operand a, Operand b, float* c,
             int64_t ldc, bool add) {
  TORCH_INTERNAL_ASSERT_DEBUG_ONLY(a.bf16 == b.bf16);
  if (m == 0 || n == 0) return;
  return b.bf16 ? gemm_of<at::BFloat16>(brgemm, m, n, k, a, b, c, ldc, add)
                : gemm_of<float>(brgemm, m, n, k, a, b, c, ldc, add);
}

void SplitGemm::gemm(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, Operand b,
                     float* c, int64_t ldc, bool add) {
  if (!b.bf16) return fdd::gemm(m, n, k, {a, lda}, b, c, ldc, add);
  const int64_t depth = round_up(k, 2);
  for (Scratch* part : {&high_, &low_}) part->resize(m * depth / 2);
  for (int64_t i = 0; i < m; ++i) {
    uint16_t *high = high_.halves() + i * depth, *low = low_.halves() + i * depth;
    row_kernels().to_bfloat16(a + i * lda, high, low, k);
    if (depth > k) high[k] = low[k] = 0;
  }
  fdd::gemm(m, n, k, {high_.get(), depth, true}, b, c, ldc, add);
  fdd::gemm(m, n, k, {low_.get(), depth, true}, b, c, ldc, true);
}

void release_gemm() {
  if (has_brgemm(false)) release_brgemm<float>();
  if (bf16_gemm() && has_brgemm(true)) release_brgemm<at::BFloat16>();
}

bool bf16_gemm() {
  static const bool chosen = [] {
    const char* wanted = std::getenv("FDD_KERNELS_BF16_PRODUCTS");
    if (wanted && *wanted) return std::strcmp(wanted, "0") != 0;
    return has_bfloat16_instructions() && uses_brgemm<at::BFloat16>();
  }();
  return chosen;
}

bool has_brgemm(bool bf16) {
  return bf16 ? brgemm_works<at::BFloat16>() : brgemm_works<float>();
}

const char* gemm_library() { return uses_brgemm<float>() ? "brgemm" : "blas"; }

Matrix::Matrix(const at::Tensor& tensor)
    : data_(static_cast<const char*>(tensor.const_data_ptr())),
      type_(tensor.scalar_type()),
      rows_(tensor.size(0)),
      columns_(tensor.size(1)),
      row_stride_(tensor.stride(0)),
      column_stride_(tensor.stride(1)) {
  TORCH_CHECK(type_ == at::kFloat || type_ == at::kBFloat16 || type_ == at::kHalf,
              "unsupported dtype ", type_);
}

at::Tensor Matrix::view() const {
  TORCH_INTERNAL_ASSERT(type_ == at::kFloat);
  return at::from_blob(const_cast<char*>(data_), {rows_, columns_}, {row_stride_, column_stride_},
                       at::kFloat);
}

const void* Matrix::direct(int64_t row, bool bf16) const {
  if (type_ != (bf16 ? at::kBFloat16 : at::kFloat)) return nullptr;
  if ((column_stride_ != 1 && columns_ > 1) || row_stride_ < columns_) return nullptr;
  return data_ + row * row_stride_ * (bf16 ? 2 : 4);
}

void Matrix::read_words(int64_t row, bool bf16, float* out) const {
  if (!bf16) return read(row, 0, columns_, out);
  const uint16_t* in = reinterpret_cast<const uint16_t*>(data_) + row * row_stride_;
  uint16_t* halves = reinterpret_cast<uint16_t*>(out);
  for (int64_t i = 0; i < columns_; ++i) halves[i] = in[i * column_stride_];
}

void Matrix::read(int64_t row, int64_t first, int64_t count, float* out) const {
  const int64_t start = row * row_stride_ + first * column_stride_;
  if (type_ == at::kFloat) {
    const float* in = reinterpret_cast<const float*>(data_) + start;
    if (column_stride_ == 1) {
      std::memcpy(out, in, sizeof(float) * count);
      return;
    }
    for (int64_t i = 0; i < count; ++i) out[i] = in[i * column_stride_];
    return;
  }
  const auto convert = type_ == at::kHalf ? row_kernels().from_half : row_kernels().from_bfloat16;
  const uint16_t* in = reinterpret_cast<const uint16_t*>(data_) + start;
  if (column_stride_ == 1) return convert(in, out, count);
  for (int64_t i = 0; i < count; ++i) convert(in + i * column_stride_, out + i, 1);
}

}  // namespace fdd
