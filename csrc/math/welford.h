// Mean and sum of squared deviations (M2) of values that come in parts: Chan, Golub and LeVeque 1979, "Updating
// formulae and a pairwise algorithm for computing sample variances". For host and device; combine_moments in
// csrc/cuda/bn_relu_tile.cuh merges many parts at once over the lanes of a warp.
//
//   d = mean_b - mean_a      n = n_a + n_b      mean = mean_a + d * n_b / n      M2 = M2_a + M2_b + d^2 * n_a * n_b / n
#pragma once

#include "math/common.h"

namespace fasttricks {

template <class A>
struct Moments {
  A count, mean, m2;
};

// What depends on the counts alone: n, n_b / n and n_a * n_b / n.
template <class A>
struct MergeFactors {
  A count, share, cross;
};

template <class A>
FT_HD MergeFactors<A> merge_factors(A count_a, A count_b) {
  const A count = count_a + count_b, share = count_b / count;
  return {count, share, count_a * share};
}

// Merges part b into the mean and M2 of part a.
template <class A>
FT_HD void merge_into(A& mean, A& m2, A mean_b, A m2_b, const MergeFactors<A>& factors) {
  const A d = mean_b - mean;
  mean += d * factors.share;
  m2 += m2_b + d * d * factors.cross;
}

template <class A>
FT_HD Moments<A> merge(Moments<A> a, const Moments<A>& b) {
  if (a.count + b.count == A(0)) return {A(0), A(0), A(0)};
  const MergeFactors<A> factors = merge_factors(a.count, b.count);
  merge_into(a.mean, a.m2, b.mean, b.m2, factors);
  a.count = factors.count;
  return a;
}

}  // namespace fasttricks
