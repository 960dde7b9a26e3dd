// Qualifiers, types and integer helpers shared by host code, CPU kernels and CUDA kernels.
#pragma once

#include <stdint.h>

#ifdef __CUDACC__
#define FT_HD __host__ __device__ __forceinline__
#else
#define FT_HD inline __attribute__((always_inline))
#endif
// Whether this code runs on a card, or in the emulator of one. On cards float64 may run at 1/64 of float32's rate.
#if defined(__CUDA_ARCH__) || defined(CUDA_ON_CPU)
#define FT_ON_DEVICE 1
#else
#define FT_ON_DEVICE 0
#endif

namespace fasttricks {

// The type in which values stored as T are computed: double for double, else float.
template <class T>
struct AccumulateType {
  using type = float;
};
template <>
struct AccumulateType<double> {
  using type = double;
};
template <class T>
using acc_t = typename AccumulateType<T>::type;

// A tensor's dtype as a value that kernels can receive.
enum class ElementType : uint8_t { kHalf, kBFloat16, kFloat, kDouble };

FT_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace fasttricks
