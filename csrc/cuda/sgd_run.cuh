// Host side of sgd_check and sgd_step on raw pointers: fills the tables of sgd_table.h as sgd_plan.h plans, and
// launches.
#pragma once

#include <array>
#include <cstring>
#include <vector>

#include "launch.cuh"
#include "sgd.cuh"

namespace fasttricks::cuda {

// One tensor of a call; unused pointers are null.
struct SgdItem {
  int64_t index;  // into the squared norms
  int64_t numel;
  int group;
  std::array<void*, 5> pointers;  // by kSgdGrad, ..., kSgdSteps
  ElementType type, grad_type;
};

// Calls launch_one(table, launch) for the launches of the items; each entry has `pointers` pointers.
template <typename Launch>
void sgd_tables(const std::vector<SgdItem>& items, const std::vector<SgdGroup>& groups, SgdHeader header, int pointers,
                Launch launch_one) {
  std::vector<SgdTensor> tensors;
  for (const SgdItem& item : items)
    tensors.push_back({item.numel, (int64_t(item.group) * 4 + int64_t(item.type)) * 4 + int64_t(item.grad_type)});
  for (const SgdLaunch& plan : sgd_plan(tensors, pointers, kSgdTableBytes)) {
    SgdTable table;
    header.entries = int32_t(plan.entries.size());
    header.groups = int32_t(plan.group_starts.size());
    header.pointers = uint16_t(pointers);
    header.flags &= ~(kSgdContinues | kSgdGoesOn);
    if (plan.entries.front().begin > 0) header.flags |= kSgdContinues;
    if (!plan.entries.back().last) header.flags |= kSgdGoesOn;
    std::memcpy(table.bytes, &header, sizeof header);
    const SgdLayout at = sgd_layout(header.entries, header.groups, pointers);
    const auto write = [&table](int64_t offset, const auto& value) {
      std::memcpy(table.bytes + offset, &value, sizeof value);
    };
    for (int64_t g = 0; g < header.groups; ++g) {
      const SgdItem& first = items[size_t(plan.entries[size_t(plan.group_starts[size_t(g)])].tensor)];
      SgdGroup group = groups[size_t(first.group)];
      group.first_entry = int32_t(plan.group_starts[size_t(g)]);
      group.type = first.type;
      group.grad_type = first.grad_type;
      write(at.groups + g * int64_t(sizeof group), group);
    }
    for (int64_t e = 0; e < header.entries; ++e) {
      const SgdEntry& entry = plan.entries[size_t(e)];
      const SgdItem& item = items[size_t(entry.tensor)];
      const int64_t type = size_of(item.type), computed = type == 8 ? 8 : 4;
      const std::array<int64_t, 5> bytes{size_of(item.grad_type), type, 4, computed, 0};
      for (int k = 0; k < pointers; ++k) {
        char* const p = static_cast<char*>(item.pointers[size_t(k)]);
        write(at.pointers + (e * pointers + k) * 8, p ? p + entry.begin * bytes[size_t(k)] : p);
      }
      write(at.counts + e * 4, uint32_t(entry.count));
      write(at.first_blocks + e * 4, uint32_t(entry.first_block));
      write(at.tensors + e * 2, uint16_t(item.index));
    }
    launch_one(table, plan);
  }
}

// The most blocks of any launch of sgd_check, which is the size of `partial`.
inline int64_t sgd_check_blocks(const std::vector<SgdItem>& items) {
  int64_t blocks = 0;
  for (const SgdItem& item : items) blocks += item.numel / kSgdBlock + 1 + item.numel / kSgdPiece;
  return blocks;
}

// items: gradients of group 0, weights (for LARS) of group 1. partial: null if no norms are requested.
inline void sgd_check_run(const std::vector<SgdItem>& items, const SgdHeader& header, double* partial,
                          cudaStream_t stream) {
  std::vector<SgdGroup> groups(2);
  groups[1].flags = kSgdWeight;
  const bool weights = !items.empty() && items.back().group == 1;
  sgd_tables(items, groups, header, weights ? 3 : 1, [&](const SgdTable& table, const SgdLaunch& plan) {
    launch(&sgd_check, dim3(unsigned(plan.blocks)), kSgdThreads, 0, stream, table, partial);
    if (!partial) return;
    const int64_t warps = kSgdThreads / 32, blocks = ceil_div(int64_t(plan.entries.size()), warps);
    launch(&sgd_norms, dim3(unsigned(blocks)), kSgdThreads, 0, stream, table, static_cast<const double*>(partial),
           plan.blocks);
  });
}

// counts: the steps are counted, too.
inline void sgd_step_run(const std::vector<SgdItem>& items, const std::vector<SgdGroup>& groups, SgdHeader header,
                         bool counts, cudaStream_t stream) {
  int pointers = kSgdMaster;
  for (const SgdItem& item : items)
    for (int k = kSgdMaster; k <= kSgdSteps; ++k)
      if (item.pointers[size_t(k)]) pointers = std::max(pointers, k + 1);
  if (counts) header.flags |= kSgdCount;
  sgd_tables(items, groups, header, pointers, [&](const SgdTable& table, const SgdLaunch& plan) {
    launch(&sgd_step, dim3(unsigned(plan.blocks)), kSgdThreads, 0, stream, table);
  });
}

inline void sgd_count_run(float* steps, const float* found_inf, cudaStream_t stream) {
  launch(&sgd_count, dim3(1), 1, 0, stream, steps, found_inf);
}

}  // namespace fasttricks::cuda
