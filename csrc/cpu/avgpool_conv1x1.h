// The table between the op avgpool_conv1x1 (argument checks, plan) and its kernels (one set per ISA).
#pragma once

#include <stdint.h>

#include "cpu/isa.h"
#include "math/avgpool.h"

namespace fasttricks::cpu {

// forward: y = W pool(x) + bias.   backward: dx = spread(W^T dy).
// Both are one product per output pixel, from k channels (of x or dy) to m channels.
enum class AvgPoolConv1x1Pass { forward, backward };

// A part of that product: output pixels [p0, p1) counted over the batch, output channels [m0, m1).
struct AvgPoolConv1x1Task {
  const void* src;            // x or dy
  const void* packed_weight;  // from pack_weight of the same pass
  const void* bias;           // m values, or null
  void* dst;                  // y or dx
  int64_t p0, p1, m0, m1;     // NHWC: m0 is a multiple of nr
  void* workspace;            // convolve_bytes, 64-byte aligned
};

// A part of dW = dy pool(x)^T: output channels [o0, o1), input channels [c0, c1), summed over the pixels [p0, p1), p0 <
// p1.
struct AvgPoolConv1x1WeightTask {
  const void* dy;
  const void* x;
  void* dweight;  // o x c sums in the accumulation type; the part is overwritten
  int64_t p0, p1, o0, o1, c0, c1;
  void* workspace;  // weight_grad_bytes, 64-byte aligned
};

struct AvgPoolConv1x1OfType {
  int64_t mr, nr;  // the register tile
  int64_t (*packed_weight_bytes)(const AvgPoolConv1x1Sizes&, AvgPoolConv1x1Pass);
  // Rows of nr output channels each: units [begin, end) of ceil(m / nr).
  void (*pack_weight)(const AvgPoolConv1x1Sizes&, AvgPoolConv1x1Pass, const void* weight, void* packed, int64_t begin,
                      int64_t end);
  int64_t (*convolve_bytes)(const AvgPoolConv1x1Sizes&, AvgPoolConv1x1Pass);
  void (*convolve)(const AvgPoolConv1x1Sizes&, AvgPoolConv1x1Pass, const AvgPoolConv1x1Task&);
  int64_t (*weight_grad_bytes)(const AvgPoolConv1x1Sizes&);
  void (*weight_grad)(const AvgPoolConv1x1Sizes&, const AvgPoolConv1x1WeightTask&);
  // dst[i] = sum of partial[slice * numel + i] over the slices, in order, for i in [begin, end).
  void (*sum_slices)(const void* partial, int64_t slices, int64_t numel, void* dst, int64_t begin, int64_t end);
  // dbias[o] = sum of dy over its pixels, for o in [o0, o1).
  void (*bias_grad)(const AvgPoolConv1x1Sizes&, const void* dy, void* dbias, int64_t o0, int64_t o1);
  // Zeros the pixels of dx that no window covers, in the images [n0, n1).
  void (*zero_uncovered)(const AvgPoolConv1x1Sizes&, void* dx, int64_t n0, int64_t n1);
};

struct AvgPoolConv1x1Kernels {
  AvgPoolConv1x1OfType float32, float64, float16, bfloat16;
};

}  // namespace fasttricks::cpu

FT_DECLARE_KERNELS(AvgPoolConv1x1Kernels, avgpool_conv1x1_kernels)
