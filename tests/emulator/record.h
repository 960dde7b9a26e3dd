// Records the launches that the host code of an op makes for a card, in place of running their kernels.
#pragma once

#include <cxxabi.h>
#include <dlfcn.h>

#include <functional>
#include <string>

#include "bindings.h"

namespace emu {

// A source with kernels has their names in its dynamic symbols: it includes them with default visibility.
inline std::string kernel_name(const void* kernel) {
  Dl_info found{};
  if (!dladdr(kernel, &found) || !found.dli_sname || found.dli_saddr != kernel)
    throw std::runtime_error("a kernel that was to be launched has no dynamic symbol");
  char* const readable = abi::__cxa_demangle(found.dli_sname, nullptr, nullptr, nullptr);
  const std::string name = readable ? readable : found.dli_sname;
  std::free(readable);
  return name;
}

// (demangled name of a kernel, threads of a block, dynamic bytes of shared memory) -> resident blocks of a
// multiprocessor
using Resident = std::function<int(std::string, int, int64_t)>;

template <class Call>
std::vector<Launch> record(const Resident& resident, Call call) {
  Recorder recorder{[&](const void* kernel, int threads, size_t dynamic_bytes) {
    return resident(kernel_name(kernel), threads, int64_t(dynamic_bytes));
  }};
  struct Recording {
    explicit Recording(Recorder* r) { world.recorder = r; }
    ~Recording() { world.recorder = nullptr; }
  } recording(&recorder);
  call();
  return recorder.launches;
}

}  // namespace emu
