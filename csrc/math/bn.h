// BatchNorm + ReLU and BatchNorm + residual add + ReLU, for host and device. Statistics are over all but the channels;
// M is the number of values per channel, rstd = 1 / sqrt(var + eps), var is biased.
//
//   z = (x - mean) * (weight * rstd) + bias [+ residual]        y = z rounded to the type of x, 0 where that is <= 0
//   m = (y > 0 or y is NaN)                                     dz = m * dy
//   dbias = sum dz      dweight = rstd * sum dz * (x - mean)    dresidual = dz
//   dx = weight * rstd * (dz - dbias / M - (x - mean) * rstd * dweight / M)      batch statistics
//   dx = weight * rstd * dz                                                      constant statistics (eval)
//
// (x - mean) comes first: it is nearly exact where |mean| is large against the deviation, and zero weights stay exact.
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

// inv_count is 1 / M, and 0 for constant statistics: the sums are then not read.
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

// The biased variance times this is the unbiased one; of one value it stays biased.
FT_HD double bn_unbiased_factor(double count) { return count > 1 ? count / (count - 1) : 1.0; }

// The factor of the new statistics after so many batches; cumulative: all batches weigh the same.
FT_HD double bn_momentum(bool cumulative, double momentum, int64_t batches) {
  return cumulative ? 1.0 / double(batches) : momentum;
}

}  // namespace fasttricks
