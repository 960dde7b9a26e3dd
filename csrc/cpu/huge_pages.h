// Huge pages for large results that are about to be written for the first time.
#pragma once

#include <stdint.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fasttricks::cpu {

// From 32 MiB on, glibc's malloc takes fresh pages for every allocation; smaller ones reuse its heap.
// A fresh allocation of some 100 MB costs a page fault for every 4 KiB of it, which takes longer than computing and
// writing its contents. This asks the kernel to map huge pages instead: a hint that changes no
// contents and that the system may ignore (/sys/kernel/mm/transparent_hugepage/enabled: never).
inline void advise_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t(2) << 20;
  if (bytes < int64_t(16 * kHuge)) return;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) & ~(kHuge - 1);
  const uintptr_t last = (reinterpret_cast<uintptr_t>(data) + uintptr_t(bytes)) & ~(kHuge - 1);
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace fasttricks::cpu
