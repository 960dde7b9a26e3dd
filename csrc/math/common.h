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

FT_HD int64_t size_of(ElementType t) { return t == ElementType::kDouble ? 8 : t == ElementType::kFloat ? 4 : 2; }

FT_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Division by a number that the host knows, for kernels, where a division takes 20 (32 bits) to 90 (64 bits)
// instructions. n / d = (n * m) >> (bits + log2) with m = ceil(2^(bits + log2) / d), 2^log2 >= d; exact for 0 <= n <
// 2^bits, as m * d exceeds the power by less than 2^log2 (Granlund and Montgomery 1994, "Division by invariant
// integers using multiplication").
struct Divider {  // of numbers below 2^31
  uint32_t by = 1, multiplier = 1u << 31;
  int log2 = 0;

  Divider() = default;
  explicit Divider(int64_t d) : by(uint32_t(d)) {
    while ((int64_t{1} << log2) < d) ++log2;
    multiplier = uint32_t(((uint64_t{1} << (31 + log2)) + uint64_t(d) - 1) / uint64_t(d));
  }
  FT_HD uint32_t divide(uint32_t n) const { return uint32_t((uint64_t(n) * multiplier) >> (31 + log2)); }
};
struct LongDivider {  // of numbers below 2^63
  uint64_t by = 1, multiplier = uint64_t{1} << 63;
  int log2 = 0;

  LongDivider() = default;
  explicit LongDivider(int64_t d) : by(uint64_t(d)) {
    while (log2 < 62 && (int64_t{1} << log2) < d) ++log2;
    multiplier = uint64_t(((static_cast<unsigned __int128>(1) << (63 + log2)) + by - 1) / by);
  }
  FT_HD int64_t divide(int64_t n) const {
#if defined(__CUDA_ARCH__)
    const uint64_t high = __umul64hi(uint64_t(n), multiplier), low = uint64_t(n) * multiplier;
#else
    const auto product = static_cast<unsigned __int128>(uint64_t(n)) * multiplier;
    const uint64_t high = uint64_t(product >> 64), low = uint64_t(product);
#endif
    return int64_t(((high << 1) | (low >> 63)) >> log2);
  }
  FT_HD int64_t remainder(int64_t n) const { return n - divide(n) * int64_t(by); }
};

}  // namespace fasttricks
