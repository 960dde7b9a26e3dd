// Mean and sum of squared deviations (M2) of values that come in parts: Chan, Golub and LeVeque 1979, "Updating
// formulae and a pairwise algorithm for computing sample variances". For host and device.
//
//   d = mean_b - mean_a      n = n_a + n_b      mean = mean_a + d * n_b / n      M2 = M2_a + M2_b + d^2 * n_a * n_b / n
#pragma once

#ifndef FT_HD
#ifdef __CUDACC__
#define FT_HD __host__ __device__ __forceinline__
#else
#define FT_HD inline __attribute__((always_inline))
#endif
#endif

namespace fasttricks {

template <class A>
struct Moments {
  A count, mean, m2;
};

template <class A>
FT_HD Moments<A> merge(const Moments<A>& a, const Moments<A>& b) {
  const A n = a.count + b.count;
  if (n == A(0)) return {A(0), A(0), A(0)};
  const A d = b.mean - a.mean, share = b.count / n;
  return {n, a.mean + d * share, a.m2 + b.m2 + d * d * a.count * share};
}

}  // namespace fasttricks
