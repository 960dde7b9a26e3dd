// The table between csrc/cpu/sgd.cpp (checks, plan) and csrc/cpu/isa/sgd.cpp (kernels).
#pragma once

#include <stdint.h>

#include "cpu/isa.h"
#include "math/sgd.h"

namespace fasttricks::cpu {

struct SgdKernels {
  // n contiguous elements. master: fp32, null unless the parameter is half or bfloat16; buf: null without momentum.
  using Step = void (*)(void* param, const void* grad, void* master, void* buf, int64_t n, const SgdScalars& scalars);
  // Whether any value is infinite or NaN; *square_sum (unless null) receives the sum of squares.
  using Check = bool (*)(const void* grad, int64_t n, double* square_sum);
  // The sum of squares of the weights as a step sees them: the master, or the parameter if it no longer equals the
  // rounded master.
  using WeightSquare = double (*)(const void* param, const void* master, int64_t n);

  // Indexed by ElementType.
  Step step[4][4];  // [parameter][gradient]
  Check check[4];
  WeightSquare weight_square[4];
};

}  // namespace fasttricks::cpu

FT_DECLARE_KERNELS(SgdKernels, sgd_kernels)
