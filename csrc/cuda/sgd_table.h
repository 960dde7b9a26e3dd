// What the kernels of sgd_check and sgd_step read from their parameters: see sgd_plan.h for where the arrays lie.
#pragma once

#include <cstdint>

#include "math/sgd.h"
#include "sgd_plan.h"

namespace fasttricks::cuda {

constexpr int64_t kSgdTableBytes = 32736;  // out of 32,764 bytes of kernel parameters
struct alignas(16) SgdTable {
  unsigned char bytes[kSgdTableBytes];
};

struct SgdHeader {
  const float* grad_scale;  // null: 1
  float* found_inf;         // null: never set
  double* grad_sq;          // null: not requested
  double* weight_sq;
  double max_norm, eps;  // max_norm 0: no clipping
  int32_t entries, groups, norms;
  uint16_t pointers;
  uint16_t flags;
};
static_assert(sizeof(SgdHeader) == kSgdHeaderBytes);

// kSgdCount: steps are counted. kSgdContinues: the first tensor started in an earlier launch. kSgdGoesOn: the last one
// continues in the next.
enum : uint16_t { kSgdLrInMomentum = 1, kSgdCount = 2, kSgdContinues = 4, kSgdGoesOn = 8 };

struct SgdGroup {
  const void* lr;
  double momentum, one_minus_dampening, weight_decay, trust_coefficient;
  int32_t first_entry;
  ElementType type, grad_type;
  uint16_t flags;
};
static_assert(sizeof(SgdGroup) == kSgdGroupBytes);

// kSgdWeight: of sgd_check, entries of weights, not of gradients.
enum : uint16_t { kSgdNesterov = 1, kSgdMaximize = 2, kSgdLrIsDouble = 4, kSgdWeight = 8 };

// Pointers of an entry, in this order; those after kSgdParam only if a tensor of the launch has them.
enum { kSgdGrad = 0, kSgdParam = 1, kSgdMaster = 2, kSgdBuffer = 3, kSgdSteps = 4 };

// A table, read.
struct SgdView {
  const SgdTable& table;
  SgdLayout at;

  FT_HD explicit SgdView(const SgdTable& t)
      : table(t), at(sgd_layout(header().entries, header().groups, header().pointers)) {}

  FT_HD const SgdHeader& header() const { return *reinterpret_cast<const SgdHeader*>(table.bytes); }
  FT_HD const SgdGroup& group(int64_t i) const { return reinterpret_cast<const SgdGroup*>(table.bytes + at.groups)[i]; }
  FT_HD void* pointer(int64_t entry, int which) const {
    return which < header().pointers
               ? reinterpret_cast<void* const*>(table.bytes + at.pointers)[entry * header().pointers + which]
               : nullptr;
  }
  FT_HD uint32_t count(int64_t entry) const {
    return reinterpret_cast<const uint32_t*>(table.bytes + at.counts)[entry];
  }
  FT_HD const uint32_t* first_blocks() const {
    return reinterpret_cast<const uint32_t*>(table.bytes + at.first_blocks);
  }
  FT_HD int tensor(int64_t entry) const { return reinterpret_cast<const uint16_t*>(table.bytes + at.tensors)[entry]; }
  FT_HD int64_t entry_of_block(int64_t block) const { return sgd_find(first_blocks(), header().entries, block); }
  FT_HD int64_t group_of_entry(int64_t entry) const {
    int64_t low = 0, high = header().groups;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (group(middle).first_entry <= entry ? low : high) = middle;
    }
    return low;
  }
};

}  // namespace fasttricks::cuda
