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
#include <stdint.h>

#ifndef FT_HD
#ifdef __CUDACC__
#define FT_HD __host__ __device__ __forceinline__
#else
#define FT_HD inline __attribute__((always_inline))
#endif
#endif

namespace fasttricks {

template <class A>
FT_HD A bn_rstd(A var, double eps) {
  return A(1.0 / sqrt(double(var) + eps));
}

// The factors of the dx formula: dx = scale * (dz - shift + (x - mean) * slope).
template <class A>
struct BnBackward {
  A scale, shift, slope;
};

template <class A>
FT_HD BnBackward<A> bn_backward_factors(A weight, A rstd, A dweight, A dbias, double count, bool training) {
  if (!training) return {weight * rstd, A(0), A(0)};
  return {weight * rstd, A(double(dbias) / count), A(-double(rstd) * double(dweight) / count)};
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
