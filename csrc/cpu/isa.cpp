#include "isa.h"

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <string>

namespace fasttricks::cpu {
namespace {

const char* const kNames[] = {"generic", "avx2", "avx512"};

Isa best_isa() {
#if FT_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    return Isa::avx2;
#endif
  return Isa::generic;
}

Isa choose() {
  const Isa best = best_isa();
  const char* requested = std::getenv("FASTTRICKS_CPU_ISA");
  if (requested == nullptr || *requested == '\0') return best;
  for (int i = 0; i < 3; ++i) {
    if (std::string(requested) != kNames[i]) continue;
    STD_TORCH_CHECK(i <= static_cast<int>(best), "fasttricks: FASTTRICKS_CPU_ISA=", requested,
                    " but this CPU (or this build) goes no further than ", kNames[static_cast<int>(best)]);
    return static_cast<Isa>(i);
  }
  STD_TORCH_CHECK(false, "fasttricks: FASTTRICKS_CPU_ISA=", requested, "; accepted: generic, avx2, avx512");
  return best;
}

}  // namespace

Isa active_isa() {
  static const Isa isa = choose();
  return isa;
}

}  // namespace fasttricks::cpu

static std::string cpu_isa() { return fasttricks::cpu::kNames[static_cast<int>(fasttricks::cpu::active_isa())]; }

STABLE_TORCH_LIBRARY_IMPL(fasttricks, CompositeExplicitAutograd, m) { m.impl("cpu_isa", TORCH_BOX(&cpu_isa)); }
