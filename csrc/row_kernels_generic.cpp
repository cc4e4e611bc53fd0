// Row kernels: the instructions that every processor of the architecture has, which the compiler
// chooses for vectors of 4 floats: NEON on AArch64, SSE2 on x86-64. With 8 lanes g++ 12 compares and
// selects lane by lane: 3,088 scalar comparisons on AArch64 instead of 69, and 3.5 times the code.
#include "row_kernels.h"

#if defined(__ARM_NEON)
#define FDD_ISA isa_neon
#define FDD_ISA_NAME "neon"
#else
#define FDD_ISA isa_generic
#define FDD_ISA_NAME "generic"
#endif
#define FDD_LANES 4
#include "row_kernels_impl.h"

namespace fdd {
const RowKernels& row_kernels_generic() { return FDD_ISA::kKernels; }
}  // namespace fdd
