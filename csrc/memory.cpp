#include "memory.h"

#include <ATen/ops/from_blob.h>
#include <c10/core/Allocator.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <new>
#include <utility>

#if defined(__linux__) && !defined(MADV_POPULATE_WRITE)
#define MADV_POPULATE_WRITE 23  // of Linux 5.14, which may be newer than the C library's headers
#endif

namespace fdd {
namespace {

struct Pages {
  void* begin = nullptr;
  size_t bytes = 0;
};

size_t page_size() {
  static const size_t size = size_t(sysconf(_SC_PAGESIZE));
  return size;
}

Pages map(size_t bytes) {
  void* begin = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (begin == MAP_FAILED) throw std::bad_alloc();
  return {begin, bytes};
}

void unmap(Pages pages) {
  if (pages.begin) munmap(pages.begin, pages.bytes);
}

bool offer_to_system(void* begin, size_t bytes) {
#if defined(MADV_FREE)
  return madvise(begin, bytes, MADV_FREE) == 0;
#else
  return false;
#endif
}

// The largest buffer released so far, while nobody has it.
class Spare {
 public:
  // Its pages if they are enough, else none.
  Pages take(size_t bytes) {
    const std::lock_guard lock(guard_);
    return pages_.bytes < bytes ? Pages() : std::exchange(pages_, {});
  }
  // Only the first `used` bytes were lent: the others have been offered before.
  void give(Pages pages, size_t used) {
    if (offer_to_system(pages.begin, used)) {
      const std::lock_guard lock(guard_);
      if (pages.bytes > pages_.bytes) std::swap(pages, pages_);
    }
    unmap(pages);
  }

 private:
  std::mutex guard_;
  Pages pages_;
};

// Shows memory that is lent (bytes > 0) or given back to torch's profiler, like torch's allocator.
void report(void* begin, int64_t bytes) {
  c10::reportMemoryUsageToProfiler(begin, bytes, 0, 0, c10::Device(c10::kCPU));
}

Spare& spare() {
  static Spare* const one = new Spare;  // outlives every tensor
  return *one;
}

}  // namespace

at::Tensor reused_memory(int64_t count) {
  const int64_t asked = sizeof(float) * count;
  const size_t page = page_size(),
               bytes = (size_t(std::max<int64_t>(asked, 1)) + page - 1) / page * page;
  Pages pages = spare().take(bytes);
  if (!pages.begin) pages = map(bytes);
  report(pages.begin, asked);
  const auto give_back = [pages, asked](void* begin) {
    report(begin, -asked);
    spare().give(pages, asked);
  };
  return at::from_blob(pages.begin, {count}, give_back, at::kFloat);
}

void populate(void* begin, size_t bytes) {
#if defined(MADV_POPULATE_WRITE)
  const size_t page = page_size();
  const uintptr_t first = (reinterpret_cast<uintptr_t>(begin) + page - 1) / page * page,
                  last = (reinterpret_cast<uintptr_t>(begin) + bytes) / page * page;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_POPULATE_WRITE);
#endif
}

}  // namespace fdd
