// Row kernels: avx512. Empty on other architectures.
#include "row_kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#endif

#define FDD_ISA isa_avx512
#define FDD_ISA_NAME "avx512"
#define FDD_STREAM _mm512_stream_ps
#define FDD_LANES 16
#include "row_kernels_impl.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

namespace fdd {
const RowKernels& row_kernels_avx512() { return isa_avx512::kKernels; }
}  // namespace fdd
#endif  // __x86_64__
