// Pages of large buffers. The system provides a page at its first touch: about 0.4 ms per MiB in
// pages of 4 KiB, as long as 50 multiplications with every float32 number of them.
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
