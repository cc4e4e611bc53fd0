// Pages of large buffers. The system provides a page at its first touch: in pages of 4 KiB this
// took nearly 0.5 ms per MiB on Emerald Rapids (docs/design.md, "Strategies and memory").
#pragma once

#include <ATen/core/Tensor.h>

namespace fdd {

// What memory is for: each use has a spare buffer of its own.
enum class Use { kLogits, kGradient };

// Returns an uninitialised contiguous tensor on the CPU. When it is released its pages are offered
// to the system (MADV_FREE) and lent to the next tensor of the same use if the system has not
// taken them; one buffer of each use in a process, of at most kMostRetained bytes. Where the system
// cannot take back offered pages none are retained.
at::Tensor reused_memory(at::IntArrayRef sizes, at::ScalarType dtype, Use use);
constexpr int64_t kMostRetained = int64_t(1) << 30;

// Asks the system for the pages inside of [begin, begin + bytes) in one call instead of one by one.
// What cannot be had this way is provided at its first touch.
void populate(void* begin, size_t bytes);

}  // namespace fdd
