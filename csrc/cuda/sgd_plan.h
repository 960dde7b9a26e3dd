// Launch plan of sgd_check and sgd_step: plain host arithmetic, shared by launchers and tests.
//
// All tensors of a call travel in the kernel's parameters, so that a step needs no copy to the device and can be
// captured in a CUDA graph: 32,764 bytes from CUDA 12.1 on, 4,096 before (CUDA Programming Guide, "__global__ function
// parameters"). The table is a header and arrays without gaps; an entry is a tensor, or a piece of one:
//
//   header | groups, 48 bytes each | pointers, `pointers` x 8 bytes each | values and first block, 4 + 4 | tensor,
//   2
//
// pointers: gradient; and for the step parameter [master] [momentum buffer, step count]. Entries are sorted by group
// and dtypes, so that a group of the table is a run of entries, found as an entry is found: by bisection over firsts.
// Block b works on kSgdBlock values of the entry whose first block is the last one not above b.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "math/common.h"

namespace fasttricks::cuda {

constexpr int64_t kSgdBlock = 8192;              // values of a block: 256 threads x 32
constexpr int64_t kSgdPiece = int64_t{1} << 31;  // most values of an entry: they are counted in 32 bits
constexpr int64_t kSgdMaxTensors = 1 << 16;      // of one table: entries name their tensor in 16 bits

// Filled in once per launch: grad_scale, found_inf, grad_sq, weight_sq, max_norm, eps, the arrays'
// lengths.
constexpr int64_t kSgdHeaderBytes = 64;
// lr (a pointer), momentum, 1 - dampening, weight decay and trust coefficient in fp64, flags and dtypes, first entry.
constexpr int64_t kSgdGroupBytes = 48;

// One tensor as the planner sees it. Tensors with the same group, dtype and gradient dtype have the same key.
struct SgdTensor {
  int64_t numel;
  int64_t key;
};

struct SgdEntry {
  int64_t tensor, begin, count;
  int64_t first_block;
  bool last;  // the last entry of its tensor, whose blocks count the step
};

struct SgdLaunch {
  std::vector<SgdEntry> entries;
  std::vector<int64_t> group_starts;  // first entry of each run of one key
  int64_t blocks = 0, bytes = 0;
};

// Offsets of the arrays of a table.
struct SgdLayout {
  int64_t groups, pointers, counts, first_blocks, tensors, bytes;
};

FT_HD SgdLayout sgd_layout(int64_t entries, int64_t groups, int64_t pointers) {
  SgdLayout at{};
  at.groups = kSgdHeaderBytes;
  at.pointers = at.groups + groups * kSgdGroupBytes;
  at.counts = at.pointers + entries * pointers * 8;
  at.first_blocks = at.counts + entries * 4;
  at.tensors = at.first_blocks + entries * 4;
  at.bytes = at.tensors + entries * 2;
  return at;
}

// The last of `n` ascending firsts that is not above `at`; firsts[0] is 0.
template <class Index>
FT_HD int64_t sgd_find(const Index* firsts, int64_t n, int64_t at) {
  int64_t low = 0, high = n;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (int64_t(firsts[middle]) <= at)
      low = middle;
    else
      high = middle;
  }
  return low;
}

// The launches of one pass over the tensors, each with a table of at most `limit` bytes; no launches if that is too
// small for one entry, or if there are more tensors than a table can name. An empty tensor has one block, which counts
// its step. The pieces of a tensor are launched in order. Tensors that share memory must be planned separately.
inline std::vector<SgdLaunch> sgd_plan(const std::vector<SgdTensor>& tensors, int64_t pointers, int64_t limit) {
  if (sgd_layout(1, 1, pointers).bytes > limit || int64_t(tensors.size()) > kSgdMaxTensors) return {};
  std::vector<int64_t> order(tensors.size());
  std::iota(order.begin(), order.end(), int64_t{0});
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return tensors[a].key < tensors[b].key; });

  std::vector<SgdLaunch> launches;
  int64_t key = 0;
  const auto add = [&](int64_t tensor, int64_t begin, int64_t count) {
    const auto fits = [&](bool new_group) {
      const SgdLaunch& l = launches.back();
      return sgd_layout(int64_t(l.entries.size()) + 1, int64_t(l.group_starts.size()) + new_group, pointers).bytes <=
             limit;
    };
    bool new_group = launches.empty() || tensors[tensor].key != key;
    if (launches.empty() || !fits(new_group)) {
      launches.emplace_back();
      new_group = true;
    }
    SgdLaunch& l = launches.back();
    if (new_group) l.group_starts.push_back(int64_t(l.entries.size()));
    key = tensors[tensor].key;
    l.entries.push_back({tensor, begin, count, l.blocks, begin + count == tensors[tensor].numel});
    l.blocks += std::max<int64_t>(1, ceil_div(count, kSgdBlock));
    l.bytes = sgd_layout(int64_t(l.entries.size()), int64_t(l.group_starts.size()), pointers).bytes;
  };
  for (int64_t i : order) {
    int64_t begin = 0;
    do {
      const int64_t count = std::min(kSgdPiece, tensors[i].numel - begin);
      add(i, begin, count);
      begin += count;
    } while (begin < tensors[i].numel);
  }
  return launches;
}

}  // namespace fasttricks::cuda
