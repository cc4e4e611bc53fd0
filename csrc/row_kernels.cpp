#include "row_kernels.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace fdd {
namespace {

bool runs_here(const RowKernels& kernels) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (&kernels == &row_kernels_avx2()) return avx2;
  if (&kernels == &row_kernels_avx512())
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#endif
  return &kernels == &row_kernels_generic();
}

const RowKernels& choose() {
  const RowKernels* all[] = {
#if defined(__x86_64__)
      &row_kernels_avx512(), &row_kernels_avx2(),
#endif
      &row_kernels_generic()};
  const char* wanted = std::getenv("FDD_KERNELS_ISA");
  std::string names;
  for (const RowKernels* kernels : all) {
    names += std::string(names.empty() ? "" : ", ") + kernels->name;
    if (wanted && *wanted && std::strcmp(kernels->name, wanted) != 0) continue;
    if (runs_here(*kernels)) return *kernels;
  }
  throw std::invalid_argument("FDD_KERNELS_ISA=" + std::string(wanted) + " is not one of " + names +
                              ", or this processor lacks it");
}

}  // namespace

const RowKernels& row_kernels() {
  static const RowKernels& chosen = choose();
  return chosen;
}

}  // namespace fdd
