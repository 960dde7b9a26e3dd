// The choice of instruction set, made once when the library is loaded.
#pragma once

#if defined(__x86_64__) || defined(_M_X64)
#define FT_X86 1
#else
#define FT_X86 0
#endif

namespace fasttricks::cpu {

enum class Isa { generic = 0, avx2 = 1, avx512 = 2 };

// The best instruction set that this CPU and this library both have, or the one that the environment variable
// FASTTRICKS_CPU_ISA names; an error if it names one that the CPU lacks.
Isa active_isa();

}  // namespace fasttricks::cpu

// Beside the struct of function pointers `Table`: declares the instance `name` that every ISA defines.
#if FT_X86
#define FT_DECLARE_KERNELS(Table, name)       \
  namespace fasttricks::cpu::generic {        \
  extern const ::fasttricks::cpu::Table name; \
  }                                           \
  namespace fasttricks::cpu::avx2 {           \
  extern const ::fasttricks::cpu::Table name; \
  }                                           \
  namespace fasttricks::cpu::avx512 {         \
  extern const ::fasttricks::cpu::Table name; \
  }
#define FT_KERNELS(name)                                                                               \
  (::fasttricks::cpu::active_isa() == ::fasttricks::cpu::Isa::avx512 ? ::fasttricks::cpu::avx512::name \
   : ::fasttricks::cpu::active_isa() == ::fasttricks::cpu::Isa::avx2 ? ::fasttricks::cpu::avx2::name   \
                                                                     : ::fasttricks::cpu::generic::name)
#else
#define FT_DECLARE_KERNELS(Table, name)       \
  namespace fasttricks::cpu::generic {        \
  extern const ::fasttricks::cpu::Table name; \
  }
#define FT_KERNELS(name) (::fasttricks::cpu::generic::name)
#endif
