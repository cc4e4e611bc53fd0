#include "memory.h"

#include <ATen/ops/empty.h>
#include <c10/core/Allocator.h>
#include <c10/core/Storage.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <memory>
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

// A released buffer of one use, while nobody has it. Of logits, which live for a call, it is the
// largest so far; of gradients, which live for a step, the last.
class Spare {
 public:
  explicit Spare(Use use) : largest_(use == Use::kLogits) {}
  // Its pages if they are enough, else none. A small gradient does not take a large one's.
  Pages take(size_t bytes) {
    const std::lock_guard lock(guard_);
    const bool suits = bytes <= pages_.bytes && (largest_ || pages_.bytes / 2 <= bytes);
    return suits ? std::exchange(pages_, {}) : Pages();
  }
  // Only the first `used` bytes were lent: the others have been offered before.
  void give(Pages pages, size_t used) {
    if (pages.bytes <= size_t(kMostRetained) && offer_to_system(pages.begin, used)) {
      const std::lock_guard lock(guard_);
      if (!largest_ || pages.bytes > pages_.bytes) std::swap(pages, pages_);
    }
    unmap(pages);
  }

 private:
  const bool largest_;
  std::mutex guard_;
  Pages pages_;
};

// Shows memory that is lent (bytes > 0) or given back to torch's profiler, like torch's allocator.
void report(void* begin, int64_t bytes) {
  c10::reportMemoryUsageToProfiler(begin, bytes, 0, 0, c10::Device(c10::kCPU));
}

Spare& spare(Use use) {
  // They outlive every tensor.
  static Spare* const logits = new Spare(Use::kLogits);
  static Spare* const gradients = new Spare(Use::kGradient);
  return use == Use::kLogits ? *logits : *gradients;
}

// A loan, while a tensor has it.
struct Lent {
  Pages pages;
  int64_t asked;
  Use use;
};

void give_back(void* context) {
  const std::unique_ptr<Lent> lent(static_cast<Lent*>(context));
  report(lent->pages.begin, -lent->asked);
  spare(lent->use).give(lent->pages, lent->asked);
}

}  // namespace

at::Tensor reused_memory(at::IntArrayRef sizes, at::ScalarType dtype, Use use) {
  const int64_t asked = c10::multiply_integers(sizes) * c10::elementSize(dtype);
  const size_t page = page_size(),
               bytes = (size_t(std::max<int64_t>(asked, 1)) + page - 1) / page * page;
  Pages pages = spare(use).take(bytes);
  if (!pages.begin) pages = map(bytes);
  report(pages.begin, asked);
  c10::DataPtr data(pages.begin, new Lent{pages, asked, use}, &give_back, c10::kCPU);
  // With an allocator the storage can be resized, as that of any tensor.
  const c10::Storage storage(c10::Storage::use_byte_size_t(), asked, std::move(data),
                             c10::GetAllocator(c10::kCPU), /*resizable=*/true);
  return at::empty({0}, dtype).set_(storage, 0, sizes);
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
