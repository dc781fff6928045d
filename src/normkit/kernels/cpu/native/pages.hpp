// Large pages for large outputs.
//
// An allocator returns 32 MB and more to the system when a tensor is freed, so that the
// next output of that size is mapped again: one page fault for every 4 KB, which takes
// longer than all of the arithmetic (32×256×56×56 float32: 5.1 copies instead of 2.7).
// Where large pages are opt-in (`madvise`, the usual setting), pages of 2 MB turn 512
// faults into one. Pages that are mapped already stay.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace normkit {

// NORMKIT_LARGE_PAGES=0 disables it.
inline bool wants_large_pages() {
  static const bool wants = [] {
    const char* given = std::getenv("NORMKIT_LARGE_PAGES");
    return !given || std::strcmp(given, "0");
  }();
  return wants;
}

inline void prefer_large_pages([[maybe_unused]] void* p, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 2 << 20;
  if (!p || bytes < (int64_t)(2 * kPage) || !wants_large_pages()) return;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(p) + kPage - 1) & ~(kPage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(p) + bytes) & ~(kPage - 1);
  if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
}

}  // namespace normkit
