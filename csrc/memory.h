// Pages of large buffers. The system provides a page at its first touch: in pages of 4 KiB this took
// nearly 0.5 ms per MiB on Emerald Rapids (docs/design.md, "Strategies and memory").
#pragma once

#include <ATen/core/Tensor.h>

namespace fdd {

// Returns uninitialised float32 memory, (count). When the tensor is released its pages are offered
// to the system (MADV_FREE) and lent to the next call if the system has not taken them; one buffer
// of a process at a time. Where the system cannot take back offered pages none are retained.
at::Tensor reused_memory(int64_t count);

// Asks the system for the pages inside of [begin, begin + bytes) in one call instead of one by one.
// What cannot be had this way is provided at its first touch.
void populate(void* begin, size_t bytes);

}  // namespace fdd
