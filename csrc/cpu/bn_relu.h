// The table between the ops of bn_relu.cpp and bn_add_bn_relu.cpp (checks, allocation, plan) and their kernels (one set
// per ISA).
#pragma once

#include <stdint.h>

#include "cpu/isa.h"

namespace fasttricks::cpu {

// A second gradient of y: of the shape of x or, pooled, of the 2x2 means of its height x width pixels. Null: none.
struct BnSecondGradient {
  const void* data;
  bool pooled;
  int64_t height, width, pooled_height, pooled_width;
};

// The 2x2 means of y, whose images have height x width pixels. Null: they are not wanted.
struct BnMeans {
  void* data;
  int64_t height, width, pooled_height, pooled_width;
};

// One call. Tensors of x's shape are dense in one layout; their elements have x's dtype, those per channel the
// accumulation type (float, double for double). Null: absent.
//   NCHW (inner > 1): x is rows x channels x inner.      NHWC: x is rows x channels, inner = 1.
struct BnArguments {
  int64_t rows, channels, inner;
  double eps;
  bool training;
  const void *x, *residual, *dy;
  void *y, *dx, *dresidual;
  BnMeans means;
  BnSecondGradient second;
  void* dz;                // written by a reduction if there is a second gradient, then read instead of dy; may be dx
  const uint8_t* mask_in;  // one bit per element, in memory order
  int64_t mask_bytes;
  uint8_t* mask_out;  // zeroed beforehand
  const void *weight, *bias;
  void *mean, *var, *dweight, *dbias;  // written by a statistics pass, read by the other passes
  double count;                        // values per channel that dweight and dbias are sums over
  void* prepared;                      // NHWC: five values per channel, from prepare
  bool vanish;                         // NHWC: what prepare returned
  BnArguments* of_residual;            // bn_add_bn_relu: the BatchNorm of the residual, whose x is `residual`
};

enum BnPass { kBnStatistics = 1, kBnApply = 2, kBnReduce = 4, kBnBackward = 8 };

struct BnOfType {
  // NCHW: channels [begin, end); the second pass over a channel finds it in the cache. passes: of enum BnPass.
  void (*channels)(const BnArguments&, int passes, int64_t begin, int64_t end);
  // NHWC: computes `prepared` for the passes below; true if x need not be read (all weights are zero and all statistics
  // finite).
  bool (*prepare)(const BnArguments&, bool backward);
  // NHWC: rows [begin, end). The reductions return partial sums per channel, in double, which the caller merges; sums:
  // arrays of dz, of dz * (x - mean) and, with a BatchNorm of the residual, of dz * (residual - mean).
  void (*row_statistics)(const BnArguments&, int64_t begin, int64_t end, double* mean, double* m2);
  void (*row_apply)(const BnArguments&, int64_t begin, int64_t end);
  // Of pairs of image rows [begin, end), counted over the batch, with the means of y; the last of an odd number of rows
  // counts as a pair.
  void (*row_apply_pooled)(const BnArguments&, int64_t begin, int64_t end);
  void (*row_reduce)(const BnArguments&, int64_t begin, int64_t end, double* sums);
  void (*row_backward)(const BnArguments&, int64_t begin, int64_t end);
};

struct BnReluKernels {
  BnOfType float32, float64, float16, bfloat16;
};

}  // namespace fasttricks::cpu

FT_DECLARE_KERNELS(BnReluKernels, bn_relu_kernels)
