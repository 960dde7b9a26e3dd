// BatchNorm + ReLU and BatchNorm + residual add + ReLU, for host and device. Statistics are taken over all dimensions
// but the channels; M is the number of values per channel, rstd = 1 / sqrt(var + eps), var is biased.
//
//   z = (x - mean) * (weight * rstd) + bias [+ residual]        y = z rounded to the type of x, 0 where that is <= 0
//   m = (y > 0 or y is NaN)                                     dz = m * dy
//   dbias = sum dz      dweight = rstd * sum dz * (x - mean)    dresidual = dz
//   dx = weight * rstd * (dz - dbias / M - (x - mean) * rstd * dweight / M)      batch statistics
//   dx = weight * rstd * dz                                                      constant statistics (eval)
//
// (x - mean) is computed first: it is nearly exact even if |mean| is much larger than the deviation, and a zero weight
// gives an exact zero.
#pragma once

#include <math.h>

#include "math/common.h"

namespace fasttricks {

// NaN where var + eps is negative, as in torch. eps, and inv_count below: double on the host, A on the device.
template <class A, class S>
FT_HD A bn_rstd(A var, S eps) {
#if FT_ON_DEVICE
  return A(1) / sqrt(var + eps);
#else
  return A(1.0 / sqrt(double(var) + eps));
#endif
}

// The factors of the dx formula: dx = scale * (dz - shift + (x - mean) * slope).
template <class A>
struct BnBackward {
  A scale, shift, slope;
};

// inv_count is 1 / M; for constant statistics it is 0 and the sums are not read.
template <class A, class S>
FT_HD BnBackward<A> bn_backward_factors(A weight, A rstd, A dweight, A dbias, S inv_count) {
  if (inv_count == S(0)) return {weight * rstd, A(0), A(0)};
#if FT_ON_DEVICE
  return {weight * rstd, dbias * inv_count, -(rstd * dweight * inv_count)};
#else
  return {weight * rstd, A(double(dbias) * inv_count), A(-double(rstd) * double(dweight) * inv_count)};
#endif
}

// running = (1 - momentum) * running + momentum * new; the variance unbiased (M / (M - 1)) as torch has it.
template <class A>
FT_HD A bn_update(A running, A now, A momentum) {
  return (A(1) - momentum) * running + momentum * now;
}

// Factor from the biased to the unbiased variance; 1 for a single value.
FT_HD double bn_unbiased_factor(double count) { return count > 1 ? count / (count - 1) : 1.0; }

// Weight of the new statistics after `batches` batches; cumulative: every batch has the same weight.
FT_HD double bn_momentum(bool cumulative, double momentum, int64_t batches) {
  return cumulative ? 1.0 / double(batches) : momentum;
}

}  // namespace fasttricks
