// What host code, CPU kernels and CUDA kernels share below the formulas: qualifiers, types, integers.
#pragma once

#include <stdint.h>

#ifdef __CUDACC__
#define FT_HD __host__ __device__ __forceinline__
#else
#define FT_HD inline __attribute__((always_inline))
#endif
// Whether a card runs this code, or the emulator in its place: there float64 may have 1/64 of float32's rate.
#if defined(__CUDA_ARCH__) || defined(CUDA_ON_CPU)
#define FT_ON_DEVICE 1
#else
#define FT_ON_DEVICE 0
#endif

namespace fasttricks {

// The type in which values stored as T are computed: float, of double double.
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

// A tensor's dtype, where it travels to kernels as a value.
enum class ElementType : uint8_t { kHalf, kBFloat16, kFloat, kDouble };

FT_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace fasttricks
