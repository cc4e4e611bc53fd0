// Row kernels: generic.
#include "row_kernels.h"

#define FDD_ISA isa_generic
#define FDD_ISA_NAME "generic"
#define FDD_LANES 8
#include "row_kernels_impl.h"

namespace fdd {
const RowKernels& row_kernels_generic() { return isa_generic::kKernels; }
}  // namespace fdd
